"""Everything one credential depends on, as one immutable value; and what happens in it that no protocol decides.

One task, one grant, one lease, one secret of Vault's database engine. A move is one step that cannot be divided: a
transaction, a message that arrives, a piece of work inside Vault. Between two moves any other may come first.

There are two kinds of moves. What *must* come is what a program will do if nothing stops it. What *may* come is a
crash, an answer that is lost, a revocation that Vault gives up, the end of the task: nobody may count on it, and nobody
may be surprised by it.

Time is left out: whoever may be slow may be slow for ever, and recovery may take the slow for dead. Two facts of time
remain, each as a fact of the world and not as a number: Vault lets no request run longer than its maximum (90 s), so
who waits that long knows that none is `under_way`; and a login ends by itself (`lifetime_over`), which only the
protocols that count on it are given, because expiry would otherwise hide every flaw there is.

One Vault token is not shown: a token that was created and whose accessor nobody learned. It opens nothing, because
nothing was made under it, and it ends by its own time to live.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from broker.domain.lifecycle import GrantState, LeaseState, TaskState


class Token(StrEnum):
    """The Vault token under which the secret is read."""

    NONE = "none"
    SHARED = "shared"  # the broker's own: all grants hang from it, so it cannot be revoked for one of them
    LIVE = "live"
    REVOKED = "revoked"


class Ask(StrEnum):
    """How far the request for the secret has come. Vault looks at the token once, at the beginning."""

    NONE = "none"
    SENT = "sent"
    TOKEN_CHECKED = "token checked"
    LOGIN_CREATED = "login created"
    ANSWERED = "answered"
    REFUSED = "refused"
    CUT = "cut"


class VaultLease(StrEnum):
    """What Vault knows of the login."""

    NONE = "none"
    LIVE = "live"
    QUEUED = "queued"  # to be revoked; a 204 was answered already
    IRREVOCABLE = "irrevocable"  # given up after six failures
    GONE = "gone"


class Login(StrEnum):
    """The truth, at the target: whether the credential opens anything."""

    NONE = "none"
    ALIVE = "alive"
    DEAD = "dead"


# Where an issuer is that is at none of the steps of its protocol.
ABORTS = "aborts"
ENDED = "ended"
CRASHED = "crashed"

OWED = (LeaseState.REVOKING, LeaseState.STUCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    # Our database: what survives every crash.
    task: TaskState = TaskState.ACTIVE
    grant: GrantState | None = None
    lease: LeaseState | None = None
    accessor: bool = False  # the lease row has the handle: the accessor of the token
    reference: bool = False  # the lease row has Vault's lease id
    # Our processes: what a crash takes.
    issuer: str
    seen_dead: bool = False  # the sweeper has looked, and has not yet written what it saw
    # Vault.
    token: Token = Token.NONE
    ask: Ask = Ask.NONE
    vault_lease: VaultLease = VaultLease.NONE
    # The target.
    login: Login = Login.NONE
    lifetime_over: bool = False
    # What a witness remembers who sees everything; no protocol may read it.
    handed_out: bool = False
    was_active: bool = False
    was_ended: bool = False

    @property
    def owed(self) -> bool:
        return self.lease in OWED

    @property
    def under_way(self) -> bool:
        """A request that may still come to create a login."""
        return self.ask in (Ask.SENT, Ask.TOKEN_CHECKED, Ask.LOGIN_CREATED)

    @property
    def listed(self) -> bool:
        """Vault's list of leases under our prefix has one."""
        return self.vault_lease in (VaultLease.LIVE, VaultLease.QUEUED, VaultLease.IRREVOCABLE)

    def but(self, **changes: object) -> World:
        return replace(self, **changes)  # type: ignore[arg-type]

    def with_authority_ended(self, *, as_: GrantState) -> World:
        """No authority, one debt, in one transaction. Whatever has ended already stays as it ended."""
        if self.grant not in (GrantState.APPROVED, GrantState.ACTIVE):
            return self
        return self.but(
            # `failed` is for what never became active.
            grant=GrantState.REVOKED if self.grant is GrantState.ACTIVE else as_,
            lease=LeaseState.REVOKING,
            was_ended=True,
        )

    def with_token_revoked(self) -> World:
        """Only the leases that Vault can see now are queued; a request past its token check is not one of them."""
        seen = self.vault_lease is VaultLease.LIVE
        return self.but(token=Token.REVOKED, vault_lease=VaultLease.QUEUED if seen else self.vault_lease)

    def with_lease_killed(self) -> World:
        return self.but(vault_lease=VaultLease.GONE, login=Login.DEAD)

    def differences(self, after: World) -> dict[str, tuple[object, object]]:
        """What a move has changed, by name: (before, after)."""
        pairs = {field.name: (getattr(self, field.name), getattr(after, field.name)) for field in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True, slots=True)
class Move:
    who: str
    does: str
    after: World
    may: bool = False
    """Nobody may count on it. False: it comes, unless something else makes it impossible first."""

    @property
    def name(self) -> str:
        return f"{self.who} {self.does}"


def the_task_may_end(world: World) -> Iterator[Move]:
    if world.task is TaskState.ACTIVE:
        ended = world.with_authority_ended(as_=GrantState.REVOKED).but(task=TaskState.COMPLETED)
        yield Move("the task", "ends, and with it every grant that has a row", ended, may=True)


def vault_answers(world: World) -> Iterator[Move]:
    """The request for the secret, on its way through Vault. That its sender has crashed does not stop it."""
    if world.ask is Ask.SENT:
        if world.token in (Token.LIVE, Token.SHARED):
            yield Move("Vault", "finds the token good", world.but(ask=Ask.TOKEN_CHECKED))
        else:
            yield Move("Vault", "finds the token revoked and refuses", world.but(ask=Ask.REFUSED))
    if world.ask is Ask.TOKEN_CHECKED:
        yield Move("Vault", "creates the login", world.but(ask=Ask.LOGIN_CREATED, login=Login.ALIVE))
    if world.ask is Ask.LOGIN_CREATED:
        late = ", after its token was revoked" if world.token is Token.REVOKED else ""
        registered = world.but(ask=Ask.ANSWERED, vault_lease=VaultLease.LIVE)
        yield Move("Vault", f"registers the lease{late}", registered)


def vault_may_die(world: World) -> Iterator[Move]:
    """The database engine writes nothing down between CREATE ROLE and the registration of the lease."""
    if world.ask is Ask.LOGIN_CREATED:
        yield Move("Vault", "dies before it registers the lease", world.but(ask=Ask.CUT), may=True)


def vault_pays_its_queue(world: World) -> Iterator[Move]:
    if world.vault_lease is VaultLease.QUEUED:
        yield Move("Vault", "revokes the queued lease", world.with_lease_killed())
        given_up = world.but(vault_lease=VaultLease.IRREVOCABLE)
        yield Move("Vault", "gives up the queued lease after six failures", given_up, may=True)


def the_lifetime_passes(world: World) -> Iterator[Move]:
    """The latest moment until which a login can be good: counted from the last moment it could have been created."""
    could_still_be_created = world.under_way or (world.ask is Ask.NONE and world.token is not Token.REVOKED)
    if not world.lifetime_over and not could_still_be_created:
        login = Login.DEAD if world.login is Login.ALIVE else world.login
        yield Move("time", "ends the login, if there is one", world.but(lifetime_over=True, login=login))
