"""`/openapi.json` is valid OpenAPI 3.1, and true: held against the application by what a machine makes of it."""

import json
import re
from dataclasses import replace
from datetime import timedelta

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from broker.web.app import API, create_app
from broker.web.oauth import described
from broker.web.operations import openapi
from tests.hostile.conftest import Hostile, event_stream, stuck_lease
from tests.house import CRM, ISSUER

CALLERS = ("pipeline", "summarizer", "crm-api", "ada", "audrey")
DOCUMENT = openapi([operation for room in API for operation in room.declared], ISSUER, "0")
OPERATIONS = [
    (method, path) for path, entry in (DOCUMENT["paths"] | described.paths()).items() for method in sorted(entry)
]
# Names of configured things are data: a string of the right shape that names nothing is refused, and rightly.
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
REFUSING = [*CHECKS, checks.negative_data_rejection]


@schemathesis.serializer("application/secevent+jwt")
def as_token(_context, value):
    return str(value).encode(errors="replace")


@pytest.fixture(scope="module")
def web(module_house):
    # A stream that says how it begins and is over, so that a generator can ask for many.
    settings = module_house.broker.settings
    briefly = replace(settings, feed=replace(settings.feed, longest_stream=timedelta(0)))
    object.__setattr__(module_house.broker, "settings", briefly)
    return Hostile(module_house)


@pytest.fixture(scope="module")
def document(web):
    return web.get("/openapi.json").json


@pytest.fixture(scope="module")
def schema(web, document):
    return schemathesis.openapi.from_wsgi("/openapi.json", web.app)


def test_the_document_is_valid_openapi(document):
    schemathesis.openapi.from_dict(document).validate()
    assert document["openapi"].startswith("3.1.")
    names = [entry.get("operationId") for path in document["paths"].values() for entry in path.values()]
    named = [name for name in names if name]
    assert len(named) == len(set(named))


def test_no_shape_takes_the_name_of_another():
    """They are described in two places, and the later one would win."""
    assert not DOCUMENT["components"]["schemas"].keys() & described.components().keys()


def test_every_reference_leads_somewhere(document):
    for reference in re.findall(r'"\$ref": ?"#/([^"]+)"', str(document).replace("'", '"')):
        found = document
        for step in reference.split("/"):
            found = found[step]
        assert found


def test_every_route_is_described_and_nothing_else(web, document):
    """A door that nobody wrote down is one that nobody checks."""
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in web.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    unified = {(re.sub(r"{\w+}", "{}", path), method) for path, method in routes}
    said = {(re.sub(r"{\w+}", "{}", path), method) for path, entry in document["paths"].items() for method in entry}
    assert unified == said


def test_every_refusal_has_a_page_and_every_answer_is_described(document):
    for path, entry in document["paths"].items():
        for method, operation in entry.items():
            assert operation["summary"], (method, path)
            assert any(status.startswith("2") or path == "/oauth2/authorize" for status in operation["responses"])
            if path.startswith("/v1/"):
                assert {"400", "401", "403", "503"} <= operation["responses"].keys()


def real_id(web, path):
    if "{id}" not in path:
        return None
    if "/lockdowns/" in path:
        return web.post("/v1/lockdowns", "ada", json={"agent": "nobody", "reason": "drill"}).json["id"]
    if "/event-streams/" in path:
        return event_stream(web)
    task = web.open_task("summarizer")
    if "/tasks/" in path:
        return task["id"]
    grant_id = web.grant(task).json["grant"]["id"]
    return grant_id if "/grants/" in path else stuck_lease(web.house.broker, grant_id)


def tried(web, schema, method, path, by, mode, wanted):
    """Some requests to one operation by one caller, each checked against what the document says of it."""
    operation = schema[path][method.upper()]
    real = real_id(web, path) if by and mode is GenerationMode.POSITIVE else None

    @settings(
        derandomize=True, database=None, deadline=None, max_examples=6, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def run(data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.headers = {**(case.headers or {}), **(web.as_(by) if by else {})}
        if real is not None:
            # An id of the right shape is almost never one of a thing that is there.
            case.path_parameters = {"id": real}
        case.call_and_validate(checks=wanted)

    run()


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda value: value)
def test_whatever_fits_the_document_is_answered_as_it_says(web, schema, method, path):
    for by in CALLERS if path.startswith("/v1/") else (None,):
        tried(web, schema, method, path, by, GenerationMode.POSITIVE, CHECKS)


@pytest.mark.parametrize(
    ("method", "path"),
    [operation for operation in OPERATIONS if operation[1].startswith("/v1/")],
    ids=lambda value: value,
)
def test_whatever_does_not_fit_the_document_is_refused_as_it_says(web, schema, method, path):
    if not schema[path][method.upper()].body and "{" not in path and not schema[path][method.upper()].query:
        return  # nothing about it could be wrong
    for by in CALLERS:
        tried(web, schema, method, path, by, GenerationMode.NEGATIVE, REFUSING)


def test_the_answers_of_the_main_job_are_as_described(web, schema):
    def checked(method, path, answer, status):
        assert answer.status_code == status, answer.json
        schema[path][method].validate_response(answer)
        return answer.json

    ceiling = [{"resource": CRM, "scopes": ["contacts:read", "contacts:write"]}]
    body = {"purpose": "x", "agents": ["summarizer"], "deadline_s": 60, "heartbeat_s": 30, "resources": ceiling}
    task = checked("POST", "/v1/tasks", web.post("/v1/tasks", "pipeline", json=body), 201)
    asked = {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"], "intent": "x", "context": {"a": 1}}
    grant = checked("POST", "/v1/grants", web.post("/v1/grants", "summarizer", json=asked), 201)["grant"]
    refusal = web.post("/v1/grants", "summarizer", json=asked | {"scopes": ["contacts:write"]})
    assert checked("POST", "/v1/grants", refusal, 403)["decision"]["outcome"] == "deny"
    renewal = web.post(f"/v1/grants/{grant['id']}/renew", "summarizer", json={})
    checked("POST", "/v1/grants/{id}/renew", renewal, 200)
    receipt = web.post(f"/v1/grants/{grant['id']}/revoke", "summarizer", json={})
    checked("POST", "/v1/grants/{id}/revoke", receipt, 200)
    for dry_run in (True, False):
        order = {"agent": "summarizer", "reason": "drill", "dry_run": dry_run, "lockdown": not dry_run}
        answer = checked("POST", "/v1/revocations", web.post("/v1/revocations", "ada", json=order), 200)
    lift = web.client.delete(f"/v1/lockdowns/{answer['lockdown']['id']}", headers=web.as_("ada"))
    checked("DELETE", "/v1/lockdowns/{id}", lift, 200)
    ended = web.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
    checked("POST", "/v1/tasks/{id}/complete", ended, 200)
    stuck_lease(web.house.broker, grant["id"])
    for path in ("/v1/tasks", "/v1/grants", "/v1/leases", "/v1/audit", "/v1/policies"):
        assert checked("GET", path, web.get(path, "ada"), 200)["items"]
    token = {"grant_type": "client_credentials", "resource": CRM, "scope": "contacts:read", **web.assertion("scribe")}
    issued = checked("POST", "/oauth2/token", web.client.post("/oauth2/token", data=token), 200)["access_token"]
    for path, by in (("/oauth2/introspect", "crm-api"), ("/oauth2/revoke", "scribe")):
        checked("POST", path, web.client.post(path, data={"token": issued, **web.assertion(by)}), 200)


def test_what_no_generator_sends_is_refused_as_described_too(web, schema, document):
    """Another content type, and a body beyond the limit."""
    for method, path in OPERATIONS:
        operation = schema[path][method.upper()]
        if operation.body:
            address = path.replace("{id}", real_id(web, path) or "")
            for content_type, raw in (("text/plain", b"{}"), ("application/json", b"x" * 65_537)):
                # Who may not send spans is told so before any of them is read.
                by = "summarizer" if path == "/v1/traces" else "ada"
                headers = web.as_(by) if path.startswith(("/v1/", "/ssf/")) else {}
                answer = web.client.open(
                    address, method=method.upper(), data=raw, content_type=content_type, headers=headers
                )
                assert answer.status_code in (400, 413, 415)
                assert str(answer.status_code) in document["paths"][path][method]["responses"], (method, path)
                operation.validate_response(answer)


def test_the_checks_see_an_answer_that_is_not_as_described(web, document):
    """A check that cannot fail is none."""
    wrong = json.loads(json.dumps(document))
    wrong["components"]["schemas"]["TaskAnswer"]["properties"]["agents"] = {"type": "string"}
    schema = schemathesis.openapi.from_dict(wrong)
    answer = web.get(f"/v1/tasks/{web.open_task()['id']}", "pipeline")
    with pytest.raises(Exception, match="string"):
        schema["/v1/tasks/{id}"]["GET"].validate_response(answer)


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda value: value)
def test_whoever_calls_without_a_token_is_told_so_and_nothing_more(web, method, path):
    if not path.startswith("/v1/") and path != "/metrics":
        return  # for everybody, or with the credential in its form
    answer = web.client.open(path.replace("{id}", "x"), method=method.upper(), json={})
    # OTLP wants a google.rpc.Status, which says it with a number.
    said = {"code": 16} if path == "/v1/traces" else {"code": "unauthenticated"}
    assert (answer.status_code, answer.json["code"]) == (401, said["code"])


@pytest.mark.parametrize("path", sorted({path for _, path in OPERATIONS}))
def test_a_method_that_is_not_described_is_refused_with_those_that_are(web, document, path):
    said = {method.upper() for method in document["paths"][path]}
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY"):
        if method in said:
            continue
        answer = web.client.open(re.sub(r"{\w+}", "1", path), method=method, headers=web.as_("ada"))
        assert answer.status_code == 405, (method, path)
        allowed = set(answer.headers["Allow"].split(", "))
        assert allowed - {"HEAD", "OPTIONS"} == said


def test_the_document_is_the_one_of_the_application_behind_it(web, document):
    assert document["servers"] == [{"url": ISSUER}]
    assert document["paths"].keys() == (DOCUMENT["paths"] | described.paths()).keys()
    assert create_app(web.house.broker).test_client().get("/openapi.json").json == document
