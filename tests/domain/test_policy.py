import dataclasses
import json
from datetime import UTC, datetime

import cedarpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.catalogue import Catalogue, PrincipalRule, Resource, TrustedIssuer
from broker.domain.errors import ConfigurationError
from broker.domain.identity import Principal
from broker.domain.policy import (
    ALLOW,
    DENY,
    NEEDS_APPROVAL,
    NOBODY,
    AccessRequest,
    Approved,
    PolicySet,
    TaskFacts,
    read_tests,
    run_tests,
)

CRM = "https://crm.example/api"
BERLIN = "Europe/Berlin"
PEOPLE = TrustedIssuer(
    name="people",
    issuer="https://people.example",
    key_source="discovery",
    users=True,
    user_attributes={"groups": "groups", "department": "org.department"},
)
SCOPES = tuple(f"contacts:{number}" for number in range(64))
RULES = (
    PrincipalRule(name="summarizer", kind="agent", issuer="https://issuer.example", subject="s", owner="sales"),
    PrincipalRule(name="scribe", kind="agent", issuer="https://issuer.example", subject="t"),
    *(
        PrincipalRule(
            name=name,
            kind="person",
            issuer="https://issuer.example",
            subject=name,
            roles=("approver",),
            groups=("security",),
        )
        for name in ("sam", "sue")
    ),
)


def catalogue(policies: str, *, resource: str = CRM, scopes: tuple[str, ...] = SCOPES) -> Catalogue:
    return Catalogue(
        version=7,
        issuers=(PEOPLE,),
        time_zone=BERLIN,
        principals=RULES,
        resources=(Resource(identifier=resource, scopes=scopes, sensitivity="restricted"),),
        policies={"test.cedar": policies},
    )


def compiled(policies: str, **options: str) -> PolicySet:
    return PolicySet.compile(catalogue(policies, **options))


def asked(*scopes: str, resource: str = CRM, **facts: object) -> AccessRequest:
    task = TaskFacts(
        id="task_1", purpose="the leads of May", age_s=60, orchestrator="pipeline", labels=facts.pop("labels", {})
    )
    return AccessRequest(
        **{
            "agent": Principal(
                name="summarizer",
                kind="agent",
                issuer="https://issuer.example",
                subject="s",
                roles=frozenset(),
                owner="sales",
            ),
            "resource": Resource(identifier=resource, scopes=SCOPES, sensitivity="restricted"),
            "scopes": frozenset(scopes or SCOPES[:1]),
            "ttl_s": 300,
            "task": task,
            "intent": None,
            "sender_bound": False,
            "claimed": {},
            "now": datetime(2026, 3, 2, 12, tzinfo=UTC),
        }
        | facts
    )


@pytest.fixture
def evaluations(monkeypatch):
    """Every question the engine is asked."""
    questions = []
    really = cedarpy.is_authorized

    def counting(request, *others):
        questions.append(request)
        return really(request, *others)

    monkeypatch.setattr(cedarpy, "is_authorized", counting)
    return questions


SHORT = '@id("short") permit (principal, action, resource) when { context.ttl_s <= 60 };'
BOUND = '@id("bound") permit (principal, action, resource) when { context.sender_bound && context.ttl_s <= 45 };'
ASKING = '@id("asking") @approval("security") @quorum("2") permit (principal, action, resource);'
NIGHT = '@id("night") forbid (principal, action, resource) when { context.time.hour < 6 };'
EVERYTHING = '@id("all") permit (principal, action, resource);'


# --- What is decided --------------------------------------------------------------------------------------------------


def test_what_no_policy_allows_is_denied():
    decision = compiled("").decide(asked())
    assert (decision.outcome, decision.policies) == (DENY, ())
    assert decision.reasons == (f"no policy allows {SCOPES[0]} on {CRM} to summarizer: ask for another scope",)


def test_every_scope_has_to_be_allowed_and_the_refused_ones_are_named():
    policies = compiled(f'@id("one") permit (principal, action == Action::"{SCOPES[0]}", resource);')
    decision = policies.decide(asked(SCOPES[0], SCOPES[1]))
    assert (decision.outcome, decision.refused_scopes) == (DENY, (SCOPES[1],))


def test_a_forbid_wins_over_a_permit_and_over_an_approval():
    policies = compiled(EVERYTHING + ASKING + NIGHT)
    assert policies.decide(asked()).policies == ("all",)
    night = policies.decide(asked(now=datetime(2026, 3, 2, 3, tzinfo=UTC)))
    assert (night.outcome, night.policies) == (DENY, ("night",))
    assert night.reasons == (f"policy 'night' forbids {SCOPES[0]} on {CRM} when {{ context.time.hour < 6 }}",)


def test_a_permit_that_asks_people_waits_for_them():
    decision = compiled(ASKING).decide(asked())
    assert (decision.outcome, decision.approvals) == (NEEDS_APPROVAL, (("security", 2),))


def test_labels_and_claims_are_data_a_policy_may_look_at():
    policies = compiled(
        '@id("team") permit (principal, action, resource) when {'
        ' context.task.labels.hasTag("team") && context.task.labels.getTag("team") == "crm" };'
        '@id("drill") forbid (principal, action, resource) when { context.claimed.hasTag("drill") };'
    )
    assert policies.decide(asked()).outcome == DENY
    assert policies.decide(asked(labels={"team": "crm"})).outcome == ALLOW
    assert policies.decide(asked(claimed={"team": "crm"})).outcome == DENY
    assert policies.decide(asked(labels={"team": "crm"}, claimed={"drill": True})).policies == ("drill",)


def test_a_fact_that_is_not_there_is_not_an_empty_one():
    policies = compiled('@id("own") permit (principal, action, resource) unless { context has user };')
    assert policies.decide(asked()).outcome == ALLOW
    assert policies.decide(asked(user="alice")).outcome == DENY


def test_what_stands_in_a_name_is_never_read_as_policy():
    odd = 'urn:x") when { true }; permit(principal, action, resource); //'
    policies = compiled(NIGHT, resource=odd)
    assert policies.decide(asked(resource=odd)).outcome == DENY


# --- What the engine cannot do ----------------------------------------------------------------------------------------


def test_what_concerns_many_agents_is_parsed_once_for_all_of_them():
    """What is parsed is large: a fleet of a thousand agents would hold it a thousand times."""
    policies = compiled(
        """@id("any") permit (principal, action == Action::"contacts:0", resource) when { context.ttl_s <= 60 };
        @id("own") permit (principal == Agent::"summarizer", action == Action::"contacts:1", resource);"""
    )
    assert policies._slice_of(("summarizer", "contacts:0", CRM)) is policies._slice_of(("scribe", "contacts:0", CRM))
    assert policies._slice_of(("summarizer", "contacts:1", CRM)) is not policies._slice_of(
        ("scribe", "contacts:1", CRM)
    )


def test_an_engine_that_breaks_denies_and_says_to_the_log_alone_what_broke(monkeypatch):
    policies = compiled(EVERYTHING)

    def broken(*_):
        raise OverflowError("the engine is out of order")

    monkeypatch.setattr(cedarpy, "is_authorized", broken)
    decision = policies.decide(asked())
    assert decision.outcome == DENY
    assert decision.failure == "OverflowError: the engine is out of order"
    assert "out of order" not in str(decision.as_json())
    assert policies.explain(asked(), decision) == ()


def test_a_forbid_that_cannot_be_evaluated_denies():
    overflow = "context.ttl_s + 9223372036854775807 > 0"
    policies = compiled(EVERYTHING + f'@id("odd") forbid (principal, action, resource) when {{ {overflow} }};')
    decision = policies.decide(asked())
    assert (decision.outcome, decision.policies) == (DENY, ("odd",))
    assert "could not be evaluated" in decision.reasons[0]
    assert "odd" in (decision.failure or "")


def test_a_permit_that_cannot_be_evaluated_allows_nothing_and_leaves_a_trace():
    overflow = "context.ttl_s + 9223372036854775807 > 0"
    decision = compiled(f'@id("odd") permit (principal, action, resource) when {{ {overflow} }};').decide(asked())
    assert decision.outcome == DENY
    assert "odd" in (decision.failure or "")


# --- How much it costs, and what would be allowed ---------------------------------------------------------------------


def test_a_denial_costs_one_question_for_each_scope(evaluations):
    decision = compiled(SHORT + BOUND).decide(asked(*SCOPES))
    assert decision.outcome == DENY
    assert len(evaluations) == 64


def test_a_denial_with_people_to_ask_costs_two_questions_for_each_scope(evaluations):
    asking = ASKING.removesuffix(";") + " when { context.ttl_s <= 60 };"
    assert compiled(SHORT + asking).decide(asked(*SCOPES)).outcome == DENY
    assert len(evaluations) == 128


def test_looking_for_what_would_be_allowed_asks_at_most_32_times(evaluations):
    asking = ASKING.removesuffix(";") + " when { context.ttl_s <= 60 };"
    for policies in (compiled(SHORT + BOUND), compiled(SHORT + asking), compiled(BOUND)):
        request = asked(*SCOPES, ttl_s=86_400)
        decision = policies.decide(request)
        evaluations.clear()
        assert policies.explain(request, decision)
        assert 0 < len(evaluations) <= 32


def test_the_longest_life_that_would_be_allowed_is_found():
    policies = compiled(SHORT)
    request = asked(ttl_s=3600)
    decision = policies.decide(request)
    assert decision.reasons == (f"policy 'short' allows {SCOPES[0]} on {CRM} only when {{ context.ttl_s <= 60 }}",)
    assert policies.explain(request, decision) == ("it would be allowed with ttl_s = 60: ask for at most that",)


def test_a_proof_is_recommended_where_one_would_do():
    policies = compiled(BOUND)
    for ttl_s, hint in (
        (45, "with a DPoP proof: bind the credential to a key (RFC 9449)"),
        (300, "with ttl_s = 45 and a DPoP proof: ask for at most that"),
    ):
        request = asked(ttl_s=ttl_s)
        assert policies.explain(request, policies.decide(request)) == (f"it would be allowed {hint}",)


def test_among_several_scopes_each_hint_names_its_own():
    policies = compiled(SHORT)
    request = asked(*SCOPES[:2])
    assert policies.explain(request, policies.decide(request)) == (
        f"{SCOPES[0]} on {CRM} would be allowed with ttl_s = 60: ask for at most that",
        f"{SCOPES[1]} on {CRM} would be allowed with ttl_s = 60: ask for at most that",
    )


@pytest.mark.parametrize("policies", [EVERYTHING, ASKING, NIGHT, EVERYTHING + NIGHT])
def test_nothing_is_searched_for_where_no_change_could_help(policies, evaluations):
    found = compiled(policies)
    request = asked(now=datetime(2026, 3, 2, 3, tzinfo=UTC)) if "night" in policies else asked()
    decision = found.decide(request)
    evaluations.clear()
    assert found.explain(request, decision) == ()
    assert evaluations == []


def test_a_decision_keeps_no_more_reasons_than_somebody_reads():
    decision = compiled(SHORT + BOUND).decide(asked(*SCOPES))
    assert len(decision.reasons) == 21
    assert decision.reasons[-1] == "and 108 reasons more: ask for fewer scopes at once"


# --- The facts --------------------------------------------------------------------------------------------------------


def allowed_where(condition, **facts):
    text = f'@id("it") permit (principal, action, resource) when {{ {condition} }};'
    return compiled(text).decide(asked(**facts)).outcome == ALLOW


@pytest.mark.parametrize(
    ("now", "hour", "minute", "weekday"),
    [
        # The last and the first minute of summer time, and a day that is another one there.
        (datetime(2026, 3, 29, 0, 59, tzinfo=UTC), 1, 59, 7),
        (datetime(2026, 3, 29, 1, 0, tzinfo=UTC), 3, 0, 7),
        (datetime(2026, 10, 25, 0, 30, tzinfo=UTC), 2, 30, 7),
        (datetime(2026, 10, 25, 1, 30, tzinfo=UTC), 2, 30, 7),
        (datetime(2026, 7, 5, 22, 0, tzinfo=UTC), 0, 0, 1),
    ],
)
def test_the_time_of_day_is_that_of_the_named_zone(now, hour, minute, weekday):
    there = f'{{zone: "{BERLIN}", hour: {hour}, minute: {minute}, weekday: {weekday}}}'
    assert allowed_where(f"context.local == {there}", now=now)


@pytest.mark.parametrize("zone", ["Europe/Berlim", "../../etc/passwd", "/etc/localtime", "europe/berlin", "", "+01:00"])
def test_a_zone_that_is_not_known_is_refused_on_load(zone):
    with pytest.raises(ConfigurationError, match="there is no time zone"):
        PolicySet.compile(dataclasses.replace(catalogue(EVERYTHING), time_zone=zone))


def test_one_that_is_in_force_denies_what_looks_at_it_and_nothing_else():
    """INV-13: a machine without it does not know the time there."""
    policies = (
        f'@id("day") permit (principal, action == Action::"{SCOPES[0]}", resource) when {{ context.local.hour < 24 }};'
        f'@id("any") permit (principal, action == Action::"{SCOPES[1]}", resource);'
    )
    nowhere = dataclasses.replace(catalogue(policies), time_zone="Atlantis/Poseidonis")
    in_force = PolicySet.compile(nowhere, applied=True)
    denied = in_force.decide(asked(SCOPES[0]))
    assert (denied.outcome, "Atlantis" in denied.failure) == (DENY, True)
    assert in_force.decide(asked(SCOPES[1])).outcome == ALLOW


def test_what_an_issuer_says_of_a_user_is_a_closed_list_of_sets():
    condition = "context has user_attributes && context.user_attributes has groups"
    member = f'{condition} && context.user_attributes.groups.contains("it")'
    assert allowed_where(member, user="people:alice", user_attributes={"groups": ("hr", "it")})
    assert not allowed_where(member, user="people:alice", user_attributes={"groups": ("hr",)})
    assert not allowed_where(member, user="people:alice")
    assert not allowed_where(condition)
    # Without a user there is nothing to know of one, whoever says so.
    assert not allowed_where(condition, user_attributes={"groups": ("it",)})
    for misspelt in ("has grops", '.grops.contains("it")'):
        with pytest.raises(ConfigurationError, match="there is no user attribute 'grops': did you mean 'groups'"):
            allowed_where(f"context has user_attributes && context.user_attributes {misspelt}")


def test_the_callers_word_is_in_claimed_alone():
    """A claim that is called like a fact is no fact."""
    claimed = {"user_attributes": {"groups": ["it"]}, "approvals": {"count": 7}, "delegation_root": "planner"}
    for condition in (
        "context has user_attributes",
        "context.approvals.count > 0",
        'context.delegation_root == "planner"',
        "context.break_glass",
    ):
        assert not allowed_where(condition, claimed=claimed | {"break_glass": True})
    assert allowed_where('context.claimed.hasTag("delegation_root")', claimed=claimed)


def test_the_chain_is_a_set_and_the_root_is_the_agent_itself_without_one():
    assert allowed_where('context.delegation_root == "summarizer" && context.delegation_chain.isEmpty()')
    chain = 'context.delegation_root == "planner" && context.delegation_chain.containsAll(["planner", "scribe"])'
    assert allowed_where(chain, chain=("planner", "scribe"))
    assert not allowed_where(chain, chain=("scribe", "planner"))


def test_where_a_resource_leads_is_typed_by_what_the_configuration_says():
    def with_destination(condition, destination):
        made = catalogue(f'@id("it") permit (principal, action, resource) when {{ {condition} }};')
        [crm] = made.resources
        made = dataclasses.replace(made, resources=(dataclasses.replace(crm, destination=destination),))
        return PolicySet.compile(made).decide(dataclasses.replace(asked(), resource=made.resources[0]))

    eu = 'resource.destination.region == "eu" && resource.destination.port == 443'
    assert with_destination(eu, {"region": "eu", "port": 443}).outcome == ALLOW
    assert with_destination(eu, {"region": "us", "port": 443}).outcome == DENY
    for destination in ({"region": "eu"}, {"region": "eu", "port": "443"}, {}):
        with pytest.raises(ConfigurationError):
            with_destination(eu, destination)


# --- What a slice reads -----------------------------------------------------------------------------------------------

CONDITIONS = (
    "context.ttl_s <= 60",
    'context.task.purpose like "*lead*" && context.sender_bound',
    'context.task == {id: "task_1", purpose: "", age_s: 1, orchestrator: "o", labels: context.task.labels}',
    'context has user && context.user == "alice"',
    "context has user",
    'context.task has purpose && context.task.purpose != ""',
    f'context.scopes.contains("{SCOPES[0]}") || context.time.hour < 12',
    'if context.risk == "high" then context.sender_bound else true',
    'context.claimed.hasTag("team") && context.claimed.getTag("team") == "crm"',
    'context.task.labels.hasTag("team")',
    '[context.intent, context.risk].contains("low")',
    "{x: context}.x.sender_bound",
    "context.agent.live_grants < 3 || context.agent.recent_denials == 0",
    "context.break_glass || context.delegation_depth > 0",
    'context.delegation_chain.contains("planner") && context.delegation_root == "planner"',
    "context has user_attributes && context.user_attributes has groups && "
    'context.user_attributes.groups.contains("it")',
    'context.approvals.count > 0 && context.approvals.groups.contains("board")',
    'context.approvals.by.contains("sam")',
    'context.local.hour == 13 && context.local.zone == "Europe/Berlin"',
    'context.local == {zone: "Europe/Berlin", hour: 4, minute: 0, weekday: 1}',
)


@given(
    condition=st.sampled_from(CONDITIONS),
    unless=st.none() | st.sampled_from(CONDITIONS),
    effect=st.sampled_from(["permit", "forbid"]),
    facts=st.fixed_dictionaries(
        {
            "ttl_s": st.sampled_from([60, 61]),
            "sender_bound": st.booleans(),
            "intent": st.sampled_from([None, "low", "send"]),
            "risk": st.sampled_from(["low", "high"]),
            "user": st.sampled_from([None, "alice", "bob"]),
            "labels": st.sampled_from([{}, {"team": "crm"}]),
            "claimed": st.sampled_from([{}, {"team": "crm"}, {"team": 1}]),
            "break_glass": st.sampled_from([None, "an emergency"]),
            "chain": st.sampled_from([(), ("planner", "scribe"), ("scribe", "planner")]),
            "user_attributes": st.sampled_from([{}, {"groups": ("hr", "it")}]),
            "approved": st.sampled_from([NOBODY, Approved(by=frozenset({"sam"}), groups=frozenset({"board"}))]),
            "now": st.sampled_from([datetime(2026, 3, 2, hour, tzinfo=UTC) for hour in (3, 12)]),
        }
    ),
)
def test_leaving_out_what_no_policy_reads_changes_no_answer(condition, unless, effect, facts):
    text = f'@id("it") {effect} (principal, action, resource) when {{ {condition} }}'
    text += ";" if unless is None else f" unless {{ {unless} }};"
    told_what_it_reads = compiled(EVERYTHING * (effect == "forbid") + text)
    told_everything = PolicySet(
        7, [dataclasses.replace(policy, reads=frozenset({()})) for policy in told_what_it_reads._by_id.values()], BERLIN
    )
    assert told_what_it_reads.decide(asked(**facts)) == told_everything.decide(asked(**facts))


@given(text=st.text(), ttl_s=st.integers(1, 86_400), claimed=st.dictionaries(st.text(), st.text(), max_size=2))
def test_whatever_is_asked_reaches_the_engine_as_the_values_it_is(text, ttl_s, claimed):
    """INV-31."""
    told = []
    policies = compiled('@id("it") permit (principal, action, resource) when { {x: context}.x.ttl_s > 0 };')
    request = asked(
        intent=text,
        user=text,
        user_attributes={"groups": (text,)},
        approved=Approved(by=frozenset({text}), groups=frozenset({text})),
        ttl_s=ttl_s,
        claimed=claimed,
        live_grants=3,
        recent_denials=2,
    )
    request = dataclasses.replace(request, task=dataclasses.replace(request.task, purpose=text, orchestrator=text))
    really = cedarpy.is_authorized
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cedarpy, "is_authorized", lambda asked, *more: (told.append(asked), really(asked, *more))[1])
        decision = policies.decide(request)
    # A lone surrogate is text to Python and no text to the engine: what it cannot read is refused (INV-13).
    assert decision.outcome == (ALLOW if decision.failure is None else DENY)
    context = json.loads(told[0]["context"])
    labels, claims = ("task", "caller") if claimed else ("none", "none")
    assert context == {
        "task": {
            "id": "task_1",
            "purpose": text,
            "age_s": 60,
            "orchestrator": text,
            "labels": {"__entity": {"type": "Labels", "id": labels}},
        },
        "intent": text,
        "ttl_s": ttl_s,
        "scopes": [SCOPES[0]],
        "sender_bound": False,
        "break_glass": False,
        "delegation_depth": 0,
        "delegation_chain": [],
        "delegation_root": "summarizer",
        "user": text,
        "user_attributes": {"groups": [text]},
        "approvals": {"count": 1, "by": [text], "groups": [text]},
        "risk": "low",
        "agent": {"live_grants": 3, "recent_denials": 2},
        "time": {"hour": 12, "weekday": 1},
        "local": {"zone": BERLIN, "hour": 13, "minute": 0, "weekday": 1},
        "claimed": {"__entity": {"type": "Claimed", "id": claims}},
    }


def test_only_what_is_read_is_told(evaluations):
    compiled(SHORT).decide(asked(claimed={"secret": "plans"}))
    assert evaluations[0]["context"] == '{"ttl_s": 300}'


# --- How a condition reads --------------------------------------------------------------------------------------------


def test_a_condition_reads_as_it_was_written():
    policies = compiled(
        '@id("it") permit (principal, action, resource == Resource::"urn:a when (b)")'
        ' when { context.task.purpose == "(lead) when x" && principal has owner } unless { context.ttl_s > 60 };',
        resource="urn:a when (b)",
    )
    reasons = policies.decide(asked(resource="urn:a when (b)")).reasons
    assert reasons == (
        f"policy 'it' allows {SCOPES[0]} on urn:a when (b) only"
        ' when { (context.task.purpose == "(lead) when x") && (principal has owner) } unless { context.ttl_s > 60 }',
    )


@pytest.mark.parametrize("alternatives", [70, 3000])
def test_a_condition_the_engine_could_not_read_back_is_refused_on_load(alternatives):
    purposes = " || ".join(f'context.task.purpose == "{number}"' for number in range(alternatives))
    with pytest.raises(ConfigurationError, match=r"test\.cedar.*is nested too deeply.*contains"):
        compiled(f'@id("it") permit (principal, action, resource) when {{ {purposes} }};')


def test_a_long_condition_is_cut():
    purposes = " || ".join(f'context.task.purpose == "{number}"' for number in range(40))
    reason = compiled(f'@id("it") permit (principal, action, resource) when {{ {purposes} }};').decide(asked()).reasons
    assert len(reason[0]) < 700
    assert reason[0].endswith("…")


# --- What is refused on load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policies", "problem"),
    [
        ("permit (principal, action, resource);", "has no @id"),
        (EVERYTHING + EVERYTHING, "is taken by a policy in test.cedar"),
        ('@id("x") permit (principal == Agent::"sumarizer", action, resource);', "did you mean 'summarizer'?"),
        ('@id("x") permit (principal, action, resource) when { context.tll_s < 1 };', "tll_s"),
        ('@id("x") permit (principal, action, resource) when { context.ttl_s < "1" };', "String"),
        ('@id("x") permit (principal == ?principal, action, resource);', "has a template"),
        ('@id("x") @max_tll("60") permit (principal, action, resource);', "did you mean @max_ttl?"),
        ('@id("x") @max_ttl("0") permit (principal, action, resource);', "not a whole number from 1 to 86400"),
        ('@id("x") @quorum("2") permit (principal, action, resource);', "asks nobody"),
        ('@id("x") @approval("security") forbid (principal, action, resource);', "on a permit"),
        ("permit", "not Cedar"),
    ],
)
def test_a_policy_that_cannot_mean_what_it_says_is_refused_with_the_remedy(policies, problem):
    with pytest.raises(ConfigurationError) as refused:
        compiled(policies)
    assert problem in str(refused.value)
    assert "test.cedar" in str(refused.value)


# --- Tests of policies ------------------------------------------------------------------------------------------------

TEST = {"name": "it", "agent": "summarizer", "resource": CRM, "scopes": [SCOPES[0]], "expect": "allow"}


def test_an_expectation_that_is_not_met_says_what_came_instead():
    policies = catalogue(SHORT)
    tests = read_tests({"tests": [TEST, TEST | {"ttl_s": 60, "policies": ["other"], "max_ttl_s": 5}]}, policies)
    denied, allowed = run_tests(PolicySet.compile(policies), tests)
    assert "expected allow, got deny: policy 'short' allows" in denied.wrong
    assert allowed.wrong == "expected policies other, got short; expected max_ttl_s 5, got None"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"agent": "nobody"}, "there is no principal 'nobody'"),
        ({"resource": "https://other.example"}, "is not a resource"),
        ({"expect": "maybe"}, "say allow, deny or needs_approval"),
        ({"ttl": 60}, "unknown member 'ttl'"),
        ({"ttl_s": True}, "ttl_s is not a whole number"),
        ({"scopes": SCOPES[0]}, "scopes is not a list of text"),
        ({"scopes": [1]}, "scopes is not a list of text"),
        ({"labels": "team"}, "labels is not a table"),
        ({"time": "noon"}, "time is not a date and time with its zone"),
        ({"time": datetime(2026, 3, 2, 12)}, "time is not a date and time with its zone"),  # noqa: DTZ001
    ],
)
def test_an_expectation_that_cannot_be_read_is_named(changed, problem):
    with pytest.raises(ConfigurationError) as refused:
        read_tests({"tests": [TEST | changed]}, catalogue(SHORT))
    assert str(refused.value).startswith("test 'it': ")
    assert problem in str(refused.value)


@pytest.mark.parametrize("document", [{"tests": ["it"]}, {"tests": {"name": "it"}}, {"test": [TEST]}])
def test_a_file_of_other_things_than_tests_is_refused(document):
    with pytest.raises(ConfigurationError, match=r"\[\[tests\]\]"):
        read_tests(document, catalogue(SHORT))


def test_a_scope_or_time_of_a_test_reaches_the_policy():
    policies = catalogue(EVERYTHING + NIGHT)
    night = TEST | {"time": datetime(2026, 3, 2, 3, tzinfo=UTC), "expect": "deny", "policies": ["night"]}
    results = run_tests(PolicySet.compile(policies), read_tests({"tests": [TEST, night]}, policies))
    assert all(result.passed for result in results)
