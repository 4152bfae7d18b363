"""Secrets from outside over HTTP: how they are asked for, how they are refused, and what is owed for them."""

import shutil
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from broker.domain.clock import rfc3339
from tests.fakes.outside import AGENTS, HOSTS, ORDERS, PASSWORD, SEALED, house_on_outside
from tests.hostile.conftest import refused
from tests.house import CRM
from tests.web.conftest import Web


@pytest.fixture
def web(migrated_file, tmp_path):
    shutil.copyfile(migrated_file, tmp_path / "broker.db")
    with house_on_outside(f"sqlite:///{tmp_path / 'broker.db'}", tmp_path) as house:
        yield Web(house)


@pytest.fixture
def web_on_both(store_url, tmp_path):
    with house_on_outside(store_url, tmp_path) as house:
        yield Web(house)


def ask(web, resource=ORDERS, scope="select", task=None, headers=None, **more):
    task = task or web.open_task()
    body = {"task_id": task["id"], "resource": resource, "scopes": [scope], **more}
    return web.post("/v1/grants", "summarizer", json=body, headers=headers)


def certificate_request():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a.agents.example")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def stuck(web):
    """A lease whose revocation failed six times, and the time at which its authority ended."""
    lease = ask(web).json["grant"]["lease"]["id"]
    web.house.outside.down = True
    ended_at = web.house.clock()
    web.post("/v1/revocations", "ada", json={"agent": "summarizer", "reason": "incident 42"})
    web.house.pay(times=6)
    return lease, ended_at


def test_a_login_is_handed_out_once_with_its_lease_and_dies_with_its_task(web_on_both):
    web = web_on_both
    task = web.open_task()
    answer = ask(web, task=task)
    assert answer.status_code == 201, answer.json
    grant, credential = answer.json["grant"], answer.json["credential"]
    assert credential["data"] == {"username": "jit-grt-1", "password": PASSWORD}
    assert (credential["type"], credential["expires_at"]) == ("database", grant["expires_at"])
    assert (grant["provider"], grant["revocation_class"], grant["lease"]["state"]) == ("vault", "hard", "held")
    shown = web.get(f"/v1/grants/{grant['id']}", "summarizer")
    assert shown.json["lease"] == grant["lease"]
    assert PASSWORD not in shown.text
    lease = web.get(f"/v1/leases/{grant['lease']['id']}", "audrey").json
    assert (lease["state"], lease["grant_id"], lease["owed_since"]) == ("held", grant["id"], None)
    receipt = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline").json
    assert receipt["totals"] == {"ended": 1, "confirmed_dead": 1, "outstanding": 0}
    assert web.house.outside.alive == {}
    lease = web.get(f"/v1/leases/{lease['id']}", "ada").json
    assert lease["state"] == "released"
    assert lease["confirmed_dead_at"] == lease["owed_since"] == receipt["grants"][0]["confirmed_dead_at"]
    # One question gives the life of everything of the task, what became of its secrets outside too.
    told = [event["type"] for event in web.get(f"/v1/audit?task={task['id']}", "audrey").json["items"]]
    for type_ in ("task.opened", "grant.approved", "lease.held", "grant.issued", "lease.owed", "lease.released"):
        assert told.count(type_) == 1, told


def test_what_is_owed_says_since_when_how_often_it_was_tried_and_why_it_fails(web_on_both):
    web = web_on_both
    lease_id, ended_at = stuck(web)
    [lease] = web.get("/v1/leases?state=stuck", "ada").json["items"]
    assert (lease["id"], lease["attempts"], lease["last_error"]) == (lease_id, 6, SEALED)
    assert lease["owed_since"] == rfc3339(ended_at)
    assert lease["confirmed_dead_at"] is None
    assert lease["next_attempt_at"] > rfc3339(web.house.clock())
    # INV-27, INV-04: it is tried on, and is dead when the outside says so.
    web.house.outside.down = False
    web.house.pay()
    lease = web.get(f"/v1/leases/{lease_id}", "ada").json
    assert (lease["state"], lease["last_error"]) == ("released", None)


def test_a_lease_of_a_grant_that_never_came_to_be_is_owed_since_it_was_made(web_on_both):
    web = web_on_both
    web.house.outside.down = True
    made_at = web.house.clock()
    refused(ask(web), status=[503])
    web.house.clock.forward(seconds=30)
    [lease] = web.get("/v1/leases", "ada").json["items"]
    assert lease["owed_since"] == rfc3339(made_at)


def test_leases_go_page_by_page_newest_first_and_are_filtered(web_on_both):
    web = web_on_both
    task = web.open_task()
    made = [ask(web, task=task).json["grant"] for _ in range(3)]
    ids = [grant["lease"]["id"] for grant in made]
    first = web.get("/v1/leases?limit=2", "ada").json
    second = web.get(f"/v1/leases?limit=2&cursor={first['next_cursor']}", "ada").json
    assert [lease["id"] for lease in first["items"] + second["items"]] == ids[::-1]
    web.post(f"/v1/grants/{made[0]['id']}/revoke", "summarizer")
    assert [one["id"] for one in web.get("/v1/leases?state=released", "ada").json["items"]] == [ids[0]]
    assert [one["id"] for one in web.get(f"/v1/leases?grant={made[1]['id']}", "ada").json["items"]] == [ids[1]]
    assert len(web.get("/v1/leases?provider=vault&state=held", "ada").json["items"]) == 2
    assert web.get("/v1/leases?provider=other", "ada").json["items"] == []
    refused(web.get("/v1/leases?state=lost", "ada"), member="state")
    refused(web.get("/v1/leases?cursor=x", "ada"), member="cursor")


@pytest.mark.parametrize("path", ["/v1/leases", "/v1/leases/lea_0000000000000000000000000a"])
def test_only_admins_and_auditors_see_what_is_owed(web, path):
    for name in ("pipeline", "summarizer", "crm-api"):
        assert refused(web.get(path, name), status=[403])["code"] == "role_missing"
    for name in ("ada", "audrey"):
        assert web.get(path, name).status_code in (200, 404)


def test_a_stuck_lease_is_abandoned_by_an_admin_with_a_reason_and_stays_open(web):
    lease_id, _ = stuck(web)
    path, body = f"/v1/leases/{lease_id}/abandon", {"reason": "the server was scrapped"}
    for name in ("audrey", "summarizer", "pipeline"):
        assert refused(web.post(path, name, json=body), status=[403])["code"] == "role_missing"
    refused(web.post(path, "ada", json={}), member="reason")
    refused(web.post(path, "ada", json={"reason": ""}), member="reason")
    lease = web.post(path, "ada", json=body).json
    assert (lease["state"], lease["abandoned_by"]) == ("stuck", "ada")
    assert lease["abandoned_reason"] == "the server was scrapped"
    assert lease["owed_since"] is not None
    assert web.post(path, "ada", json={"reason": "again"}).json == lease
    assert web.get(f"/v1/grants/{lease['grant_id']}", "ada").json["lease"]["abandoned_at"] == lease["abandoned_at"]
    [event] = web.get("/v1/audit?type=lease.abandoned", "audrey").json["items"]
    assert (event["actor"], event["reason"]) == ("ada", "the server was scrapped")
    grant = web.get(f"/v1/grants/{lease['grant_id']}", "ada").json
    assert event["task_id"] == grant["task_id"] is not None


def test_only_what_is_stuck_can_be_abandoned(web):
    lease_id = ask(web).json["grant"]["lease"]["id"]
    problem = refused(web.post(f"/v1/leases/{lease_id}/abandon", "ada", json={"reason": "x"}), status=[409])
    assert "only one that is stuck" in problem["detail"]
    nothing = "/v1/leases/lea_0000000000000000000000000a/abandon"
    assert refused(web.post(nothing, "ada", json={"reason": "x"}), status=[404])["code"] == "not_found"


def test_nothing_is_issued_from_a_provider_that_was_not_looked_at_yet(store_url, tmp_path):
    """INV-37."""
    with house_on_outside(store_url, tmp_path, looked=False) as house:
        web = Web(house)
        answer = ask(web)
        assert "has not yet compared" in refused(answer, status=[503])["detail"]
        assert int(answer.headers["Retry-After"]) >= 1
        assert house.outside.alive == {}
        house.broker.reconciliation.run()
        assert ask(web).status_code == 201


# --- What an agent sends -------------------------------------------------------------------------------------------


def test_a_certificate_is_asked_for_with_a_request_of_ones_own(web):
    answer = ask(web, AGENTS, "connect", parameters={"csr": certificate_request()})
    assert answer.status_code == 201, answer.json
    assert answer.json["credential"]["type"] == "pki"
    assert answer.json["grant"]["lease"]["state"] == "held"


BROKEN = "-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize(
    ("resource", "scope", "parameters", "member", "says"),
    [
        (AGENTS, "connect", {}, "parameters.csr", "csr is missing"),
        (AGENTS, "connect", {"csr": "hello"}, "parameters.csr", "one certificate request in PEM"),
        (AGENTS, "connect", {"csr": BROKEN}, "parameters.csr", "cannot be read"),
        (AGENTS, "connect", {"csr": "x" * 16_385}, "parameters.csr", "at most 16384 characters"),
        (AGENTS, "connect", {"csr": ""}, "parameters.csr", "at least 1 character"),
        (AGENTS, "connect", {"csr": 7}, "parameters.csr", "valid string"),
        (AGENTS, "connect", {"csr": BROKEN, "ttl": "9h"}, "parameters", "takes no parameter 'ttl'; it takes: csr"),
        (HOSTS, "login", {"public_key": "ssh-rsa AAAA\nssh-rsa BBBB"}, "parameters.public_key", "one line"),
        (ORDERS, "select", {"role": "../../admin"}, "parameters", "takes no parameter 'role'; it takes: none"),
        (CRM, "contacts:read", {"csr": BROKEN}, "parameters", "takes no parameters: leave them out"),
        (ORDERS, "select", {f"p{n}": "x" for n in range(9)}, "parameters", "at most 8 items"),
    ],
)
def test_a_parameter_that_is_wrong_is_named_and_nothing_is_left_of_it(web, resource, scope, parameters, member, says):
    problem = refused(ask(web, resource, scope, parameters=parameters), status=[400])
    assert (problem["code"], problem["member"]) == ("invalid_request", member)
    assert says in problem["detail"]
    assert web.house.outside.alive == {}
    web.house.pay()
    assert {lease["state"] for lease in web.get("/v1/leases", "ada").json["items"]} <= {"released"}


def test_what_was_wrong_with_a_parameter_is_on_record_without_the_parameter(web):
    ask(web, AGENTS, "connect", parameters={"csr": "canary-8841"})
    events = web.get("/v1/audit", "audrey")
    latest = events.json["items"][0]
    assert (latest["type"], latest["outcome"]) == ("grant.refused", "invalid_request")
    assert "csr" in latest["reason"]
    assert "canary-8841" not in events.text


@pytest.mark.parametrize(("fault", "code"), [("down", "provider_unavailable"), ("refuses", "provider_refused")])
def test_an_outside_that_fails_is_a_503_that_says_nothing_of_the_set_up_and_owes_what_may_exist(web, fault, code):
    setattr(web.house.outside, fault, True)
    answer = ask(web)
    problem = refused(answer, status=[503])
    assert problem["code"] == code
    assert int(answer.headers["Retry-After"]) >= 1
    assert SEALED not in answer.text and "no such role" not in answer.text
    assert web.get(f"/problems/{code}").status_code == 200
    [failed] = web.get("/v1/audit?type=grant.failed", "audrey").json["items"]
    assert failed["outcome"] == code
    assert failed["reason"] in (SEALED, "403: no such role")
    web.house.outside.down = web.house.outside.refuses = False
    assert ask(web).status_code == 201


def test_a_secret_is_not_asked_for_at_the_token_endpoint_bound_to_a_key_or_renewed(web):
    task = web.open_task()
    grant = ask(web, task=task).json["grant"]
    form = {"grant_type": "client_credentials", "resource": ORDERS, "scope": "select", "task_id": task["id"]}
    answer = web.form("/oauth2/token", **form, **web.assertion("summarizer"))
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_target")
    assert "POST /v1/grants" in answer.json["error_description"]
    problem = refused(web.post(f"/v1/grants/{grant['id']}/renew", "summarizer", json={}), status=[400])
    assert "ask for a new one, and hand this one back" in problem["detail"]


def test_the_same_request_again_gives_another_secret_and_the_first_one_dies(web):
    task, key = web.open_task(), {"Idempotency-Key": "once"}
    first = ask(web, task=task, headers=key).json["grant"]
    second = ask(web, task=task, headers=key).json["grant"]
    assert first["id"] != second["id"]
    web.house.pay()
    assert len(web.house.outside.alive) == 1
    assert web.get(f"/v1/grants/{first['id']}", "summarizer").json["lease"]["state"] == "released"


def test_a_certificate_is_exposed_until_its_bound_has_passed_and_the_receipt_says_so(web):
    task = web.open_task()
    ask(web, AGENTS, "connect", task=task, parameters={"csr": certificate_request()})
    ended_at = web.house.clock()
    [line] = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline").json["grants"]
    assert (line["confirmed_dead_at"], line["exposed_until"]) == (None, rfc3339(ended_at + timedelta(seconds=60)))
    web.house.pay()
    [line] = web.get(f"/v1/tasks/{task['id']}/receipt", "pipeline").json["grants"]
    assert (line["confirmed_dead_at"], line["exposed_until"]) == (rfc3339(ended_at + timedelta(seconds=60)), None)
