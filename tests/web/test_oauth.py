"""The OAuth surface, as unmodified clients and verifiers meet it."""

import json
import threading

import httpx
import jwt
import pytest
from authlib.integrations.requests_client import OAuth2Session
from werkzeug.serving import make_server

from tests.house import CRM, ISSUER
from tests.workloads import dpop_proof, issuer_key

JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
JWT_TYPE = "urn:ietf:params:oauth:token-type:jwt"
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
        "spiffe assertion": {
            "grant_type": "client_credentials",
            **web.assertion("summarizer", client_assertion_type=SPIFFE),
        },
        "jwt bearer": {"grant_type": JWT_BEARER, "assertion": token},
        "exchange": {"grant_type": EXCHANGE, "subject_token": token, "subject_token_type": JWT_TYPE},
    }


@pytest.mark.parametrize("way", ["client assertion", "spiffe assertion", "jwt bearer", "exchange"])
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
        (web.assertion("scribe"), "invalid_request"),
    ]:
        assert web.form("/oauth2/token", **(exchange | wrong)).json["error"] == error


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
    refused = web.form("/oauth2/revoke", token=token, **web.assertion("scribe"))
    assert (refused.status_code, refused.json["error"]) == (400, "unauthorized_client")
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
