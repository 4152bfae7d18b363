"""Status lists: how soon who has nothing else refuses, what a million tokens take, how soon a list is made anew.

Tokens of a task sit side by side, as the broker hands out places; sixteen a task here, and a task is over as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import httpx

from benchmarks.rows import copy_grants, remove_copies
from benchmarks.servers import RESOURCE, Bench
from broker.domain.clock import system_clock
from broker.sdk.verifier import Refused, Verifier
from broker.store.standing import STATUS_LIST_SIZE, reserve_indexes
from broker.wiring import build

_OF_A_TASK = 16
_LOOKS_EVERY_S = 0.02
_ENDS_EVERY_S = 0.5
_WITHIN_S = 60
# One task in a hundred, in no order that a compression could find.
_IS_OVER = f"((n - 1) / {_OF_A_TASK}) * 2654435761 % 4294967296 / 65536 % 100 = 7"


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Of all lists together, and the seconds of the slowest one."""

    tokens: int
    count: int
    kib: float
    seconds: float
    slowest: float

    @property
    def told(self) -> str:
        return (
            f"{self.kib:.1f} KiB in {self.count} lists, made anew in {self.seconds * 1000:.0f} ms, "
            f"each in at most {self.slowest * 1000:.0f} ms"
        )


def measure(bench: Bench, count: int) -> Lists:
    """Of `count` lists that are full."""
    broker = build(bench.settings)
    tokens = count * STATUS_LIST_SIZE
    try:
        expires_at = system_clock() + timedelta(hours=1)
        with broker.database.begin() as db:
            ids = [reserve_indexes(db, STATUS_LIST_SIZE, last_expiry_at=expires_at)[0] for _ in range(count)]
        copy_grants(
            broker,
            tokens,
            expires_at=expires_at,
            state=f"CASE WHEN {_IS_OVER} THEN 'expired' ELSE 'active' END",
            status_list=f"{ids[0]} + (n - 1) / {STATUS_LIST_SIZE}",
            status_index=f"(n - 1) % {STATUS_LIST_SIZE}",
        )
        took, size = [], 0
        for list_id in ids:
            started = time.perf_counter()
            size += len(broker.verification.status_list(list_id))
            took.append(time.perf_counter() - started)
        return Lists(tokens=tokens, count=count, kib=size / 1024, seconds=sum(took), slowest=max(took))
    finally:
        remove_copies(broker)
        broker.close()


def until_refused(bench: Bench, tokens: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Seconds from the answer of "complete" to the refusal, in the middle and at most; `tokens` with their tasks."""
    headers = {"Authorization": f"Bearer {bench.token('pipeline')}"}
    waiting, ended, took = list(tokens), dict[str, float](), list[float]()
    # It has no token of its own, so it may not follow the feed.
    with (
        Verifier(bench.settings.issuer, RESOURCE) as verifier,
        httpx.Client(base_url=bench.settings.issuer, headers=headers, timeout=30) as client,
    ):
        for token, _ in tokens:
            verifier.check(f"Bearer {token}", "GET", RESOURCE)
        next_end = began = time.monotonic()
        while waiting or ended:
            if time.monotonic() - began > _ENDS_EVERY_S * len(tokens) + _WITHIN_S:
                raise SystemExit(f"{len(ended)} tokens of completed tasks are still accepted")
            if waiting and time.monotonic() >= next_end:
                token, task = waiting.pop()
                client.post(f"/v1/tasks/{task}/complete").raise_for_status()
                ended[token] = time.perf_counter()
                next_end += _ENDS_EVERY_S
            for token in [token for token in ended if _is_refused(verifier, token)]:
                took.append(time.perf_counter() - ended.pop(token))
            time.sleep(_LOOKS_EVERY_S)
    return sorted(took)[len(took) // 2], max(took)


def _is_refused(verifier: Verifier, token: str) -> bool:
    try:
        verifier.check(f"Bearer {token}", "GET", RESOURCE)
    except Refused as problem:
        if problem.code != "revoked":
            raise SystemExit(f"refused for another reason: {problem}") from problem
        return True
    return False
