"""What a list of leases proves of one that it leaves out, and what it does not (INV-04)."""

import pytest

from broker.domain.clock import system_clock
from broker.domain.errors import ProviderUnavailable
from broker.providers.vault import VaultSettings
from broker.providers.vault.ending import Dying
from broker.providers.vault.provider import VaultProvider

A, B = "database/creds/jit-a", "database/creds/jit-b"


@pytest.fixture
def provider(tmp_path):
    token = tmp_path / "token"
    token.touch(mode=0o600)
    made = VaultProvider(
        VaultSettings.parse(
            {
                "address": "http://127.0.0.1:1",
                "auth": {"method": "token_file", "token_file": str(token)},
                "lease_prefix_exclusive": True,
            }
        ),
        system_clock,
    )
    yield made
    made.close()


def dead_of(provider, references, lists, monkeypatch):
    """Those of these leases that a look at these lists, by prefix, confirms; an exception is a list that breaks."""

    def leases_under(prefix, _since, *, depth):
        assert depth == 0  # of what is further down it says nothing
        for name in lists[prefix.rstrip("/")]:
            if isinstance(name, Exception):
                raise name
            yield prefix + name

    monkeypatch.setattr(provider._calls, "leases_under", leases_under)
    dying = [Dying(None, reference) for reference in references]
    provider._ending._look_at_lists(dying, float("inf"), None)
    return [one.reference for one in dying if one.is_dead]


def test_a_list_speaks_of_its_own_prefix_alone(provider, monkeypatch):
    assert dead_of(provider, [f"{A}/one", f"{B}/two"], {A: ["other"], B: ["two"]}, monkeypatch) == [f"{A}/one"]
    assert dead_of(provider, [f"{A}/one", f"{B}/two"], {A: ["other"], B: []}, monkeypatch) == [f"{A}/one"]


def test_a_list_that_breaks_off_proves_nothing_of_what_it_had_not_come_to(provider, monkeypatch):
    broken = {A: ["first", ProviderUnavailable("it lists a lease whose name cannot be read")]}
    assert dead_of(provider, [f"{A}/one"], broken, monkeypatch) == []


def test_a_list_is_not_asked_for_when_there_is_no_time(provider, monkeypatch):
    monkeypatch.setattr(provider._ending, "_listed", lambda *_of: pytest.fail("it was listed"))
    provider._ending._look_at_lists([Dying(None, f"{A}/one")], float("-inf"), None)
