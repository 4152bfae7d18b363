"""Our own protocol, broken on purpose: in each of these one thing is wrong, and the checker has to see it."""

from __future__ import annotations

from collections.abc import Iterator

from broker.domain.lifecycle import GrantState, LeaseState, TaskState
from tests.model.protocols import (
    E,
    Protocol,
    Rule,
    Step,
    ask_for_secret,
    commit_accessor,
    confirm,
    create_token,
    hand_out,
    intend,
    look_up,
    overwrite,
    receive_secret,
    reconcile,
    release,
    release_on_204,
    revoke_lease_with_sync,
)
from tests.model.world import ABORTS, ENDED, Move, Token, VaultLease, World


def with_step(old: Step, *new: Step) -> tuple[Step, ...]:
    place = E.issuer.index(old)
    return (*E.issuer[:place], *new, *E.issuer[place + 1 :])


def with_rule(old: Rule, *new: Rule) -> tuple[Rule, ...]:
    place = E.sweep.index(old)
    return (*E.sweep[:place], *new, *E.sweep[place + 1 :])


# --- wrong steps -------------------------------------------------------------------------------------------------


def read_task(world: World, then: str) -> Iterator[Move]:
    """Looks at the task and does not hold it: whatever ends it now has ended it before the next step."""
    if world.task is TaskState.ACTIVE:
        yield Move("the issuer", "reads that the task is active", world.but(issuer=then))
    else:
        yield Move("the issuer", "reads that the task has ended and refuses", world.but(issuer=ENDED))


def intend_unseen(world: World, then: str) -> Iterator[Move]:
    intended = world.but(grant=GrantState.APPROVED, lease=LeaseState.INTENDED, issuer=then)
    yield Move("the issuer", "commits the intent, without a look at the task", intended)


def confirm_unseen(world: World, then: str) -> Iterator[Move]:
    """The compare-and-set alone: what it asks of the task is answered as if it were still active."""
    for move in confirm(world.but(task=TaskState.ACTIVE), then):
        yield Move(move.who, move.does, move.after.but(task=world.task), move.may)


def confirm_hoping(world: World, then: str) -> Iterator[Move]:
    """An unknown commit is taken for a commit."""
    for move in confirm(world, then):
        hopes = move.may and move.after.issuer == ABORTS
        yield Move(move.who, move.does, move.after.but(issuer=then) if hopes else move.after, move.may)


# --- wrong rules -------------------------------------------------------------------------------------------------


def revoke_lease_unless_given_up(world: World) -> Iterator[Move]:
    """What Vault gave up is left to Vault, which tries once a day."""
    if world.vault_lease is not VaultLease.IRREVOCABLE:
        yield from revoke_lease_with_sync(world)


def revoke_lease_by_force(world: World) -> Iterator[Move]:
    """`revoke-force`, or `tidy`: Vault forgets the lease, whatever became of the login."""
    if world.owed and world.reference and world.listed:
        yield Move("the sweep", "revokes the lease by force", world.but(vault_lease=VaultLease.GONE))


def look_up_what_the_row_knows(world: World) -> Iterator[Move]:
    """Nobody compares the list: a lease that no row refers to is not looked for."""
    unknown_to_the_row = world.listed and not world.reference
    yield from look_up(world.but(vault_lease=VaultLease.GONE) if unknown_to_the_row else world)


def look_up_at_once(world: World) -> Iterator[Move]:
    """Does not wait until no request can be under way any more."""
    token_is_dead = not world.accessor or world.token is Token.REVOKED
    if world.owed and not world.seen_dead and token_is_dead and not world.listed:
        yield Move("the sweep", "looks at once and finds everything dead", world.but(seen_dead=True))


def look_up_or_403(world: World) -> Iterator[Move]:
    yield from look_up(world)
    token_is_dead = not world.accessor or world.token is Token.REVOKED
    if world.owed and not world.seen_dead and token_is_dead and world.listed:
        yield Move("the sweep", "is refused the look-up and takes it for death", world.but(seen_dead=True), may=True)


# --- each with the invariants that catch it ----------------------------------------------------------------------

BROKEN: tuple[tuple[Protocol, set[str]], ...] = (
    (
        E.but("no compare-and-set", "the row is overwritten", issuer=with_step(confirm, overwrite)),
        {"INV-12", "INV-23"},
    ),
    (
        E.but(
            "released on a 204",
            "queued is taken for dead",
            sweep=tuple(rule for rule in with_rule(look_up, release_on_204) if rule is not release),
        ),
        {"INV-04"},
    ),
    (
        E.but(
            "secret before accessor",
            "the secret is read before the accessor is committed",
            issuer=(intend, create_token, ask_for_secret, receive_secret, commit_accessor, confirm, hand_out),
        ),
        {"INV-02", "INV-04"},
    ),
    (
        E.but(
            "no reconcile",
            "nobody compares Vault's list with the rows",
            sweep=tuple(r for r in with_rule(look_up, look_up_what_the_row_knows) if r is not reconcile),
        ),
        {"INV-03", "INV-04"},
    ),
    (
        E.but(
            "no task lock",
            "the task is read once, before the intent",
            issuer=(read_task, intend_unseen, *with_step(confirm, confirm_unseen)[1:]),
        ),
        {"INV-12"},
    ),
    (
        E.but(
            "handed out before confirmed",
            "the secret leaves before the commit",
            issuer=(intend, create_token, commit_accessor, ask_for_secret, receive_secret, hand_out, confirm),
        ),
        {"INV-01"},
    ),
    (
        E.but("unknown commit trusted", "an unknown commit is a commit", issuer=with_step(confirm, confirm_hoping)),
        {"INV-01"},
    ),
    (
        E.but("no wait", "what may still be under way is not waited for", sweep=with_rule(look_up, look_up_at_once)),
        {"INV-04"},
    ),
    (
        E.but("403 taken for death", "unknown is a yes", sweep=with_rule(look_up, look_up_or_403)),
        {"INV-04"},
    ),
    (
        E.but(
            "revoked by force",
            "Vault is told to forget",
            sweep=with_rule(revoke_lease_with_sync, revoke_lease_by_force),
        ),
        {"INV-03", "INV-04"},
    ),
    (
        E.but(
            "stuck not retried",
            "what Vault gave up is left to Vault",
            sweep=with_rule(revoke_lease_with_sync, revoke_lease_unless_given_up),
        ),
        {"debts end"},
    ),
)

# One of the two locks of the task alone. Neither is broken: see the test.
LOCKED_AT_INTENT = E.but(
    "locked at intent", "and not looked at again to confirm", issuer=with_step(confirm, confirm_unseen)
)
LOCKED_AT_CONFIRM = E.but(
    "locked at confirm", "and read without a lock for the intent", issuer=with_step(intend, read_task, intend_unseen)
)
