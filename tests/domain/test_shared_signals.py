"""The words of Shared Signals: each event of the feed has a subject of its own, and subjects are compared exactly."""

from datetime import UTC, datetime

import pytest

from broker.domain.errors import Invalid
from broker.domain.feed import LISTS, end_along, end_of_grant, end_of_task, end_of_trust
from broker.domain.shared_signals import (
    CREDENTIAL_CHANGE,
    CRITICAL_MEMBERS,
    SESSION_REVOKED,
    could_be_told_of,
    error_code,
    identifiers_in,
    key_of,
    set_claims,
    strings,
    subject_of,
    told_of,
    transaction_of,
)

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
ISSUER = "https://broker.example"
ENDED = (
    end_of_grant("grt_1"),
    end_of_task("task_1"),
    end_along("agent", "summarizer", AT),
    end_along("user", "corp:zoe", AT),
    end_along("resource", "https://crm.example/api", AT),
)
EVERYTHING = (end_along("all", "all", AT), LISTS, end_along("orchestrator", "pipeline", AT))


def told(ended):
    return told_of(ISSUER, AT, {"seq": 1, "kind": ended.kind, **ended.members})


@pytest.mark.parametrize("ended", [*ENDED, *EVERYTHING, end_of_trust("kid")])
def test_every_event_of_the_feed_is_a_subject_we_would_accept_and_an_event_of_the_profile(ended):
    one = told(ended)
    assert subject_of(one.subject) == one.subject
    assert could_be_told_of(one.subject)
    assert one.type in (SESSION_REVOKED, CREDENTIAL_CHANGE)
    assert one.event["reason_admin"]["en"]
    assert one.event["event_timestamp"] == 1772366400
    if one.subject["format"] == "complex":
        assert set(one.subject) - {"format"} <= set(CRITICAL_MEMBERS)


def test_what_ends_for_some_says_for_whom_and_what_ends_for_all_does_not():
    assert [told(ended).axis for ended in ENDED] == ["grant", "task", "agent", "user", "resource"]
    assert {told(ended).axis for ended in EVERYTHING} == {None}
    assert len({key_of(told(ended).subject) for ended in ENDED}) == len(ENDED)


@pytest.mark.parametrize("event", [{"kind": "new"}, {}, {"kind": "tokens"}, {"kind": "grant", "grant_id": 7}])
def test_an_event_that_nobody_knows_sends_everybody_to_ask(event):
    one = told_of(ISSUER, AT, event)
    assert one.subject == {"format": "complex", "tenant": {"format": "opaque", "id": ISSUER}}
    assert one.axis is None


def test_a_set_has_one_event_and_neither_an_end_nor_a_sub():
    claims = set_claims(
        issuer=ISSUER, audience="crm-api", jti="set_1", at=AT, type_="urn:x", subject={"format": "opaque", "id": "1"},
        event={}, transaction="t",
    )  # fmt: skip
    assert claims.keys() == {"iss", "aud", "iat", "jti", "txn", "sub_id", "events"}


def test_a_transaction_is_one_event_and_no_count():
    assert transaction_of("feed", 1) == transaction_of("feed", 1) != transaction_of("feed", 2)
    assert len(transaction_of("feed", 1)) == 32


def test_subjects_are_identical_whatever_the_order_of_their_members_and_else_not():
    one = {"format": "iss_sub", "iss": "a", "sub": "b"}
    assert key_of(one) == key_of({"sub": "b", "iss": "a", "format": "iss_sub"})
    assert key_of(one) != key_of({"format": "iss_sub", "iss": "a", "sub": "B"})


@pytest.mark.parametrize(
    "subject",
    [
        {"format": "account", "uri": "acct:a@example.com"},
        {"format": "did", "url": "did:example:1"},
        {"format": "phone_number", "phone_number": "+12065550100"},
        {"format": "jwt_id", "iss": "a", "jti": "b"},
        {"format": "saml_assertion_id", "issuer": "a", "assertion_id": "b"},
        {"format": "aliases", "identifiers": [{"format": "email", "email": "a@example.com"}]},
    ],
)
def test_every_format_of_the_standards_is_read_and_what_we_never_tell_is_not_kept(subject):
    assert subject_of(subject) == subject
    assert not could_be_told_of(subject)


def test_of_a_complex_subject_the_user_counts_or_else_the_application():
    user, application = {"format": "opaque", "id": "u"}, {"format": "opaque", "id": "a"}
    assert list(identifiers_in({"format": "complex", "user": user, "application": application})) == [user]
    assert list(identifiers_in({"format": "complex", "application": application})) == [application]
    assert list(identifiers_in({"format": "complex", "device": user})) == []
    assert list(identifiers_in({"format": "aliases", "identifiers": [user, application]})) == [user, application]


@pytest.mark.parametrize("value", [None, 7, "", "a b", "a\nb", "x" * 65, {}])
def test_an_error_code_that_is_none_is_not_repeated(value):
    assert error_code(value) == "none"
    assert error_code("invalid_key") == "invalid_key"


def test_a_list_of_strings_is_one():
    assert strings(["a", "b", "a"], "x", most=3, longest=1) == ("a", "b")
    for value in (None, "a", ["ab"], [""], [7], ["a"] * 4):
        with pytest.raises(Invalid):
            strings(value, "x", most=3, longest=1)
