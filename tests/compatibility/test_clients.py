"""Clients and verifiers as others wrote them, unmodified, over a real socket."""

import hashlib
import json

import jwt
import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from authlib.oauth2.rfc7662 import IntrospectTokenValidator
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata, get_well_known_url
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.providers import jose
from tests.compatibility.conftest import CLIENT, CLIENT_ID, GITHUB, NEWS
from tests.processes import JWT_BEARER


@pytest.fixture(autouse=True)
def plain_http(monkeypatch):
    """Authlib insists on https; this is its own switch for loopback."""
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")


@pytest.fixture
def metadata(broker):
    """As a client finds it that knows the issuer alone (RFC 8414 section 3)."""
    url = get_well_known_url(broker.deployment.issuer, external=True)
    return AuthorizationServerMetadata(broker.client.get(url).json())


@pytest.fixture
def private_key():
    return CLIENT.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def test_the_metadata_is_what_rfc_8414_says(broker, metadata):
    metadata.validate()
    assert metadata["issuer"] == broker.deployment.issuer
    assert metadata["response_types_supported"] == ["none"]
    alias = broker.client.get("/.well-known/openid-configuration").json()
    assert alias == dict(metadata)


def test_private_key_jwt_gets_a_token_for_a_task_that_is_dead_when_the_task_has_ended(broker, metadata, private_key):
    """A client that is its own issuer, with the broker's issuer as audience as RFC 7523 bis asks."""
    task = broker.open_task("oauth-client")
    client = OAuth2Session(CLIENT_ID, private_key, token_endpoint_auth_method="private_key_jwt")
    client.register_client_auth_method(
        PrivateKeyJWT(broker.deployment.issuer, headers={"kid": CLIENT.kid}, alg=CLIENT.algorithm)
    )
    with client:
        token = client.fetch_token(
            metadata["token_endpoint"], grant_type="client_credentials", resource=NEWS, scope="news:read", task_id=task
        )
    assert (token["token_type"], token["scope"], token["task_id"]) == ("Bearer", "news:read", task)
    claims = broker.introspect(token["access_token"]).json()
    assert (claims["active"], claims["client_id"], claims["task_id"]) == (True, "oauth-client", task)
    broker.complete(task)
    assert not broker.is_active(token["access_token"])


def test_a_wrong_key_is_an_error_that_the_client_can_read(broker, metadata):
    pem = GITHUB.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    client = OAuth2Session(CLIENT_ID, pem, token_endpoint_auth_method="private_key_jwt")
    client.register_client_auth_method(
        PrivateKeyJWT(broker.deployment.issuer, headers={"kid": CLIENT.kid}, alg="RS256")
    )
    with client, pytest.raises(OAuthError) as refused:
        client.fetch_token(
            metadata["token_endpoint"], grant_type="client_credentials", resource=NEWS, scope="news:read"
        )
    assert refused.value.error == "invalid_client"
    assert refused.value.description == "the workload token was not accepted"


def a_token(broker, tokens, resource):
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
        "assertion": tokens["kubernetes"](),
        "resource": resource,
        "scope": "news:read",
    }
    answer = broker.client.post("/oauth2/token", data=form)
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


@pytest.mark.parametrize(
    ("resource", "algorithm", "typ"),
    [
        (NEWS, "ES256", "at+jwt"),
        ("https://plain.example", "RS256", "JWT"),
        ("https://edwards.example", "EdDSA", "at+jwt"),
    ],
)
def test_pyjwt_verifies_what_was_issued_from_discovery_alone(broker, tokens, metadata, resource, algorithm, typ):
    token = a_token(broker, tokens, resource)
    assert jwt.get_unverified_header(token).keys() == {"alg", "kid", "typ"}
    assert jwt.get_unverified_header(token)["typ"] == typ
    keys = jwt.PyJWKClient(metadata["jwks_uri"])
    key = keys.get_signing_key_from_jwt(token)
    claims = jwt.decode(
        token, key, algorithms=[algorithm], audience=resource, issuer=metadata["issuer"],
        options={"require": ["exp", "iat", "nbf", "aud", "iss", "sub", "jti"], "strict_aud": True},
    )  # fmt: skip
    assert claims["client_id"] == claims["sub"] == "pod"
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(token, key, algorithms=[algorithm], audience="https://other.example")
    with pytest.raises(jwt.InvalidTokenError):
        jwt.decode(token[:-4] + "AAAA", key, algorithms=[algorithm], audience=resource)


def test_every_key_that_is_published_is_public_named_by_its_thumbprint_and_for_signatures(broker, metadata):
    keys = broker.client.get(metadata["jwks_uri"]).json()["keys"]
    assert {key["alg"] for key in keys} >= {"ES256", "RS256", "EdDSA"}
    for key in keys:
        assert key["use"] == "sig"
        assert not {"d", "p", "q", "dp", "dq", "qi", "k"} & key.keys()
        members = {name: key[name] for name in ("crv", "e", "kty", "n", "x", "y") if name in key}
        canonical = json.dumps(members, sort_keys=True, separators=(",", ":"))
        assert key["kid"] == jose.base64url(hashlib.sha256(canonical.encode()).digest())
        assert jwt.PyJWK(key)


def test_an_introspecting_verifier_of_authlib_accepts_it_until_it_is_revoked(broker, tokens):
    """RFC 7662 as Authlib's resource server reads it."""

    class Introspecting(IntrospectTokenValidator):
        def introspect_token(self, token_string):
            assertion = {"client_assertion_type": JWT_BEARER, "client_assertion": broker.deployment.token("crm-api")}
            return broker.client.post("/oauth2/introspect", data={"token": token_string, **assertion}).json()

    validator = Introspecting()
    token = a_token(broker, tokens, NEWS)
    answer = validator.authenticate_token(token)
    validator.validate_token(answer, ["news:read"], None)
    assert answer["aud"] == NEWS
    form = {"token": token, "client_assertion_type": JWT_BEARER, "client_assertion": tokens["kubernetes"]()}
    assert broker.client.post("/oauth2/revoke", data=form).status_code == 200
    with pytest.raises(Exception, match="token"):
        validator.validate_token(validator.authenticate_token(token), ["news:read"], None)


def test_the_protected_resource_metadata_leads_to_the_issuers(broker):
    """RFC 9728: what a client finds that was answered 401."""
    refused = broker.client.get("/v1/tasks")
    challenge = refused.headers["WWW-Authenticate"]
    url = challenge.split('resource_metadata="')[1].split('"')[0]
    document = broker.client.get(url).json()
    assert document["resource"] == f"{broker.deployment.issuer}/v1"
    assert "https://kubernetes.default.svc.cluster.local" in document["authorization_servers"]
    assert document["bearer_methods_supported"] == ["header"]
