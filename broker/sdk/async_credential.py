"""`CredentialSource` for asyncio. Apart from it, so that a program without an event loop does not load one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from broker.sdk.credential import FINAL, NOTHING_MADE, Lifetime, Need, going, handing_back, not_handed_back
from broker.sdk.dpop import DpopKey
from broker.sdk.errors import ApprovalPending, BrokerError
from broker.sdk.finishing import to_its_end
from broker.sdk.values import Credential, Grant

if TYPE_CHECKING:
    from broker.sdk.aio import AsyncClient
    from broker.sdk.auth import AsyncSourceAuth
    from broker.sdk.oversight import Approval
    from broker.sdk.receipts import Receipt


class AsyncCredentialSource:
    """`CredentialSource` for asyncio."""

    def __init__(self, client: AsyncClient, lifetime: Lifetime) -> None:
        self._client = client
        self._lifetime = lifetime
        self._lock = asyncio.Lock()

    @property
    def grant(self) -> Grant | None:
        return self._lifetime.grant

    @property
    def dpop(self) -> DpopKey | None:
        return self._lifetime.dpop

    async def token(self) -> str:
        """The token, live at this moment. Show it to nobody but the resource."""
        return (await self.credential()).reveal()

    async def data(self) -> dict[str, Any]:
        """What a secret from outside consists of, e.g. user name and password, live at this moment."""
        return (await self.credential()).reveal_data()

    async def credential(self) -> Credential:
        """The credential, live at this moment."""
        failures, need = self._lifetime.failures, self._lifetime.need()
        if need is Need.NOTHING or (need is not Need.NOW and self._lock.locked()):
            return self._lifetime.live()
        async with self._lock:
            need = self._lifetime.need()
            if need is Need.TIDY:
                await self._tidy()
            elif need is not Need.NOTHING:
                if need is Need.NOW:
                    self._lifetime.share_failure(failures)
                try:
                    self._lifetime.got(*await self._ask())
                except BrokerError as error:
                    if not self._lifetime.failed(error):
                        raise
            return self._lifetime.live()

    async def another(self, refused: Credential) -> Credential | None:
        """One to try instead of this one, which a resource did not take; None where there is none."""
        async with self._lock:
            if not self._lifetime.refused(refused):
                return None
        current = await self.credential()
        return None if current is refused else current

    async def lapse(self) -> None:
        """No more use: its task has ended, and with it whatever this holds."""
        async with self._lock:
            self._lifetime.close()

    async def _ask(self) -> tuple[Grant, Credential]:
        try:
            return await self._client.send(self._lifetime.call())
        except ApprovalPending as pending:
            collecting = self._lifetime.collecting(pending)
            if collecting is None:
                raise
        return await self._client.send(collecting)

    async def wait(self, timeout_s: float, progress: Callable[[Approval], None] | None = None) -> Credential:
        """The credential, waiting for people where they are asked first; `progress` is told how they stand."""
        try:
            return await self.credential()
        except ApprovalPending as pending:
            waiting = self._lifetime.awaiting(pending, timeout_s, progress)
        collected = await self._client.drive(waiting)
        async with self._lock:
            self._lifetime.got(*collected)
            return self._lifetime.live()

    def due_in_s(self) -> float:
        """When `credential` has something to do next, in seconds: for those who renew without being asked."""
        return self._lifetime.due_in_s()

    async def _tidy(self) -> None:
        for old in self._lifetime.due():
            try:
                await self._client.send(handing_back(old))
            except FINAL:
                continue
            except BrokerError:
                self._lifetime.not_yet(old)

    def report(self, action: str, **more: Any) -> None:
        """Tell, in the background, what was done with the credential; as `report` of the client, which never raises."""
        grant = self.grant
        if grant is not None:
            self._client.report(grant, action, **more)

    def auth(self, *origins: str) -> AsyncSourceAuth:
        from broker.sdk.auth import AsyncSourceAuth, destination

        return AsyncSourceAuth(self, destination(self._lifetime.resource, origins))

    async def close(self, reason: str | None = None) -> Receipt | None:
        async with self._lock:
            if self._lifetime.closed:
                return None
            grants, unanswered = self._lifetime.close()
        receipt, problems = None, list[BrokerError]()
        if unanswered is not None:
            try:
                grants.append((await self._client.send(unanswered))[0].id)
            except NOTHING_MADE:
                pass
            except ApprovalPending as pending:
                grants += [pending.grant_id] if pending.grant_id else []
            except BrokerError as problem:
                problems.append(problem)
        for grant_id in grants:
            try:
                receipt = await self._client.send(going(grant_id, reason))
            except BrokerError as problem:
                problems.append(problem)
        if problems:
            raise problems[0]
        return receipt

    async def __aenter__(self) -> AsyncCredentialSource:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await to_its_end(self.close())
        except BrokerError as problem:
            if error is None:
                raise
            error.add_note(not_handed_back(problem))

    def __repr__(self) -> str:
        return f"AsyncCredentialSource({self._lifetime.resource!r}, grant={self.grant.id if self.grant else None!r})"
