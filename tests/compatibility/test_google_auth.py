"""google-auth's workload identity federation, unmodified, by the configuration file that the how-to shows."""

import json
from pathlib import Path

import google.auth
import pytest
from google.auth import identity_pool
from google.auth.exceptions import OAuthError
from google.auth.transport.requests import Request

from tests.compatibility.conftest import NOTES_SERVER, RESEARCHER


@pytest.fixture
def configuration(shown, tokens, tmp_path):
    """The file as it is shown, with the platform's token beside it."""
    [text] = shown.blocks("json")
    settings = json.loads(text)
    (tmp_path / "token").write_text(tokens["spiffe"](sub=RESEARCHER))
    settings["credential_source"]["file"] = str(tmp_path / "token")
    path = tmp_path / "broker.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture
def session(shown, configuration, broker):
    with shown.program("session").session(configuration) as opened:
        yield opened


def token_of(session, resource):
    """What the library puts on a request of its own accord."""
    headers = {}
    session.credentials.before_request(Request(), "GET", resource, headers)
    scheme, _, token = headers["authorization"].partition(" ")
    assert scheme == "Bearer"
    return token


def introspected(broker, tokens, token):
    form = {
        "token": token,
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": tokens["spiffe"](sub=NOTES_SERVER),
    }
    return broker.client.post("/oauth2/introspect", data=form).json()


def test_it_exchanges_the_platforms_token_for_a_brokers(broker, shown, tokens, session):
    token = token_of(session, shown.notes)
    claims = introspected(broker, tokens, token)
    assert claims["active"]
    assert (claims["iss"], claims["aud"]) == (broker.deployment.issuer, shown.notes)
    assert (claims["sub"], claims["client_id"], claims["scope"]) == ("researcher", "researcher", "notes:read")
    assert session.credentials.expiry.timestamp() == pytest.approx(claims["exp"], abs=2)
    assert token_of(session, shown.notes) == token


def test_what_it_got_is_refused_when_its_task_has_ended(broker, shown, tokens, session):
    token = token_of(session, shown.notes)
    task = introspected(broker, tokens, token)["task_id"]
    assert broker.post(f"/v1/tasks/{task}/complete", "ada").status_code == 200
    assert introspected(broker, tokens, token) == {"active": False}
    session.credentials.refresh(Request())
    again = introspected(broker, tokens, token_of(session, shown.notes))
    assert again["active"]
    assert again["task_id"] != task


def test_an_application_that_takes_what_its_environment_has_finds_it(broker, tokens, configuration, monkeypatch):
    """Application Default Credentials, which is what Google's client libraries start with."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(configuration))
    credentials, project = google.auth.default(scopes=["notes:read"])
    assert (type(credentials), project) == (identity_pool.Credentials, None)
    credentials.refresh(Request())
    assert introspected(broker, tokens, credentials.token)["client_id"] == "researcher"


@pytest.mark.parametrize(
    ("changed", "scopes", "error"),
    [
        ({"audience": "https://nowhere.example"}, ["notes:read"], "invalid_target"),
        ({}, ["notes:write"], "invalid_scope"),
        ({"subject_token_type": "urn:ietf:params:oauth:token-type:saml2"}, ["notes:read"], "invalid_request"),
        ({"client_id": "researcher", "client_secret": "hunter2"}, ["notes:read"], "invalid_client"),
    ],
    ids=["resource", "scope", "token type", "a secret"],
)  # fmt: skip
def test_a_refusal_is_told_in_the_brokers_words(broker, configuration, changed, scopes, error):
    settings = json.loads(configuration.read_text()) | changed
    credentials = identity_pool.Credentials.from_info(settings, scopes=scopes)
    with pytest.raises(OAuthError, match=f"Error code {error}: "):
        credentials.refresh(Request())


def test_a_token_that_is_not_the_platforms_is_refused(broker, configuration):
    settings = json.loads(configuration.read_text())
    file = Path(settings["credential_source"]["file"])
    signed, _, _ = file.read_text().rpartition(".")
    file.write_text(f"{signed}.{'A' * 86}")
    credentials = identity_pool.Credentials.from_info(settings, scopes=["notes:read"])
    with pytest.raises(OAuthError, match="invalid_request: subject_token"):
        credentials.refresh(Request())


def test_a_newline_after_the_token_is_refused_as_the_how_to_says(broker, configuration):
    settings = json.loads(configuration.read_text())
    with Path(settings["credential_source"]["file"]).open("a") as file:
        file.write("\n")
    credentials = identity_pool.Credentials.from_info(settings, scopes=["notes:read"])
    with pytest.raises(OAuthError, match="invalid_request: subject_token holds a control"):
        credentials.refresh(Request())
