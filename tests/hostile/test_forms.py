"""Every parameter of every OAuth endpoint, filled with everything it must not hold (RFC 6749, RFC 8693, RFC 9396)."""

import json
from urllib.parse import quote, urlencode

import pytest

from tests.hostile.conftest import Hostile, refused_by_oauth
from tests.hostile.corpus import MALFORMED, TRICKS
from tests.house import CRM, LEDGER

FORM = "application/x-www-form-urlencoded"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
TOKEN_TYPE = "urn:ietf:params:oauth:token-type:"
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:"


class Endpoint:
    """One way to send a good request; `accepted` is what must hold for it before anything is spoiled."""

    def __init__(self, web, path, **parameters):
        self.web, self.path, self.good = web, path, parameters

    def send(self, parameters, *, path=None, content_type=FORM, headers=None):
        raw = parameters if isinstance(parameters, bytes) else encoded(parameters)
        return self.web.client.post(path or self.path, data=raw, content_type=content_type, headers=headers)


def encoded(parameters):
    pairs = parameters.items() if isinstance(parameters, dict) else parameters
    # A lone surrogate has no UTF-8; this is what a careless encoder makes of it.
    return urlencode(list(pairs), errors="surrogatepass").encode()


def endpoints(web):
    task = web.open_task()
    held = web.grant(task).json["credential"]["token"]
    token = web.house.token("summarizer")
    ask = {"resource": CRM, "scope": "contacts:read", "task_id": task["id"]}
    details = json.dumps([{"type": "urn:broker:task", "task_id": task["id"], "purpose": "x"}])
    return {
        "client credentials": Endpoint(
            web, "/oauth2/token", grant_type="client_credentials", client_id="summarizer",
            authorization_details=details, **web.assertion("summarizer"), **ask,
        ),
        "jwt bearer": Endpoint(
            web, "/oauth2/token", grant_type=JWT_BEARER, assertion=token, client_id="summarizer", audience=CRM, **ask
        ),
        "exchange": Endpoint(
            web, "/oauth2/token", grant_type=EXCHANGE, subject_token=token, subject_token_type=f"{TOKEN_TYPE}jwt",
            requested_token_type=f"{TOKEN_TYPE}access_token", **ask,
        ),
        "renewal": Endpoint(
            web, "/oauth2/token", grant_type=EXCHANGE, subject_token=held,
            subject_token_type=f"{TOKEN_TYPE}access_token", **web.assertion("summarizer"), **ask,
        ),
        "introspection": Endpoint(web, "/oauth2/introspect", token=held, **web.assertion("crm-api")),
        "revocation": Endpoint(web, "/oauth2/revoke", token=held, **web.assertion("summarizer")),
    }  # fmt: skip


WAYS = ("client credentials", "exchange", "introspection", "jwt bearer", "renewal", "revocation")


@pytest.fixture(scope="module")
def one_web(module_house):
    return Hostile(module_house)


@pytest.fixture(params=WAYS)
def endpoint(request, one_web):
    made = endpoints(one_web)[request.param]
    before = one_web.tables()
    yield made
    assert one_web.tables() == before, "a refused request changed something"


@pytest.mark.parametrize("way", WAYS)
def test_the_good_request_of_each_kind_is_accepted(web, way):
    """Otherwise the refusals below would be refused for this."""
    endpoint = endpoints(web)[way]
    assert endpoint.send(endpoint.good).status_code == 200


def test_no_parameter_holds_what_would_change_a_line_or_a_header(endpoint):
    for name in endpoint.good:
        for text in MALFORMED:
            if len(text) < 100:
                refused_by_oauth(endpoint.send(endpoint.good | {name: text}), "invalid_request")


def test_a_name_with_control_characters_is_no_parameter_of_anything(endpoint):
    for name in ("sc\0ope", "scope\r\nX: y", "\u202escope", "x" * 5000):
        answer = endpoint.send([*endpoint.good.items(), (name, "1"), (name, "2")])
        refused_by_oauth(answer, "invalid_request")
        assert "X:" not in answer.headers


@pytest.mark.parametrize("by", ["summarizer", "pipeline"])
def test_a_parameter_of_any_length_fits_no_column_and_breaks_none(web_on_both, by):
    """The refusal of a caller without the role is an event; PostgreSQL would not store one that is too long."""
    web = web_on_both
    task = web.open_task()
    good = {"grant_type": JWT_BEARER, "assertion": web.house.token(by), "resource": CRM, "scope": "contacts:read"}
    endpoint = Endpoint(web, "/oauth2/token", **good, task_id=task["id"])
    before = web.tables()
    for name in ("resource", "audience", "scope", "task_id", "client_id", "grant_type"):
        for text in ("x" * 1001, "x" * 60_000, "x " * 3000, "😀" * 1001):
            refused_by_oauth(endpoint.send(endpoint.good | {name: text}))
    assert web.tables() == before


def test_a_trick_is_a_name_of_nothing(endpoint):
    for name in endpoint.good:
        for text in TRICKS:
            answer = endpoint.send(endpoint.good | {name: text})
            if endpoint.path != "/oauth2/token" and name == "token" and text.isprintable():
                # Neither verb says why a token opens nothing.
                assert (answer.status_code, answer.get_data()) in ((200, b""), (200, b'{"active":false}'))
                continue
            assert "49" not in refused_by_oauth(answer)["error_description"]


def test_every_parameter_is_given_once(endpoint):
    for name, value in endpoint.good.items():
        for again in (value, "", "x"):
            answer = endpoint.send([*endpoint.good.items(), (name, again)])
            assert name in refused_by_oauth(answer, "invalid_request")["error_description"]
        # The same name, otherwise spelled.
        spelled = encoded(endpoint.good) + b"&" + quote(name).replace("_", "%5F").replace("t", "%74").encode() + b"=x"
        refused_by_oauth(endpoint.send(spelled), "invalid_request")


def test_a_parameter_that_is_missing_or_empty_is_missed(endpoint):
    optional = {"client_id", "authorization_details", "requested_token_type", "audience"}
    if endpoint.good.get("subject_token_type", "").endswith("access_token"):
        optional |= {"resource", "scope", "task_id"}  # a renewal keeps them
    if "authorization_details" in endpoint.good:
        optional |= {"task_id"}
    if "audience" in endpoint.good:
        optional |= {"resource"}
    for name in endpoint.good.keys() - optional:
        for without in (
            {key: value for key, value in endpoint.good.items() if key != name},
            endpoint.good | {name: ""},
        ):
            refused_by_oauth(endpoint.send(without))


def test_no_parameter_comes_in_the_query(endpoint):
    for query in ("?scope=x", "?access_token=x", "?x", f"?{urlencode(endpoint.good)}"):
        refused_by_oauth(endpoint.send(endpoint.good, path=endpoint.path + query), "invalid_request")
        refused_by_oauth(endpoint.send(b"", path=endpoint.path + query), "invalid_request")


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/xml",
        "*/*",
        FORM + "x",
    ],
)
def test_a_form_is_a_form(endpoint, content_type):
    for raw in (json.dumps(endpoint.good).encode(), encoded(endpoint.good)):
        answer = refused_by_oauth(endpoint.send(raw, content_type=content_type), "invalid_request")
        assert FORM in answer["error_description"]


def test_a_form_is_well_formed_utf8(endpoint):
    for raw in (
        b"", b"\0", b"&", b"=&=", b"grant_type", b"%", b"a=%", b"a=%f", b"a=%zz", b"a=%ff", b"a=%c0%af", b"\xff=\xff",
        b"a=%ed%a0%80", "ä=ö".encode(), b"a=b;c=d", b"a=b&&c=d", b"[]", b"{}", b"\x1f\x8b\x08", b"a=b&" * 65 + b"c=d",
        encoded(endpoint.good).decode().encode("utf-16"), b"x" * 65_537, b"a=" + b"%00" * 21_000,
    ):  # fmt: skip
        refused_by_oauth(endpoint.send(raw))


def test_the_endpoints_are_for_post_alone(endpoint):
    for method in ("GET", "PUT", "PATCH", "DELETE", "TRACE"):
        answer = endpoint.web.client.open(endpoint.path, method=method)
        assert answer.status_code == 405
        assert set(answer.headers["Allow"].split(", ")) == {"POST", "OPTIONS"}
        refused_by_oauth(answer, "invalid_request", status=(405,))


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Basic c3VtbWFyaXplcjpodW50ZXIy"},
        {"Authorization": "Basic"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Digest x"},
        {"Authorization": "Negotiate x"},
    ],
    ids=str,
)
def test_a_password_is_no_way_in_even_beside_a_good_assertion(endpoint, headers):
    """And an endpoint that reads Authorization does not read past a scheme it does not know."""
    refused_by_oauth(endpoint.send(endpoint.good, headers=headers), "invalid_client", status=(401,))
    refused_by_oauth(endpoint.send(endpoint.good | {"client_secret": "hunter2"}), "invalid_client", status=(401,))


def test_a_caller_authenticates_once(endpoint):
    if endpoint.path == "/oauth2/token":
        return
    headers = endpoint.web.as_("crm-api")
    refused_by_oauth(endpoint.send(endpoint.good, headers=headers), "invalid_request")


DETAILS = (
    "", "null", "1", '"x"', "{}", "[]", "[[]]", "[null]", "[{}]", '[{"type":1}]', '[{"type":"urn:broker:other"}]',
    '[{"type":"urn:broker:task","task_id":1}]', '[{"type":"urn:broker:task","task_id":""}]',
    '[{"type":"urn:broker:task","task_id":null}]', '[{"type":"urn:broker:task","task_id":["x"]}]',
    '[{"type":"urn:broker:task","purpose":"a\\u0000b"}]', '[{"type":"urn:broker:task","purpose":"a\\r\\nb"}]',
    '[{"type":"urn:broker:task","purpose":"\\ud800"}]', '[{"type":"urn:broker:task","purpose":"' + "x" * 1001 + '"}]',
    '[{"type":"urn:broker:task","type":"urn:broker:task"}]', '[{"type":"urn:broker:task","locations":["x"]}]',
    '[{"type":"urn:broker:task"},{"type":"urn:broker:task"}]', '[{"type":"urn:broker:task","purpose":NaN}]',
    "[" * 40 + "]" * 40, "[" * 20_000, "{{7*7}}", "[{'type':'urn:broker:task'}]", '[{"type":"urn:broker:task"}] x',
)  # fmt: skip


def test_authorization_details_are_one_task_of_our_one_type(one_web):
    endpoint = endpoints(one_web)["client credentials"]
    before = one_web.tables()
    for text in DETAILS:
        if text:
            refused_by_oauth(
                endpoint.send(endpoint.good | {"authorization_details": text}), "invalid_authorization_details"
            )
    other = json.dumps([{"type": "urn:broker:task", "task_id": "task_0000000000000000000000000a"}])
    answer = endpoint.send(endpoint.good | {"authorization_details": other})
    refused_by_oauth(answer, "invalid_authorization_details")
    assert one_web.tables() == before


def test_a_token_has_one_resource(one_web):
    endpoint = endpoints(one_web)["jwt bearer"]
    for wrong in (
        {"audience": LEDGER},
        {"resource": f"{CRM}/"},
        {"resource": CRM.upper(), "audience": ""},
        {"resource": f"{CRM}#x", "audience": ""},
        {"resource": f"{CRM} {LEDGER}", "audience": ""},
        {"resource": "", "audience": "*"},
    ):
        refused_by_oauth(endpoint.send(endpoint.good | wrong), "invalid_target")


def test_only_what_rfc_6749_calls_a_scope_is_one(one_web):
    endpoint = endpoints(one_web)["jwt bearer"]
    for scope in (
        " ", "  ", " contacts:read", "contacts:read ", "contacts:read  contacts:read", 'contacts:"read',
        "contacts\\read", "contacts:réad", "contacts:read\u00a0contacts:write", "contacts:read,contacts:write", "*",
        "contacts:*", "CONTACTS:READ", "contacts:read contacts:delete", " ".join(f"s{n}" for n in range(65)), "x" * 201,
    ):  # fmt: skip
        refused_by_oauth(endpoint.send(endpoint.good | {"scope": scope}), "invalid_scope")


def test_a_workload_cannot_be_another_by_saying_so(one_web):
    """Neither by client_id, nor with somebody else's token as the subject or the assertion beside its own."""
    ways = endpoints(one_web)
    for name in ("scribe", "dev:scribe", "SUMMARIZER", "summarizer ", "ada"):
        for way in ("client credentials", "jwt bearer"):
            answer = ways[way].send(ways[way].good | {"client_id": name})
            refused_by_oauth(answer, "invalid_client", status=(401,))
    for way in ("exchange", "renewal"):
        good = ways[way].good | one_web.assertion("scribe")
        refused_by_oauth(ways[way].send(good), "invalid_request")
    good = ways["jwt bearer"].good | one_web.assertion("scribe") | {"client_id": ""}
    refused_by_oauth(ways["jwt bearer"].send(good), "invalid_grant")


def test_what_is_not_ours_to_exchange_is_refused(one_web):
    endpoint = endpoints(one_web)["exchange"]
    for wrong in (
        {"subject_token_type": f"{TOKEN_TYPE}refresh_token"},
        {"subject_token_type": f"{TOKEN_TYPE}id_token"},
        {"subject_token_type": "jwt"},
        {"requested_token_type": f"{TOKEN_TYPE}refresh_token"},
        {"actor_token": one_web.house.token("scribe"), "actor_token_type": f"{TOKEN_TYPE}jwt"},
        {"subject_token": one_web.house.token("nobody")},
        {"subject_token": "a.b.c"},
    ):
        refused_by_oauth(endpoint.send(endpoint.good | wrong), "invalid_request")


@pytest.mark.parametrize("kind", ["", "jwt", "saml2-bearer", "JWT-BEARER", "jwt-bearer "])
def test_an_assertion_is_of_a_type_we_read(one_web, kind):
    endpoint = endpoints(one_web)["client credentials"]
    answer = endpoint.send(endpoint.good | {"client_assertion_type": ASSERTION_TYPE + kind})
    refused_by_oauth(answer, "invalid_request")
