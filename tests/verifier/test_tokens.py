"""Good and bad access tokens, asked for by a real verifier of a fake broker."""

import pytest

from broker.conformance.fake_broker import AUDIENCE, SigningKey
from broker.sdk.verifier import REASONS, Refused
from tests.verifier.conftest import URL, bearer, why

ACT = {"sub": "summarizer", "act": {"sub": "planner"}}


def test_a_good_token_says_who_acts_for_whom_and_until_when(broker, verifier):
    issued = broker.issue(sub="ada", act=ACT, scope="contacts:read contacts:write", txn="trace")
    found = verifier.check(bearer(issued), "GET", URL, scopes=["contacts:read"])
    assert (found.subject, found.agent, found.actors) == ("ada", "summarizer", ("summarizer", "planner"))
    assert (found.task_id, found.grant_id) == (issued.task_id, issued.grant_id)
    assert found.scopes == {"contacts:read", "contacts:write"}
    assert found.expires_at.timestamp() == issued.claims["exp"]
    assert not found.bound
    assert found.claims == issued.claims


def test_changing_the_claims_one_was_given_changes_nothing_for_the_next(broker, verifier):
    issued = broker.issue()
    verifier.check(bearer(issued), "GET", URL).claims["scope"] = "everything"
    assert verifier.check(bearer(issued), "GET", URL).claims["scope"] == "contacts:read"


def elsewhere(uri, idx=0):
    return {"status": {"status_list": {"uri": uri, "idx": idx}}}


@pytest.mark.parametrize(
    ("code", "claims"),
    [
        ("wrong_issuer", {"iss": "https://broker.example"}),
        ("wrong_issuer", {"iss": None}),
        ("wrong_audience", {"aud": "https://mail.example/api"}),
        ("wrong_audience", {"aud": AUDIENCE + "/"}),
        ("wrong_audience", {"aud": [AUDIENCE, "https://mail.example/api"]}),
        ("wrong_audience", {"aud": None}),
        ("malformed_token", {"exp": None}),
        ("malformed_token", {"exp": "soon"}),
        ("malformed_token", {"exp": True}),
        ("malformed_token", {"exp": 2**40}),
        ("malformed_token", {"iat": None}),
        ("malformed_token", {"iat": 1.5}),
        ("malformed_token", {"nbf": "x"}),
        ("malformed_token", {"jti": None}),
        ("malformed_token", {"sub": ""}),
        ("malformed_token", {"client_id": None}),
        ("malformed_token", {"grant_id": None}),
        ("malformed_token", {"task_id": 7}),
        ("malformed_token", {"scope": ["contacts:read"]}),
        ("malformed_token", {"act": "planner"}),
        ("malformed_token", {"act": {"act": {"sub": "planner"}}}),
        ("malformed_token", {"cnf": {}}),
        ("malformed_token", {"cnf": {"jkt": "short"}}),
        ("malformed_token", {"cnf": {"x5t#S256": "A" * 43}}),
        ("malformed_token", {"cnf": {"jkt": "A" * 43, "x5t#S256": "A" * 43}}),
        ("malformed_token", {"status": None}),
        ("malformed_token", elsewhere("https://lists.example/status-lists/1")),
        ("malformed_token", {"padding": "x" * 9000}),
    ],
)
def test_a_token_that_is_not_for_this_resource_or_not_well_formed_is_refused(broker, verifier, code, claims):
    assert why(verifier, broker.issue(**claims)) == code


@pytest.mark.parametrize("idx", [-1, 2**31, True, "0", None])
def test_a_place_that_is_none_is_refused(broker, verifier, idx):
    assert why(verifier, broker.issue(**elsewhere(f"{broker.url}/status-lists/1", idx))) == "malformed_token"


@pytest.mark.parametrize("name", ["", "../oauth2/jwks", "1?x=", "1/2", "a" * 65])
def test_a_status_list_is_asked_for_by_its_name_and_by_nothing_else(broker, verifier, name):
    assert why(verifier, broker.issue(**elsewhere(f"{broker.url}/status-lists/{name}"))) == "malformed_token"


def test_times_have_leeway_at_the_beginning_and_none_at_the_end(broker, verifier):
    now = broker.now()
    assert why(verifier, broker.issue(iat=now + 2, nbf=now + 2)) is None
    assert why(verifier, broker.issue(iat=now + 60, nbf=now + 60)) == "not_yet_valid"
    assert why(verifier, broker.issue(nbf=now + 60)) == "not_yet_valid"
    assert why(verifier, broker.issue(iat=now - 60, exp=now)) == "expired"


def test_a_token_that_lives_longer_than_refusals_are_remembered_is_refused(broker, verifier):
    now = broker.now()
    assert why(verifier, broker.issue(iat=now, exp=now + 3600)) is None
    assert why(verifier, broker.issue(iat=now, exp=now + 3601)) == "malformed_token"


@pytest.mark.parametrize("typ", ["JWT", "statuslist+jwt", "dpop+jwt", ""])
def test_only_access_tokens_are_access_tokens(broker, verifier, typ):
    assert why(verifier, broker.issue(typ=typ)) == "wrong_type"


def test_a_resource_of_old_verifiers_can_say_another_type(broker, verifier_of):
    assert why(verifier_of(token_typ="JWT"), broker.issue(typ="JWT")) is None


def test_the_key_is_the_brokers_and_its_algorithm_is_its_own(broker, verifier):
    assert why(verifier, broker.issue(key=SigningKey())) == "unknown_key"
    assert why(verifier, broker.issue(header={"kid": None})) == "unknown_key"
    assert why(verifier, broker.issue(key=SigningKey(), header={"kid": broker.keys[0].kid})) == "bad_signature"
    for algorithm in ("none", "HS256", "ES512", "PS256"):
        assert why(verifier, broker.issue(header={"alg": algorithm})) == "wrong_algorithm"
    assert why(verifier, broker.issue(header={"alg": "RS256"})) == "wrong_algorithm"
    assert why(verifier, broker.issue(key=SigningKey(), header={"jwk": SigningKey().published})) == "malformed_token"


def test_an_algorithm_can_be_ruled_out_for_a_resource(broker, verifier_of):
    assert why(verifier_of(algorithms=["EdDSA"]), broker.issue()) == "wrong_algorithm"


def test_scopes_are_all_needed_and_the_challenge_names_them(broker, verifier):
    issued = broker.issue(scope="contacts:read")
    with pytest.raises(Refused) as refused:
        verifier.check(bearer(issued), "GET", URL, scopes=["contacts:read", "contacts:write"])
    assert (refused.value.status, refused.value.error) == (403, "insufficient_scope")
    assert 'scope="contacts:read contacts:write"' in refused.value.www_authenticate
    assert verifier.check(bearer(issued), "GET", URL, scopes="contacts:read")


@pytest.mark.parametrize(
    ("authorization", "code", "status"),
    [
        (None, "missing_token", 401),
        ("", "missing_token", 401),
        ("Bearer", "malformed_request", 400),
        ("Bearer ", "malformed_request", 400),
        ("Basic dXNlcjpwYXNz", "malformed_request", 400),
        ("Bearer a b", "malformed_request", 400),
        ("Bearer a, Bearer b", "malformed_request", 400),
        ("Bearer a.b.c", "malformed_token", 401),
        ("Bearer é.é.é", "malformed_token", 401),
    ],
)
def test_what_is_no_bearer_token_is_refused(verifier, authorization, code, status):
    with pytest.raises(Refused) as refused:
        verifier.check(authorization, "GET", URL)
    assert (refused.value.code, refused.value.status) == (code, status)


def test_the_scheme_is_read_in_any_case(broker, verifier):
    issued = broker.issue()
    assert why(verifier, issued, authorization=f"bEARER {issued.token}") is None


def test_without_credentials_the_challenge_has_no_error(verifier_of):
    with pytest.raises(Refused) as refused:
        verifier_of(resource_metadata="https://crm.example/.well-known/oauth-protected-resource").check(
            None, "GET", URL
        )
    assert refused.value.error is None
    assert refused.value.www_authenticate == (
        'Bearer resource_metadata="https://crm.example/.well-known/oauth-protected-resource"'
    )


def test_a_refusal_holds_neither_the_token_nor_what_is_in_it(broker, verifier):
    issued = broker.issue(aud='https://mail.example/"injected', sub="ada\r\nX-Evil: 1")
    with pytest.raises(Refused) as refused:
        verifier.check(bearer(issued), "GET", URL)
    said = f"{refused.value} {refused.value.args} {refused.value.www_authenticate} {refused.value.body}"
    assert issued.token not in said
    assert "injected" not in said
    assert "Evil" not in said
    assert refused.value.__context__ is None
    frames = []
    trace = refused.value.__traceback__
    while trace is not None:
        frames.append(repr(trace.tb_frame.f_locals) if "verifier.py" in trace.tb_frame.f_code.co_filename else "")
        trace = trace.tb_next
    assert not any(issued.token in frame for frame in frames)


@pytest.mark.parametrize("code", REASONS)
def test_every_reason_has_an_answer_that_can_be_sent(code):
    refused = Refused(code, "detail", scopes=["a"])
    assert refused.status in (400, 401, 403, 503)
    assert (refused.www_authenticate is None) == (refused.status == 503) == (refused.retry_after_s is not None)
    assert '"' not in refused.description
    assert "\\" not in refused.description


def test_a_signature_is_verified_once_and_its_key_has_to_stay_published(broker, verifier_of):
    verifier = verifier_of()
    issued = broker.issue()
    assert why(verifier, issued) is None
    broker.rotate()
    broker.keys = broker.keys[:1]
    verifier._keys.refresh(at_most_every_s=0)
    assert why(verifier, issued) == "unknown_key"


def test_the_memory_of_tokens_is_bounded(broker, verifier_of):
    verifier = verifier_of(cache_size=3)
    for _ in range(10):
        assert why(verifier, broker.issue()) is None
    assert len(verifier._seen._tokens) == 3
    assert why(verifier_of(cache_size=0), broker.issue()) is None
