"""A workload token becomes a Caller, or is refused without saying why."""

import gc
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.catalogue import Catalogue, PrincipalRule, TrustedIssuer
from broker.domain.clock import epoch
from broker.domain.errors import Unauthenticated
from broker.domain.identity import Role
from broker.providers import jose, key_sets
from broker.providers.key_sets import KeySets
from broker.services.authentication import REMEMBERED, REMEMBERED_BYTES, Authenticator, trust_domain_of
from broker.store.models import ConsumedProof
from tests.workloads import (
    BROKER,
    IDP,
    NOW,
    SUBJECT,
    issuer_key,
    trusted_issuer,
    unauthenticated,
    workload_token,
    write_key_set,
)

KEY, OTHER = issuer_key("one"), issuer_key("two")
SECOND = timedelta(seconds=1)
SPIFFE_ID = "spiffe://prod.example/ns/agents/sa/summarizer"


class NoDatabase:
    """Reusable tokens must not cost a transaction."""

    def begin(self):
        raise AssertionError("a transaction was opened")


@pytest.fixture
def jwks(tmp_path):
    return write_key_set(tmp_path / "jwks.json", KEY)


@pytest.fixture
def bundle(tmp_path):
    return write_key_set(tmp_path / "bundle.json", KEY, use="jwt-svid")


@pytest.fixture
def authenticator():
    return Authenticator(database=NoDatabase(), key_sets=KeySets(), audience=BROKER)


def rule(**changed):
    made = {"name": "summarizer", "kind": "agent", "issuer": "corp", "subject": SUBJECT, "roles": ("agent",)}
    return PrincipalRule(**made | changed)


def catalogue(*issuers, principals=None, version=1):
    return Catalogue(version=version, issuers=issuers, principals=principals or (rule(),))


def spiffe_issuer(bundle, **changed):
    made = {"name": "prod", "issuer": "spiffe://prod.example", "key_source": "spiffe_bundle_file"}
    return TrustedIssuer(**made | {"location": str(bundle)} | changed)


def svid(key=KEY, **changed):
    return workload_token(key, **{"without": ["iss"], "sub": SPIFFE_ID} | changed)


def test_a_token_of_a_trusted_issuer_makes_its_principal_a_caller(authenticator, jwks):
    caller = authenticator.authenticate(workload_token(KEY), catalogue(trusted_issuer(jwks)), now=NOW, trace_id="t1")
    assert (caller.name, caller.principal.roles, caller.trace_id) == ("summarizer", {Role.AGENT}, "t1")
    assert caller.proof_expires_at == NOW + timedelta(minutes=5)
    assert (caller.identity.issuer, caller.identity.subject, caller.catalogue_version) == ("corp", SUBJECT, 1)


# --- whose token -----------------------------------------------------------------------------------------------


def test_a_kubernetes_service_account_is_a_principal_by_configuration_alone(authenticator, jwks):
    cluster = "https://kubernetes.default.svc.cluster.local"
    token = workload_token(
        KEY,
        headers={"without": ["typ"]},
        iss=cluster,
        aud=[BROKER],
        sub="system:serviceaccount:agents:summarizer",
        nbf=epoch(NOW),
        exp=epoch(NOW) + 3607,
        jti="0a1f",
        **{
            "kubernetes.io": {
                "namespace": "agents",
                "node": {"name": "n1", "uid": "u0"},
                "pod": {"name": "summarizer-0", "uid": "u1"},
                "serviceaccount": {"name": "summarizer", "uid": "u2"},
                "warnafter": epoch(NOW) + 3607,
            }
        },
    )
    rules = (
        rule(subject="system:serviceaccount:agents:summarizer", claims={"kubernetes.io.namespace": "agents"}),
        rule(name="other", subject="system:serviceaccount:other:summarizer"),
    )
    declared = catalogue(trusted_issuer(jwks, issuer=cluster, max_lifetime_s=86400), principals=rules)
    assert authenticator.authenticate(token, declared, now=NOW).name == "summarizer"


@pytest.mark.parametrize(("repository", "accepted"), [("74", True), ("75", False), (74, False)])
def test_a_github_workflow_is_a_principal_by_its_repository_id(authenticator, jwks, repository, accepted):
    github = "https://token.actions.githubusercontent.com"
    subject = "repo:octo-org/octo-repo:environment:prod"
    token = workload_token(
        KEY,
        headers={"x5t": "abc"},
        iss=github,
        sub=subject,
        jti="example-id",
        repository_id=repository,
        repository="octo-org/octo-repo",
        job_workflow_ref="octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main",
        nbf=epoch(NOW) - 600,
        iat=epoch(NOW) - 5,
    )
    declared = catalogue(
        trusted_issuer(jwks, issuer=github), principals=(rule(subject=subject, claims={"repository_id": "74"}),)
    )
    if accepted:
        assert authenticator.authenticate(token, declared, now=NOW).name == "summarizer"
    else:
        with unauthenticated("no principal"):
            authenticator.authenticate(token, declared, now=NOW)


def test_a_jwt_svid_belongs_to_the_trust_domain_in_its_subject(authenticator, bundle):
    declared = catalogue(spiffe_issuer(bundle), principals=(rule(issuer="prod", subject=SPIFFE_ID),))
    assert authenticator.authenticate(svid(), declared, now=NOW).name == "summarizer"
    # SPIRE may be told to write an iss; it proves nothing and is not read.
    assert authenticator.authenticate(svid(iss="https://spire.example", without=[]), declared, now=NOW)


@pytest.mark.parametrize(
    "subject",
    [
        "spiffe://other.example/ns/agents/sa/summarizer",
        "spiffe://prod.example.evil.test/ns/agents/sa/summarizer",
        "spiffe://PROD.example/ns/agents/sa/summarizer",
        "SPIFFE://prod.example/ns/agents/sa/summarizer",
        "spiffe://prod.example:443/ns/agents",
        "spiffe://user@prod.example/ns/agents",
        "spiffe://prod.example/ns/agents/../admins",
        "spiffe://prod.example/./ns",
        "spiffe://prod.example/ns//agents",
        "spiffe://prod.example/ns/agents/",
        "spiffe://prod.example/ns/%61gents",
        "spiffe://prod.example/ns?a=b",
        "spiffe://prod.example/ns#a",
        "spiffe://prod.example/ns/agents\n",
        "spiffe://prod.example/",
        "spiffe://prod.example",
        "spiffe:///ns",
        "prod.example/ns",
        "",
        None,
        1,
        ["spiffe://prod.example/ns"],
    ],
)
def test_a_subject_that_is_no_spiffe_id_of_the_trust_domain_is_refused(authenticator, bundle, subject):
    declared = catalogue(
        spiffe_issuer(bundle), principals=(rule(issuer="prod", subject=None, subject_prefix="spiffe://prod.example/"),)
    )
    with unauthenticated("0 trusted issuers"):
        authenticator.authenticate(svid(sub=subject), declared, now=NOW)


def test_a_spiffe_id_has_at_most_2048_bytes():
    assert trust_domain_of("spiffe://d/" + "a" * 2037) == "d"
    assert trust_domain_of("spiffe://d/" + "a" * 2038) is None
    assert trust_domain_of(f"spiffe://{'d' * 256}/a") is None


def test_the_keys_of_one_trust_domain_do_not_speak_for_another(authenticator, bundle, tmp_path):
    theirs = write_key_set(tmp_path / "theirs.json", OTHER, use="jwt-svid")
    declared = catalogue(
        spiffe_issuer(bundle),
        spiffe_issuer(theirs, name="theirs", issuer="spiffe://theirs.example"),
        principals=(rule(issuer="prod", subject=SPIFFE_ID),),
    )
    with unauthenticated("prod has no key 'two'"):
        authenticator.authenticate(svid(OTHER), declared, now=NOW)


@pytest.mark.parametrize(
    "headers", [{"cty": "JWT"}, {"x5t": "abc"}, {"typ": "client-authentication+jwt"}, {"typ": "x"}]
)
def test_a_jwt_svid_has_only_the_headers_it_may_have(authenticator, bundle, headers):
    declared = catalogue(spiffe_issuer(bundle), principals=(rule(issuer="prod", subject=SPIFFE_ID),))
    with unauthenticated("header|type"):
        authenticator.authenticate(svid(headers=headers), declared, now=NOW)


def test_a_subject_that_looks_like_spiffe_is_not_one_where_another_issuer_says_so(authenticator, jwks, bundle):
    """INV-17: the same words of two issuers are two identities."""
    declared = catalogue(
        trusted_issuer(jwks), spiffe_issuer(bundle), principals=(rule(issuer="prod", subject=SPIFFE_ID),)
    )
    with unauthenticated("no principal"):
        authenticator.authenticate(svid(iss=IDP, without=[]), declared, now=NOW)
    with unauthenticated("0 trusted issuers"):
        authenticator.authenticate(workload_token(KEY, iss="spiffe://prod.example"), declared, now=NOW)


@pytest.mark.parametrize("issuer", [f"{IDP}/", "https://IDP.example", "idp.example", "corp", "", None, 1, [IDP], {}])
def test_an_issuer_is_compared_exactly(authenticator, jwks, issuer):
    """INV-17."""
    with unauthenticated("0 trusted issuers"):
        authenticator.authenticate(workload_token(KEY, iss=issuer), catalogue(trusted_issuer(jwks)), now=NOW)


def test_an_issuer_that_is_declared_twice_is_not_guessed(authenticator, jwks):
    declared = catalogue(trusted_issuer(jwks), trusted_issuer(jwks, name="again"))
    with unauthenticated("2 trusted issuers"):
        authenticator.authenticate(workload_token(KEY), declared, now=NOW)


def test_one_issuer_cannot_sign_for_another(authenticator, jwks, tmp_path):
    theirs = trusted_issuer(
        write_key_set(tmp_path / "theirs.json", OTHER), name="theirs", issuer="https://theirs.example"
    )
    declared = catalogue(trusted_issuer(jwks), theirs)
    with unauthenticated("corp has no key 'two'"):
        authenticator.authenticate(workload_token(OTHER), declared, now=NOW)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"aud": "https://other.example"}, "aud"),
        ({"aud": [BROKER, "https://other.example"]}, "aud"),
        ({"exp": epoch(NOW) - 30, "iat": epoch(NOW) - 60}, "expired"),
        ({"exp": epoch(NOW) + 3601}, "lives"),
        ({"exp": str(epoch(NOW) + 60)}, "exp"),
        ({"headers": {"typ": "at+jwt"}}, "type"),
        ({"headers": {"jwk": KEY.jwk}}, "jwk"),
        ({"headers": {"alg": "none"}}, "algorithm"),
        ({"headers": {"kid": "three"}}, "no key"),
        ({"sub": ""}, "sub"),
        ({"sub": "a\0"}, "NUL"),
        ({"sub": "somebody"}, "no principal"),
    ],
)
def test_a_token_with_a_defect_is_refused_and_never_remembered(authenticator, jwks, changed, reason):
    declared = catalogue(trusted_issuer(jwks))
    for _ in range(2):
        with unauthenticated(reason):
            authenticator.authenticate(workload_token(KEY, **changed), declared, now=NOW)


@pytest.mark.parametrize("token", ["", "a.b.c", "é", "\ud800", "\0", "x" * 8193, "Bearer " + "e30.e30.e30"])
def test_what_is_no_token_is_refused(authenticator, jwks, token):
    with pytest.raises(Unauthenticated):
        authenticator.authenticate(token, catalogue(trusted_issuer(jwks)), now=NOW)


def test_an_algorithm_that_is_not_listed_is_refused_before_any_key_is_looked_for(authenticator, tmp_path):
    """INV-35."""
    missing = trusted_issuer(tmp_path / "missing.json", algorithms=("RS256",))
    with unauthenticated("algorithm ES256 is not listed for corp"):
        authenticator.authenticate(workload_token(KEY), catalogue(missing), now=NOW)


def test_keys_that_were_never_obtained_are_named_to_the_log_alone(authenticator, tmp_path):
    with unauthenticated("no keys of corp were obtained yet"):
        authenticator.authenticate(workload_token(KEY), catalogue(trusted_issuer(tmp_path / "none.json")), now=NOW)


# --- remembering -----------------------------------------------------------------------------------------------


@pytest.fixture
def verifications(monkeypatch):
    """How often a signature was checked."""
    seen = []
    check = jose.check_signature
    monkeypatch.setattr(jose, "check_signature", lambda parsed, **more: (seen.append(parsed), check(parsed, **more)))
    return seen


def test_a_token_is_verified_once_and_then_remembered(authenticator, jwks, verifications):
    declared, token = catalogue(trusted_issuer(jwks)), workload_token(KEY)
    callers = [authenticator.authenticate(token, declared, now=NOW, trace_id=trace) for trace in ("t1", None, "t2")]
    assert [caller.trace_id for caller in callers] == ["t1", None, "t2"]
    assert len(verifications) == 1


def test_a_remembered_token_ends_when_it_expires(authenticator, jwks):
    declared, token = catalogue(trusted_issuer(jwks)), workload_token(KEY)
    until = NOW + timedelta(minutes=5, seconds=30)
    for now in (NOW, until - SECOND):
        assert authenticator.authenticate(token, declared, now=now)
    with unauthenticated("expired"):
        authenticator.authenticate(token, declared, now=until)


def test_a_remembered_token_ends_with_the_configuration_it_rests_on(authenticator, jwks):
    token = workload_token(KEY)
    before = catalogue(trusted_issuer(jwks))
    assert authenticator.authenticate(token, before, now=NOW)
    for after, reason in (
        (catalogue(trusted_issuer(jwks), principals=(rule(subject="other"),), version=2), "no principal"),
        (catalogue(trusted_issuer(jwks, max_lifetime_s=60), version=3), "lives"),
        (catalogue(version=4), "0 trusted"),
    ):
        with unauthenticated(reason):
            authenticator.authenticate(token, after, now=NOW)
    renamed = catalogue(trusted_issuer(jwks), principals=(rule(name="renamed"),), version=5)
    assert authenticator.authenticate(token, renamed, now=NOW).name == "renamed"


def test_a_remembered_token_ends_with_the_key_that_signed_it(authenticator, jwks, verifications):
    declared, token = catalogue(trusted_issuer(jwks)), workload_token(KEY)
    assert authenticator.authenticate(token, declared, now=NOW)
    write_key_set(jwks, KEY, OTHER)
    assert authenticator.authenticate(token, declared, now=NOW)
    assert len(verifications) == 2
    write_key_set(jwks, OTHER)
    with unauthenticated("no key 'one'"):
        authenticator.authenticate(token, declared, now=NOW)


def test_a_remembered_token_ends_when_its_issuer_was_silent_for_a_day(authenticator, jwks):
    lifetime = timedelta(days=3)
    declared = catalogue(trusted_issuer(jwks, max_lifetime_s=3 * 86400))
    token = workload_token(KEY, exp=epoch(NOW + lifetime))
    assert authenticator.authenticate(token, declared, now=NOW)
    jwks.unlink()
    assert authenticator.authenticate(token, declared, now=NOW + key_sets.KEPT_FOR - SECOND)
    with unauthenticated("too old"):
        authenticator.authenticate(token, declared, now=NOW + key_sets.KEPT_FOR)


def test_tokens_that_begin_alike_are_different_tokens(authenticator, jwks):
    rules = (rule(), rule(name="other", subject="summarizer-2"))
    declared = catalogue(trusted_issuer(jwks), principals=rules)
    one, two = workload_token(KEY), workload_token(KEY, sub="summarizer-2")
    assert [authenticator.authenticate(token, declared, now=NOW).name for token in (one, two, one, two)] == [
        "summarizer",
        "other",
    ] * 2
    with unauthenticated("signature|base64url"):
        authenticator.authenticate(one[:-4] + two[-4:], declared, now=NOW)


def test_what_is_remembered_is_bounded_and_the_longest_unused_goes_first(jwks, verifications):
    authenticator = Authenticator(database=NoDatabase(), key_sets=KeySets(), audience=BROKER, remembered=2)
    declared = catalogue(trusted_issuer(jwks))
    tokens = [workload_token(KEY, jti=f"{number}") for number in range(3)]
    for number in (0, 1, 0, 2, 0):  # 1 is the one to go
        authenticator.authenticate(tokens[number], declared, now=NOW)
    assert len(verifications) == 3
    authenticator.authenticate(tokens[1], declared, now=NOW)
    assert len(verifications) == 4


def test_what_is_remembered_takes_a_bounded_number_of_bytes(jwks, verifications):
    authenticator = Authenticator(
        database=NoDatabase(), key_sets=KeySets(), audience=BROKER, remembered_bytes=3 * (6 * 1024)
    )
    declared = catalogue(trusted_issuer(jwks))
    tokens = [workload_token(KEY, jti=f"{number}", padding="x" * 3500) for number in range(4)]
    for number in (0, 1, 2, 0, 1, 2, 3, 1, 2, 3):
        authenticator.authenticate(tokens[number], declared, now=NOW)
    assert len(verifications) == 4
    authenticator.authenticate(tokens[0], declared, now=NOW)
    assert len(verifications) == 5


def test_a_full_memory_of_the_most_expensive_tokens_leaves_most_of_a_worker_free(jwks):
    authenticator = Authenticator(database=NoDatabase(), key_sets=KeySets(), audience=BROKER)
    declared = catalogue(trusted_issuer(jwks))
    # Many small members take the most room for each byte of a token.
    padding = {f"{number:x}": {} for number in range(480)}
    tokens = [workload_token(KEY, jti=f"{number}", padding=padding) for number in range(200)]
    assert len(tokens[0]) > 7000
    tracemalloc.start()
    try:
        for token in tokens:
            authenticator.authenticate(token, declared, now=NOW)
        gc.collect()
        each = tracemalloc.get_traced_memory()[0] / len(tokens)
    finally:
        tracemalloc.stop()
    entries = REMEMBERED_BYTES / (len(tokens[0]) * 3 / 4)
    assert each * min(entries, REMEMBERED) < 48 * 1024 * 1024


def test_a_remembered_caller_is_judged_by_its_claims_in_a_newer_configuration(authenticator, jwks):
    token = workload_token(KEY, deep={"team": "crm"})
    declared = catalogue(trusted_issuer(jwks))
    authenticator.authenticate(token, declared, now=NOW)
    recalled = authenticator.authenticate(token, declared, now=NOW)
    newer = catalogue(principals=(rule(name="by-claim", claims={"deep.team": "crm"}),), version=2)
    assert newer.principal_for(recalled.identity).name == "by-claim"
    assert recalled.identity.claims["deep"] == {"team": "crm"}
    assert len(recalled.identity.claims) == len(list(recalled.identity.claims)) > 5
    other = catalogue(principals=(rule(claims={"deep.team": "hr"}),), version=2)
    with unauthenticated("no principal"):
        other.principal_for(recalled.identity)


def test_many_threads_may_ask_at_once(jwks):
    authenticator = Authenticator(database=NoDatabase(), key_sets=KeySets(), audience=BROKER, remembered=3)
    declared = catalogue(trusted_issuer(jwks))
    tokens = [workload_token(KEY, jti=f"{number}") for number in range(6)]
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(authenticator.authenticate, tokens[number % 6], declared, now=NOW) for number in range(600)
        ]
        assert {each.result().name for each in asked} == {"summarizer"}


# --- one-time tokens -------------------------------------------------------------------------------------------


def test_of_fifty_uses_of_one_single_use_token_at_once_exactly_one_wins(database, jwks):
    """INV-20."""
    authenticator = Authenticator(database=database, key_sets=KeySets(), audience=BROKER)
    declared, token = catalogue(trusted_issuer(jwks, single_use=True)), workload_token(KEY, jti="once")
    barrier = threading.Barrier(50)

    def use(_):
        barrier.wait()
        try:
            return authenticator.authenticate(token, declared, now=NOW).name
        except Unauthenticated as problem:
            return problem.reason

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(use, range(50)))
    assert answers.count("summarizer") == 1
    assert len([answer for answer in answers if "used before" in answer]) == 49


def test_a_single_use_token_is_used_for_as_long_as_it_could_be_accepted(database, jwks):
    """INV-20; whatever else of it changes, the configuration's name for its issuer included."""
    authenticator = Authenticator(database=database, key_sets=KeySets(), audience=BROKER)
    token = workload_token(KEY, jti="once")
    assert authenticator.authenticate(token, catalogue(trusted_issuer(jwks, single_use=True)), now=NOW)
    last = NOW + timedelta(minutes=5, seconds=29)
    with database.read() as db:
        assert db.execute(sa.select(ConsumedProof.forget_at)).scalar_one() > last + SECOND
    renamed = catalogue(
        trusted_issuer(jwks, single_use=True, name="renamed"), principals=(rule(issuer="renamed"),), version=2
    )
    for again in (token, workload_token(KEY, jti="once", extra=1)):
        with unauthenticated("used before"):
            authenticator.authenticate(again, renamed, now=last)


def test_the_same_jti_of_another_issuer_is_another_token(database, jwks, tmp_path):
    authenticator = Authenticator(database=database, key_sets=KeySets(), audience=BROKER)
    theirs = "https://theirs.example"
    declared = catalogue(
        trusted_issuer(jwks, single_use=True),
        trusted_issuer(jwks, name="theirs", issuer=theirs, single_use=True),
        principals=(rule(), rule(name="other", issuer="theirs")),
    )
    assert authenticator.authenticate(workload_token(KEY, jti="once"), declared, now=NOW).name == "summarizer"
    assert authenticator.authenticate(workload_token(KEY, jti="once", iss=theirs), declared, now=NOW).name == "other"


def test_a_single_use_token_needs_a_jti_and_costs_nothing_when_it_is_refused(authenticator, jwks):
    declared = catalogue(trusted_issuer(jwks, single_use=True))
    for changed, reason in (({}, "no jti"), ({"jti": "once", "sub": "somebody"}, "no principal")):
        with unauthenticated(reason):
            authenticator.authenticate(workload_token(KEY, **changed), declared, now=NOW)


def test_an_issuer_that_becomes_single_use_does_not_profit_from_memory(database, jwks):
    authenticator = Authenticator(database=database, key_sets=KeySets(), audience=BROKER)
    token = workload_token(KEY, jti="once")
    assert authenticator.authenticate(token, catalogue(trusted_issuer(jwks)), now=NOW)
    declared = catalogue(trusted_issuer(jwks, single_use=True), version=2)
    assert authenticator.authenticate(token, declared, now=NOW)
    with unauthenticated("used before"):
        authenticator.authenticate(token, declared, now=NOW)


# --- users -----------------------------------------------------------------------------------------------------


def test_the_token_of_a_user_never_makes_a_caller(authenticator, jwks):
    declared = catalogue(trusted_issuer(jwks, users=True))
    with unauthenticated("0 trusted issuers of workloads"):
        authenticator.authenticate(workload_token(KEY), declared, now=NOW)
    identity = authenticator.identify_user(workload_token(KEY, headers={"typ": "at+jwt"}), declared, now=NOW)
    assert (identity.issuer, identity.subject) == ("corp", SUBJECT)
    with unauthenticated("0 trusted issuers of workloads"):
        authenticator.authenticate(workload_token(KEY), declared, now=NOW)


def test_the_token_of_a_workload_never_makes_a_user(authenticator, jwks):
    declared = catalogue(trusted_issuer(jwks))
    authenticator.authenticate(workload_token(KEY), declared, now=NOW)
    with unauthenticated("0 trusted issuers of users"):
        authenticator.identify_user(workload_token(KEY), declared, now=NOW)
