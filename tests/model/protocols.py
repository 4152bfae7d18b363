"""Six ways to issue a secret from Vault: the steps of the issuer, and the rules of the sweep.

The issuer is one request that is being answered: it does its steps in order, may crash before each, and may be so slow
that recovery takes it for dead. The sweep is every other program of ours: each rule looks at the world and, where its
time has come, makes one move. Read `E`, at the end, first: it is the protocol of the broker. `A` to `D` are what others
do, each better than the one before, and each with the flaw that a later one repairs.

No step and no rule reads the truth at the target, nor what the witness remembers, except those that say so: they ask
the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from broker.domain.lifecycle import GrantState, LeaseState, TaskState
from tests.model.world import (
    ABORTS,
    CRASHED,
    ENDED,
    OWED,
    Ask,
    Login,
    Move,
    Token,
    VaultLease,
    World,
    the_lifetime_passes,
    the_task_may_end,
    vault_answers,
    vault_may_die,
    vault_pays_its_queue,
)

# What an issuer does in this world; `then` names the step that follows where all goes well.
Step = Callable[[World, str], Iterator[Move]]
# What a program does in this world whenever it can.
Rule = Callable[[World], Iterator[Move]]


# --- the issuer's steps ------------------------------------------------------------------------------------------


def intend(world: World, then: str) -> Iterator[Move]:
    """Transaction 1: the task is locked, so that it ends before this or after this, and not in between."""
    if world.task is TaskState.ACTIVE:
        intended = world.but(grant=GrantState.APPROVED, lease=LeaseState.INTENDED, issuer=then)
        yield Move("the issuer", "commits the intent", intended)
    else:
        yield Move("the issuer", "finds the task ended and refuses", world.but(issuer=ENDED))


def create_token(world: World, then: str) -> Iterator[Move]:
    """A service token for this one grant. If the answer is lost nobody knows it, and nothing hangs from it."""
    yield Move("the issuer", "creates a token for this grant", world.but(token=Token.LIVE, issuer=then))
    unheard = world.but(token=Token.LIVE, issuer=ABORTS)
    yield Move("the issuer", "creates a token and does not hear its accessor", unheard, may=True)


def commit_accessor(world: World, then: str) -> Iterator[Move]:
    """Transaction 2: what we can revoke by is durable before anything valuable exists under it."""
    if world.lease is LeaseState.INTENDED:
        yield Move("the issuer", "commits the accessor", world.but(accessor=True, issuer=then))
        unsure = world.but(accessor=True, issuer=ABORTS)
        yield Move("the issuer", "commits the accessor and does not hear that it did", unsure, may=True)
    else:
        stopped = world.with_token_revoked().but(issuer=ENDED)
        yield Move("the issuer", "finds its lease ended, revokes its own token and stops", stopped)


def ask_for_secret(world: World, then: str) -> Iterator[Move]:
    yield Move("the issuer", "asks for the secret", world.but(ask=Ask.SENT, issuer=then))


def receive_secret(world: World, then: str) -> Iterator[Move]:
    """Unknown means created: whoever does not hear the answer gives up, and owes a revocation."""
    if world.ask is Ask.ANSWERED:
        yield Move("the issuer", "receives the secret", world.but(issuer=then))
    if world.ask in (Ask.REFUSED, Ask.CUT):
        yield Move("the issuer", "hears that there is no secret", world.but(issuer=ABORTS))
    else:
        yield Move("the issuer", "hears no answer in time", world.but(issuer=ABORTS), may=True)


def confirm(world: World, then: str) -> Iterator[Move]:
    """Transaction 3: lease held and grant active, both or nothing, the task locked again and still active."""
    if (world.task, world.grant, world.lease) == (TaskState.ACTIVE, GrantState.APPROVED, LeaseState.INTENDED):
        confirmed = _held_and_active(world)
        yield Move("the issuer", "commits lease held and grant active", confirmed.but(issuer=then))
        # An unknown commit counts as "not committed" for delivery and as "committed" for cleanup (INV-05).
        yield Move("the issuer", "commits and does not hear that it did", confirmed.but(issuer=ABORTS), may=True)
        yield Move("the issuer", "does not commit and does not hear that either", world.but(issuer=ABORTS), may=True)
    else:
        yield _owes_what_arrived_late(world)


def hand_out(world: World, then: str) -> Iterator[Move]:
    yield Move("the issuer", "hands the secret out", world.but(handed_out=True, issuer=then))


def abort(world: World) -> Iterator[Move]:
    if world.issuer == ABORTS:
        aborted = world.with_authority_ended(as_=GrantState.FAILED).but(issuer=ENDED)
        yield Move("the issuer", "gives up, and owes whatever it may have created", aborted)


def _held_and_active(world: World) -> World:
    return world.but(grant=GrantState.ACTIVE, lease=LeaseState.HELD, reference=True, was_active=True)


def _owes_what_arrived_late(world: World) -> Move:
    # What was released is final. That it was dead then is the duty of whoever released it (INV-04).
    known = world.reference or world.lease not in (None, LeaseState.RELEASED)
    return Move(
        "the issuer", "finds itself ended and owes what arrived late", world.but(reference=known, issuer=ABORTS)
    )


# --- the steps of weaker issuers ---------------------------------------------------------------------------------


def insert(world: World, then: str) -> Iterator[Move]:
    """The first row is written when the secret is there already."""
    yield Move("the issuer", "inserts its first row, as active", _held_and_active(world).but(issuer=then))


def overwrite(world: World, then: str) -> Iterator[Move]:
    """A plain UPDATE by id: it does not ask what the row, or the task, has become meanwhile."""
    yield Move("the issuer", "overwrites its row as active", _held_and_active(world).but(issuer=then))


# --- the rules of the sweep --------------------------------------------------------------------------------------


def recover(world: World) -> Iterator[Move]:
    """An intent past its deadline is taken for abandoned. Its issuer may be alive, and only slow."""
    if world.lease is LeaseState.INTENDED:
        yield Move("recovery", "takes the issuer for dead", world.with_authority_ended(as_=GrantState.FAILED))


def revoke_accessor(world: World) -> Iterator[Move]:
    """Answers 204 when the leases that Vault can see are queued, and not when they are dead."""
    if world.owed and world.accessor and world.token is Token.LIVE:
        yield Move("the sweep", "revokes the accessor", world.with_token_revoked())


def revoke_lease_with_sync(world: World) -> Iterator[Move]:
    """Answers when the target has done it; where it fails nothing has changed, and it is tried again."""
    if world.owed and world.reference and world.listed:
        yield Move("the sweep", "revokes the lease and waits for it", world.with_lease_killed())


def mark_stuck(world: World) -> Iterator[Move]:
    """On somebody's screen, and still retried."""
    if world.lease is LeaseState.REVOKING and world.vault_lease is VaultLease.IRREVOCABLE:
        yield Move("the sweep", "reports the lease as stuck", world.but(lease=LeaseState.STUCK))


def look_up(world: World) -> Iterator[Move]:
    """What the row knows is dead, no request can still create anything, and then Vault's list has nothing else of it.

    In this world there is one grant, so whatever is unknown in the list belongs to it. Where there are many, an unknown
    lease may belong to any grant whose lease id was never heard: none of those is dead before that one is killed.
    """
    if _what_the_row_knows_is_dead(world) and not world.under_way and not world.listed:
        yield _sees_it_dead(world)


def release(world: World) -> Iterator[Move]:
    """Another transaction than the look-up: a sweeper that dies in between has to look again."""
    if world.owed and world.seen_dead:
        yield Move("the sweep", "releases the lease", world.but(lease=LeaseState.RELEASED, seen_dead=False))


def reconcile(world: World) -> Iterator[Move]:
    """Vault's list under a prefix that is ours alone, less what our rows account for; young intents are left alone."""
    accounted_for = world.reference and world.lease in (LeaseState.HELD, *OWED)
    if world.listed and not accounted_for and world.lease is not LeaseState.INTENDED:
        yield Move("the reconciler", "kills a lease that no row accounts for", world.with_lease_killed())


def _what_the_row_knows_is_dead(world: World) -> bool:
    token_is_dead = not world.accessor or world.token is Token.REVOKED
    lease_is_dead = not world.reference or not world.listed
    return world.owed and not world.seen_dead and token_is_dead and lease_is_dead


def _sees_it_dead(world: World) -> Move:
    return Move("the sweep", "looks and finds everything dead", world.but(seen_dead=True))


# --- the rules of weaker sweeps ----------------------------------------------------------------------------------


def revoke_lease(world: World) -> Iterator[Move]:
    """Without `sync`: answers 204 when the work is queued."""
    if world.owed and world.reference and world.vault_lease is VaultLease.LIVE:
        yield Move("the sweep", "queues the lease for revocation", world.but(vault_lease=VaultLease.QUEUED))


def release_on_204(world: World) -> Iterator[Move]:
    """Everything that was known has been asked to die, and every answer was a 204."""
    token_was_asked = not world.accessor or world.token is Token.REVOKED
    lease_was_asked = not world.reference or world.vault_lease is not VaultLease.LIVE
    if world.owed and token_was_asked and lease_was_asked:
        yield Move("the sweep", "takes the 204 for death and releases", world.but(lease=LeaseState.RELEASED))


# --- the rules of a sweep that does not trust Vault to know every login --------------------------------------------


def reconcile_target(world: World) -> Iterator[Move]:
    """Database users that carry a grant id of ours and belong to nothing live are ended, by a connection of our own."""
    belongs_to_something = world.under_way or world.lease in (LeaseState.INTENDED, LeaseState.HELD)
    if world.login is Login.ALIVE and not belongs_to_something:
        yield Move("the reconciler", "ends a login at the target that nothing live owns", world.but(login=Login.DEAD))


def look_up_at_target_too(world: World) -> Iterator[Move]:
    if world.login is not Login.ALIVE:
        yield from look_up(world)


def look_up_or_outwait(world: World) -> Iterator[Move]:
    """A secret that may have been made and has no lease we know is owed until it would have ended by itself."""
    may_be_unknown_to_vault = world.accessor and not world.reference
    if world.lifetime_over or not may_be_unknown_to_vault:
        yield from look_up(world)


# --- the protocols -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Protocol:
    name: str
    what: str
    issuer: tuple[Step, ...]
    sweep: tuple[Rule, ...]
    outside: tuple[Rule, ...] = (the_task_may_end, vault_answers, vault_pays_its_queue)

    def start(self) -> World:
        has_own_token = create_token in self.issuer
        return World(issuer=self.issuer[0].__name__, token=Token.NONE if has_own_token else Token.SHARED)

    def moves(self, world: World) -> Iterator[Move]:
        """Everything that can happen next."""
        for rule in (*self.outside, abort, *self.sweep):
            yield from rule(world)
        names = [step.__name__ for step in self.issuer]
        if world.issuer in names:
            place = names.index(world.issuer)
            yield from self.issuer[place](world, (*names, ENDED)[place + 1])
        if world.issuer in (*names, ABORTS):
            yield Move("the issuer", "crashes", world.but(issuer=CRASHED), may=True)
        if world.seen_dead:
            yield Move("the sweep", "crashes and forgets what it saw", world.but(seen_dead=False), may=True)

    def but(self, name: str, what: str, **changes: object) -> Protocol:
        return replace(self, name=name, what=what, **changes)  # type: ignore[arg-type]


A = Protocol(
    name="A",
    what="Vault, then insert a row",
    issuer=(ask_for_secret, receive_secret, insert, hand_out),
    sweep=(revoke_lease, release_on_204),
)
B = Protocol(
    name="B",
    what="intent, Vault with the shared token, then record the lease",
    issuer=(intend, ask_for_secret, receive_secret, confirm, hand_out),
    sweep=(recover, revoke_lease, release_on_204),
)
C1 = Protocol(
    name="C1",
    what="a token for each grant, a plain UPDATE to activate",
    issuer=(intend, create_token, commit_accessor, ask_for_secret, receive_secret, overwrite, hand_out),
    sweep=(recover, revoke_accessor, revoke_lease, release_on_204),
)
C = C1.but(
    "C",
    "C1 with a compare-and-set to activate",
    issuer=(intend, create_token, commit_accessor, ask_for_secret, receive_secret, confirm, hand_out),
)
D = C.but(
    "D",
    "C, and Vault's list is compared with our rows",
    sweep=(*C.sweep, reconcile),
)
E = Protocol(
    name="E",
    what="ours: D, released only when seen dead",
    issuer=(intend, create_token, commit_accessor, ask_for_secret, receive_secret, confirm, hand_out),
    sweep=(recover, revoke_accessor, revoke_lease_with_sync, mark_stuck, reconcile, look_up, release),
)

WEAKER = (A, B, C1, C, D)

# Ours, under a Vault that may die between CREATE ROLE and the registration of the lease.
_DYING = (*E.outside, vault_may_die)
E_DYING = E.but("E-dying", "E, and Vault may die half-way", outside=_DYING)
E_DYING_TARGET = E.but(
    "E-dying-target",
    "E-dying, and the target is reconciled and looked at as well",
    outside=_DYING,
    sweep=(*(rule for rule in E.sweep if rule is not look_up), reconcile_target, look_up_at_target_too),
)
E_DYING_EXPIRY = E.but(
    "E-dying-expiry",
    "E-dying, and what may have no lease is owed until its own expiry",
    outside=(*_DYING, the_lifetime_passes),
    sweep=tuple(look_up_or_outwait if rule is look_up else rule for rule in E.sweep),
)
