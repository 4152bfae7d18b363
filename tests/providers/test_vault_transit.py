"""The contract of a wrapping key, on the fake Vault and on a real OpenBao alike."""

import base64
import logging
import secrets

import pytest

from broker.domain.clock import system_clock
from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.providers.vault import VaultProvider
from broker.providers.vault.setup import Layout, broker_policy, check
from broker.providers.vault.transit import TransitKey, transit_paths
from tests.conftest import NOW
from tests.services.sealings import KEY, OTHER, OnFake, OnOpenBao

FOR = b'["signing key","kid-1","ES256"]'


@pytest.fixture(params=["fake", "openbao"])
def stand(request, tmp_path):
    made = OnFake(tmp_path) if request.param == "fake" else OnOpenBao(request.getfixturevalue("openbao"), tmp_path)
    yield made
    made.close()


@pytest.fixture
def key(stand):
    return stand.wrapping(system_clock)


@pytest.fixture
def fake(tmp_path):
    made = OnFake(tmp_path)
    yield made
    made.close()


def test_what_was_wrapped_opens_again_and_never_looks_the_same_twice(key):
    own = secrets.token_bytes(32)
    wrapped = {key.wrap(own, bound_to=FOR) for _ in range(3)}
    assert len(wrapped) == 3
    assert {key.unwrap(text, bound_to=FOR) for text in wrapped} == {own}


def test_it_opens_only_for_what_it_was_wrapped_for_and_only_under_its_own_key(stand, key):
    wrapped = key.wrap(b"x" * 32, bound_to=FOR)
    for bound_to in (b"", FOR[:-1], FOR.replace(b"kid-1", b"kid-2")):
        with pytest.raises(Invalid):
            key.unwrap(wrapped, bound_to=bound_to)
    with pytest.raises(Invalid):
        stand.wrapping(system_clock, OTHER).unwrap(wrapped, bound_to=FOR)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-8],
        lambda text: text[:-7],
        lambda text: text + "=",
        lambda text: text[:12] + ("B" if text[12] == "A" else "A") + text[13:],
        lambda text: text.replace(":v1:", ":v999:"),
        lambda text: text.replace(":v1:", ":v0:"),
        lambda text: "vault:v1:AAAA",
        lambda text: "vault:v1:",
        lambda text: text.removeprefix("vault:"),
        lambda text: text + "\n",
        lambda text: "vault:v1:" + "A" * 100_000,
        lambda text: "",
    ],
)
def test_what_was_changed_never_opens_and_is_never_taken_for_silence(key, spoil):
    """Else whoever can write a row makes one that nobody can judge, for as long as they like."""
    wrapped = key.wrap(b"x" * 32, bound_to=FOR)
    with pytest.raises(Invalid):
        key.unwrap(spoil(wrapped), bound_to=FOR)


def test_an_older_version_of_the_key_opens_until_an_administrator_ends_that(stand, key):
    wrapped = key.wrap(b"x" * 32, bound_to=FOR)
    stand.rotate()
    assert key.unwrap(wrapped, bound_to=FOR) == b"x" * 32
    newer = key.wrap(b"y" * 32, bound_to=FOR)
    assert newer.startswith("vault:v2:")
    stand.require_version(2)
    assert key.unwrap(newer, bound_to=FOR) == b"y" * 32
    with pytest.raises(Invalid, match="too old"):
        key.unwrap(wrapped, bound_to=FOR)


def test_a_sealed_vault_says_nothing_about_what_was_wrapped(stand, key):
    wrapped = key.wrap(b"x" * 32, bound_to=FOR)
    stand.falls_silent()
    try:
        with pytest.raises(ProviderUnavailable):
            key.unwrap(wrapped, bound_to=FOR)
        with pytest.raises(ProviderUnavailable):
            key.wrap(b"x" * 32, bound_to=FOR)
    finally:
        stand.answers_again()
    assert key.unwrap(wrapped, bound_to=FOR) == b"x" * 32


def test_a_key_that_nobody_made_wraps_nothing_and_is_not_made_by_asking(stand):
    missing = TransitKey(stand.settings, "transit/keys/missing", system_clock)
    with pytest.raises(ProviderRefused):
        missing.wrap(b"x" * 32, bound_to=FOR)
    missing.close()


def test_nothing_that_opens_something_is_logged_or_raised(stand, key, caplog):
    """INV-30."""
    caplog.set_level(logging.DEBUG)
    own = secrets.token_bytes(32)
    wrapped = key.wrap(own, bound_to=FOR)
    said = [repr(key), str(key.__dict__)]
    with pytest.raises(Invalid) as refused:
        key.unwrap(wrapped, bound_to=b"other")
    stand.falls_silent()
    try:
        with pytest.raises(ProviderUnavailable) as silent:
            key.wrap(own, bound_to=FOR)
    finally:
        stand.answers_again()
    said += [caplog.text, str(refused.value), repr(silent.value), str(silent.value.reason)]
    for canary in (own.hex(), base64.b64encode(own).decode(), repr(own)[2:-1]):
        assert canary not in "\n".join(said)


# --- what only the fake can answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document", [{}, {"data": {}}, {"data": {"plaintext": 7}}, {"data": {"plaintext": "not base64!"}}, {"data": []}]
)
def test_an_answer_without_what_was_asked_for_is_no_answer(fake, document):
    key = fake.wrapping(fake.fake.clock)
    wrapped = key.wrap(b"x" * 32, bound_to=FOR)
    fake.fake.answers("decrypt", 200, document)
    with pytest.raises(ProviderUnavailable) as problem:
        key.unwrap(wrapped, bound_to=FOR)
    assert "not base64" not in f"{problem.value} {problem.value.reason} {problem.value.__context__}"


@pytest.mark.parametrize("ciphertext", [None, 7, "", "sealed:v1:AAAA", "vault:v1:" + "A" * 5000])
def test_what_could_not_be_read_again_is_not_kept(fake, ciphertext):
    fake.fake.answers("encrypt", 200, {"data": {"ciphertext": ciphertext}})
    with pytest.raises(ProviderUnavailable):
        fake.wrapping(fake.fake.clock).wrap(b"x" * 32, bound_to=FOR)


@pytest.mark.parametrize(
    ("status", "document", "raised"),
    [
        (400, None, ProviderUnavailable),  # not Vault, but something on the way
        (400, {"errors": ["cipher: message authentication failed"]}, Invalid),
        (404, {"errors": []}, ProviderRefused),
        (403, {"errors": ["permission denied"]}, ProviderRefused),
        (307, None, ProviderUnavailable),
        (500, {"errors": ["internal error"]}, ProviderUnavailable),
        (503, {"errors": ["Vault is sealed"]}, ProviderUnavailable),
    ],
)
def test_only_vault_itself_can_say_that_something_does_not_open(fake, status, document, raised):
    key = fake.wrapping(fake.fake.clock)
    wrapped = key.wrap(b"x" * 32, bound_to=FOR)
    fake.fake.answers("decrypt", status, document, times=2)
    with pytest.raises(raised):
        key.unwrap(wrapped, bound_to=FOR)


@pytest.mark.parametrize("path", ["transit/broker", "keys/broker", "a/../b/keys/broker", "transit/keys/a/b", ""])
def test_a_key_is_a_mount_and_a_name(path):
    with pytest.raises(Invalid):
        transit_paths(path)
    assert transit_paths("teams/crm/transit/keys/broker") == ("teams/crm/transit", "broker")


# --- what only a real OpenBao can show -------------------------------------------------------------------------------


@pytest.fixture
def proven(openbao, tmp_path):
    """What `broker vault check` finds, for a policy to which something may have been added."""
    stand = OnOpenBao(openbao, tmp_path)
    layout = Layout(sources=(), broker_policy="jit-keys-broker", wrapping_key=KEY)
    # Its token role is the one of the run, which has secrets of its own.
    layout_of_role = Layout(sources=(), wrapping_key=KEY)

    def findings(more=""):
        policy = broker_policy(layout) + more
        openbao.root("post", "sys/policies/acl/jit-keys-broker", {"policy": policy})
        provider = VaultProvider(stand.settings, system_clock)
        try:
            return check(provider, layout_of_role, "grt_06fbs1awnnxwn000t2tqc4tt1g")
        finally:
            provider.close()

    yield findings
    stand.close()


def test_the_set_up_gives_the_broker_the_use_of_one_key_and_nothing_else(proven):
    found = {finding.path: finding for finding in proven() if finding.path.startswith("transit/")}
    assert found.keys() >= {"transit/encrypt/broker", "transit/decrypt/broker", "transit/keys/broker"}
    assert [finding for finding in found.values() if not finding.ok] == []


@pytest.mark.parametrize(
    "path",
    [
        "transit/keys/broker",
        "transit/keys/broker/config",
        "transit/keys/broker/rotate",
        "transit/export/encryption-key/broker",
        "transit/encrypt/jit-probe-broker",
    ],
)
def test_whatever_is_allowed_beyond_that_is_found(proven, path):
    found = proven(f'\npath "{path}" {{\n  capabilities = ["create", "read", "update"]\n}}')
    assert [finding.path for finding in found if not finding.ok] == [path]


def test_the_key_stays_as_it_is_where_it_is_set_up_again(openbao, tmp_path):
    stand = OnOpenBao(openbao, tmp_path)
    wrapped = stand.wrapping(lambda: NOW).wrap(b"x" * 32, bound_to=FOR)
    again = OnOpenBao(openbao, tmp_path)
    assert again.wrapping(lambda: NOW).unwrap(wrapped, bound_to=FOR) == b"x" * 32
    made = openbao.root("get", KEY)["data"]
    assert (made["latest_version"], made["exportable"], made["deletion_allowed"]) == (1, False, False)
    stand.close()
    for left in again._made:
        left.close()
