"""What holds between any broker and a verifier of it, whichever channel is there."""

import pytest

from broker.sdk import DpopKey
from broker.sdk.verifier import Verifier
from tests.conftest import migrated_store
from tests.processes import until
from tests.verifier import sources
from tests.verifier.conftest import why


@pytest.fixture(params=["fake", "sqlite", "postgresql"])
def source(request, tmp_path):
    """The fake broker, and a real one on each store."""
    if request.param == "fake":
        with sources.fake() as made:
            yield made
        return
    with migrated_store(request.param, request, tmp_path) as store_url, sources.real(tmp_path, store_url) as made:
        yield made


@pytest.fixture
def verifier(source):
    with Verifier(source.url, source.audience, token_source=source.token_source, bound_s=5) as made:
        yield made


def refused(verifier, issued, within_s=8, codes=("revoked",)):
    until(lambda: why(verifier, issued) in codes, within_s=within_s, what="the refusal")


def accepted(verifier, issued, within_s=20):
    until(lambda: why(verifier, issued) is None, within_s=within_s, what="the yes")


def following(verifier, channel, issued):
    """It may have been told something before a channel was shut, which lasts for as long as its bound.

    Asked about all the while: a list is fetched when something is checked, and not by itself.
    """
    until(lambda: why(verifier, issued) is None and verifier.state().channel == channel, what=f"following by {channel}")


@pytest.mark.parametrize("without", [(), ("stream",), ("stream", "poll")], ids=["stream", "poll", "lists"])
def test_what_ends_is_refused_within_the_bound_by_every_channel(source, verifier, without):
    with source.without(*without):
        grant, task, other = source.issue(), source.issue(), source.issue()
        for each in (grant, task, other):
            accepted(verifier, each)
        following(verifier, {0: "stream", 1: "poll", 2: "lists"}[len(without)], other)
        source.revoke_grant(grant)
        source.end_task(task)
        refused(verifier, grant)
        refused(verifier, task)
        accepted(verifier, other)


@pytest.mark.parametrize("axis", ["agent", "resource"])
def test_a_bulk_revocation_ends_what_is_out_and_not_what_comes(source, verifier, axis):
    issued = source.issue()
    accepted(verifier, issued)
    following(verifier, "stream", issued)
    source.revoke(axis, "summarizer" if axis == "agent" else source.audience)
    refused(verifier, issued)
    until(lambda: why(verifier, source.issue()) is None, what="a yes to what was issued since")


def test_a_verifier_that_comes_later_knows_what_ended_before(source, verifier):
    issued, other = source.issue(), source.issue()
    source.revoke_grant(issued)
    accepted(verifier, other)
    assert why(verifier, issued) == "revoked"


def test_a_broker_that_is_away_for_too_long_is_no_reason_to_say_yes(source, verifier):
    issued = source.issue()
    accepted(verifier, issued)
    following(verifier, "stream", issued)
    source.stop()
    refused(verifier, issued, codes=("not_fresh",))
    source.start()
    accepted(verifier, issued)


def test_what_was_revoked_stays_so_when_the_broker_starts_again(source, verifier):
    issued, other = source.issue(), source.issue()
    accepted(verifier, issued)
    accepted(verifier, other)
    source.revoke_grant(issued)
    refused(verifier, issued)
    source.stop()
    source.start()
    accepted(verifier, other)
    assert why(verifier, issued) == "revoked"


def test_a_rotation_of_keys_refuses_nobody(source, verifier):
    before = source.issue()
    accepted(verifier, before)
    following(verifier, "stream", before)
    source.rotate_keys()
    after = source.issue()
    assert why(verifier, after) is None
    assert why(verifier, before) is None
    source.revoke_grant(after)
    refused(verifier, after)


def test_a_bound_token_opens_with_its_proof_alone(source, verifier):
    key = DpopKey.generate()
    issued = source.issue(bound_to=key)
    url = "https://crm.example/api/contacts"
    accepted(verifier, source.issue())
    assert why(verifier, issued) == "bound_token"
    proof = key.proof("GET", url, access_token=issued.token)
    presented = {"authorization": f"DPoP {issued.token}", "url": url, "dpop": proof}
    assert why(verifier, issued, **presented) is None
    assert why(verifier, issued, **presented) == "replayed_proof"
