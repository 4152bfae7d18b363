"""The client for asyncio: the verbs of `broker.sdk.client`, awaited; lists are asynchronous iterators."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from broker.sdk import calls
from broker.sdk.async_credential import AsyncCredentialSource
from broker.sdk.async_reporting import AsyncReporter
from broker.sdk.async_run import AsyncRunningTask, async_running
from broker.sdk.client import token_source, turn_page
from broker.sdk.clock import Timing
from broker.sdk.credential import Lifetime
from broker.sdk.dpop import DpopKey
from broker.sdk.errors import BrokerError
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
)
from broker.sdk.values import Credential, Grant
from broker.sdk.waiting import awaiting
from broker.sdk.wire import AsyncWire, GivenAsyncWire, OwnAsyncWire

if TYPE_CHECKING:
    import httpx

    from broker.sdk.activities import OfGrant

T = TypeVar("T")
P = ParamSpec("P")


def _verb(make: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    @wraps(make)
    async def verb(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        # An argument may be a token, and crash reporters read the variables of every frame (INV-30).
        del args, kwargs
        return await self.send(call)

    return verb


def _pages(make: Callable[P, calls.Listing[T]]) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    @wraps(make)
    def verb(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return _items(self, make(*args, **kwargs))

    return verb


async def _items(client: AsyncClient, listing: calls.Listing[T]) -> AsyncIterator[T]:
    page, seen = await client.send(listing.first), set[str]()
    for item in page.items:
        yield item
    while page.next_cursor is not None:
        turn_page(page.next_cursor, seen)
        page = await client.send(listing.after(page.next_cursor))
        for item in page.items:
            yield item


class AsyncClient:
    """`Client` for asyncio. A `token` function is called in the event loop, so it must not block."""

    def __init__(
        self,
        url: str,
        *,
        token: str | Callable[[], str] | None = None,
        token_file: Path | None = None,
        timeout: float = 10.0,
        http: httpx.AsyncClient | None = None,
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
        self.reports = AsyncReporter(self.send, self.timing)
        self._owns_reports = True
        self._owns_wire = True
        self._wire: AsyncWire = (
            OwnAsyncWire(self.url, self.timing) if http is None else GivenAsyncWire(http, self.timing)
        )

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

    async def await_grant(
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
        return await self.drive(awaiting(grant_id, timeout_s, dpop, parameters, self.timing))

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
    ) -> AsyncCredentialSource:
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
        return AsyncCredentialSource(self, lifetime)

    def run_task(
        self,
        purpose: str,
        agents: Iterable[str],
        deadline_s: int,
        heartbeat_s: int | None = None,
        resources: Mapping[str, Iterable[str]] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> contextlib.AbstractAsyncContextManager[AsyncRunningTask]:
        """A task for the length of an `async with` block, kept alive meanwhile, and ended as the block ends."""
        return async_running(self, calls.open_task(purpose, agents, deadline_s, heartbeat_s, resources, labels))

    def with_trace(self, traceparent: str | None) -> AsyncClient:
        """The same client for requests of another trace; it shares the connections, and is not to be closed."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other._owns_wire = other._owns_reports = False
        other._endpoint = replace(self._endpoint, traceparent=require_traceparent(traceparent))
        return other

    async def drive(self, steps: Generator[Call[Any] | Wait, Any, T]) -> T:
        """Do several calls in turn, each with what came of the last, and wait between them as they say."""
        outcome: Any = None
        error: BrokerError | None = None
        try:
            while True:
                step = steps.send(outcome) if error is None else steps.throw(error)
                outcome, error = None, None
                if isinstance(step, Wait):
                    await self.timing.async_sleep(step.seconds)
                    continue
                try:
                    outcome = await self.send(step)
                except BrokerError as problem:
                    error = problem
        except StopIteration as done:
            result: T = done.value
        return result

    async def send(self, call: Call[T]) -> T:
        """Do one call; the verbs above are made of it."""
        steps = exchange(call, self._endpoint)
        outcome: Outcome = None
        try:
            while True:
                step = steps.send(outcome)
                if isinstance(step, Identify):
                    outcome = self._identify()
                elif isinstance(step, Send):
                    outcome = await self._wire.send(step.request)
                else:
                    await self.timing.async_sleep(step.seconds)
                    outcome = None
        except StopIteration as done:
            result: T = done.value
        return result

    async def close(self) -> None:
        """Tell what waits to be told, for two seconds at most, and let go of the connections."""
        if self._owns_reports:
            await self.reports.close()
        if self._owns_wire:
            await self._wire.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"
