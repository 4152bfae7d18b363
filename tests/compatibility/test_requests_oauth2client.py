"""requests_oauth2client, unmodified, with the programs that the how-to shows."""

from dataclasses import dataclass
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwskate import Jwk, SignedJwt
from requests_oauth2client import BearerToken, DPoPToken, OAuth2Client, PrivateKeyJwt, exceptions

from tests.compatibility.conftest import NOTES_SERVER, REPORTER, RESEARCHER
from tests.workloads import issuer_key

# Endpoints without TLS: the library's own switch for loopback.
LOOPBACK = {"testing": True}


def jwk_of(key):
    pem = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Jwk.from_pem(pem, alg=key.algorithm, kid=key.kid)


@dataclass(frozen=True)
class Scene:
    """What the how-to shows, a client of its making, and a verifier."""

    broker: Any
    shown: Any
    client: OAuth2Client
    verifier: OAuth2Client

    def is_active(self, token):
        return self.verifier.introspect_token(token)["active"]


@pytest.fixture
def scene(broker, shown, tokens):
    program = shown.program("token_for")
    issuer = broker.deployment.issuer
    with (
        program.client(issuer, jwk_of(REPORTER), **LOOPBACK) as client,
        program.verifier(issuer, tokens["spiffe"](sub=NOTES_SERVER), **LOOPBACK) as verifier,
    ):
        yield Scene(broker, program, client, verifier)


def test_discovery_finds_every_endpoint_and_the_keys(broker, scene):
    issuer, client = broker.deployment.issuer, scene.client
    assert client.issuer == issuer
    assert (client.token_endpoint, client.introspection_endpoint, client.revocation_endpoint) == (
        f"{issuer}/oauth2/token", f"{issuer}/oauth2/introspect", f"{issuer}/oauth2/revoke",
    )  # fmt: skip
    published = {key["kid"] for key in broker.get("/oauth2/jwks").json()["keys"]}
    assert {key.kid for key in client.authorization_server_jwks.jwks} == published


def test_a_client_with_a_key_gets_tokens_for_its_task_until_that_ends(broker, shown, scene):
    task = broker.open_task("reporter")
    token = scene.shown.token_for(scene.client, task)
    assert type(token) is BearerToken
    assert (token.scope, token.task_id, token.token_type) == ("notes:read", task, "Bearer")
    claims = scene.verifier.introspect_token(token)
    assert claims["active"]
    assert (claims["iss"], claims["aud"]) == (broker.deployment.issuer, shown.notes)
    assert (claims["client_id"], claims["task_id"]) == ("reporter", task)
    assert SignedJwt(token.access_token).verify_signature(scene.client.authorization_server_jwks, algs=["ES256"])
    broker.complete(task)
    assert scene.verifier.introspect_token(token) == {"active": False}
    for again in (lambda: scene.shown.token_for(scene.client, task), lambda: scene.shown.renewed(scene.client, token)):
        with pytest.raises(exceptions.TokenEndpointError):
            again()


def test_a_token_lives_no_longer_than_the_assertion_it_was_asked_for_with(broker, scene):
    """INV-08."""
    auth = PrivateKeyJwt("https://reporter.example", jwk_of(REPORTER), lifetime=30, aud=broker.deployment.issuer)
    with OAuth2Client.from_discovery_endpoint(issuer=broker.deployment.issuer, auth=auth, **LOOPBACK) as client:
        assert 25 <= scene.shown.token_for(client, broker.open_task("reporter")).expires_in <= 30


def test_an_exchange_of_ones_own_token_renews_it(broker, scene):
    token = scene.shown.token_for(scene.client, broker.open_task("reporter"))
    again = scene.shown.renewed(scene.client, token)
    assert again.grant_id == token.grant_id
    assert again.access_token != token.access_token
    assert again.issued_token_type == "urn:ietf:params:oauth:token-type:access_token"
    assert scene.is_active(again)


def test_what_is_handed_back_is_dead(broker, scene):
    task = broker.open_task("reporter")
    token, other = (scene.shown.token_for(scene.client, task) for _ in range(2))
    assert scene.client.revoke_access_token(token)
    assert (scene.is_active(token), scene.is_active(other)) == (False, True)


def test_a_bound_token_is_renewed_with_its_key_alone(broker, scene):
    """INV-21."""
    task = broker.open_task("reporter")
    token = scene.shown.token_for(scene.client, task, dpop=True)
    assert type(token) is DPoPToken
    thumbprint = token.dpop_key.public_jwk.thumbprint()
    assert scene.verifier.introspect_token(token)["cnf"] == {"jkt": thumbprint}
    again = scene.shown.renewed(scene.client, token, dpop=True, dpop_key=token.dpop_key)
    assert scene.verifier.introspect_token(again)["cnf"] == {"jkt": thumbprint}
    for without in ({}, {"dpop": True}):
        with pytest.raises(exceptions.AccessDenied, match="key"):
            scene.shown.renewed(scene.client, token, **without)
    broker.complete(task)
    assert not scene.is_active(again)


def test_the_platforms_token_is_a_grant_of_its_own(broker, scene, tokens):
    task = broker.open_task("researcher")
    token = scene.shown.token_of_platform(broker.deployment.issuer, tokens["spiffe"](sub=RESEARCHER), task, **LOOPBACK)
    claims = jwt.decode(token.access_token, options={"verify_signature": False})
    assert (claims["sub"], claims["task_id"]) == ("researcher", task)
    assert scene.is_active(token)
    broker.complete(task)
    assert not scene.is_active(token)


@pytest.mark.parametrize(
    ("key", "audience"), [(issuer_key(), None), (REPORTER, "/oauth2/token")], ids=["another key", "the endpoint"]
)
def test_an_assertion_that_is_not_the_clients_or_not_for_the_issuer_is_refused(broker, scene, key, audience):
    """INV-19: a token for another endpoint's address could be one that somebody else may use up."""
    issuer = broker.deployment.issuer
    auth = PrivateKeyJwt("https://reporter.example", jwk_of(key), aud=f"{issuer}{audience or ''}")
    with (
        OAuth2Client.from_discovery_endpoint(issuer=issuer, auth=auth, **LOOPBACK) as client,
        pytest.raises(exceptions.InvalidClient, match="workload token was not accepted"),
    ):
        scene.shown.token_for(client, broker.open_task("reporter"))


def test_whoever_is_no_verifier_of_the_resource_learns_nothing(broker, scene):
    """INV-26."""
    token = scene.shown.token_for(scene.client, broker.open_task("reporter"))
    assert scene.client.introspect_token(token) == {"active": False}
