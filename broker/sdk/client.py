"""The client for programs without an event loop. `broker.sdk.aio` is the same for asyncio.

It reads no environment: where the broker is and which token proves the caller are arguments. A token goes to the
broker's origin and nowhere else: no redirect is followed, and no proxy or netrc of the environment is used.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from broker.sdk import calls
from broker.sdk.clock import Timing
from broker.sdk.credential import CredentialSource, Lifetime
from broker.sdk.dpop import DpopKey
from broker.sdk.errors import BrokerError, no_token, not_the_broker
from broker.sdk.exchange import (
    Call,
    Endpoint,
    Identify,
    Outcome,
    Send,
    Wait,
    exchange,
    origin_of,
    require_traceparent,
    token_from_file,
    workload_token,
)
from broker.sdk.reporting import Reporter
from broker.sdk.run import RunningTask, running
from broker.sdk.secret import Secret
from broker.sdk.values import Credential, Grant
from broker.sdk.waiting import awaiting
from broker.sdk.wire import GivenWire, OwnWire, Wire

if TYPE_CHECKING:
    import httpx

    from broker.sdk.activities import OfGrant

T = TypeVar("T")
P = ParamSpec("P")


def _verb(make: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    @wraps(make)
    def verb(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        # An argument may be a token, and crash reporters read the variables of every frame (INV-30).
        del args, kwargs
        return self.send(call)

    return verb


def _pages(make: Callable[P, calls.Listing[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @wraps(make)
    def verb(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        # Made here and not in the generator, so that a wrong argument is said where it was given.
        return _items(self, make(*args, **kwargs))

    return verb


def _items(client: Client, listing: calls.Listing[T]) -> Iterator[T]:
    page, seen = client.send(listing.first), set[str]()
    yield from page.items
    while page.next_cursor is not None:
        turn_page(page.next_cursor, seen)
        page = client.send(listing.after(page.next_cursor))
        yield from page.items


def turn_page(cursor: str, seen: set[str]) -> None:
    """Refuse to go round in circles."""
    if cursor in seen:
        raise not_the_broker("a list answers the same page again and again")
    seen.add(cursor)


class Client:
    """A caller's hand on the broker. Safe to share between threads; close it, or use it in a `with` block.

    `token` is the workload token or a function that gives it; `token_file` is read anew for each request. `http` is
    used as transport only: its headers, cookies, base URL and authentication stay out of it, and it is not closed.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | Callable[[], str] | None = None,
        token_file: Path | None = None,
        timeout: float = 10.0,
        http: httpx.Client | None = None,
        retry_deadline_s: float = 20.0,
        traceparent: str | None = None,
        timing: Timing | None = None,
    ) -> None:
        self.timing = timing or Timing()
        self._endpoint = Endpoint(
            origin=origin_of(url),
            timeout_s=timeout,
            retry_deadline_s=retry_deadline_s,
            timing=self.timing,
            traceparent=require_traceparent(traceparent),
        )
        self._identify = token_source(token, token_file)
        self.reports = Reporter(self.send, self.timing)
        self._owns_reports = True
        self._owns_wire = True
        self._wire: Wire = OwnWire(self.url, self.timing) if http is None else GivenWire(http, self.timing)

    @property
    def url(self) -> str:
        """The broker's origin: its issuer."""
        return self._endpoint.origin

    open_task = _verb(calls.open_task)
    task = _verb(calls.task)
    tasks = _pages(calls.tasks)
    heartbeat = _verb(calls.heartbeat)
    complete_task = _verb(calls.complete_task)
    fail_task = _verb(calls.fail_task)
    cancel_task = _verb(calls.cancel_task)
    receipt = _verb(calls.receipt)
    timeline = _pages(calls.timeline)
    drift = _verb(calls.drift)
    tell = _verb(calls.tell)

    request_grant = _verb(calls.request_grant)
    collect_grant = _verb(calls.collect_grant)
    grant = _verb(calls.grant)
    explain_grant = _verb(calls.explain_grant)
    grants = _pages(calls.grants)
    renew_grant = _verb(calls.renew_grant)
    revoke_grant = _verb(calls.revoke_grant)

    approval = _verb(calls.approval)
    approvals = _pages(calls.approvals)
    approve = _verb(calls.approve)
    deny = _verb(calls.deny)
    withdraw = _verb(calls.withdraw)

    review = _verb(calls.review)
    reviews = _pages(calls.reviews)
    complete_review = _verb(calls.complete_review)

    lease = _verb(calls.lease)
    leases = _pages(calls.leases)
    abandon_lease = _verb(calls.abandon_lease)

    revoke = _verb(calls.revoke)
    lockdowns = _pages(calls.lockdowns)
    set_lockdown = _verb(calls.set_lockdown)
    lift_lockdown = _verb(calls.lift_lockdown)
    send_signal = _verb(calls.send_signal)
    signals = _pages(calls.signals)
    audit = _pages(calls.audit)
    policies = _pages(calls.policies)
    evaluate_policy = _verb(calls.evaluate_policy)
    replay_policies = _verb(calls.replay_policies)
    replace_policies = _verb(calls.replace_policies)

    introspect = _verb(calls.introspect)
    token = _verb(calls.token)

    def report(
        self,
        grant: OfGrant | None,
        action: str,
        *,
        kind: str = "tool",
        scope: str | None = None,
        resource: str | None = None,
        outcome: str = "ok",
        attributes: Mapping[str, str] | None = None,
        at: datetime | None = None,
    ) -> None:
        """Tell, in the background, what was done with a grant. It neither waits nor raises; `reports` says what became.

        `grant` is its id, the grant itself, or for a verifier what introspection answered or the claims of the token;
        None is the grant that was asked for in this client's trace.
        """
        more = {"kind": kind, "scope": scope, "resource": resource, "outcome": outcome, "attributes": attributes or {}}
        self.reports.put(grant, action, traceparent=self._endpoint.traceparent, at=at, **more)

    def await_grant(
        self,
        grant_id: str,
        timeout_s: float,
        dpop: DpopKey | None = None,
        *,
        parameters: Mapping[str, str] | None = None,
    ) -> tuple[Grant, Credential]:
        """Wait until people have decided about a grant, and collect its credential. For its agent.

        Raises Refused where they said no, and ApprovalPending when the time is over before they have said anything.
        """
        return self.drive(awaiting(grant_id, timeout_s, dpop, parameters, self.timing))

    def credential(
        self,
        task_id: str | None,
        resource: str,
        scopes: Iterable[str],
        *,
        ttl_s: int | None = None,
        intent: str | None = None,
        context: Mapping[str, Any] | None = None,
        dpop: DpopKey | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> CredentialSource:
        """A credential that is asked for when first used, renewed or replaced in time, and handed back on `close`."""
        lifetime = Lifetime(
            self.timing,
            task_id,
            resource,
            scopes,
            ttl_s=ttl_s,
            intent=intent,
            context=context,
            dpop=dpop,
            parameters=parameters,
        )
        return CredentialSource(self, lifetime)

    def run_task(
        self,
        purpose: str,
        agents: Iterable[str],
        deadline_s: int,
        heartbeat_s: int | None = None,
        resources: Mapping[str, Iterable[str]] | None = None,
        labels: Mapping[str, str] | None = None,
        *,
        pause: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> contextlib.AbstractContextManager[RunningTask]:
        """A task for the length of a `with` block, kept alive meanwhile, and ended as the block ends."""
        opening = calls.open_task(purpose, agents, deadline_s, heartbeat_s, resources, labels)
        return running(self, opening, pause)

    def with_trace(self, traceparent: str | None) -> Client:
        """The same client for requests of another trace; it shares the connections, and is not to be closed."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other._owns_wire = other._owns_reports = False
        other._endpoint = replace(self._endpoint, traceparent=require_traceparent(traceparent))
        return other

    def drive(self, steps: Generator[Call[Any] | Wait, Any, T]) -> T:
        """Do several calls in turn, each with what came of the last, and wait between them as they say."""
        outcome: Any = None
        error: BrokerError | None = None
        try:
            while True:
                step = steps.send(outcome) if error is None else steps.throw(error)
                outcome, error = None, None
                if isinstance(step, Wait):
                    self.timing.sleep(step.seconds)
                    continue
                try:
                    outcome = self.send(step)
                except BrokerError as problem:
                    error = problem
        except StopIteration as done:
            result: T = done.value
        return result

    def send(self, call: Call[T]) -> T:
        """Do one call; the verbs above are made of it."""
        steps = exchange(call, self._endpoint)
        outcome: Outcome = None
        try:
            while True:
                step = steps.send(outcome)
                if isinstance(step, Identify):
                    outcome = self._identify()
                elif isinstance(step, Send):
                    outcome = self._wire.send(step.request)
                else:
                    self.timing.sleep(step.seconds)
                    outcome = None
        except StopIteration as done:
            result: T = done.value
        return result

    def close(self) -> None:
        """Tell what waits to be told, for two seconds at most, and let go of the connections."""
        if self._owns_reports:
            self.reports.close()
        if self._owns_wire:
            self._wire.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def token_source(token: str | Callable[[], str] | None, token_file: Path | None) -> Callable[[], Secret]:
    """Where the workload token comes from, asked on each request."""
    if (token is None) == (token_file is None):
        raise no_token("give the workload token as exactly one of token and token_file")
    if token_file is not None:
        path = Path(token_file)
        return lambda: token_from_file(path)
    if callable(token):
        ask = token
        return lambda: workload_token(ask(), "what the token function gave")
    fixed = workload_token(token or "", "the workload token")
    return lambda: fixed
