"""Waiting for people: asking whether they have decided, patiently, and collecting what they said yes to.

A generator says what to send and when to pause, and a client does it; so both clients wait alike.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

from broker.sdk import calls
from broker.sdk.clock import Timing
from broker.sdk.dpop import DpopKey
from broker.sdk.errors import ApprovalPending
from broker.sdk.exchange import Call, Wait
from broker.sdk.values import Credential, Grant

if TYPE_CHECKING:
    from broker.sdk.oversight import Approval

_LONGEST_S = 20  # that the broker keeps a question open
_PAUSE_S = 2.0


def awaiting(
    grant_id: str,
    timeout_s: float,
    dpop: DpopKey | None,
    parameters: Mapping[str, str] | None,
    timing: Timing,
) -> Generator[Call[Any] | Wait, Any, tuple[Grant, Credential]]:
    """Ask until people have decided, then collect; ApprovalPending when the time is over before they have."""
    yield from deciding(grant_id, timeout_s, timing)
    collected: tuple[Grant, Credential] = yield calls.collect_grant(grant_id, dpop, parameters=parameters)
    return collected


def deciding(
    grant_id: str,
    timeout_s: float,
    timing: Timing,
    *,
    approval_id: str | None = None,
    progress: Callable[[Approval], None] | None = None,
) -> Generator[Call[Any] | Wait, Any, None]:
    """Ask until people have decided, whatever they have: collecting says what. `progress` is told how they stand."""
    until = timing.monotonic() + timeout_s
    while True:
        if progress is not None and approval_id is not None:
            standing: Approval = yield calls.approval(approval_id)
            progress(standing)
        asked_at = timing.monotonic()
        wait_s = max(0, min(_LONGEST_S, int(until - asked_at)))
        found: Grant = yield calls.grant(grant_id, wait_s=wait_s or None)
        if found.state != "pending":
            # Denied, expired, revoked: the broker says so, and why, to whoever collects.
            return
        left_s = until - timing.monotonic()
        if left_s <= 0:
            detail = f"nobody has decided about grant {grant_id} yet: wait for it again, or collect it later"
            raise ApprovalPending("approval_pending", "Approval is needed", detail, None, {"grant": found.raw})
        if timing.monotonic() - asked_at < 1:
            # Answered at once: too many wait at the broker, and asking without a pause makes it no better.
            yield Wait(min(_PAUSE_S, left_s))
