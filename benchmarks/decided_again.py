"""Deciding live grants again and replaying a draft: the verbs themselves, over rows that were copied into the store."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

from sqlalchemy import select, text

from benchmarks import load, rows
from benchmarks.servers import AGENTS, Bench
from broker.domain.catalogue import Catalogue
from broker.domain.clock import epoch, from_epoch, system_clock
from broker.services.drafts import fit
from broker.store import models
from broker.wiring import Broker, build

IDLE = AGENTS // 2  # the agents from here on hold what is decided again
_runs = models.table_of(models.Redecision)
_LIVE_S = 550  # as long as the policies of the benchmark allow, and longer than it takes
# True for three agents of ten.
_FORBID_SOME = """
@id("not-some-of-them")
forbid (principal, action, resource == Resource::"https://crm.example/api")
when { principal.subject like "*1" || principal.subject like "*3" || principal.subject like "*5" };
"""
_CHANGES_NOTHING = """
@id("changes-nothing-%d")
forbid (principal, action, resource == Resource::"https://crm.example/api") when { context.risk == "critical-%d" };
"""


@dataclass(frozen=True, kw_only=True)
class Again:
    looked_at: int
    ended: int
    seconds: float

    @property
    def told(self) -> str:
        return f"{self.seconds:8.2f} s for {self.looked_at:,} live grants, {self.ended:,} of them ended"


def replaying(bench: Bench, count: int) -> float:
    """Recorded requests a second."""
    with _copied(bench, count) as broker:
        catalogue = _with(broker, _FORBID_SOME)
        policies = fit(catalogue)
        live = broker.redeciding.foresee
        # Only the requests: what is live is another figure.
        broker.redeciding.foresee = lambda catalogue, at_most: live(catalogue, at_most=1)  # type: ignore[method-assign]
        started = time.perf_counter()
        found = broker.replaying.replayed(catalogue, policies, period=system_clock() - from_epoch(0), at_most=count)
        return found.requests / (time.perf_counter() - started)


def deciding_again(bench: Bench, count: int) -> tuple[Again, Again]:
    """Where nothing changes, and where some end; pass after pass, with nobody else on the machine."""
    with _copied(bench, count) as broker:
        broker.administration.apply(_with(broker, _CHANGES_NOTHING % (1, 1)), by="bench")
        unchanged = _until_done(broker)
        broker.administration.apply(_with(broker, _FORBID_SOME), by="bench")
        some_end = _until_done(broker)
        broker.administration.apply(_with(broker, _CHANGES_NOTHING % (3, 3)), by="bench")
        _until_done(broker)
        return unchanged, some_end


def beside_issuing(bench: Bench, requests: list[bytes], count: int, seconds: int) -> tuple[float, float, float]:
    """Grants a second before, and while a running broker decides so many again; and how many seconds that takes."""
    with _copied(bench, count) as broker:
        # In parts of a second, as meanwhile: each opens its connections anew.
        parts = [load.run(bench.port, requests, seconds=1, expect=b"201").per_second for _ in range(seconds)]
        broker.administration.apply(_with(broker, _CHANGES_NOTHING % (2, 2)), by="bench")
        started = time.perf_counter()
        made = 0
        while not _finished(broker):
            made += load.run(bench.port, requests, seconds=1, expect=b"201").requests
        meanwhile = made / (time.perf_counter() - started)
        last = select(_runs.c.ordered_at, _runs.c.finished_at).order_by(_runs.c.id.desc()).limit(1)
        with broker.database.read() as db:
            ordered_at, finished_at = db.execute(last).one()
        return sum(parts) / seconds, meanwhile, (finished_at - ordered_at).total_seconds()


def _with(broker: Broker, policy: str) -> Catalogue:
    catalogue = broker.standing.now().catalogue
    return replace(catalogue, policies={**catalogue.policies, "again.cedar": policy})


def _until_done(broker: Broker) -> Again:
    started, looked_at, ended = time.perf_counter(), 0, 0
    while not _finished(broker):
        broker.look_again()
        done = broker.redeciding.run()
        looked_at += done.looked_at
        ended += done.ended
    return Again(looked_at=looked_at, ended=ended, seconds=time.perf_counter() - started)


def _finished(broker: Broker) -> bool:
    with broker.database.read() as db:
        return db.execute(text("SELECT 1 FROM redecisions WHERE finished_at IS NULL LIMIT 1")).first() is None


@contextmanager
def _copied(bench: Bench, count: int) -> Iterator[Broker]:
    """A broker on a store with so many live grants more, of all agents; they are gone afterwards."""
    broker = build(bench.settings)
    try:
        while not _finished(broker):
            broker.redeciding.run()
        # Of those who do not issue meanwhile: their limit counts what was copied too.
        number = f"{IDLE} + CAST(n AS integer) % {AGENTS - IDLE}"
        names = {"agent": f"'agent-' || ({number})", "subject": f"'dev:agent-' || ({number})"}
        now = system_clock()
        # Decided now, and not when what they are copies of was: policies ask how long a grant may live from then on.
        terms = json.dumps({"decided_at": epoch(now), "ceilings_s": {}, "ttl_s": _LIVE_S, "delegation_depth": 0})
        names["terms"] = f"'{terms}'" if broker.database.is_sqlite else f"CAST('{terms}' AS jsonb)"
        rows.copy_grants(broker, count, expires_at=now + timedelta(seconds=_LIVE_S), **names)
        yield broker
    finally:
        rows.remove_copies(broker)
        broker.close()
