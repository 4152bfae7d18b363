"""What only a real OpenBao and a real PostgreSQL can show: sessions cut, users ended, policies that hold."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psycopg
import pytest

from broker.domain.clock import system_clock
from broker.domain.errors import ProviderRefused, ProviderUnavailable
from broker.domain.identity import new_id
from broker.domain.secret import Secret
from broker.providers.base import SecretRequest
from broker.providers.vault import VaultProvider, VaultSettings
from broker.providers.vault.connection import Connection
from broker.providers.vault.setup import Layout, apply, broker_policy, check, policies_and_token_roles
from tests.openbao import DATABASE, SOURCES, connect
from tests.processes import until

TTL = timedelta(minutes=2)
LAYOUT = Layout(sources=SOURCES, max_ttl=timedelta(minutes=10))


@pytest.fixture
def provider(openbao):
    made = VaultProvider(openbao.settings(), system_clock, lambda: SOURCES)
    yield made
    for live in made.list_live():
        made.revoke(None, live.reference)
    made.close()


def issued(provider, ttl=TTL):
    request = SecretRequest(grant_id=new_id("grt", system_clock()), settings=DATABASE)
    handle = provider.prepare(request, ttl)
    return request, handle, provider.issue(handle, request, ttl)


def sessions(openbao, username):
    with openbao.superuser() as db:
        return db.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = %s", (username,)).fetchone()[0]


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


def test_an_open_session_is_cut_and_the_login_refused(openbao, provider):
    request, handle, secret = issued(provider)
    data = secret.data.reveal()
    with connect(openbao, data) as session:
        assert session.execute("SELECT item FROM orders").fetchone() == ("lamp",)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("DELETE FROM orders")
        provider.revoke(handle, secret.reference)
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        connect(openbao, data)
    # The grant can be told from the user's name, in the database's own log too.
    assert data["username"].startswith(f"jit-{request.grant_id.replace('_', '-')}-")


def test_a_user_that_owns_something_is_ended_and_what_it_made_stays(openbao, provider):
    _, handle, secret = issued(provider)
    with connect(openbao, secret.data.reveal()) as session:
        session.execute("CREATE TABLE notes (id int)")
        provider.revoke(handle, secret.reference)
    with openbao.superuser() as db:
        owner = db.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'notes'").fetchone()
        db.execute("DROP TABLE notes")
    assert owner == ("jit_orders_heir",)


def test_a_user_that_somebody_dropped_does_not_leave_an_irrevocable_lease(openbao, provider):
    _, handle, secret = issued(provider)
    with openbao.superuser() as db:
        db.execute(f'DROP ROLE "{secret.facts["username"]}"')
    provider.revoke(handle, secret.reference)
    assert provider.list_live() == ()


def test_a_user_that_cannot_be_dropped_yet_can_do_nothing_meanwhile(openbao, provider):
    """That it may not log in is committed before what may fail is tried."""
    _, handle, secret = issued(provider)
    data = secret.data.reveal()
    with openbao.superuser() as db, connect(openbao, data) as session:
        db.execute("ALTER ROLE jit_orders_heir RENAME TO somebody")
        try:
            with pytest.raises(ProviderUnavailable):
                provider.revoke(handle, secret.reference)
            with pytest.raises(psycopg.OperationalError):
                session.execute("SELECT 1")
            with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
                connect(openbao, data)
        finally:
            db.execute("ALTER ROLE somebody RENAME TO jit_orders_heir")
    until(lambda: confirmed(provider, handle, secret), what="the end of the user")


def confirmed(provider, handle, secret):
    try:
        provider.revoke(handle, secret.reference)
    except ProviderUnavailable:
        return False
    return True


def test_whoever_logs_in_again_and_again_while_it_is_revoked_is_left_with_nothing(openbao, provider):
    """A login that was let in just before the end of the revoking transaction would outlive its role."""
    _, handle, secret = issued(provider)
    data = secret.data.reveal()
    stop = threading.Event()
    opened = []

    def storm():
        while not stop.is_set():
            try:
                opened.append(connect(openbao, data))
            except psycopg.OperationalError:
                if stop.is_set():
                    return

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(storm)
        until(lambda: len(opened) > 8, what="the storm")
        provider.revoke(handle, secret.reference)
        stop.set()
    left = 0
    for session in opened:
        try:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute("SELECT item FROM orders")
            left += 1
        except psycopg.OperationalError:
            pass
        session.close()
    assert len(opened) > 8
    assert left <= 1, "one may have been between its own check and the list of sessions"


def test_a_session_ends_with_the_time_of_its_grant_though_nobody_revokes_it(openbao, provider):
    _, _, secret = issued(provider, timedelta(seconds=2))
    with connect(openbao, secret.data.reveal()) as session:
        assert session.execute("SELECT 1").fetchone() == (1,)
        until(lambda: sessions(openbao, secret.facts["username"]) == 0, what="the end of the session")
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")


def test_many_at_once_are_each_confirmed_dead(openbao, provider):
    """A revocation that is done twice at once, by the queue and by us, confirms neither too early nor not at all."""

    def one(_):
        _, handle, secret = issued(provider)
        provider.revoke(handle, secret.reference)
        with openbao.superuser() as db:
            found = db.execute("SELECT count(*) FROM pg_roles WHERE rolname = %s", (secret.facts["username"],))
            return found.fetchone()[0]

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(one, range(48))) == {0}
    assert provider.list_live() == ()


# --- OpenBao ---------------------------------------------------------------------------------------------------------


def test_what_was_issued_before_openbao_was_killed_is_revoked_after_it_is_back(openbao, provider):
    _, handle, secret = issued(provider)
    openbao.kill()
    try:
        with pytest.raises(ProviderUnavailable):
            provider.revoke(handle, secret.reference)
        with pytest.raises(ProviderUnavailable):
            issued(provider)
    finally:
        openbao.start()
    assert [live.reference for live in provider.list_live()] == [secret.reference]
    provider.revoke(handle, secret.reference)
    assert provider.list_live() == ()


def test_the_broker_s_own_token_is_renewed_before_it_ends(openbao, tmp_path):
    body = {"policies": ["jit-broker"], "no_default_policy": True, "period": "9s"}
    auth = openbao.root("post", "auth/token/create", body)["auth"]
    (tmp_path / "token").write_text(auth["client_token"])
    settings = openbao.settings(auth={"method": "token_file", "token_file": str(tmp_path / "token")})
    provider = VaultProvider(settings, system_clock, lambda: SOURCES)

    def renewed():
        provider.list_live()
        found = openbao.root("post", "auth/token/lookup-accessor", {"accessor": auth["accessor"]})["data"]
        return found.get("last_renewal")

    until(renewed, what="the renewal")
    provider.close()


def test_a_target_that_is_gone_leaves_a_debt_and_says_why(openbao, provider):
    _, handle, secret = issued(provider)
    with openbao.superuser() as db:
        db.execute("ALTER ROLE vault_admin NOLOGIN")
        db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'vault_admin'")
    try:
        with pytest.raises(ProviderUnavailable):
            provider.revoke(handle, secret.reference)
        with pytest.raises(ProviderUnavailable) as unavailable:
            provider.revoke(None, secret.reference)
        assert unavailable.value.reason
    finally:
        with openbao.superuser() as db:
            db.execute("ALTER ROLE vault_admin LOGIN")
    until(lambda: confirmed(provider, handle, secret), what="the debt being paid")
    assert sessions(openbao, secret.facts["username"]) == 0


# --- the set-up and its proof ----------------------------------------------------------------------------------------


def probe():
    return new_id("grt", system_clock())


def test_the_set_up_may_be_applied_again_and_is_proven_by_the_broker_s_own_token(openbao, provider):
    """INV-29."""
    openbao.apply(*policies_and_token_roles(LAYOUT))
    findings = check(provider, LAYOUT, probe())
    assert [finding for finding in findings if not finding.ok] == []
    assert {"the broker cannot take a secret itself", "a child token of jit can take a secret"} <= {
        finding.sentence for finding in findings
    }


def with_policy(openbao, tmp_path, policy):
    """A provider whose own token has this policy."""
    openbao.root("put", "sys/policies/acl/jit-other", {"policy": policy})
    body = {"policies": ["jit-other"], "no_default_policy": True, "ttl": "5m"}
    token = openbao.root("post", "auth/token/create", body)["auth"]["client_token"]
    (tmp_path / "token").write_text(token)
    auth = {"method": "token_file", "token_file": str(tmp_path / "token")}
    return VaultProvider(openbao.settings(auth=auth), system_clock, lambda: SOURCES)


@pytest.mark.parametrize(
    ("path", "capability", "sentence"),
    [
        ("sys/policies/acl/*", "update", "the broker cannot change its own policy"),
        ("auth/token/create", "update", "the broker cannot make tokens of its own choosing"),
        ("auth/token/roles/*", "update", "the broker cannot change what child tokens may be"),
        ("database/creds/*", "read", "the broker cannot take a secret itself"),
        ("database/roles/*", "update", "the broker cannot change roles of database"),
        ("sys/leases/*", "update", "the broker cannot revoke leases of others"),
    ],
)
def test_a_policy_that_allows_too_much_is_found(openbao, tmp_path, path, capability, sentence):
    policy = f'{broker_policy(LAYOUT)}\npath "{path}" {{ capabilities = ["{capability}"] }}'
    provider = with_policy(openbao, tmp_path, policy)
    wrong = {finding.sentence for finding in check(provider, LAYOUT, probe()) if not finding.ok}
    provider.close()
    assert sentence in wrong


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("sys/leases/lookup/database/creds/jit-orders-ro/*", "the broker can list what lives under"),
        ("sys/leases/revoke/database/creds/jit-orders-ro/*", "the broker can revoke leases of"),
        ("sys/leases/lookup", "the broker can see that a lease is dead"),
    ],
)
def test_a_policy_that_allows_too_little_is_found(openbao, tmp_path, path, sentence):
    policy = broker_policy(LAYOUT).replace(f'path "{path}" {{', f'path "{path}-not" {{')
    provider = with_policy(openbao, tmp_path, policy)
    wrong = [finding.sentence for finding in check(provider, LAYOUT, probe()) if not finding.ok]
    provider.close()
    assert any(found.startswith(sentence) for found in wrong)


def test_root_is_not_what_a_broker_should_be(openbao, tmp_path):
    (tmp_path / "token").write_text(openbao.root_token)
    auth = {"method": "token_file", "token_file": str(tmp_path / "token")}
    provider = VaultProvider(openbao.settings(auth=auth), system_clock, lambda: SOURCES)
    wrong = [finding for finding in check(provider, LAYOUT, probe()) if not finding.ok]
    provider.close()
    assert len(wrong) > 10


@pytest.fixture
def token_role(openbao):
    """Changes the token role for one test."""
    (good,) = [request for request in policies_and_token_roles(LAYOUT) if request.path == "auth/token/roles/jit"]
    yield lambda **changed: openbao.root("post", good.path, {**good.body, **changed})
    openbao.root("post", good.path, good.body)


@pytest.mark.parametrize(
    "changed",
    [
        {"orphan": False},
        {"token_type": "batch", "token_explicit_max_ttl": 0},
        {"token_no_default_policy": False},
        {"token_num_uses": 1},
    ],
    ids=str,
)
def test_a_token_role_that_is_set_up_wrong_gives_no_handle(provider, token_role, changed):
    token_role(**changed)
    with pytest.raises(ProviderRefused) as refused:
        issued(provider)
    assert "jit" in refused.value.reason
    assert provider.list_live() == ()


def test_a_token_role_whose_tokens_could_be_renewed_gives_one_that_cannot(provider, token_role):
    token_role(renewable=True)
    _, handle, secret = issued(provider)
    provider.revoke(handle, secret.reference)


def test_the_broker_cannot_ask_for_a_child_that_may_do_more(openbao, tmp_path):
    """INV-29: what its own token would need for that, Vault refuses it."""
    body = {"policies": ["jit-broker"], "no_default_policy": True, "ttl": "5m"}
    own = Secret(openbao.root("post", "auth/token/create", body)["auth"]["client_token"])
    connection = Connection(openbao.address)
    for more in (
        {"policies": ["root"]},
        {"policies": ["jit-broker"]},
        {"num_uses": 0},
        {"id": "s.mine"},
        {"period": "1h"},
    ):
        answer = connection.call("post", "auth/token/create/jit", token=own, body={"ttl": "30s", **more})
        assert answer.status == 403, more
    for path in ("database/creds/jit-orders-ro", "database/roles/jit-orders-ro", "sys/policies/acl/jit-broker"):
        assert connection.call("get", path, token=own).status == 403
    connection.close()


def test_what_vault_refuses_to_write_ends_the_set_up_with_the_path(openbao):
    connection = Connection(openbao.address)
    with pytest.raises(ProviderRefused, match="write sys/policies/acl/jit-broker"):
        apply(policies_and_token_roles(LAYOUT), connection, Secret("s.nobody"))
    connection.close()


def test_a_namespace_that_is_not_there_is_no_confirmation(openbao):
    """INV-04: in another namespace every lease is unknown."""
    files = {"role_id_file": str(openbao.directory / "role-id"), "secret_id_file": str(openbao.directory / "secret-id")}
    settings = VaultSettings.parse(
        {
            "address": openbao.address,
            "namespace": "elsewhere",
            "auth": {"method": "approle", **files},
            "lease_prefix_exclusive": True,
        }
    )
    provider = VaultProvider(settings, system_clock, lambda: SOURCES)
    with pytest.raises(ProviderUnavailable):
        provider.revoke(None, "database/creds/jit-orders-ro/abcdefghijklmnop")
    provider.close()
