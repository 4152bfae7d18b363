"""A credential that stays alive: asked for when first needed, renewed in time, handed back at the end.

`Lifetime` decides and does no I/O; `CredentialSource` and `AsyncCredentialSource` (in a room of its own) act on it, one
request at a time however many ask. A grant that reached its end by time is followed by a new one. When the broker says
no, to a renewal or to a new grant, that is the end: it is not asked again.

A secret from outside is not renewed: it is replaced in time by another. The old one goes on for half of what was left
of it, for those who are just using it, and is handed back at the first use after that.
"""

from __future__ import annotations

import copy
import enum
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from broker.sdk import calls
from broker.sdk.clock import Timing
from broker.sdk.dpop import DpopKey
from broker.sdk.errors import (
    ApprovalPending,
    BrokerError,
    Conflict,
    Invalid,
    Limited,
    NotFound,
    Refused,
    Unreachable,
)
from broker.sdk.exchange import Call, Wait
from broker.sdk.values import Credential, Grant
from broker.sdk.waiting import deciding

if TYPE_CHECKING:
    from broker.sdk.auth import RequestsAuth, SourceAuth
    from broker.sdk.client import Client
    from broker.sdk.oversight import Approval
    from broker.sdk.receipts import Receipt

# What a broker says when it means it; anything else may pass.
FINAL = (Refused, Conflict, NotFound)
# After these there is no grant to give back; after anything else there may be one.
NOTHING_MADE = (Refused, Conflict, NotFound, Invalid)
# Whoever leaves does not wait long for a broker that is away: the credential is short-lived, too.
_GONE_WITHIN_S = 5.0
_REFRESHED_AGAIN_AFTER = timedelta(seconds=10)


class Need(enum.Enum):
    NOTHING = "use what we have"
    TIDY = "use what we have, and hand back what it replaced"
    SOON = "use what we have, and renew it"
    NOW = "what we have is dead, or there is none: ask for a grant"


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A grant that another one took the place of: to be handed back when, and over by itself when."""

    grant: Grant
    due_at: datetime
    dead_at: datetime


class Lifetime:
    """One grant's credential over time. Not thread-safe: its owner holds a lock around every change."""

    def __init__(
        self,
        timing: Timing,
        task_id: str | None,
        resource: str,
        scopes: Iterable[str],
        *,
        ttl_s: int | None = None,
        intent: str | None = None,
        context: Mapping[str, Any] | None = None,
        dpop: DpopKey | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        self.resource = resource
        self.dpop = dpop
        self.grant: Grant | None = None
        self.credential: Credential | None = None
        self.closed = False
        self.failures = 0
        self._failure: BrokerError | None = None
        self._timing = timing
        self._task_id, self._scopes = task_id, scopes if isinstance(scopes, str) else tuple(scopes)
        self._ttl_s, self._intent, self._context, self._parameters = ttl_s, intent, context, parameters
        self._dead_at = self._renew_at = datetime.min.replace(tzinfo=UTC)
        self._asked_at: datetime | None = None
        self._key: str | None = None  # of a grant that was asked for, until there is an answer
        self._unanswered = False
        self._ended: BrokerError | None = None
        self._replaced: list[Replaced] = []
        self._refused = False  # by a resource, which we had not expected
        self._refreshed_at: datetime | None = None
        self._awaited: str | None = None  # a grant that is being collected, until its credential is here

    def need(self) -> Need:
        """What is to be done before the credential is used now. Raises once the broker has said no, or after close."""
        self._require_open()
        if self._ended is not None:
            # A copy, so that threads do not grow one traceback together.
            raise copy.copy(self._ended)
        now = self._timing.now()
        if self.credential is None or now >= self._dead_at or self._refused:
            return Need.NOW
        if now >= self._renew_at:
            return Need.SOON
        return Need.TIDY if any(old.due_at <= now for old in self._replaced) else Need.NOTHING

    def call(self) -> Call[tuple[Grant, Credential]]:
        """The request that meets the need: a renewal while the credential lives, else a grant.

        A dead one cannot be renewed: its grant ended with it, or had reached its maximum. Nor can what is no token.
        """
        self._asked_at = self._timing.now()
        renewable = self.credential is None or self.credential.token is not None
        if self.grant is not None and self._asked_at < self._dead_at and renewable:
            return calls.renew_grant(self.grant.id, ttl_s=self._ttl_s, dpop=self.dpop)
        # The same key until there is an answer: a grant whose answer was lost is found again, not made twice (INV-06).
        self._key, self._unanswered = self._key or calls.new_idempotency_key(), True
        return self._request(self._key)

    def unanswered(self) -> Call[tuple[Grant, Credential]] | None:
        """The request whose answer was lost, to be sent once more before we go: it may have made a grant."""
        if not self._unanswered or self._key is None:
            return None
        return replace(self._request(self._key), repeatable=False, within_s=_GONE_WITHIN_S)

    def _request(self, idempotency_key: str) -> Call[tuple[Grant, Credential]]:
        return calls.request_grant(
            self._task_id,
            self.resource,
            self._scopes,
            self._ttl_s,
            self._intent,
            self._context,
            self.dpop,
            parameters=self._parameters,
            idempotency_key=idempotency_key,
        )

    def due_in_s(self) -> float:
        """How long there is nothing to do; raises as `need` does."""
        if self.need() is not Need.NOTHING:
            return 0.0
        due_at = min([self._renew_at, *(old.due_at for old in self._replaced)])
        return (due_at - self._timing.now()).total_seconds()

    def collecting(self, error: ApprovalPending) -> Call[tuple[Grant, Credential]] | None:
        """The call that collects what people said yes to; None while they have not."""
        if error.grant_id is None or error.approval.get("state") != "approved":
            return None
        self._awaited = error.grant_id
        return calls.collect_grant(error.grant_id, self.dpop, parameters=self._parameters)

    def awaiting(
        self, error: ApprovalPending, timeout_s: float, progress: Callable[[Approval], None] | None
    ) -> Generator[Call[Any] | Wait, Any, tuple[Grant, Credential]]:
        """Wait for the people whom `error` says are asked; who is interrupted meanwhile takes the request back."""
        if error.grant_id is None:
            raise error
        self._require_open()
        self._awaited = error.grant_id
        approval_id = error.approval.get("id")
        try:
            yield from deciding(
                error.grant_id,
                timeout_s,
                self._timing,
                approval_id=approval_id if isinstance(approval_id, str) else None,
                progress=progress,
            )
            self._asked_at = self._timing.now()
            collected: tuple[Grant, Credential] = yield calls.collect_grant(
                error.grant_id, self.dpop, parameters=self._parameters
            )
        except (ApprovalPending, *FINAL):
            # Nobody has decided yet, and asking again joins what waits; or they said no, and nothing was made.
            self._awaited = None
            raise
        return collected

    def got(self, grant: Grant, credential: Credential) -> None:
        if self._asked_at is None:
            raise RuntimeError("an answer to nothing that was asked")
        now = self._timing.now()
        if self.grant is not None and self.grant.id != grant.id and now < self._dead_at:
            due_at = now + (self._dead_at - now) / 2
            self._replaced.append(Replaced(grant=self.grant, due_at=due_at, dead_at=self._dead_at))
        # Counted from before we asked, and by what the broker's clock said was left: late is the error not to make.
        life_s = credential.life_s
        self.grant, self.credential, self._key, self._unanswered, self._awaited = grant, credential, None, False, None
        self._refused = False
        # The way to the resource takes time too, and at `expires_at` it is over.
        self._dead_at = self._asked_at + timedelta(seconds=life_s - min(2.0, life_s / 10))
        renew_after_s = life_s * 2 / 3 * (1 - 0.1 * self._timing.chance())
        self._renew_at = self._asked_at + timedelta(seconds=renew_after_s)
        if grant.renewable_until is not None and credential.expires_at >= grant.renewable_until:
            # Nothing is to be gained before the end: the next token could not live longer than this one.
            self._renew_at = self._dead_at

    def failed(self, error: BrokerError) -> bool:
        """Take note of it; True where the credential we have is still good and the caller need not know."""
        self.failures += 1
        self._failure = copy.copy(error)
        self._refused = False
        final = isinstance(error, FINAL)
        if final:
            self._awaited = None
        if self._key is not None:
            if not isinstance(error, Unreachable):
                self._unanswered = False
            if not isinstance(error, Unreachable | Limited):
                self._key = None
            final = final and self.grant is not None
        if final:
            self._ended = copy.copy(error)
            return False
        now = self._timing.now()
        # Not at once again, or every use would wait for a broker that is down; a tenth of what is left.
        self._renew_at = now + max(timedelta(seconds=1), (self._dead_at - now) / 10)
        return now < self._dead_at

    def refused(self, credential: Credential) -> bool:
        """A resource did not take this one: whether there is, or is to be asked for, another to try.

        Seldom: a resource that takes none is not to make the broker issue one for each of its refusals.
        """
        if credential is not self.credential:
            return True
        now = self._timing.now()
        if self._refreshed_at is not None and now < self._refreshed_at + _REFRESHED_AGAIN_AFTER:
            return False
        self._refreshed_at, self._refused = now, True
        return True

    def live(self) -> Credential:
        self._require_open()
        if self.credential is None:
            raise RuntimeError("there is no credential to use")
        return self.credential

    def due(self) -> list[Replaced]:
        """What is to be handed back now; answered once, unless `not_yet` says that it could not be."""
        now = self._timing.now()
        due = [old for old in self._replaced if old.due_at <= now]
        self._replaced = [old for old in self._replaced if old.due_at > now]
        return due

    def not_yet(self, old: Replaced) -> None:
        """Again later, and at the latest on close; unless it is over by then."""
        later = self._timing.now() + timedelta(seconds=5)
        if later < old.dead_at:
            self._replaced.append(replace(old, due_at=later))

    def close(self) -> tuple[list[str], Call[tuple[Grant, Credential]] | None]:
        """No more use; the grants to hand back, the current one last, and the request that may have made another."""
        now, unanswered = self._timing.now(), self.unanswered()
        grants = [old.grant.id for old in self._replaced if now < old.dead_at]
        if self._awaited is not None:
            grants.append(self._awaited)
        # One that was asked for anew because the last had died leaves nothing of the last.
        if self.grant is not None and (unanswered is None or now < self._dead_at):
            grants.append(self.grant.id)
        self.closed, self.credential, self._replaced, self._awaited = True, None, [], None
        return grants, unanswered

    def share_failure(self, since: int) -> None:
        """Raise what others met while we waited for them: a dead broker is asked once, not once for each that waits."""
        if self.failures != since and self._failure is not None:
            raise copy.copy(self._failure)

    def _require_open(self) -> None:
        if self.closed:
            raise Conflict("closed", "The credential was handed back", "open a new source for a new credential")


class CredentialSource:
    """`token()` gives a live token, however long the work takes. Safe to share between threads.

    Leaving the `with` block, or `close`, hands the grant back.
    """

    def __init__(self, client: Client, lifetime: Lifetime) -> None:
        self._client = client
        self._lifetime = lifetime
        self._lock = threading.Lock()

    @property
    def grant(self) -> Grant | None:
        """The grant as it was last answered; None before the first use."""
        return self._lifetime.grant

    @property
    def dpop(self) -> DpopKey | None:
        return self._lifetime.dpop

    def token(self) -> str:
        """The token, live at this moment. Show it to nobody but the resource."""
        return self.credential().reveal()

    def data(self) -> dict[str, Any]:
        """What a secret from outside consists of, e.g. user name and password, live at this moment."""
        return self.credential().reveal_data()

    def credential(self) -> Credential:
        """The credential, live at this moment."""
        failures, need = self._lifetime.failures, self._lifetime.need()
        if need is Need.NOTHING:
            return self._lifetime.live()
        # While the old one lives nobody waits: one thread renews, the others go on with it.
        if not self._lock.acquire(blocking=need is Need.NOW):
            return self._lifetime.live()
        try:
            need = self._lifetime.need()
            if need is Need.TIDY:
                self._tidy()
            elif need is not Need.NOTHING:
                if need is Need.NOW:
                    self._lifetime.share_failure(failures)
                try:
                    self._lifetime.got(*self._ask())
                except BrokerError as error:
                    if not self._lifetime.failed(error):
                        raise
            return self._lifetime.live()
        finally:
            self._lock.release()

    def another(self, refused: Credential) -> Credential | None:
        """One to try instead of this one, which a resource did not take; None where there is none.

        Raises where the broker says no: then that is why the resource did.
        """
        with self._lock:
            if not self._lifetime.refused(refused):
                return None
        current = self.credential()
        return None if current is refused else current

    def lapse(self) -> None:
        """No more use: its task has ended, and with it whatever this holds."""
        with self._lock:
            self._lifetime.close()

    def _ask(self) -> tuple[Grant, Credential]:
        try:
            return self._client.send(self._lifetime.call())
        except ApprovalPending as pending:
            collecting = self._lifetime.collecting(pending)
            if collecting is None:
                raise
        return self._client.send(collecting)

    def wait(self, timeout_s: float, progress: Callable[[Approval], None] | None = None) -> Credential:
        """The credential, waiting for people where they are asked first; `progress` is told how they stand.

        Raises Refused where they said no, and ApprovalPending when the time is over before they have said anything:
        asking again joins the request that waits. Who is interrupted meanwhile takes it back by leaving the block.
        """
        try:
            return self.credential()
        except ApprovalPending as pending:
            waiting = self._lifetime.awaiting(pending, timeout_s, progress)
        collected = self._client.drive(waiting)
        with self._lock:
            self._lifetime.got(*collected)
            return self._lifetime.live()

    def due_in_s(self) -> float:
        """When `credential` has something to do next, in seconds: for those who renew without being asked."""
        return self._lifetime.due_in_s()

    def _tidy(self) -> None:
        for old in self._lifetime.due():
            try:
                self._client.send(handing_back(old))
            except FINAL:
                continue  # it has ended already
            except BrokerError:
                self._lifetime.not_yet(old)

    def report(self, action: str, **more: Any) -> None:
        """Tell, in the background, what was done with the credential; as `report` of the client, which never raises."""
        grant = self.grant
        if grant is not None:
            self._client.report(grant, action, **more)

    def auth(self, *origins: str) -> SourceAuth:
        """For `httpx`: puts the credential on requests to the resource's origin, or to `origins` where named.

        Requests to anywhere else go out without it. A resource that is no address (urn:…) has no origin: name them.
        A 401 of the resource is answered with another credential, once.
        """
        from broker.sdk.auth import SourceAuth, destination  # and with it httpx, which not every program has a use for

        return SourceAuth(self, destination(self._lifetime.resource, origins))

    def requests_auth(self, *origins: str) -> RequestsAuth:
        """The same for `requests`."""
        from broker.sdk.auth import RequestsAuth, destination

        return RequestsAuth(self, destination(self._lifetime.resource, origins))

    def close(self, reason: str | None = None) -> Receipt | None:
        """Revoke the grant, so that the credential dies now and not at its expiry. Again does nothing.

        Where the answer to the last request was lost, it is asked for once more, so that no grant stays unknown.
        """
        with self._lock:
            if self._lifetime.closed:
                return None
            grants, unanswered = self._lifetime.close()
        receipt, problems = None, list[BrokerError]()
        if unanswered is not None:
            try:
                grants.append(self._client.send(unanswered)[0].id)
            except NOTHING_MADE:
                pass
            except ApprovalPending as pending:
                grants += [pending.grant_id] if pending.grant_id else []
            except BrokerError as problem:
                problems.append(problem)
        for grant_id in grants:
            try:
                receipt = self._client.send(going(grant_id, reason))
            except BrokerError as problem:
                problems.append(problem)
        if problems:
            raise problems[0]
        return receipt

    def __enter__(self) -> CredentialSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BrokerError as problem:
            if error is None:
                raise
            error.add_note(not_handed_back(problem))

    def __repr__(self) -> str:
        return f"CredentialSource({self._lifetime.resource!r}, grant={self.grant.id if self.grant else None!r})"


def going(grant_id: str, reason: str | None) -> Call[Receipt]:
    """Handing back at the end."""
    return replace(calls.revoke_grant(grant_id, reason), within_s=_GONE_WITHIN_S)


def handing_back(old: Replaced) -> Call[Receipt]:
    """Asked once: whoever uses the credential that came after it waits for this."""
    return replace(calls.revoke_grant(old.grant.id, "replaced by a new one"), repeatable=False)


def not_handed_back(problem: BrokerError) -> str:
    return f"the credential could not be handed back and lives until it expires: {problem}"
