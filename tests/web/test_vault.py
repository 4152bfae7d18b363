"""A whole broker on a Vault at its worst, over HTTP: what callers get, what they are told, and what is owed for it."""

import ssl
from datetime import timedelta

import pytest

from broker.domain.clock import rfc3339
from tests.hostile.conftest import refused
from tests.leases import require_consistent, states
from tests.providers.contract import csr, ssh_key
from tests.providers.test_vault_faults import certificate as certificate  # a fixture
from tests.vault_house import AGENTS, CLOUD, HOSTS, ORDERS, UNMADE, fake_vault, house_on_vault
from tests.web.conftest import Web

CREATE = "POST auth/token/create/jit"
CREDS = "GET database/creds/"
DENIED = {"errors": ["1 error occurred:\n\t* permission denied\n\n"]}
SPEAKS_OF_THE_SET_UP = ("jit-", "auth/", "database/", "sys/", "creds", "canary")


@pytest.fixture
def web(store_url, tmp_path):
    with fake_vault() as fake, house_on_vault(fake, store_url, tmp_path) as house:
        yield Web(house)
        require_consistent(house.broker.database)


def ask(web, resource=ORDERS, task=None, headers=None, **more):
    task = task or web.open_task()
    body = {"task_id": task["id"], "resource": resource, "scopes": ["use"], **more}
    return web.post("/v1/grants", "summarizer", json=body, headers=headers)


def granted(answer):
    assert answer.status_code == 201, answer.json
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.json["grant"], answer.json["credential"]


class TestWhatEachEngineGives:
    def test_a_database_login_that_is_dead_when_its_task_has_ended(self, web):
        fake, task = web.house.fake, web.open_task()
        grant, credential = granted(ask(web, task=task))
        assert (credential["type"], sorted(credential["data"])) == ("database", ["password", "username"])
        assert credential["expires_at"] == grant["expires_at"]
        assert fake.alive == {credential["data"]["username"]}
        receipt = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline").json
        assert fake.alive == set()
        (line,) = receipt["grants"]
        assert (line["revocation_class"], line["confirmed_dead_at"]) == ("hard", rfc3339(fake.now))
        assert line["exposed_until"] is None
        assert receipt["totals"] == {"ended": 1, "confirmed_dead": 1, "outstanding": 0}

    def test_a_certificate_for_the_agents_own_key_that_is_dead_a_bound_after_its_task(self, web):
        fake, task = web.house.fake, web.open_task()
        grant, credential = granted(ask(web, AGENTS, task, parameters={"csr": csr()}))
        assert credential["type"] == "pki" and "private_key" not in credential["data"]
        assert grant["revocation_class"] == "bounded"
        web.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
        ended_at = fake.now
        (line,) = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json["grants"]
        assert (line["confirmed_dead_at"], line["exposed_until"]) == (None, rfc3339(ended_at + timedelta(seconds=60)))
        web.house.tick()
        (line,) = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json["grants"]
        assert line["confirmed_dead_at"] == rfc3339(ended_at + timedelta(seconds=60))

    @pytest.mark.parametrize(
        ("resource", "more", "kind"),
        [
            (HOSTS, {"parameters": {"public_key": ssh_key()}}, "ssh"),
            (CLOUD, {"ttl_s": 900}, "generic"),
        ],
        ids=["ssh", "aws sts"],
    )
    def test_what_nothing_can_end_is_exposed_until_its_expiry_and_every_answer_says_so(self, web, resource, more, kind):
        fake, task = web.house.fake, web.open_task()
        grant, credential = granted(ask(web, resource, task, **more))
        assert (credential["type"], grant["revocation_class"]) == (kind, "ttl_only")
        receipt = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline").json
        assert receipt["totals"]["outstanding"] == 1
        lease = web.house.lease_of(grant["id"])
        # Not what the agent was told, which may be less: what the outside enforces.
        assert receipt["grants"][0]["exposed_until"] == rfc3339(lease.dead_at) >= credential["expires_at"]
        web.house.clock.at = lease.dead_at - timedelta(seconds=1)
        web.house.broker.debts.pay()
        assert web.house.lease_of(grant["id"]).state == "revoking"
        web.house.tick(1)
        receipt = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json
        assert receipt["totals"] == {"ended": 1, "confirmed_dead": 1, "outstanding": 0}
        assert receipt["grants"][0]["confirmed_dead_at"] == rfc3339(fake.now)

    def test_an_agent_with_implicit_tasks_gets_one_as_long_as_its_secret(self, web):
        body = {"resource": ORDERS, "scopes": ["use"]}
        grant, _ = granted(web.post("/v1/grants", "scribe", json=body))
        task = web.get(f"/v1/tasks/{grant['task_id']}", "scribe").json
        assert task["deadline_at"] == grant["expires_at"]
        web.house.settle()
        assert web.house.fake.alive == set()


# --- Every way in which Vault may fail -------------------------------------------------------------------------------


def down(fake):
    fake.fault(".", lambda call: call.hang_up(), times=1000)


def sealed(fake):
    fake.sealed = True


def slow(fake):
    fake.drips(CREATE)


def slow_with_the_secret(fake):
    fake.drips(CREDS)


def without_a_policy(fake):
    fake.answers(CREATE, 403, DENIED, times=9)


def without_a_policy_for_the_role(fake):
    fake.answers(CREDS, 403, DENIED)


def redirecting(fake):
    fake.answers(CREATE, 307, Location="http://127.0.0.1:1/v1/auth/token/create/jit")


def redirecting_the_secret(fake):
    fake.answers(CREDS, 307, Location="http://127.0.0.1:1/v1/database/creds/jit-orders-ro")


def overloaded(fake):
    fake.answers(CREATE, 429, {"errors": ["request path rate limit quota exceeded"]})


def a_standby(fake):
    fake.answers(CREDS, 473, {"errors": ["performance standby"]})


def losing_the_answer_with_the_token(fake):
    fake.loses_reply(CREATE)


def losing_the_answer_with_the_secret(fake):
    fake.loses_reply(CREDS)


def giving_no_lease(fake):
    fake.lease_ttl = None


def giving_a_token_that_can_be_renewed(fake):
    fake.child = {"renewable": True}


def giving_a_token_that_lives_longer(fake):
    fake.child = {"lease_duration": 10**6}


def giving_what_cannot_be_read(fake):
    fake.says(CREDS, b'{"lease_id": 1, "data": []}')


def behind_a_proxy_that_says_no(fake):
    fake.answers(CREDS, 404, "<html>")


REFUSED = [
    without_a_policy,
    without_a_policy_for_the_role,
    overloaded,
    giving_a_token_that_can_be_renewed,
    giving_a_token_that_lives_longer,
]
SILENT = [
    down,
    sealed,
    slow,
    slow_with_the_secret,
    redirecting,
    redirecting_the_secret,
    a_standby,
    losing_the_answer_with_the_token,
    losing_the_answer_with_the_secret,
    giving_no_lease,
    giving_what_cannot_be_read,
    behind_a_proxy_that_says_no,
]


def mend(fake):
    fake._faults.clear()
    fake.sealed, fake.lease_ttl, fake.overlong, fake.child = False, timedelta(minutes=10), False, {}


def require_told(web, answer, code):
    """503 with when to come again, nothing of the set-up; the trail says all of it, and under the same trace."""
    problem = refused(answer, status=[503])
    assert problem["code"] == code
    assert int(answer.headers["Retry-After"]) >= 1
    for word in (*SPEAKS_OF_THE_SET_UP, web.house.fake.address):
        assert word not in answer.get_data(as_text=True)
    (event,) = web.house.events("grant.failed")
    assert (event.outcome, event.actor, event.resource) == (code, "summarizer", ORDERS)
    assert event.reason and "canary" not in event.reason
    assert event.trace_id == problem["trace_id"]


@pytest.mark.parametrize("fails", [*REFUSED, *SILENT], ids=lambda fails: fails.__name__)
def test_a_vault_that_fails_is_told_audited_and_owed_for_and_nothing_lives_on(web, fails):
    fake, task = web.house.fake, web.open_task()
    fails(fake)
    answer = ask(web, task=task)
    require_told(web, answer, "provider_refused" if fails in REFUSED else "provider_unavailable")
    (lease,) = web.house.leases()
    assert (states(web.house.broker.database), lease.abandoned_at) == ([("failed", "revoking")], None)
    if fake.alive:
        assert lease.handle is not None
    # What it may have made is on nobody's list of what is dead before the outside said so.
    receipt = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json
    assert receipt["totals"] == {"ended": 0, "confirmed_dead": 0, "outstanding": 1}
    mend(fake)
    web.house.settle()
    assert states(web.house.broker.database) == [("failed", "released")]
    if fails is not giving_no_lease:
        assert fake.alive == set()
    # Also a token whose accessor nobody heard: it opens nothing, because nothing was made under it, and ends by itself.
    web.house.tick(900)
    assert [token for token in fake.tokens.values() if "jit-secrets" in token.policies] == []
    granted(ask(web))


@pytest.mark.parametrize(
    ("resource", "path", "more"),
    [
        (HOSTS, "ssh/sign", {"parameters": {"public_key": ssh_key()}}),
        (CLOUD, "aws/sts", {}),
        (AGENTS, "pki/sign", {"parameters": {"csr": csr()}}),
    ],
    ids=["ssh", "aws sts", "pki"],
)
def test_what_was_refused_is_not_called_exposed_for_as_long_as_it_would_have_lived(web, resource, path, more):
    """There is its token alone, and that is dead when Vault says so."""
    task = web.open_task()
    web.house.fake.answers(f"POST {path}", 403, DENIED)
    assert refused(ask(web, resource, task, ttl_s=900, **more), status=[503])["code"] == "provider_refused"
    web.house.broker.debts.pay()
    receipt = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json
    assert receipt["totals"] == {"ended": 0, "confirmed_dead": 1, "outstanding": 0}


def test_a_role_that_nobody_made_is_refused(web):
    answer = ask(web, UNMADE)
    problem = refused(answer, status=[503])
    assert (problem["code"], answer.headers["Retry-After"]) == ("provider_refused", "2")
    assert "nobody-made-it" not in answer.get_data(as_text=True)
    (event,) = web.house.events("grant.failed")
    assert "nobody-made-it" in event.reason
    web.house.broker.debts.pay()
    assert states(web.house.broker.database) == [("failed", "released")]


@pytest.mark.parametrize(
    ("resource", "parameters"),
    [(HOSTS, {"public_key": ssh_key()}), (CLOUD, {}), (AGENTS, {"csr": csr()})],
    ids=["ssh", "aws sts", "pki"],
)
def test_what_lives_longer_than_was_asked_is_not_handed_out_and_owed_for_as_long_as_it_lives(web, resource, parameters):
    fake = web.house.fake
    fake.overlong, fake.lease_ttl = True, timedelta(hours=5)
    problem = refused(ask(web, resource, parameters=parameters, ttl_s=900), status=[503])
    assert problem["code"] == "provider_unavailable"
    (lease,) = web.house.leases()
    assert lease.expires_at >= fake.now + timedelta(hours=4)
    if resource == AGENTS:
        return
    # Nothing can end it: it is not called dead while it lives.
    for _ in range(20):
        web.house.tick()
    assert web.house.leases()[0].state == "revoking"


def test_a_secret_that_lives_as_long_as_is_asked_has_one_shorter_life_told_to_the_agent(web):
    """INV-08: the grant is over before the lease is."""
    grant, credential = granted(ask(web, CLOUD, ttl_s=900))
    assert credential["expires_at"] == grant["expires_at"] <= rfc3339(web.house.fake.now + timedelta(seconds=900))


@pytest.mark.parametrize("ttl_s", [60, 604])
def test_what_is_asked_for_shorter_than_it_can_live_is_refused_and_nothing_is_begun(web, ttl_s):
    """What goes by while it is made counts too: with 600 s there would be less than 600 left to ask for."""
    problem = refused(ask(web, CLOUD, ttl_s=ttl_s), status=[400])
    assert (problem["code"], problem["member"]) == ("invalid_request", "ttl_s")
    assert "at least 605 s" in problem["detail"]
    assert states(web.house.broker.database) == []


HOSTILE = [
    "urn:db:orders:readonly/../../sys/seal",
    "urn:db:orders:readonly\n",
    "urn:db:orders:readonly%2e",
    "URN:db:orders:readonly",
    "../../sys/seal",
    "urn:db:orders:readonly'; DROP TABLE leases; --",
]


@pytest.mark.parametrize("resource", HOSTILE)
def test_a_hostile_resource_reaches_no_vault(web, resource):
    asked = len(web.house.fake.seen)
    assert refused(ask(web, resource), status=[400])["code"] in ("invalid_target", "invalid_request")
    assert len(web.house.fake.seen) == asked
    assert web.house.leases() == []


@pytest.mark.parametrize(
    ("resource", "parameters"),
    [
        (ORDERS, {"role": "../../sys/seal"}),
        (ORDERS, {"ttl": "999h"}),
        (HOSTS, {"public_key": f"{ssh_key()}\nssh-ed25519 AAAA"}),
        (HOSTS, {"public_key": f'command="sh" {ssh_key()}'}),
        (HOSTS, {"public_key": ssh_key(), "valid_principals": "root"}),
        (AGENTS, {"csr": csr() + csr()}),
        (AGENTS, {"csr": csr(), "common_name": "root"}),
        (CLOUD, {"role_arn": "arn:aws:iam::1:role/admin"}),
    ],
)
def test_a_hostile_parameter_reaches_no_vault_and_leaves_nothing_owed(web, resource, parameters):
    asked = len(web.house.fake.seen)
    problem = refused(ask(web, resource, parameters=parameters, ttl_s=900), status=[400])
    assert problem["member"].startswith("parameters")
    assert len(web.house.fake.seen) == asked
    assert states(web.house.broker.database) == []


def test_a_request_whose_parameters_were_wrong_may_be_made_again_under_its_key(web):
    task, key = web.open_task(), {"Idempotency-Key": "certificate-1"}
    refused(ask(web, AGENTS, task, key, parameters={"csr": "none"}), status=[400])
    granted(ask(web, AGENTS, task, key, parameters={"csr": csr()}))


def test_a_vault_with_a_certificate_of_somebody_else_is_told_nothing(store_url, tmp_path, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with fake_vault(context) as fake:
        with house_on_vault(fake, store_url, tmp_path, looked=False) as house:
            web = Web(house)
            house.tick(1)
            answer = ask(web)
            assert refused(answer, status=[503])["code"] == "unavailable"
            assert int(answer.headers["Retry-After"]) >= 1
            assert fake.seen == []
        with house_on_vault(fake, store_url, tmp_path, ca_file=str(certificate)) as house:
            granted(ask(Web(house)))


# --- What makes no sense for a secret --------------------------------------------------------------------------------


def test_the_token_endpoint_says_that_its_target_is_none(web):
    answer = web.form(
        "/oauth2/token",
        grant_type="client_credentials",
        resource=ORDERS,
        scope="use",
        task_id=web.open_task()["id"],
        **web.assertion("summarizer"),
    )
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_target")
    assert "/v1/grants" in answer.json["error_description"]


def test_a_secret_is_not_renewed(web):
    grant, _ = granted(ask(web))
    problem = refused(web.post(f"/v1/grants/{grant['id']}/renew", "summarizer"), status=[400])
    assert "is not renewed" in problem["detail"]


def test_an_idempotency_key_gives_one_secret_that_lives_however_often_it_is_sent(web):
    """INV-06, over HTTP: each answer may have been lost, so each next one replaces it."""
    task, headers = web.open_task(), {"Idempotency-Key": "once"}
    answers = [granted(ask(web, task=task, headers=headers)) for _ in range(3)]
    web.house.broker.debts.pay()
    assert web.house.fake.alive == {answers[-1][1]["data"]["username"]}
    other = ask(web, task=task, headers=headers, ttl_s=61)
    assert refused(other, status=[409])["code"] == "idempotency_conflict"


# --- After it was handed out -----------------------------------------------------------------------------------------


def test_a_204_is_not_death(web):
    """INV-04: Vault's queue stands still, and says to everybody that it is done."""
    fake, task = web.house.fake, web.open_task()
    grant, _ = granted(ask(web, task=task))
    fake.queue_works = False
    receipt = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline").json
    assert fake.alive and receipt["totals"]["outstanding"] == 1
    assert receipt["grants"][0]["confirmed_dead_at"] is None
    web.house.tick()
    assert web.house.lease_of(grant["id"]).state == "revoking"
    fake.queue_works = True
    web.house.settle()
    assert fake.alive == set()


def test_a_database_that_is_down_makes_a_debt_stuck_and_it_is_paid_when_it_is_back(web):
    fake, task = web.house.fake, web.open_task()
    grant, _ = granted(ask(web, task=task))
    fake.target_works = False
    web.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
    for _ in range(8):
        web.house.tick()
    shown = web.get(f"/v1/grants/{grant['id']}", "summarizer").json["lease"]
    assert (shown["state"], shown["confirmed_dead_at"]) == ("stuck", None)
    for word in SPEAKS_OF_THE_SET_UP:
        assert word not in shown["last_error"]
    assert len(web.house.events("lease.stuck")) == 1
    assert "the target does not answer" in web.get(f"/v1/grants/{grant['id']}", "ada").json["lease"]["last_error"]
    receipt = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json
    assert receipt["totals"]["outstanding"] == 1
    fake.target_works = True
    web.house.settle()
    assert fake.alive == set()


def test_what_flew_past_its_own_token_s_death_is_found_and_killed(web):
    """INV-03: Vault gives a request 90 s, and its secret appears when everything known of it is dead."""
    fake, task = web.house.fake, web.open_task()
    fake.flies(CREDS)
    refused(ask(web, task=task), status=[503])
    web.house.broker.debts.pay()
    web.house.tick(80)
    fake.land()
    assert len(fake.alive) == 1
    assert web.house.leases()[0].state == "revoking"
    web.house.settle()
    assert fake.alive == set()
    assert len(web.house.events("lease.found")) == 1


def test_a_certificate_that_was_made_late_is_not_called_dead_while_it_lives(web):
    """INV-04: nobody heard of it, no list shows it, and its life begins when it is made, not when it is asked for."""
    fake = web.house.fake
    fake.flies("POST ssh/sign/")
    refused(ask(web, HOSTS, parameters={"public_key": ssh_key()}, ttl_s=900), status=[503])
    web.house.tick(80)
    fake.land()
    lives_until = fake.now + timedelta(seconds=900)
    while fake.now < lives_until:
        assert web.house.leases()[0].state == "revoking"
        web.house.tick(10)
    web.house.settle()
