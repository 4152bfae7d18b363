"""The OAuth surface, as unmodified clients and verifiers meet it."""

import json
import logging
import re
import threading
from dataclasses import replace
from datetime import timedelta

import httpx
import jwt
import pytest
from authlib.integrations.requests_client import OAuth2Session
from prometheus_client import REGISTRY
from werkzeug.serving import make_server

from broker.domain.catalogue import PrincipalRule, TrustedIssuer
from broker.services.proofs import DPOP_ALGORITHMS
from tests.house import CRM, ISSUER, catalogue_for
from tests.workloads import dpop_proof, issuer_key, trusted_issuer, workload_token, write_key_set

JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
JWT_TYPE = "urn:ietf:params:oauth:token-type:jwt"
TASK = '[{"type":"urn:broker:task","task_id":"%s"}]'
CLIENT_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
SPIFFE = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"


@pytest.fixture
def ask(web):
    """What every request to the token endpoint has in common."""
    task = web.open_task()
    return {"resource": CRM, "scope": "contacts:read", "task_id": task["id"]}


def ways(web):
    token = web.house.token("summarizer")
    return {
        "client assertion": {"grant_type": "client_credentials", **web.assertion("summarizer")},
        "jwt bearer": {"grant_type": JWT_BEARER, "assertion": token},
        "exchange": {"grant_type": EXCHANGE, "subject_token": token, "subject_token_type": JWT_TYPE},
    }


@pytest.mark.parametrize("way", ["client assertion", "jwt bearer", "exchange"])
def test_each_way_to_ask_gives_the_same_kind_of_token(web, ask, way):
    answer = web.form("/oauth2/token", **ways(web)[way], **ask)
    assert answer.status_code == 200, answer.json
    assert answer.headers["Cache-Control"] == "no-store"
    got = answer.json
    assert (got["token_type"], got["expires_in"], got["scope"]) == ("Bearer", 300, "contacts:read")
    assert got["task_id"] == ask["task_id"]
    assert ("issued_token_type" in got) is (way == "exchange")
    assert web.introspect(got["access_token"])["client_id"] == "summarizer"


def test_the_task_may_come_in_authorization_details(web, ask):
    details = json.dumps([{"type": "urn:broker:task", "task_id": ask.pop("task_id")}])
    answer = web.form("/oauth2/token", **ways(web)["jwt bearer"], **ask, authorization_details=details)
    assert answer.status_code == 200, answer.json


def test_audience_is_another_word_for_resource(web, ask):
    ask["audience"] = ask.pop("resource")
    assert web.form("/oauth2/token", **ways(web)["jwt bearer"], **ask).status_code == 200


def test_a_live_token_is_exchanged_for_its_renewal(web, ask):
    first = web.form("/oauth2/token", **ways(web)["jwt bearer"], **ask).json
    web.house.clock.forward(seconds=100)
    exchange = {
        "grant_type": EXCHANGE,
        "subject_token": first["access_token"],
        "subject_token_type": "urn:ietf:params:oauth:token-type:access_token",
        **web.assertion("summarizer"),
    }
    renewed = web.form("/oauth2/token", **exchange)
    assert renewed.status_code == 200, renewed.json
    assert renewed.json["grant_id"] == first["grant_id"]
    assert renewed.json["access_token"] != first["access_token"]
    for wrong, error in [
        ({"resource": "https://ledger.example/api"}, "invalid_target"),
        ({"scope": "contacts:write"}, "invalid_scope"),
        ({"task_id": "task_0000000000000000000000000a"}, "invalid_grant"),
        ({"authorization_details": TASK % "task_0000000000000000000000000a"}, "invalid_grant"),
        ({"authorization_details": TASK % ask["task_id"], "task_id": "task_x"}, "invalid_authorization_details"),
        ({"authorization_details": "garbage"}, "invalid_authorization_details"),
        (web.assertion("scribe", scope="nonsense", resource="no such"), "invalid_request"),
    ]:
        assert web.form("/oauth2/token", **(exchange | wrong)).json["error"] == error
    again = web.form("/oauth2/token", **exchange, authorization_details=TASK % ask["task_id"])
    assert again.json["grant_id"] == first["grant_id"]


def test_a_dpop_proof_binds_the_token_and_works_once(web, ask):
    proof = dpop_proof(issuer_key(), url=f"{ISSUER}/oauth2/token", now=web.house.clock())
    answer = web.form("/oauth2/token", headers={"DPoP": proof}, **ways(web)["jwt bearer"], **ask)
    assert answer.json["token_type"] == "DPoP", answer.json
    claims = jwt.decode(answer.json["access_token"], options={"verify_signature": False})
    assert list(claims["cnf"]) == ["jkt"]
    again = web.form("/oauth2/token", headers={"DPoP": proof}, **ways(web)["jwt bearer"], **ask)
    assert (again.status_code, again.json["error"]) == (400, "invalid_dpop_proof")


ERRORS = [
    ({"grant_type": None}, 400, "invalid_request"),
    ({"grant_type": "password"}, 400, "unsupported_grant_type"),
    ({"grant_type": "authorization_code"}, 400, "unsupported_grant_type"),
    ({"assertion": None}, 400, "invalid_request"),
    ({"assertion": "a.b.c"}, 400, "invalid_grant"),
    ({"resource": None}, 400, "invalid_target"),
    ({"resource": "https://crm.example/api#x"}, 400, "invalid_target"),
    ({"resource": "https://crm.example/" + "x" * 1000}, 400, "invalid_target"),
    ({"resource": None, "audience": "https://crm.example/" + "x" * 1000}, 400, "invalid_target"),
    ({"task_id": "task_" + "0" * 5000}, 400, "invalid_grant"),
    ({"authorization_details": TASK % ("x" * 1001)}, 400, "invalid_authorization_details"),
    ({"audience": "https://ledger.example/api"}, 400, "invalid_target"),
    ({"scope": None}, 400, "invalid_scope"),
    ({"scope": "contacts:read  contacts:write"}, 400, "invalid_scope"),
    ({"scope": "contacts:delete"}, 400, "invalid_scope"),
    ({"scope": "contacts:write"}, 400, "access_denied"),
    ({"task_id": None}, 400, "invalid_request"),
    ({"task_id": "task_0000000000000000000000000a"}, 400, "invalid_grant"),
    ({"task_id": "../../etc/passwd"}, 400, "invalid_grant"),
    ({"authorization_details": "{}"}, 400, "invalid_authorization_details"),
    ({"authorization_details": "[]"}, 400, "invalid_authorization_details"),
    ({"authorization_details": '[{"type":"x"}]'}, 400, "invalid_authorization_details"),
    ({"authorization_details": '[{"type":"urn:broker:task","a":1}]'}, 400, "invalid_authorization_details"),
    ({"authorization_details": '[{"type":"urn:broker:task","type":"x"}]'}, 400, "invalid_authorization_details"),
    ({"authorization_details": '[{"type":"urn:broker:task","task_id":"x"}]'}, 400, "invalid_authorization_details"),
    ({"client_secret": "hunter2"}, 401, "invalid_client"),
    ({"client_id": "somebody-else"}, 401, "invalid_client"),
    ({"scope": "contacts:read\r\nX: y"}, 400, "invalid_request"),
    ({"scope": "contacts\x00read"}, 400, "invalid_request"),
]


@pytest.mark.parametrize(("wrong", "status", "error"), ERRORS, ids=lambda value: str(value)[:50])
def test_errors_are_oauths_own(web, ask, wrong, status, error):
    given = {"grant_type": JWT_BEARER, "assertion": web.house.token("summarizer"), **ask} | wrong
    answer = web.form("/oauth2/token", **{name: value for name, value in given.items() if value is not None})
    assert (answer.status_code, answer.json["error"]) == (status, error), answer.json
    description = answer.json["error_description"]
    assert description.isascii()
    assert not set(description) & {'"', "\\", "\n"}
    assert "hunter2" not in description


def test_parameters_must_not_repeat_and_belong_into_a_form(web, ask):
    ok = {"grant_type": JWT_BEARER, "assertion": web.house.token("summarizer"), **ask}
    twice = [*ok.items(), ("scope", "contacts:read")]
    body = "&".join(f"{name}={value}" for name, value in twice)
    form = "application/x-www-form-urlencoded"
    assert web.client.post("/oauth2/token", data=body, content_type=form).json["error"] == "invalid_request"
    assert web.client.post("/oauth2/token", json=ok).json["error"] == "invalid_request"
    assert web.client.post("/oauth2/token?scope=x", data=ok).json["error"] == "invalid_request"
    assert web.client.post("/oauth2/token", data=ok | {"x": "y" * 70_000}).status_code == 413
    assert (
        web.client.post("/oauth2/token", data="%ff=%ff", content_type="application/x-www-form-urlencoded").json["error"]
        == "invalid_request"
    )


def test_a_bad_client_is_unauthorized_and_told_nothing(web, ask):
    wrong = [
        {"client_assertion": "a.b.c"},
        {"client_assertion": web.house.token("nobody")},
        {"client_assertion": None},
        {"client_id": "somebody-else"},
    ]
    answers = []
    for change in wrong:
        given = {"grant_type": "client_credentials", **web.assertion("summarizer"), **ask} | change
        answer = web.form("/oauth2/token", **{name: value for name, value in given.items() if value is not None})
        assert (answer.status_code, answer.json["error"]) == (401, "invalid_client")
        assert "WWW-Authenticate" in answer.headers
        answers.append(answer.json)
    assert all(answer == answers[0] for answer in answers)


def test_introspection_tells_others_nothing(web, ask):
    token = web.form("/oauth2/token", **ways(web)["jwt bearer"], **ask).json["access_token"]
    assert web.introspect(token, by="ledger-api") == {"active": False}
    assert web.introspect(token, by="ada") == {"active": False}
    assert web.introspect("nonsense") == {"active": False}
    assert web.form("/oauth2/introspect", token=token).status_code == 401
    bearer = web.form("/oauth2/introspect", headers=web.as_("crm-api"), token=token)
    assert bearer.json["active"] is True


def test_revocation_is_for_the_holder_and_the_orchestrator(web, ask):
    token = web.form("/oauth2/token", **ways(web)["jwt bearer"], **ask).json["access_token"]
    for stranger in ("scribe", "other-pipeline", "ada"):
        # Whether a found token still lives is nothing a stranger is told.
        answers = [web.form("/oauth2/revoke", token=t, **web.assertion(stranger)) for t in (token, "nonsense")]
        assert [(answer.status_code, answer.get_data()) for answer in answers] == [(200, b"")] * 2
    assert web.introspect(token)["active"] is True
    assert web.form("/oauth2/revoke", token=token, **web.assertion("summarizer")).status_code == 200
    assert web.introspect(token) == {"active": False}
    assert web.form("/oauth2/revoke", token=token, **web.assertion("pipeline")).status_code == 200
    assert web.form("/oauth2/revoke", token="nonsense", **web.assertion("pipeline")).status_code == 200


def test_the_metadata_names_what_is_there(web):
    metadata = web.get("/.well-known/oauth-authorization-server").json
    assert metadata == web.get("/.well-known/openid-configuration").json
    assert metadata["issuer"] == ISSUER
    assert metadata["response_types_supported"] == ["none"]
    for name, value in metadata.items():
        if name.endswith(("_endpoint", "jwks_uri")):
            assert value.startswith(f"{ISSUER}/"), name
            path = value.removeprefix(ISSUER)
            assert web.get(path).status_code != 404
    resource = web.get("/.well-known/oauth-protected-resource/v1").json
    assert resource["resource"] == f"{ISSUER}/v1"
    assert web.get("/oauth2/authorize?response_type=code").status_code == 400


def test_documents_are_cached_by_their_content(web):
    first = web.get("/oauth2/jwks")
    tag = first.headers["ETag"]
    assert web.client.get("/oauth2/jwks", headers={"If-None-Match": tag}).status_code == 304


def test_somebody_elses_live_token_is_refused_like_a_dead_one(web, ask):
    token = web.form("/oauth2/token", **ways(web)["jwt bearer"], **ask).json["access_token"]
    web.open_task("scribe")
    exchange = {"grant_type": EXCHANGE, "subject_token_type": JWT_TYPE, "resource": CRM, "scope": "contacts:read"}

    def answered(subject):
        answer = web.form("/oauth2/token", **exchange, subject_token=subject, **web.assertion("scribe"))
        return answer.status_code, answer.json

    foreign = {"live": token, "a workload's": web.house.token("summarizer"), "nonsense": "nonsense"}
    answers = {name: answered(subject) for name, subject in foreign.items()}
    web.form("/oauth2/revoke", token=token, **web.assertion("summarizer"))
    answers["dead"] = answered(token)
    assert set(map(str, answers.values())) == {str(answers["dead"])}
    assert answers["dead"][1]["error"] == "invalid_request"


@pytest.fixture
def with_issuers(web, tmp_path):
    """Adds a trust domain, and an issuer whose tokens are for one use."""
    key = issuer_key()
    catalogue = catalogue_for(web.house.issuer)
    issuers = (
        TrustedIssuer(
            name="prod",
            issuer="spiffe://prod.example",
            key_source="spiffe_bundle_file",
            location=str(write_key_set(tmp_path / "bundle.json", key, use="jwt-svid")),
        ),
        trusted_issuer(write_key_set(tmp_path / "once.json", key), name="once", single_use=True, algorithms=("ES256",)),
    )
    principals = tuple(
        PrincipalRule(name=name, kind="agent", issuer=issuer, subject=subject, roles=("agent",), implicit_tasks=True)
        for name, issuer, subject in (("svid", "prod", SVID), ("one-timer", "once", "one-timer"))
    )
    policy = {"more.cedar": '@id("more") permit (principal, action, resource) when { principal.kind == "agent" };'}
    web.house.broker.administration.apply(
        replace(
            catalogue,
            issuers=catalogue.issuers + issuers,
            principals=catalogue.principals + principals,
            policies={**catalogue.policies, **policy},
        ),
        by="tests",
    )
    web.get("/readyz")

    def signed(sub, **more):
        return workload_token(key, now=web.house.clock(), aud=ISSUER, sub=sub, **more)

    return signed


SVID = "spiffe://prod.example/ns/agents/sa/svid"
ASKED = {"resource": CRM, "scope": "contacts:read"}


def test_a_spiffe_assertion_is_one_of_a_trust_domain(web, with_issuers):
    svid = with_issuers(SVID, without=("iss",))
    for kind, assertion, status in [
        (SPIFFE, svid, 200),
        (CLIENT_ASSERTION, svid, 200),
        (SPIFFE, web.house.token("scribe"), 401),
        (CLIENT_ASSERTION, web.house.token("scribe"), 200),
    ]:
        proof = {"client_assertion_type": kind, "client_assertion": assertion}
        answer = web.form("/oauth2/token", grant_type="client_credentials", **proof, **ASKED)
        assert answer.status_code == status, (kind, answer.json)


def test_a_token_for_one_use_is_exchanged_by_the_client_it_proves(web, with_issuers):
    def exchange(subject, assertion):
        return web.form(
            "/oauth2/token",
            grant_type=EXCHANGE,
            subject_token=subject,
            subject_token_type=JWT_TYPE,
            client_assertion_type=CLIENT_ASSERTION,
            client_assertion=assertion,
            **ASKED,
        )

    same, other, third = (with_issuers("one-timer", jti=jti) for jti in ("a", "b", "c"))
    assert exchange(same, same).status_code == 200
    assert exchange(other, third).status_code == 200
    assert exchange(other, third).json["error"] == "invalid_client"
    assertion = with_issuers("one-timer", jti="d")
    proof = {"client_assertion_type": CLIENT_ASSERTION, "client_assertion": assertion}
    answer = web.form("/oauth2/token", grant_type=JWT_BEARER, assertion=assertion, **proof, **ASKED)
    assert answer.status_code == 200, answer.json


@pytest.mark.parametrize(
    ("way", "status", "error"),
    [
        ("client assertion", 401, "invalid_client"),
        ("jwt bearer", 400, "invalid_grant"),
        ("exchange", 400, "invalid_request"),
    ],
)
def test_a_token_that_ended_within_the_leeway_is_refused_in_the_words_of_its_way(web, ask, way, status, error):
    form = ways(web)[way]
    web.house.clock.forward(seconds=3600)
    ended = web.house.clock.at - timedelta(seconds=3600)
    token = web.house.issuer.token("dev:summarizer", ISSUER, ended, lifetime=timedelta(seconds=3595))
    form = {
        name: token if name in ("client_assertion", "assertion", "subject_token") else v for name, v in form.items()
    }
    ask["task_id"] = web.open_task()["id"]
    answer = web.form("/oauth2/token", **form, **ask)
    assert (answer.status_code, answer.json["error"]) == (status, error), answer.json


def test_a_refused_token_is_counted_and_logged_wherever_it_came_in(web, ask, caplog):
    def count():
        return REGISTRY.get_sample_value("broker_unauthenticated_total")

    caplog.set_level(logging.INFO)
    bad = dict.fromkeys(("client_assertion", "assertion", "subject_token"), "a.b.c")
    for way, form in ways(web).items():
        before = count()
        answer = web.form("/oauth2/token", **{name: bad.get(name, value) for name, value in form.items()}, **ask)
        assert count() == before + 1, way
        line = next(record for record in reversed(caplog.records) if record.getMessage() == "unauthenticated")
        assert line.fields["trace_id"] == answer.headers["X-Trace-Id"]
        assert line.fields["reason"]


def test_every_answer_names_its_trace(web):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    for path in ("/healthz", "/oauth2/jwks", "/v1/tasks", "/oauth2/nothing", "/openapi.json"):
        assert web.client.get(path, headers=headers).headers["X-Trace-Id"] == trace
    assert web.form("/oauth2/token", headers=headers).headers["X-Trace-Id"] == trace


def test_nothing_under_oauth_is_kept_but_keys_and_those_no_longer_than_the_bound(web, ask, monkeypatch):
    token = web.form("/oauth2/token", **ways(web)["jwt bearer"], **ask).json["access_token"]
    answers = [
        web.form("/oauth2/revoke", token=token, **web.assertion("summarizer")),
        web.form("/oauth2/introspect", token=token, **web.assertion("crm-api")),
        web.form("/oauth2/token"),
        web.get("/oauth2/authorize"),
        web.get("/oauth2/token"),
        web.get("/oauth2/nothing"),
        web.get("/v1/tasks"),
        web.get("/v1/nothing"),
    ]
    monkeypatch.setattr(web.house.broker.verification, "introspect", lambda *_: 1 / 0)
    answers.append(web.form("/oauth2/introspect", token=token, **web.assertion("crm-api")))
    assert answers[-1].status_code == 500
    assert [answer.headers["Cache-Control"] for answer in answers] == ["no-store"] * len(answers)
    kept = re.fullmatch(r"public, max-age=(\d+)", web.get("/oauth2/jwks").headers["Cache-Control"])
    assert int(kept[1]) <= 15


def test_what_never_reaches_an_oauth_endpoint_is_an_oauth_error_too(web, monkeypatch):
    monkeypatch.setattr(web.house.broker.verification, "jwks", lambda: 1 / 0)
    for answer, status, error in (
        (web.get("/oauth2/nothing"), 404, "invalid_request"),
        (web.get("/oauth2/token"), 405, "invalid_request"),
        (web.get("/oauth2/jwks"), 500, "server_error"),
    ):
        assert (answer.status_code, answer.mimetype, answer.json["error"]) == (status, "application/json", error)
        assert answer.json.keys() == {"error", "error_description"}


def test_who_tries_a_password_is_told_in_its_scheme(web):
    """RFC 6749 section 5.2: WWW-Authenticate with the scheme that the client used."""
    for sent, scheme in (
        ("Basic eDp5", "Basic"),
        ("basic eDp5", "Basic"),
        ("Bearer a.b.c", "Bearer"),
        ("X y", "Bearer"),
    ):
        for path in ("/oauth2/token", "/oauth2/introspect"):
            form = {"grant_type": "client_credentials", "token": "x", **web.assertion("scribe")}
            answer = web.form(path, headers={"Authorization": sent}, **form)
            assert answer.status_code == 401, (sent, path)
            assert answer.headers["WWW-Authenticate"] == f'{scheme} realm="{ISSUER}"'


def test_the_metadata_says_what_is_really_accepted(web, with_issuers):
    metadata = web.get("/.well-known/oauth-authorization-server").json
    assert metadata["dpop_signing_alg_values_supported"] == list(DPOP_ALGORITHMS)
    catalogue = web.house.broker.standing.now().catalogue
    accepted = {name for issuer in catalogue.issuers for name in issuer.algorithms}
    for name, value in metadata.items():
        if name.endswith("_endpoint_auth_signing_alg_values_supported"):
            assert set(value) == accepted, name
    # A trust domain is no authorization server that anybody could ask.
    servers = web.get("/.well-known/oauth-protected-resource/v1").json["authorization_servers"]
    assert servers
    assert not [server for server in servers if not server.startswith(("https://", "http://"))]


@pytest.fixture
def served(web):
    """The same application behind a real socket, for clients that bring their own HTTP."""
    server = make_server("127.0.0.1", 0, web.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_unmodified_client_gets_a_token_and_an_unmodified_verifier_accepts_it(web, ask, served):
    client = OAuth2Session("dev:summarizer", token_endpoint_auth_method="none")
    url = f"{served}/oauth2/token"
    answer = client.fetch_token(url, grant_type="client_credentials", **web.assertion("summarizer"), **ask)
    client.close()
    keys = jwt.PyJWKClient(f"{served}/oauth2/jwks")
    key = keys.get_signing_key_from_jwt(answer["access_token"])
    options = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}  # the house's clock stands in March
    claims = jwt.decode(answer["access_token"], key, algorithms=["ES256"], audience=CRM, issuer=ISSUER, options=options)
    assert claims["task_id"] == ask["task_id"]


def test_a_ten_megabyte_body_is_refused_without_being_read(web, served):
    answer = httpx.post(f"{served}/v1/tasks", headers=web.as_("pipeline"), content=b"x" * 10_000_000)
    assert answer.status_code == 413
