"""The rules of approving: what is left of a request, whose yes counts, and how other people's words are shown."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.approval import (
    Approval,
    Narrowing,
    Need,
    Requesters,
    Verdict,
    Vote,
    approved_by,
    are_met,
    counts,
    in_quotes,
    met,
    narrowed,
)
from broker.domain.catalogue import Catalogue, PrincipalRule
from broker.domain.errors import BrokerError
from broker.domain.identity import Principal, Role
from broker.domain.lifecycle import ApprovalState

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SCOPES = ("a:read", "a:write", "b:read", "b:write")
ASKED = Approval(
    id="apr_1",
    state=ApprovalState.OPEN,
    grant_id="grt_1",
    task_id="task_1",
    agent="summarizer",
    orchestrator="pipeline",
    resource="https://crm.example/api",
    scopes=SCOPES[:3],
    ttl_s=300,
    needs=(Need(group="security", quorum=2),),
    request_sha256="0" * 64,
    parameters_sha256="0" * 64,
    policy_version=1,
    created_at=NOW,
    expires_at=NOW,
)


def vote(voter, verdict=Verdict.APPROVE, scopes=None, ttl_s=None, issuer="people"):
    return Vote(
        approval_id="apr_1",
        voter=voter,
        issuer=issuer,
        subject=voter,
        verdict=verdict,
        scopes=scopes,
        ttl_s=ttl_s,
        reason=None,
        voted_at=NOW,
    )


narrowings = st.lists(
    st.builds(
        Narrowing,
        scopes=st.none() | st.lists(st.sampled_from([*SCOPES, "c:admin", "", "a b"]), max_size=5),
        ttl_s=st.none() | st.integers(-5, 10_000),
    ),
    max_size=8,
)


@given(narrowings)
def test_no_sequence_of_votes_widens_a_request(said):
    """INV-16: each accepted vote leaves at most what was left before it, and never nothing and never more."""
    votes, before = [], narrowed(ASKED, [])
    for number, narrowing in enumerate(said):
        try:
            narrowing.require_fits(ASKED, votes)
        except BrokerError:
            continue
        votes.append(
            vote(f"voter-{number}", scopes=narrowing.scopes and tuple(narrowing.scopes), ttl_s=narrowing.ttl_s)
        )
        left = narrowed(ASKED, votes)
        assert left.scopes <= before.scopes <= set(ASKED.scopes)
        assert left.scopes
        assert left.ttl_s <= before.ttl_s <= ASKED.ttl_s
        assert narrowing.scopes is None or left.scopes <= set(narrowing.scopes)
        before = left


@given(narrowings)
def test_the_order_of_votes_does_not_matter(said):
    votes = [vote(f"v{n}", scopes=each.scopes and tuple(each.scopes), ttl_s=each.ttl_s) for n, each in enumerate(said)]
    assert narrowed(ASKED, votes) == narrowed(ASKED, reversed(votes))


@given(narrowings)
def test_who_says_no_leaves_nothing_out(said):
    """Or a no would narrow what a later approval of the same request gives."""
    noes = [vote(f"v{n}", Verdict.DENY, each.scopes and tuple(each.scopes), each.ttl_s) for n, each in enumerate(said)]
    assert narrowed(ASKED, noes) == narrowed(ASKED, [])


def rule(name, *groups, owner=None, roles=("approver",), **more):
    given = {"subject": name, "issuer": "people"} | more
    return PrincipalRule(name=name, kind="person", roles=roles, groups=groups, owner=owner, **given)


def principal(name, *groups, owner=None, subject=None, roles=(Role.APPROVER,)):
    return Principal(
        name=name,
        kind="person",
        issuer="people",
        subject=subject or name,
        roles=frozenset(roles),
        owner=owner,
        groups=frozenset(groups),
    )


ASKING = Requesters(
    names=frozenset({"summarizer", "pipeline", "user@example.org"}),
    identities=frozenset({("people", "the-agent")}),
    owners=frozenset({"crm-team", "lead@example.org"}),
)
NEED = Need(group="security", quorum=2)


def test_whose_yes_counts():
    assert counts(NEED, principal("sam", "security"), ASKING)
    assert not counts(NEED, principal("sam", "databases"), ASKING)
    assert not counts(NEED, principal("sam", "security", roles=(Role.ADMIN,)), ASKING)
    assert not counts(NEED, principal("summarizer", "security"), ASKING)
    assert not counts(NEED, principal("pipeline", "security"), ASKING)
    assert not counts(NEED, principal("renamed", "security", subject="the-agent"), ASKING)
    assert not counts(NEED, principal("uma", "security", subject="user@example.org"), ASKING)
    assert not counts(NEED, principal("olga", "security", owner="crm-team"), ASKING)
    assert not counts(NEED, principal("lea", "security", subject="lead@example.org"), ASKING)


def test_an_owner_counts_where_policy_says_so_and_whoever_asks_never_does():
    lenient = replace(NEED, owner_may=True)
    assert counts(lenient, principal("olga", "security", owner="crm-team"), ASKING)
    assert counts(lenient, principal("lea", "security", subject="lead@example.org"), ASKING)
    assert not counts(lenient, principal("pipeline", "security", owner="crm-team"), ASKING)
    assert not counts(lenient, principal("uma", "security", subject="user@example.org"), ASKING)


def test_votes_are_counted_under_the_configuration_as_it_is():
    people = (
        rule("sam", "security"),
        rule("sue", "security"),
        rule("dan", "databases"),
        rule("old", roles=("auditor",)),
    )
    votes = [vote("sam"), vote("sue", Verdict.DENY), vote("dan"), vote("old"), vote("gone"), vote("sam2", issuer="x")]
    found = met([NEED, Need(group="databases", quorum=1)], votes, ASKING, Catalogue(principals=people))
    assert found == {"security": 1, "databases": 1}
    assert not are_met([NEED], found)
    assert are_met([replace(NEED, quorum=1)], found)
    assert not are_met([replace(NEED, group="nobody")], found)


def test_a_voter_by_prefix_is_one_of_its_subjects():
    people = (rule("people", "security", subject=None, subject_prefix="staff/"),)
    inside, outside = replace(vote("people"), subject="staff/sam"), replace(vote("people"), subject="guests/sam")
    assert met([NEED], [inside], ASKING, Catalogue(principals=people)) == {"security": 1}
    assert met([NEED], [outside], ASKING, Catalogue(principals=people)) == {"security": 0}


# `ada` has a bot and a service of her own, with a bot that the service owns; `fleet` is a program, `team` nobody.
KNOWN = Catalogue(
    principals=(
        rule("ada", "security", owner="team"),
        rule("bob", "security", owner="team"),
        rule("ada-bot", "security", owner="ada"),
        replace(rule("ada-service", owner="ada"), kind="service"),
        rule("below", "security", owner="ada-service"),
        rule("ada-abroad", "security", issuer="elsewhere", subject="ada"),
        replace(rule("ada", "security", owner="team"), name="ada-too", claims={"email": "ada@example.org"}),
        rule("carl", "security", subject="uid-carl"),
        replace(rule("fleet", "security"), kind="service"),
        rule("one", "security", owner="fleet"),
        rule("two", "security", owner="fleet"),
        rule("lea", subject="uid-lea"),
        rule("by-name", "security", owner="lea"),
        rule("by-subject", "security", owner="uid-lea"),
        rule("ring", "security", owner="rung"),
        replace(rule("rung", "security", owner="ring"), kind="service"),
    )
)


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("ada", "ada", True),
        ("ada", "bob", False),
        ("ada", "ada-bot", True),
        ("ada", "below", True),
        ("ada-bot", "below", True),
        ("ada", "ada-abroad", True),
        ("ada", "ada-too", True),
        ("ada-abroad", "ada-bot", True),
        ("bob", "ada-bot", False),
        ("bob", "carl", False),
        ("by-name", "by-subject", True),
        ("fleet", "one", True),
        ("one", "two", False),
        ("ring", "bob", False),
    ],
)
def test_two_principals_of_one_person_are_one(one, other, are_one):
    """INV-15: by name, by subject of any issuer, and by who answers for them; a team or a program makes nobody one."""
    first, second = KNOWN.rule(one), KNOWN.rule(other)
    assert KNOWN.are_one_person(first, second) is KNOWN.are_one_person(second, first) is are_one
    votes = [replace(vote(each.name, issuer=each.issuer), subject=each.subject) for each in (first, second)]
    asked = Need(group="security", quorum=2)
    if one != other and {"security"} <= set(first.groups) & set(second.groups):
        for said in (votes, votes[::-1]):
            assert met([asked], said, ASKING, KNOWN) == {"security": 1 if are_one else 2}
            assert len(approved_by([asked], said, ASKING, KNOWN).by) == (1 if are_one else 2)


def test_what_a_requester_owns_does_not_count_whatever_the_policy_says():
    """INV-15: nor does their subject of another issuer."""
    lenient = replace(NEED, owner_may=True)
    assert not counts(lenient, principal("bot", "security", owner="pipeline"), ASKING)
    assert not counts(lenient, principal("bot", "security", owner="user@example.org"), ASKING)
    abroad = replace(principal("abroad", "security", subject="the-agent"), issuer="elsewhere")
    assert not counts(lenient, abroad, ASKING)


@given(st.text(alphabet=st.characters(), max_size=400), st.integers(1, 300))
def test_quoted_words_are_one_short_printable_line(text, longest):
    """INV-31: nothing of them acts on a terminal or a page, and nobody is buried under them."""
    shown = in_quotes(text, longest)
    assert shown.isprintable()
    assert len(shown) <= 2 * longest + 1
    assert len(shown.splitlines()) <= 1


def test_what_is_hidden_is_shown_and_what_is_harmless_is_left_as_it_is():
    assert in_quotes("prepare the Monday call – für Zoë", 100) == "prepare the Monday call – für Zoë"
    assert in_quotes("a\x1b[31mb\u202ec\u200bd\r\ne", 100) == "a\\x1b[31mb\\u202ec\\u200bd\\r\\ne"
    assert in_quotes("abcdef", 3) == "abc…"
    assert in_quotes("\ud800", 10) == "\\ud800"
