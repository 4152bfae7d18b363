"""What the broker answers where something ends, as frozen values; by the rules of `broker.sdk.values`.

Loaded with the first of them: nobody waits for it at the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from broker.sdk.values import Members, as_it_came


@dataclass(frozen=True, kw_only=True)
class ReceiptLine:
    grant_id: str
    agent: str
    resource: str
    provider: str | None
    revocation_class: str | None
    authority_ended_at: datetime | None
    confirmed_dead_at: datetime | None
    exposed_until: datetime | None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> ReceiptLine:
        read = Members("receipt line", value)
        return cls(
            grant_id=read.text("grant_id"),
            agent=read.text("agent"),
            resource=read.text("resource"),
            provider=read.maybe_text("provider"),
            revocation_class=read.maybe_text("revocation_class"),
            authority_ended_at=read.maybe_time("authority_ended_at"),
            confirmed_dead_at=read.maybe_time("confirmed_dead_at"),
            exposed_until=read.maybe_time("exposed_until"),
            raw=read.raw,
        )


@dataclass(frozen=True, kw_only=True)
class Totals:
    ended: int
    confirmed_dead: int
    outstanding: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """`jws` is the same under the broker's key, for whoever must prove it later."""

    task_id: str | None
    ended_at: datetime | None
    outcome: str
    grants: tuple[ReceiptLine, ...]
    totals: Totals
    jws: str | None
    raw: Mapping[str, Any] = as_it_came()

    @classmethod
    def of(cls, value: object) -> Receipt:
        read = Members("receipt", value)
        totals = Members("totals of a receipt", read.raw.get("totals"))
        return cls(
            task_id=read.maybe_text("task_id"),
            ended_at=read.maybe_time("ended_at"),
            outcome=read.text("outcome"),
            grants=tuple(ReceiptLine.of(line) for line in read.items("grants")),
            totals=Totals(
                ended=totals.integer("ended"),
                confirmed_dead=totals.integer("confirmed_dead"),
                outstanding=totals.integer("outstanding"),
            ),
            jws=read.maybe_text("jws"),
            raw=read.raw,
        )
