"""The contract of a provider, on the fake Vault and on a real OpenBao alike."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_identity,
    load_ssh_public_key,
)

from broker.domain.errors import ProviderRefused, ProviderUnavailable
from broker.providers.base import Handle, Provider, RevocationClass
from broker.providers.vault import ending
from tests.fakes.vault import FakeVault
from tests.openbao import DATABASE, GENERIC, PKI, PKI_ISSUE, SSH
from tests.providers.contract import TTL, OnFake, OnOpenBao, csr, ssh_key


@pytest.fixture(params=["fake", "openbao"])
def stand(request, tmp_path):
    if request.param == "fake":
        fake = FakeVault()
        made = OnFake(fake, tmp_path)
        yield made
        made.close()
        fake.close()
        return
    made = OnOpenBao(request.getfixturevalue("openbao"))
    yield made
    # The next test counts what lives.
    for live in made.provider.list_live():
        made.provider.revoke(None, live.reference)
    made.close()


def references(stand):
    return {live.reference for live in stand.provider.list_live()}


def spki(key):
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_it_is_a_provider(stand):
    provider: Provider = stand.provider
    assert provider.settles_after >= timedelta(seconds=90)


def test_a_handle_opens_nothing_and_shows_nothing_of_its_token(stand):
    began_at = stand.clock()
    handle = stand.provider.prepare(stand.request(), TTL)
    assert (references(stand), stand.living()) == (set(), 0)
    assert handle.opens.reveal() not in f"{handle!r} {handle}"
    assert handle.revocation is RevocationClass.HARD
    assert began_at + TTL <= handle.expires_at <= stand.clock() + TTL
    stand.provider.revoke(handle, None)


def test_the_child_token_is_an_orphan_service_token_of_this_grant_that_cannot_be_renewed(stand):
    request = stand.request()
    handle = stand.provider.prepare(request, TTL)
    child = stand.child(handle.value)
    assert child["meta"] == {"grant_id": request.grant_id}
    assert (child["orphan"], child["renewable"], child["type"]) == (True, False, "service")
    stand.provider.revoke(handle, None)


def test_an_issued_secret_opens_and_is_listed_until_it_is_revoked(stand):
    began_at = stand.clock()
    _, handle, secret = stand.issue()
    data = secret.data.reveal()
    assert secret.data.names == ("password", "username")
    assert began_at < secret.expires_at <= stand.clock() + TTL
    assert secret.facts == {"username": data["username"]}
    assert secret.reference.startswith("database/creds/jit-orders-ro/")
    assert stand.opens(**data)
    assert references(stand) == {secret.reference}
    stand.provider.revoke(handle, secret.reference)
    assert not stand.opens(**data)
    assert (references(stand), stand.living()) == (set(), 0)


def test_what_is_listed_is_looked_at_only_where_it_is_not_known(stand):
    _, handle, known = stand.issue()
    _, other_handle, unknown = stand.issue()
    found = {live.reference: live for live in stand.provider.list_live({known.reference})}
    assert found.keys() == {known.reference, unknown.reference}
    assert found[known.reference].issued_at is None
    age = stand.clock() - found[unknown.reference].issued_at
    assert abs(age) < timedelta(seconds=30)
    stand.provider.revoke(handle, known.reference)
    stand.provider.revoke(other_handle, unknown.reference)


def test_revoking_is_idempotent_and_needs_only_one_of_both_names(stand):
    _, handle, secret = stand.issue()
    stand.provider.revoke(None, secret.reference)
    assert not stand.opens(**secret.data.reveal())
    # As it is read back from a row: the token it was made with is gone.
    stored = Handle(value=handle.value, revocation=handle.revocation, expires_at=handle.expires_at)
    for reference in (secret.reference, None):
        stand.provider.revoke(stored, reference)
    stand.provider.revoke(None, secret.reference)
    assert references(stand) == set()


def test_revoking_by_the_handle_alone_kills_what_was_made_under_it(stand):
    _, handle, secret = stand.issue()
    stand.provider.revoke(handle, None)
    # Vault only queues the leases of a token: that it is dead says nothing about them yet.
    stand.until(lambda: not references(stand))
    assert not stand.opens(**secret.data.reveal())


def test_a_revoked_handle_issues_nothing(stand):
    request = stand.request()
    handle = stand.provider.prepare(request, TTL)
    stand.provider.revoke(handle, None)
    with pytest.raises(ProviderRefused):
        stand.provider.issue(handle, request, TTL)
    assert stand.living() == 0


def test_a_handle_from_a_row_issues_nothing(stand):
    request = stand.request()
    handle = stand.provider.prepare(request, TTL)
    stored = Handle(value=handle.value, revocation=handle.revocation, expires_at=handle.expires_at)
    with pytest.raises(ValueError, match="issues nothing"):
        stand.provider.issue(stored, request, TTL)
    stand.provider.revoke(handle, None)


def test_a_lost_answer_to_prepare_leaves_nothing_that_opens(stand):
    stand.wire.loses_reply("POST /v1/auth/token/create/jit")
    with pytest.raises(ProviderUnavailable):
        stand.provider.prepare(stand.request(), TTL)
    assert (references(stand), stand.living()) == (set(), 0)


def test_a_lost_answer_to_issue_is_unknown_and_its_handle_kills_what_was_made(stand):
    request = stand.request()
    handle = stand.provider.prepare(request, TTL)
    stand.wire.loses_reply("GET /v1/database/creds")
    with pytest.raises(ProviderUnavailable):
        stand.provider.issue(handle, request, TTL)
    assert stand.living() == 1
    stand.provider.revoke(handle, None)
    stand.until(lambda: not references(stand))
    assert stand.living() == 0


@pytest.mark.parametrize("step", ["POST /v1/auth/token/revoke-accessor", "PUT /v1/sys/leases/revoke"])
def test_a_lost_answer_to_a_step_of_a_revocation_does_not_keep_it_from_being_confirmed(stand, step):
    _, handle, secret = stand.issue()
    stand.wire.loses_reply(step)
    stand.provider.revoke(handle, secret.reference)
    assert not stand.opens(**secret.data.reveal())


@pytest.mark.parametrize("step", ["POST /v1/auth/token/lookup-accessor", "PUT /v1/sys/leases/lookup"])
def test_a_lost_answer_to_a_look_up_is_no_confirmation(stand, step):
    _, handle, secret = stand.issue()
    stand.wire.loses_reply(step)
    with pytest.raises(ProviderUnavailable):
        stand.provider.revoke(handle, secret.reference)
    stand.provider.revoke(handle, secret.reference)


def test_several_are_revoked_together_and_each_is_dead_when_it_is_said_to_be(stand):
    made = [stand.issue()[1:] for _ in range(4)]
    owed = [(handle, secret.reference) for handle, secret in made]
    assert stand.provider.revoke_many(owed) == [None] * 4
    assert not any(stand.opens(**secret.data.reveal()) for _, secret in made)
    assert not references(stand)
    assert stand.provider.revoke_many(owed) == [None] * 4


def test_of_several_the_one_that_is_malformed_keeps_no_other_from_being_revoked(stand):
    _, handle, secret = stand.issue()
    bad = replace(handle, value="../../sys/seal")
    first, second, third = stand.provider.revoke_many([(bad, None), (handle, secret.reference), (None, "a/../b")])
    assert isinstance(first, ValueError) and isinstance(third, ValueError) and second is None
    assert not stand.opens(**secret.data.reveal())


@pytest.mark.parametrize("step", ["POST /v1/auth/token/lookup-accessor", "LIST /v1/sys/leases/lookup"])
def test_of_several_the_one_whose_look_up_is_lost_is_asked_about_again(stand, step):
    made = [stand.issue()[1:] for _ in range(3)]
    stand.wire.loses_reply(step)
    assert stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made]) == [None] * 3
    assert not any(stand.opens(**secret.data.reveal()) for _, secret in made)
    assert not references(stand)


@pytest.mark.parametrize(
    "lost",
    [
        ["POST /v1/auth/token/lookup-accessor"] * 6,
        ["LIST /v1/sys/leases/lookup"] + ["PUT /v1/sys/leases/lookup"] * 3,
    ],
    ids=["of the token", "of the lease"],
)
def test_of_several_none_is_confirmed_whose_every_look_up_is_lost(stand, lost):
    made = [stand.issue()[1:] for _ in range(3)]
    owed = [(handle, secret.reference) for handle, secret in made]
    for step in lost:
        stand.wire.loses_reply(step)
    assert [type(problem) for problem in stand.provider.revoke_many(owed)] == [ProviderUnavailable] * 3
    assert stand.provider.revoke_many(owed) == [None] * 3


def test_of_several_what_vault_still_lists_is_not_taken_for_dead(stand, monkeypatch):
    """As where it says that it was done and it was not: whatever is known of their tokens."""
    made = [stand.issue()[1:] for _ in range(2)]
    owed = [(handle, secret.reference) for handle, secret in made]
    with monkeypatch.context() as lazy:
        lazy.setattr("broker.providers.vault.ending.CONFIRM_PAUSES_S", (0.01,))
        lazy.setattr(stand.provider._calls, "revoke_accessor", lambda _accessor: None)
        lazy.setattr(stand.provider._ending, "_look_at_token", lambda one: setattr(one, "handle", None))
        lazy.setattr(stand.provider._calls, "revoke_lease", lambda _reference: None)
        said = stand.provider.revoke_many(owed)
    assert [type(problem) for problem in said] == [ProviderUnavailable] * 2
    assert all(stand.opens(**secret.data.reveal()) for _, secret in made)
    assert stand.provider.revoke_many(owed) == [None] * 2


@pytest.mark.parametrize("why", ["too many", "too slow", "refused"])
def test_what_is_not_worth_listing_is_not_listed_again_for_a_while(stand, monkeypatch, why):
    asked = []
    leases_under = stand.provider._calls.leases_under

    def listing(prefix, since, **how):
        asked.append(prefix)
        if why == "refused":
            raise ProviderUnavailable("it does not list", reason="a test")
        return leases_under(prefix, since, **how)

    monkeypatch.setattr(stand.provider._calls, "leases_under", listing)
    # More than none, and longer than no time.
    monkeypatch.setattr("broker.providers.vault.ending.SPARED", 1e9)
    name = {"too many": "WORTH_LISTING", "too slow": "SLOW_S"}.get(why)
    if name:
        monkeypatch.setattr(f"broker.providers.vault.ending.{name}", -1)
    for _ in range(2):
        made = [stand.issue()[1:] for _ in range(2)]
        assert stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made]) == [None] * 2
        assert len(asked) == 1
    monkeypatch.setattr("broker.providers.vault.ending.LONG_FOR_S", -1.0)
    monkeypatch.setattr("broker.providers.vault.ending.SPARED", -1)
    stand.provider._ending._long.clear()
    made = [stand.issue()[1:] for _ in range(2)]
    assert stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made]) == [None] * 2
    assert len(asked) == 2


def test_a_list_without_a_name_confirms_nobody_and_one_with_names_all_it_leaves_out(stand, monkeypatch):
    """The first is a 404, which something on the way may say as well: then each is looked up (INV-04)."""
    looked_up = told_of(stand.provider._calls, monkeypatch, "lease")
    owed = [(None, stand.issue()[2].reference) for _ in range(3)]
    assert stand.provider.revoke_many(owed) == [None] * 3
    assert {reference for reference, _ in looked_up} == {reference for _, reference in owed}
    looked_up.clear()
    other = stand.issue()[2].reference
    owed = [(None, stand.issue()[2].reference) for _ in range(3)]
    assert stand.provider.revoke_many(owed) == [None] * 3
    # One may be worked on by Vault's queue just then, and still be there when all are listed.
    assert len(looked_up) < 3
    assert references(stand) == {other}


def test_of_several_each_lease_is_revoked_at_once_and_not_left_to_the_queue(stand, monkeypatch):
    """A node that has not heard of a lease yet would call it gone; a revocation reaches the one that has."""
    revoked = told_of(stand.provider._calls, monkeypatch, "revoke_lease")
    made = [stand.issue()[1:] for _ in range(3)]
    assert stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made]) == [None] * 3
    assert set(revoked) == {(secret.reference,) for _, secret in made}


def test_of_many_what_vault_s_queue_ends_is_told_by_lists_no_older_than_the_deaths_of_their_tokens(stand, monkeypatch):
    bystander = stand.issue()[2].reference
    made = [stand.issue()[1:] for _ in range(ending._FEW + 8)]
    listed = told_of(stand.provider._ending, monkeypatch, "_listed")
    revoked = told_of(stand.provider._calls, monkeypatch, "revoke_lease")
    with ThreadPoolExecutor(8) as pool:
        said = stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made], pool.map)
    assert said == [None] * len(made)
    assert listed and all(since for _, since in listed)
    assert len(revoked) < len(made)
    assert not any(stand.opens(**secret.data.reveal()) for _, secret in made)
    assert references(stand) == {bystander}


@pytest.mark.parametrize("step", ["POST /v1/auth/token/lookup-accessor", "PUT /v1/sys/leases/revoke"])
def test_a_list_confirms_nobody_of_whom_a_step_was_not_answered(stand, monkeypatch, step):
    """Whatever it leaves out: their token may live, or what was left undone may follow (INV-04)."""
    bystander = stand.issue()[2].reference
    made = [stand.issue()[1:] for _ in range(2)]
    confirmed = told_of(stand.provider._ending, monkeypatch, "_confirm")
    stand.wire.loses_reply(step)
    assert stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made]) == [None] * 2
    assert made[0][1].reference in [one.reference for (one,) in confirmed]
    assert references(stand) == {bystander}


def test_of_several_whose_token_nobody_could_ask_about_none_is_confirmed_by_a_list(stand):
    bystander = stand.issue()[2].reference
    owed = [(handle, secret.reference) for _, handle, secret in (stand.issue() for _ in range(2))]
    for _ in range(4):
        stand.wire.loses_reply("POST /v1/auth/token/lookup-accessor")
    assert [type(problem) for problem in stand.provider.revoke_many(owed)] == [ProviderUnavailable] * 2
    assert stand.provider.revoke_many(owed) == [None] * 2
    assert references(stand) == {bystander}


def told_of(part, monkeypatch, name):
    """What a step of a part of the provider is called with from now on."""
    told, step = [], getattr(part, name)

    def noted(*of):
        told.append(of)
        return step(*of)

    monkeypatch.setattr(part, name, noted)
    return told


def takes(part, monkeypatch, name, seconds):
    """From now on a step of a part of the provider takes so long, by a clock that nothing else moves; answers it."""
    clock, step = [0.0], getattr(part, name)

    def slow(*of):
        clock[0] += seconds
        return step(*of)

    monkeypatch.setattr(part, name, slow)
    monkeypatch.setattr("broker.providers.vault.ending.time.monotonic", lambda: clock[0])
    return clock


def test_several_are_given_up_together_where_vault_is_too_slow_and_the_first_never_is(stand, monkeypatch):
    """Whoever claimed them keeps the claim no longer than that, and some are paid however slow Vault is."""
    made = [stand.issue()[1:] for _ in range(3)]
    monkeypatch.setattr("broker.providers.vault.ending.MANY_S", -1.0)
    said = stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made])
    assert [type(problem) for problem in said] == [type(None), ProviderUnavailable, ProviderUnavailable]
    assert [stand.opens(**secret.data.reveal()) for _, secret in made] == [False, True, True]
    for handle, secret in made[1:]:
        stand.provider.revoke(handle, secret.reference)


def test_a_vault_slow_enough_to_end_all_and_confirm_none_is_asked_about_some_of_them(stand, monkeypatch):
    made = [stand.issue()[1:] for _ in range(8)]
    asked = told_of(stand.provider._calls, monkeypatch, "is_token_dead")
    takes(stand.provider._ending, monkeypatch, "_end_token", 1.3)
    said = stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made])
    assert [problem is None for problem in said] == [True, True] + [False] * 6
    # Nothing more is asked about those that are given up.
    assert len(asked) == 2
    monkeypatch.undo()
    for handle, secret in made[2:]:
        stand.provider.revoke(handle, secret.reference)


def test_where_there_is_no_time_to_look_at_all_tokens_first_each_is_looked_at_with_its_lease(stand, monkeypatch):
    made = [stand.issue()[1:] for _ in range(4)]
    asked = told_of(stand.provider._ending, monkeypatch, "_look_at_token")
    takes(stand.provider._calls, monkeypatch, "is_token_dead", 3.0)
    said = stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made])
    monkeypatch.undo()
    assert len(asked) == 2 and said[:3] == [None] * 3
    for handle, secret in made:
        stand.provider.revoke(handle, secret.reference)


def test_where_there_is_no_time_to_revoke_a_lease_one_looks_whether_the_queue_did(stand, monkeypatch):
    """One that hangs is no failure of those beside it: their tokens are dead, and so their leases are being ended."""
    made = [stand.issue()[1:] for _ in range(3)]
    listed = told_of(stand.provider._ending, monkeypatch, "_listed")
    clock = takes(stand.provider._calls, monkeypatch, "revoke_lease", 8.0)
    said = stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made])
    monkeypatch.undo()
    assert said == [None] * 3 and clock == [8.0]
    assert not listed  # which takes time as well
    assert not any(stand.opens(**secret.data.reveal()) for _, secret in made)


def test_what_cannot_be_looked_at_in_time_is_given_up(stand, monkeypatch):
    made = [stand.issue()[1:] for _ in range(4)]
    takes(stand.provider._ending, monkeypatch, "_confirm", 6.0)
    said = stand.provider.revoke_many([(handle, secret.reference) for handle, secret in made])
    monkeypatch.undo()
    assert [type(problem) for problem in said] == [type(None)] * 2 + [ProviderUnavailable] * 2


def test_a_secret_ends_with_the_time_it_was_given_though_its_lease_is_longer(stand):
    """INV-08: the role's own leases last for ten minutes."""
    ttl = timedelta(seconds=2)
    _, handle, secret = stand.issue(ttl=ttl)
    assert secret.expires_at <= handle.expires_at
    assert stand.opens(**secret.data.reveal())
    stand.pass_time(ttl)
    stand.until(lambda: not references(stand))
    assert not stand.opens(**secret.data.reveal())


def test_a_role_that_is_not_there_is_refused_and_the_agent_learns_no_more(stand):
    request = stand.request({**DATABASE, "role": "other"})
    handle = stand.provider.prepare(request, TTL)
    with pytest.raises(ProviderRefused) as refused:
        stand.provider.issue(handle, request, TTL)
    assert "database/creds/other" in refused.value.reason
    assert refused.value.detail == "Vault refused to give the secret"
    stand.provider.revoke(handle, None)


def test_a_token_role_that_is_not_there_is_refused(stand):
    with pytest.raises(ProviderRefused):
        stand.provider.prepare(stand.request({**DATABASE, "token_role": "other"}), TTL)


def test_what_was_made_outlives_the_broker_s_own_token_and_can_still_be_revoked(stand):
    _, handle, secret = stand.issue()
    stand.pass_time(timedelta(seconds=2))
    stand.forget_own_tokens()
    assert stand.opens(**secret.data.reveal())
    stand.provider.revoke(handle, secret.reference)
    assert not stand.opens(**secret.data.reveal())


def test_while_vault_is_sealed_nothing_is_issued_and_nothing_confirmed_and_afterwards_all_goes_on(stand):
    _, handle, secret = stand.issue()
    stand.stop()
    try:
        for refused in (
            lambda: stand.provider.prepare(stand.request(), TTL),
            lambda: stand.provider.revoke(handle, secret.reference),
            lambda: stand.provider.list_live(),
        ):
            with pytest.raises(ProviderUnavailable):
                refused()
    finally:
        stand.go_on()
    assert references(stand) == {secret.reference}
    stand.provider.revoke(handle, secret.reference)
    assert not stand.opens(**secret.data.reveal())


def test_the_broker_logs_in_with_a_jwt(stand):
    provider = stand.new_provider(method="jwt", role="broker", token_file=stand.jwt_file())
    handle = provider.prepare(stand.request(), TTL)
    provider.revoke(handle, None)
    provider.close()


def test_the_broker_takes_its_token_from_a_file_and_again_when_the_file_changed(stand, tmp_path):
    file = tmp_path / "token"
    file.write_text(stand.own_token() + "\n")
    provider = stand.new_provider(method="token_file", token_file=str(file))
    provider.revoke(provider.prepare(stand.request(), TTL), None)
    stand.pass_time(timedelta(seconds=2))
    stand.forget_own_tokens()
    with pytest.raises(ProviderRefused, match="refused to let the broker in"):
        provider.prepare(stand.request(), TTL)
    file.write_text(stand.own_token() + "\n")
    stand.pass_time(timedelta(seconds=2))
    provider.revoke(provider.prepare(stand.request(), TTL), None)
    provider.close()


def test_a_certificate_is_for_the_agent_s_own_key_and_is_revoked_by_its_lease(stand):
    request, handle, secret = stand.issue(PKI, csr=csr())
    data = secret.data.reveal()
    certificate = x509.load_pem_x509_certificate(data["certificate"].encode())
    wanted = x509.load_pem_x509_csr(request.parameters["csr"].encode()).public_key()
    assert spki(certificate.public_key()) == spki(wanted)
    assert secret.data.names == ("ca_chain", "certificate", "issuing_ca", "serial_number")
    assert secret.facts == {"serial_number": data["serial_number"]}
    assert secret.expires_at <= stand.clock() + TTL
    assert (handle.revocation, handle.bound) == (RevocationClass.BOUNDED, timedelta(seconds=60))
    assert references(stand) == {secret.reference}
    stand.provider.revoke(handle, secret.reference)
    assert references(stand) == set()


def test_a_certificate_can_be_issued_with_its_key_under_the_configured_name(stand):
    request, handle, secret = stand.issue(PKI_ISSUE)
    data = secret.data.reveal()
    certificate = x509.load_pem_x509_certificate(data["certificate"].encode())
    key = load_pem_private_key(data["private_key"].encode(), None)
    assert spki(certificate.public_key()) == spki(key.public_key())
    (name,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert name.value == f"{request.grant_id.replace('_', '-')}.agents.example"
    stand.provider.revoke(handle, secret.reference)


def test_an_ssh_certificate_is_for_the_agent_s_own_key_and_the_configured_users(stand):
    key = ssh_key()
    _, handle, secret = stand.issue(SSH, public_key=f"{key} comment of somebody")
    data = secret.data.reveal()
    certificate = load_ssh_public_identity(data["signed_key"].encode())
    assert spki(certificate.public_key()) == spki(load_ssh_public_key(key.encode()))
    assert certificate.valid_principals == [b"deploy"]
    assert secret.data.names == ("serial_number", "signed_key")
    assert (secret.reference, handle.revocation) == (None, RevocationClass.TTL_ONLY)
    assert secret.expires_at <= stand.clock() + TTL + timedelta(seconds=1)
    stand.provider.revoke(handle, secret.reference)


def test_any_other_path_that_gives_a_lease_works_by_configuration_alone(stand):
    _, handle, secret = stand.issue(GENERIC)
    assert stand.opens(**secret.data.reveal())
    stand.provider.revoke(handle, secret.reference)
    assert not stand.opens(**secret.data.reveal())


def test_no_secret_is_in_any_log_line_or_error(stand, caplog):
    """INV-30."""
    caplog.set_level(logging.DEBUG)
    request, handle, secret = stand.issue()
    stand.wire.loses_reply("GET /v1/database/creds")
    second = stand.provider.prepare(request, TTL)
    with pytest.raises(ProviderUnavailable) as unavailable:
        stand.provider.issue(second, request, TTL)
    stand.provider.revoke(handle, secret.reference)
    stand.provider.revoke(second, None)
    shown = caplog.text + repr(secret) + repr(handle) + repr(vars(unavailable.value)) + str(unavailable.value)
    assert caplog.records
    for hidden in (handle.opens, second.opens):
        assert hidden.reveal() not in shown
    assert secret.data.reveal()["password"] not in shown
    # Nor does the error carry the request, whose headers hold the token.
    assert unavailable.value.__context__ is None
