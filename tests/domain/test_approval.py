"""The rules of approving: what is left of a request, whose yes counts, and how other people's words are shown."""

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from broker.domain.approval import (
    Approval,
    Narrowing,
    Need,
    Requesters,
    Verdict,
    Vote,
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
    given = {"subject": name} | more
    return PrincipalRule(name=name, kind="person", issuer="people", roles=roles, groups=groups, owner=owner, **given)


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
