"""A standby of a real OpenBao, which answers from what it has heard of: it confirms no death too early (INV-04)."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from broker.domain.clock import system_clock
from broker.providers.base import SecretRequest
from broker.providers.vault import VaultProvider
from broker.providers.vault.connection import Behind
from tests.openbao import DATABASE, SOURCES, OpenBao
from tests.processes import until
from tests.providers.contract import TTL

AHEAD = 100_000
PREFIX = "database/creds/jit-orders-ro/"


@pytest.fixture(scope="module")
def standby(openbao, tmp_path_factory):
    made = OpenBao(tmp_path_factory.mktemp("standby"), name="two", joins=openbao)
    made.start()
    try:
        made.follow(openbao)
        yield made
    finally:
        made.end()
        openbao.root("post", "sys/storage/raft/remove-peer", {"server_id": "two"})


def provider_at(address, openbao):
    return VaultProvider(openbao.settings(address=address), system_clock, lambda: SOURCES)


@pytest.fixture
def at_active(openbao):
    made = provider_at(openbao.address, openbao)
    yield made
    made.close()


@pytest.fixture
def at_standby(openbao, standby):
    made = provider_at(standby.address, openbao)
    yield made
    made.close()


def issued(provider, number):
    request = SecretRequest(grant_id=f"grt_01k{number:023}", settings=DATABASE, parameters={})
    handle = provider.prepare(request, TTL)
    return handle, provider.issue(handle, request, TTL)


def test_a_standby_that_is_not_as_far_as_is_asked_for_says_so(at_active, at_standby):
    handle, secret = issued(at_active, 0)
    told = json.loads(base64.b64decode(at_active._calls.revoke_accessor(handle.value)))
    ahead = base64.b64encode(json.dumps({**told, "value": str(int(told["value"]) + AHEAD)}).encode()).decode()
    for look in (
        lambda: at_standby._calls.is_token_dead(handle.value, ahead),
        lambda: at_standby._calls.lease(secret.reference, ahead),
        lambda: list(at_standby._calls.leases_under(PREFIX, ahead)),
    ):
        with pytest.raises(Behind):
            look()
    at_active.revoke(handle, secret.reference)


@pytest.mark.parametrize("count", [1, 2, 25])
def test_whom_a_standby_is_asked_about_is_called_dead_when_it_is_dead_at_the_active_node(
    openbao, at_active, at_standby, count
):
    """However far it is behind: of those that were made a moment ago it may know none."""
    with ThreadPoolExecutor(8) as pool:
        for first in range(0, 75, count):
            made = list(pool.map(lambda number: issued(at_active, number), range(first, first + count)))
            owed = {secret.reference: handle for handle, secret in made}

            def pay(owed=owed, pool=pool):
                owing = [(handle, reference) for reference, handle in owed.items()]
                said = at_standby.revoke_many(owing, pool.map)
                dead = {reference for reference, problem in zip(owed, said, strict=True) if problem is None}
                assert not dead & {PREFIX + name for name in openbao.leases(PREFIX)}
                for reference in dead:
                    assert at_active._calls.is_token_dead(owed.pop(reference).value)
                return not owed

            until(pay, what="all being dead")
    with openbao.superuser() as db:
        assert db.execute("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'jit-grt-%'").fetchone() == (0,)
