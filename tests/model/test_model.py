"""The protocol of issue and revocation over every order in which things can happen, and beside it those that fail.

`python -m tests.model` prints the table; with the name of a protocol, a shortest way to each of its flaws.
"""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from broker.domain.lifecycle import GrantState, LeaseState, sources
from tests.model.__main__ import PROTOCOLS, main
from tests.model.broken import BROKEN, LOCKED_AT_CONFIRM, LOCKED_AT_INTENT
from tests.model.checker import explore
from tests.model.protocols import (
    C1,
    E_DYING,
    E_DYING_EXPIRY,
    E_DYING_TARGET,
    WEAKER,
    A,
    B,
    C,
    D,
    E,
    commit_accessor,
    confirm,
    create_token,
    mark_stuck,
)
from tests.model.world import Ask, Login, Token, VaultLease

SOUND = (E, E_DYING_TARGET, E_DYING_EXPIRY, LOCKED_AT_INTENT, LOCKED_AT_CONFIRM)


def named(protocols):
    return {"argvalues": protocols, "ids": [protocol.name for protocol in protocols]}


# --- ours ---------------------------------------------------------------------------------------------------------


def test_ours_breaks_nothing_in_any_order_of_events():
    """INV-01, INV-02, INV-03, INV-04, INV-12, INV-23."""
    found = explore(E)
    assert not found.violations, next(iter(found.violations.values()))
    # Far fewer would mean that the model has lost a kind of failure; far more, that two fields tell the same.
    assert 500 < found.worlds < 1_000


def test_ours_is_not_sound_because_it_does_nothing():
    found = explore(E)
    in_use = found.nearest(lambda w: w.handed_out and w.grant is GrantState.ACTIVE and w.login is Login.ALIVE)
    assert in_use.names == (
        "the issuer commits the intent",
        "the issuer creates a token for this grant",
        "the issuer commits the accessor",
        "the issuer asks for the secret",
        "Vault finds the token good",
        "Vault creates the login",
        "Vault registers the lease",
        "the issuer receives the secret",
        "the issuer commits lease held and grant active",
        "the issuer hands the secret out",
    )
    assert found.nearest(lambda w: w.handed_out and w.lease is LeaseState.RELEASED)


def test_what_may_go_wrong_around_ours_is_all_of_this():
    """A kind of failure that falls out of the model would make everything look sounder."""
    worlds = explore(E_DYING).reached_by
    assert {move.name for world in worlds for move in E_DYING.moves(world) if move.may} == {
        "the task ends, and with it every grant that has a row",
        "the issuer crashes",
        "the issuer creates a token and does not hear its accessor",
        "the issuer commits the accessor and does not hear that it did",
        "the issuer hears no answer in time",
        "the issuer commits and does not hear that it did",
        "the issuer does not commit and does not hear that either",
        "the sweep crashes and forgets what it saw",
        "Vault gives up the queued lease after six failures",
        "Vault dies before it registers the lease",
    }


def test_ours_kills_what_vault_registers_after_the_token_was_revoked():
    """INV-03: no accessor and no queue of Vault's reaches that lease; the comparison with Vault's list does."""
    found = explore(E)
    late = [w for w in found.reached_by if w.token is Token.REVOKED and w.vault_lease is VaultLease.LIVE]
    assert found.trace_to(late[0]).moves[-1].does == "registers the lease, after its token was revoked"
    for world in late:
        assert {(end.lease, end.login) for end in found.ends_of(world)} == {(LeaseState.RELEASED, Login.DEAD)}


def test_ours_tells_a_person_of_what_vault_gave_up_and_ends_it_all_the_same():
    found = explore(E)
    stuck = found.nearest(lambda w: w.lease is LeaseState.STUCK)
    assert stuck.has_in_order("Vault gives up the queued lease", "the sweep reports the lease as stuck")
    assert all(world.lease is not LeaseState.STUCK for world in found.at_rest)


def test_every_move_of_ours_is_one_that_the_life_cycle_draws():
    for protocol in (E, E_DYING_TARGET, E_DYING_EXPIRY):
        for world in explore(protocol).reached_by:
            for move in protocol.moves(world):
                for before, after in ((world.grant, move.after.grant), (world.lease, move.after.lease)):
                    assert before in (after, None) or before in sources(after), move


@pytest.mark.parametrize("rule", [rule for rule in E.sweep if rule is not mark_stuck], ids=lambda rule: rule.__name__)
def test_ours_needs_every_rule_of_its_sweep(rule):
    """Only the report to a person is for that person, and for no invariant."""
    without = E.but(f"without {rule.__name__}", "a rule less", sweep=tuple(one for one in E.sweep if one is not rule))
    assert "debts end" in explore(without).violations


@pytest.mark.parametrize(
    ("step", "caught_by"),
    [(create_token, "debts end"), (commit_accessor, "INV-02"), (confirm, "INV-01")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_ours_needs_every_step_of_its_issuer(step, caught_by):
    without = E.but(f"without {step.__name__}", "a step less", issuer=tuple(one for one in E.issuer if one is not step))
    assert caught_by in explore(without).violations


@pytest.mark.parametrize("protocol", **named((LOCKED_AT_INTENT, LOCKED_AT_CONFIRM)))
def test_either_lock_of_the_task_keeps_an_ended_task_from_a_credential_and_ours_has_both(protocol):
    """INV-12. Where neither is held, see "no task lock" among the broken: so either may fail, and not both."""
    assert not explore(protocol).violations


# --- ours, under a Vault that dies between the login and its lease -------------------------------------------------


def test_a_login_that_vault_forgot_is_released_alive_by_whoever_asks_vault_alone():
    """INV-03, INV-04: what no list of Vault's has, only the target knows."""
    found = explore(E_DYING)
    assert set(found.violations) == {"INV-03", "INV-04"}
    assert found.violations["INV-03"].trace.has_in_order(
        "the issuer commits the accessor",
        "Vault creates the login",
        "Vault dies before it registers the lease",
        "the sweep revokes the accessor",
        "the sweep looks and finds everything dead",
        "the sweep releases the lease",
    )
    for world in found.reached_by:
        if world.lease is LeaseState.RELEASED and world.login is Login.ALIVE:
            assert world.ask is Ask.CUT
            assert not world.reference


@pytest.mark.parametrize("protocol", **named((E_DYING_TARGET, E_DYING_EXPIRY)))
def test_who_asks_the_target_or_waits_for_the_expiry_releases_nothing_alive(protocol):
    """INV-03, INV-04."""
    found = explore(protocol)
    assert found.nearest(lambda world: world.ask is Ask.CUT and world.login is Login.ALIVE)
    assert not found.violations, next(iter(found.violations.values()))


def test_killing_at_the_target_is_not_enough_where_the_release_does_not_look_there():
    """INV-04: the reconciler comes in the end, and the lease was called released before it came."""
    forgetful = replace(E_DYING_TARGET, name="E-dying-target unseen", sweep=(*E.sweep, E_DYING_TARGET.sweep[-2]))
    assert set(explore(forgetful).violations) == {"INV-04"}


# --- what others do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "breaks"),
    [
        (A, {"INV-02", "INV-03", "INV-04", "INV-12"}),
        (B, {"INV-02", "INV-03", "INV-04"}),
        (C1, {"INV-03", "INV-04", "INV-12", "INV-23"}),
        (C, {"INV-03", "INV-04"}),
        (D, {"INV-04"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_each_weaker_protocol_breaks_what_it_is_known_to_break_and_no_more(protocol, breaks):
    assert set(explore(protocol).violations) == breaks


@pytest.mark.parametrize(
    ("protocol", "invariant", "essential"),
    [
        # Nothing was written down before the secret was there.
        (A, "INV-03", ["the issuer asks", "Vault creates the login", "the issuer crashes"]),
        # Nobody held the task while its secret was on the way.
        (A, "INV-12", ["the task ends", "the issuer asks", "the issuer inserts its first row, as active"]),
        # The row says that something was intended, and has nothing to revoke it by.
        (
            B,
            "INV-03",
            ["the issuer commits the intent", "the sweep takes the 204 for death", "Vault creates the login"],
        ),
        # The row was ended while its issuer was slow, and the issuer does not ask.
        (C1, "INV-12", ["the issuer commits the accessor", "the task ends", "the issuer overwrites its row"]),
        (C1, "INV-23", ["the issuer commits the accessor", "the task ends", "the issuer overwrites its row"]),
        # The token is revoked, and a request already past its check makes a lease that no row will ever know.
        (
            C,
            "INV-03",
            [
                "the issuer commits the accessor",
                "Vault finds the token good",
                "the sweep revokes the accessor",
                "Vault registers the lease, after its token was revoked",
            ],
        ),
        # A 204 says that Vault has heard.
        (
            D,
            "INV-04",
            ["Vault creates the login", "the sweep revokes the accessor", "the sweep takes the 204 for death"],
        ),
    ],
    ids=lambda value: getattr(value, "name", value if isinstance(value, str) else ""),
)
def test_the_shortest_way_to_a_flaw_shows_what_is_wrong(protocol, invariant, essential):
    trace = explore(protocol).violations[invariant].trace
    assert trace.has_in_order(*essential), f"\n{trace}"


def test_a_lease_that_vault_gave_up_stays_alive_under_a_row_that_says_released():
    """INV-03, INV-04: the other flaw of C, that no shortest trace shows."""
    found = explore(C)
    given_up = found.nearest(lambda world: world in found.at_rest and world.vault_lease is VaultLease.IRREVOCABLE)
    assert {
        "the sweep takes the 204 for death and releases",
        "Vault gives up the queued lease after six failures",
    } < set(given_up.names)
    assert given_up.moves[-1].after.login is Login.ALIVE
    assert given_up.moves[-1].after.lease is LeaseState.RELEASED


def test_the_life_cycle_has_no_place_for_what_the_plain_update_does():
    """INV-23: so the one door refuses it, whatever an issuer believes."""
    overwriting = explore(C1).violations["INV-23"].trace.moves
    assert overwriting[-2].after.grant not in sources(overwriting[-1].after.grant)


# --- the checker is not blind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "caught_by"), BROKEN, ids=[protocol.name for protocol, _ in BROKEN])
def test_ours_broken_on_purpose_is_caught(protocol, caught_by):
    assert set(explore(protocol).violations) == caught_by


@pytest.mark.parametrize("protocol", **named((*PROTOCOLS.values(), LOCKED_AT_INTENT, LOCKED_AT_CONFIRM)))
def test_every_run_ends_once_nothing_goes_wrong_any_more(protocol):
    """Otherwise what is said of the worlds at rest would be said of some runs, and not of all."""
    found = explore(protocol)
    found.demand_that_every_run_ends()
    assert found.at_rest


@pytest.mark.parametrize("protocol", **named((*WEAKER, *SOUND, E_DYING)))
def test_every_step_and_every_rule_happens_somewhere(protocol):
    reached = explore(protocol).reached_by
    for rule in (*protocol.outside, *protocol.sweep):
        assert any(list(rule(world)) for world in reached), rule.__name__
    for step in protocol.issuer:
        assert any(world.issuer == step.__name__ for world in reached), step.__name__


@pytest.mark.parametrize("protocol", **named((*WEAKER, *SOUND, E_DYING)))
def test_every_move_changes_the_world(protocol):
    """One that did not would be counted as progress for ever."""
    for world in explore(protocol).reached_by:
        for move in protocol.moves(world):
            assert move.after != world, move


def test_a_protocol_that_goes_round_for_ever_is_refused():
    def forget(world):
        if world.seen_dead:
            yield from (
                replace(move, may=False) for move in E.moves(world) if move.does.startswith("crashes and forgets")
            )

    with pytest.raises(ValueError, match="in a cycle"):
        explore(E.but("forgetful", "it forgets what it saw", sweep=(*E.sweep, forget))).demand_that_every_run_ends()


# --- what a reader sees ---------------------------------------------------------------------------------------------


def test_a_trace_reads_as_what_happened_and_what_it_changed():
    assert str(explore(A).violations["INV-03"]).split("\n") == [
        "A (Vault, then insert a row) breaks INV-03: at rest, no credential is alive that no row accounts for",
        "  1  the issuer asks for the secret                                   ask none → sent",
        "  2  Vault finds the token good                                       ask sent → token checked",
        "  3  Vault creates the login                                          ask token checked → login created,"
        " login none → alive",
        "  4  Vault registers the lease                                        ask login created → answered,"
        " vault_lease none → live",
        "  5  the issuer crashes",
    ]


def test_the_table_and_the_flaws_are_printed():
    lines = CliRunner().invoke(main).output.splitlines()
    assert lines[0].split()[:4] == ["protocol", "worlds", "at", "rest"]
    assert [line[:28].strip() for line in lines[1:]] == list(PROTOCOLS)
    assert "breaks INV-04: no lease is released while its credential is alive" in CliRunner().invoke(main, ["D"]).output
    assert CliRunner().invoke(main, ["E"]).output == "E breaks nothing.\n"
