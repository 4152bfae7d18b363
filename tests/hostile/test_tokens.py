"""Every defect a workload token can have, at every door: one answer, and not a word of the token anywhere (INV-19).

What each is refused for is for our log alone, and is tested where tokens are read.
"""

import base64
import hashlib
import hmac
import json
import logging
import shutil
from dataclasses import replace
from datetime import timedelta

import pytest

from broker.domain.catalogue import PrincipalRule
from broker.domain.clock import epoch
from broker.providers.dev_issuer import DevIssuer
from broker.telemetry import JsonLines
from broker.wiring import build
from tests.hostile.conftest import Hostile, refused, refused_by_oauth
from tests.house import CRM, ISSUER, House, TestClock, catalogue_for, settings_for
from tests.workloads import IDP, NOW, claims, header, issuer_key, trusted_issuer, write_key_set

KEY, STRANGER = issuer_key("key-1"), issuer_key("key-1")
HEX = hashlib.sha256(b"canary").hexdigest()
AT = epoch(NOW)
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"


@pytest.fixture(scope="module")
def web(migrated_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("house")
    shutil.copyfile(migrated_file, directory / "broker.db")
    dev, clock = DevIssuer.create_or_load(directory), TestClock()
    keys = write_key_set(directory / "corp.jwks.json", KEY)
    catalogue = catalogue_for(dev)
    catalogue = replace(
        catalogue,
        issuers=(
            *catalogue.issuers,
            trusted_issuer(keys),
            trusted_issuer(keys, name="people", issuer=f"{IDP}/people", users=True),
        ),
        principals=(
            *catalogue.principals,
            PrincipalRule(
                name="clerk",
                kind="agent",
                issuer="corp",
                subject="clerk",
                roles=("agent",),
                implicit_tasks=True,
                claims={"namespace": "agents"},
            ),
        ),
    )
    broker = build(settings_for(f"sqlite:///{directory / 'broker.db'}", directory, catalogue), clock=clock)
    broker.apply(by="tests")
    yield Hostile(House(broker=broker, clock=clock, issuer=dev))
    broker.close()


def token(*, key=KEY, headers=None, raw_header=None, raw_payload=None, **changed):
    """A good token of the principal, with a canary in it, unless something is changed."""
    changed = {"aud": ISSUER, "sub": "clerk", "namespace": "agents", "canary": HEX} | changed
    made = header(key, **(headers or {}))
    return key.sign(raw_header or {n: v for n, v in made.items() if v != "absent"}, raw_payload or claims(**changed))


def with_text(**members):
    """The payload as JSON text, members replaced by this very text."""
    payload = claims(aud=ISSUER, sub="clerk", namespace="agents", canary=HEX) | dict.fromkeys(members, "@")
    text = json.dumps(payload)
    for name, written in members.items():
        text = text.replace(f'"{name}": "@"', f'"{name}": {written}')
    return token(raw_payload=text.encode())


def unsigned(algorithm):
    parts = (
        json.dumps(part).encode() for part in (header(KEY, alg=algorithm), claims(aud=ISSUER, sub="clerk", canary=HEX))
    )
    return ".".join([base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts] + [""])


def confused():
    """HMAC with the public key as the password, for verifiers that let the token choose."""
    signing_input = unsigned("HS256")[:-1]
    mac = hmac.new(json.dumps(KEY.jwk).encode(), signing_input.encode(), "sha256").digest()
    return f"{signing_input}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def stolen():
    """What the broker itself issued: it opens a resource, not the broker."""
    return token(headers={"typ": "at+jwt"}, aud=CRM, iss=ISSUER)


TWICE = json.dumps(claims(aud=ISSUER, sub="clerk", namespace="agents")).replace('"sub"', '"sub": "nobody", "sub"')
DEFECTS = {
    "none": unsigned("none"),
    "None": unsigned("None"),
    "no alg": token(headers={"alg": "absent"}),
    "HMAC": token(headers={"alg": "HS256"}),
    "HMAC with the public key": confused(),
    "an algorithm not listed": token(key=issuer_key("key-2", "EdDSA")),
    "an algorithm in a list": token(headers={"alg": ["ES256"]}),
    **{
        f"header {name}": token(headers={name: value})
        for name, value in {
            "jwk": STRANGER.jwk,
            "jku": "https://evil.test/jwks",
            "x5u": "https://evil.test/x",
            "x5c": ["AA=="],
            "crit": ["exp"],
            "b64": False,
        }.items()
    },
    "unknown crit": token(headers={"crit": ["urn:x"], "urn:x": True}),
    "empty crit": token(headers={"crit": []}),
    "kid of nobody": token(headers={"kid": "key-9"}),
    "kid as a path": token(headers={"kid": "../../../dev/null"}),
    "kid as SQL": token(headers={"kid": "' UNION SELECT 'x"}),
    "kid as a number": token(headers={"kid": 1}),
    "another's key under the same kid": token(key=STRANGER),
    "an access token": token(headers={"typ": "at+jwt"}),
    "a DPoP proof": token(headers={"typ": "dpop+jwt"}),
    "a logout token": token(headers={"typ": "logout+jwt"}),
    "what the broker issued": stolen(),
    "no exp": token(without=["exp"]),
    "exp past": token(exp=AT - 31),
    "exp now with the leeway": token(iat=AT - 60, exp=AT - 30),
    "exp as a string": token(exp=str(AT + 60)),
    "exp as a float": token(exp=AT + 60.5),
    "exp whole float": token(exp=AT + 60.0),
    "exp as a boolean": token(exp=True),
    "exp negative": token(exp=-1),
    "exp huge": token(exp=10**18, without=["iat"]),
    "exp NaN": with_text(exp="NaN"),
    "exp Infinity": with_text(exp="Infinity"),
    "exp 1e400": with_text(exp="1e400"),
    "exp 1e10": with_text(exp="1e10"),
    "exp of 400 digits": with_text(exp="9" * 400),
    "iat in the future": token(iat=AT + 31),
    "iat as a string": token(iat="x"),
    "nbf in the future": token(nbf=AT + 31),
    "nbf as a float": token(nbf=AT + 0.5),
    "too long a life": token(lifetime=timedelta(seconds=3601)),
    "too long a life without iat": token(lifetime=timedelta(seconds=3640), without=["iat"]),
    "no aud": token(without=["aud"]),
    "another aud": token(aud="https://other.example"),
    "two aud": token(aud=[ISSUER, CRM]),
    "the same aud twice": token(aud=[ISSUER, ISSUER]),
    "aud with a slash": token(aud=f"{ISSUER}/"),
    "aud empty": token(aud=[]),
    "aud in other letters": token(aud=ISSUER.upper()),
    "aud in a list in a list": token(aud=[[ISSUER]]),
    "no iss": token(without=["iss"]),
    "another iss": token(iss="https://evil.test"),
    "iss with a slash": token(iss=f"{IDP}/"),
    "iss in a list": token(iss=[IDP]),
    "iss of users": token(iss=f"{IDP}/people"),
    "iss of the broker": token(iss=ISSUER),
    "no sub": token(without=["sub"]),
    "another sub": token(sub="nobody"),
    "sub in other letters": token(sub="Clerk"),
    "sub with a blank": token(sub="clerk "),
    "sub empty": token(sub=""),
    "sub as a number": token(sub=1),
    "sub with a line end": token(sub="clerk\n"),
    "sub with a NUL": with_text(sub='"clerk\\u0000"'),
    "sub as half a character": with_text(sub='"clerk\\ud800"'),
    "sub too long": token(sub="x" * 1001),
    "a claim too little": token(without=["namespace"]),
    "a claim of another value": token(namespace="agents-evil"),
    "a claim of another type": token(namespace=["agents"]),
    "NUL in another claim": token(
        raw_payload=json.dumps(claims(aud=ISSUER, sub="clerk", namespace="agents") | {"note": "a\0b"}).encode()
    ),
    "half a character in another claim": token(
        raw_payload=json.dumps(claims(aud=ISSUER, sub="clerk", namespace="agents") | {"note": "\ud800"}).encode()
    ),
    "a member twice": token(raw_payload=TWICE.encode()),
    "a member twice, once escaped": token(raw_payload=TWICE.replace('"sub"', '"s\\u0075b"', 1).encode()),
    "a header twice": token(raw_header=b'{"alg": "none", "alg": "ES256", "kid": "key-1", "typ": "JWT"}'),
    "a payload that is a list": token(raw_payload=b"[]"),
    "a payload that is text": token(raw_payload=b"clerk"),
    "a payload in UTF-16": token(raw_payload=json.dumps(claims(aud=ISSUER)).encode("utf-16")),
    "a payload behind a byte order mark": token(raw_payload=b"\xef\xbb\xbf" + json.dumps(claims(aud=ISSUER)).encode()),
    "deep": token(raw_payload=b'{"a":' * 40 + b"1" + b"}" * 40),
    "more than 8 KiB": token(padding="x" * 8192),
    "a changed payload": token()[:40] + "A" + token()[41:],
    "a changed signature": token()[:-6] + "AAAAAA",
    "no signature": token().rsplit(".", 1)[0] + ".",
    "four segments": f"{token()}.x",
    "five segments": f"{token()}.x.y",
    "two segments": token().rsplit(".", 1)[0],
    "padding": f"{token()}=",
    "standard base64": token().replace("-", "+") + "+/",
    "a line end behind it": f"{token()}%0a",
    "a quote around it": f'"{token()}"',
    "another in front": f"{token()},{token()}",
    "JSON serialisation": json.dumps({"payload": "x", "signatures": []}),
    "nothing": "x",
    "dots": "..",
    "a template": "{{7*7}}",
}


@pytest.fixture(autouse=True)
def not_a_word(caplog):
    """No line of any log, as it would be written, holds a whole token, a signature or what only the token said."""
    caplog.set_level(logging.DEBUG)
    yield
    lines = [JsonLines().format(record) for record in caplog.get_records("call")]
    assert not [line for line in lines if HEX in line]
    assert not [line for line in lines if "eyJ" in line]


def test_the_good_token_is_accepted(web):
    """Otherwise the refusals below would be refused for this."""
    assert web.client.get("/v1/grants", headers={"Authorization": f"Bearer {token()}"}).status_code == 200


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_of_a_token_gives_one_and_the_same_refusal(web, caplog, defect):
    hostile = DEFECTS[defect]
    before = web.tables()
    bearer = {"Authorization": f"Bearer {hostile}"}
    ask = {"resource": CRM, "scope": "contacts:read"}
    for method, path in (
        ("GET", "/v1/grants"),
        ("POST", "/v1/tasks"),
        ("GET", "/metrics"),
        ("DELETE", "/v1/lockdowns/x"),
    ):
        answer = web.client.open(path, method=method, headers=bearer)
        problem = refused(answer, status=(401,))
        assert (problem["code"], problem["detail"]) == ("unauthenticated", "the workload token was not accepted")
        assert problem.keys() == {"type", "title", "status", "detail", "code", "trace_id"}
        assert answer.headers["WWW-Authenticate"] == (
            f'Bearer error="invalid_token", resource_metadata="{ISSUER}/.well-known/oauth-protected-resource/v1"'
        )
        assert_not_in(hostile, answer)
    assertion = {
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": hostile,
    }
    wanted = {"error_description": "the workload token was not accepted"}
    for path, form in (
        ("/oauth2/token", {"grant_type": "client_credentials", **assertion, **ask}),
        ("/oauth2/introspect", {"token": "x", **assertion}),
        ("/oauth2/revoke", {"token": "x", **assertion}),
    ):
        answer = web.client.post(path, data=form)
        assert refused_by_oauth(answer, status=(401,)) == {"error": "invalid_client", **wanted}
        assert answer.headers["WWW-Authenticate"] == f'Bearer realm="{ISSUER}"'
        assert_not_in(hostile, answer)
    for form, error in (
        ({"grant_type": JWT_BEARER, "assertion": hostile}, "invalid_grant"),
        ({"grant_type": EXCHANGE, "subject_token": hostile,
          "subject_token_type": "urn:ietf:params:oauth:token-type:jwt"}, "invalid_request"),
    ):  # fmt: skip
        answer = web.client.post("/oauth2/token", data={**form, **ask})
        assert refused_by_oauth(answer, error, status=(400,))["error_description"].endswith(wanted["error_description"])
        assert_not_in(hostile, answer)
    assert web.tables() == before


def assert_not_in(hostile, answer):
    whole = answer.get_data(as_text=True) + str(answer.headers)
    assert HEX not in whole
    assert "eyJ" not in whole
    if len(hostile) > 10:
        assert hostile not in whole


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "bearer", "Basic eDp5", "DPoP {token}", "Token {token}", "{token}", "Bearer  {token}",
     "Bearer\t{token}", "Bearer {token} ", "Bearer {token}, Bearer {token}", "Bearer {token},Basic eDp5",
     " Bearer {token}", "Bearer token={token}", "Bearer: {token}", "BEARER{token}"],
)  # fmt: skip
def test_there_is_one_way_to_write_the_header(web, value):
    answer = web.client.get("/v1/grants", headers={"Authorization": value.format(token=token())})
    if value.strip() != value and value.strip() == "Bearer {token}":
        # Blanks around a header's value are not part of it (RFC 9110 section 5.5); some servers leave them.
        assert answer.status_code in (200, 401)
        return
    refused(answer, status=(401,))


def test_a_token_is_read_from_nowhere_else(web):
    good = token()
    refused(web.client.get(f"/v1/grants?access_token={good}"), status=(401,))
    refused(web.client.post("/v1/grants", data={"access_token": good}), status=(401,))
    web.client.set_cookie("access_token", good)
    refused(web.client.get("/v1/grants", headers={"X-Authorization": f"Bearer {good}"}), status=(401,))
    web.client.delete_cookie("access_token")


def test_what_was_issued_for_a_resource_opens_nothing_here(web):
    """The broker's own tokens are for their resource: here they are no workload token and no assertion (INV-19)."""
    form = {"grant_type": JWT_BEARER, "assertion": web.house.token("scribe"), "resource": CRM, "scope": "contacts:read"}
    issued = web.client.post("/oauth2/token", data=form).json["access_token"]
    refused(web.client.get("/v1/grants", headers={"Authorization": f"Bearer {issued}"}), status=(401,))
    refused_by_oauth(web.client.post("/oauth2/token", data=form | {"assertion": issued}), "invalid_grant")
    own = {
        "grant_type": EXCHANGE,
        "subject_token": issued,
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
    }
    refused_by_oauth(web.client.post("/oauth2/token", data=own | {"resource": CRM, "scope": "contacts:read"}))
