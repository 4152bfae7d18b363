"""`[ssf]` and `[[transmitters]]`: what is believed of whom, and every way to say it wrong."""

from datetime import timedelta
from ipaddress import ip_address

import pytest

from broker.config import load
from broker.domain.errors import ConfigurationError
from broker.providers.posting import public_or
from tests.workloads import issuer_key, write_key_set

BASE = """
issuer = "https://broker.example"
[store]
url = "sqlite:///broker.db"
[keys]
master_key_file = "master.key"
[[issuers]]
name = "corp"
issuer = "https://idp.example"
discovery = true
users = true
"""
TRANSMITTER = {
    "name": '"idp"',
    "issuer": '"https://idp.example/ssf"',
    "discovery": "true",
    "speaks_of": '["corp"]',
}


@pytest.fixture
def place(tmp_path):
    key = tmp_path / "master.key"
    key.touch(mode=0o600)
    key.write_bytes(bytes(32))
    (tmp_path / "policies").mkdir()
    write_key_set(tmp_path / "rsa.jwks", issuer_key("one", "RS256"))
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("hunter2")
    return tmp_path


def loaded(place, *sections):
    (place / "broker.toml").write_text("\n".join([BASE, *sections]))
    return load(place / "broker.toml", environ={})


def transmitter(**changed):
    keys = {name: value for name, value in (TRANSMITTER | changed).items() if value is not None}
    return "\n".join(["[[transmitters]]", *(f"{name} = {value}" for name, value in keys.items())])


def test_a_transmitter_has_these_defaults(place):
    [found] = loaded(place, transmitter()).transmitters
    assert (found.name, found.issuer, found.audience) == ("idp", "https://idp.example/ssf", "https://broker.example")
    assert (found.keys.key_source, found.keys.algorithms) == ("ssf_discovery", ("RS256",))
    assert found.speaks_of == ("corp",)
    assert len(found.events) == 4
    assert (found.max_age, found.lockdown_on, found.poll_url) == (timedelta(days=1), frozenset(), None)


def test_a_transmitter_may_be_polled_and_have_its_keys_in_a_file(place):
    polled = {
        "discovery": None,
        "jwks_file": '"rsa.jwks"',
        "poll_url": '"https://idp.example/poll"',
        "poll_token_file": '"token"',
        "lockdown_on": '["credential-compromise"]',
    }
    settings = loaded(place, transmitter(**polled))
    [found] = settings.transmitters
    assert found.keys.location == str(place / "rsa.jwks")
    assert found.poll_token_file == str(place / "token")
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("changed", "at", "what"),
    [
        ({"speaks_of": "[]"}, "speaks_of", "nothing it says counts"),
        ({"speaks_of": '["nobody"]'}, "speaks_of[0]", "the name of no issuer"),
        ({"events": "[]"}, "events", "nothing it says counts"),
        ({"events": '["account-purged"]'}, "events[0]", "not an event the broker acts on"),
        ({"lockdown_on": '["risk-level-change"]'}, "lockdown_on[0]", "not an event that revokes"),
        (
            {"events": '["session-revoked"]', "lockdown_on": '["account-disabled"]'},
            "lockdown_on[0]",
            "not among events",
        ),
        ({"discovery": None}, "", "has 0 key sources"),
        ({"jwks_uri": '"https://idp.example/k"'}, "", "has 2 key sources"),
        ({"discovery": None, "jwks_file": '"nowhere"'}, "jwks_file", "there is no file"),
        ({"discovery": None, "jwks_file": '"token"'}, "jwks_file", "not JSON"),
        ({"algorithms": '["HS256"]'}, "algorithms[0]", "HMAC"),
        ({"algorithms": '["none"]'}, "algorithms[0]", "nobody signed"),
        ({"issuer": '"https://broker.example"'}, "issuer", "the broker itself"),
        ({"issuer": '"http://idp.example"'}, "issuer", "plain http"),
        ({"poll_token_file": '"token"'}, "poll_token_file", "opens nothing without poll_url"),
        (
            {"poll_url": '"https://idp.example/p"', "poll_token_file": '"nowhere"'},
            "poll_token_file",
            "there is no file",
        ),
        ({"poll_url": '"http://idp.example/p"'}, "poll_url", "plain http"),
        ({"max_age_s": "0"}, "max_age_s", "out of bounds"),
        ({"secret": '"hunter2"'}, "secret", "not a key of this version"),
    ],
)
def test_what_is_wrong_with_a_transmitter_is_said(place, changed, at, what):
    with pytest.raises(ConfigurationError) as refused:
        loaded(place, transmitter(**changed))
    text = "\n".join(refused.value.problems)
    assert f"transmitters[0]{'.' if at else ''}{at}" in text
    assert what in text
    assert "hunter2" not in text


def test_two_transmitters_have_a_name_and_an_issuer_each(place):
    with pytest.raises(ConfigurationError) as refused:
        loaded(place, transmitter(), transmitter())
    assert len(refused.value.problems) == 2


def test_networks_inside_are_named_as_networks(place):
    found = loaded(place, '[ssf]\npush_networks = ["10.20.0.0/16", "fd00::/8"]\nmost_waiting = 10').ssf
    may_reach = public_or(found.push_networks)
    assert may_reach(ip_address("10.20.1.1"))
    assert not may_reach(ip_address("10.21.1.1"))
    assert found.bounds.most_waiting == 10
    for wrong in ("10.20.0.1/16", "receiver.example", "10.20.0.0/33"):
        with pytest.raises(ConfigurationError, match="not a network"):
            loaded(place, f'[ssf]\npush_networks = ["{wrong}"]')
