"""Names of metrics and log events: the same words as in audit events and routes.

Logs are one JSON object a line. No label and no line holds a token, a request's body or text of unbounded variety
(INV-30, INV-31).
"""

from __future__ import annotations

import errno
import json
import logging
import sys
from collections import Counter as Tally
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, TextIO

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest, start_http_server

from broker.domain.clock import from_epoch, rfc3339
from broker.domain.lifecycle import LeaseState

_log = logging.getLogger("broker.web")

# Of a method anybody can make up a new one with each request, and each is a time series that stays.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_encoded = json.JSONEncoder(default=str).encode
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SECONDS = Histogram("broker_http_request_seconds", "Time to answer", ["method", "route"], buckets=_BUCKETS)
_REQUESTS = Counter("broker_http_requests", "Requests answered", ["method", "route", "status"])
_UNAUTHENTICATED = Counter("broker_unauthenticated", "Workload tokens refused")
_LIMITED = Counter("broker_limited_requests", "Requests refused because a limit was reached", ["limit"])
_EVENTS = Counter("broker_events", "Audit events, counted when they are durable", ["type", "outcome"])
_SWEPT = Counter("broker_swept_rows", "Rows the sweeper moved", ["what"])
_SWEEP_SECONDS = Histogram("broker_sweep_seconds", "Time of one sweep", buckets=_BUCKETS)
_TOLD = Counter("broker_activities", "Activities told of, by what came of it", ["came_to"])
_UNTIL_DEAD = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 900, 3600)
_CONFIRMED_DEAD = Histogram(
    "broker_confirmed_dead_seconds",
    "From the end of authority until the outside said that the secret is dead",
    ["provider"],
    buckets=_UNTIL_DEAD,
)
_LEASES = Gauge("broker_leases", "Leases that are not released", ["provider", "state"])
_OLDEST_DEBT = Gauge(
    "broker_oldest_debt_seconds", "How long the oldest debt is owed that is not abandoned", ["provider"]
)
_LAST_LOOK = Gauge(
    "broker_last_look_timestamp_seconds", "When what a provider has alive was last compared with our rows", ["provider"]
)
_REACHABLE = Gauge("broker_provider_reachable", "1 if the last look at the provider was complete, else 0", ["provider"])
_BREAK_GLASS = Gauge("broker_break_glass_grants", "Grants that are out and were asked for as a break-glass")
_REVIEWS = Gauge("broker_break_glass_reviews", "Reviews that are owed for one, by whether they are late", ["state"])
_LAST_SWEEP = Gauge("broker_last_sweep_timestamp_seconds", "When the last sweep finished")


_STREAMS = Gauge("broker_feed_streams", "Streams of the feed that are open")
_CUT_OFF = Counter("broker_feed_cut_off", "Streams that did not read what they were sent, and were ended")


_SETS_SENT = Counter("broker_ssf_sets_sent", "Security event tokens, by what became of them at receivers", ["outcome"])
_SETS_RECEIVED = Counter("broker_ssf_sets_received", "Security event tokens of transmitters", ["outcome"])
_SETS_WAITING = Gauge("broker_ssf_sets_waiting", "Security event tokens a receiver has not taken", ["receiver"])


_OPEN = tuple(str(state) for state in LeaseState if state is not LeaseState.RELEASED)
_OWING: set[str] = set()  # every provider whose leases were counted


def answered(*, method: str, route: str, status: int, seconds: float, caller: str | None, trace_id: str) -> None:
    """One request was answered. `route` is the rule, never the path: paths are of unbounded variety."""
    method = method if method in _METHODS else "other"
    timed, counted = _of_route(method, route, status)
    timed.observe(seconds)
    counted.inc()
    if _log.isEnabledFor(logging.INFO):
        fields = {"method": method, "route": route, "status": status, "ms": round(seconds * 1000, 2), "caller": caller}
        _log.info("request", extra={"fields": {**fields, "trace_id": trace_id}})


@lru_cache(maxsize=1024)
def _of_route(method: str, route: str, status: int) -> tuple[Histogram, Counter]:
    return _SECONDS.labels(method, route), _REQUESTS.labels(method, route, status)


def unauthenticated(reason: str, trace_id: str) -> None:
    """A workload token was refused. Only here is said why; it costs no row, because anybody can cause it (INV-35)."""
    _UNAUTHENTICATED.inc()
    _log.info("unauthenticated", extra={"fields": {"reason": reason, "trace_id": trace_id}})


def limited(limit: str) -> None:
    """A limit refused a request, whichever broker found it reached. `limit` is its name, of which there are few."""
    _LIMITED.labels(limit).inc()


def broke(problem: Exception, trace_id: str) -> None:
    """An error nobody expected."""
    _log.error("internal error", exc_info=problem, extra={"fields": {"trace_id": trace_id}})


def committed(events: Sequence[tuple[str, str]]) -> None:
    """Audit events became durable: each (type, outcome) has the name it has in the trail."""
    for (type_, outcome), count in Tally(events).items():
        _EVENTS.labels(type_, outcome).inc(count)


def swept(counts: dict[str, int], seconds: float) -> None:
    for what, count in counts.items():
        if count:
            _SWEPT.labels(what).inc(count)
    _SWEEP_SECONDS.observe(seconds)
    _LAST_SWEEP.set_to_current_time()


def told(**counts: int) -> None:
    """Somebody told what was done with grants: so many activities came to each of these."""
    for came_to, count in counts.items():
        if count:
            _TOLD.labels(came_to).inc(count)


def confirmed_dead(provider: str, seconds: float) -> None:
    """A secret outside is dead, so long after the authority of its grant ended."""
    _CONFIRMED_DEAD.labels(provider).observe(max(0.0, seconds))


def owed(counts: Mapping[tuple[str, str], int], oldest_s: Mapping[str, float], providers: Collection[str]) -> None:
    """What is owed outside, as the rows have it now. What was there the last time and is no more becomes 0."""
    _OWING.update(providers, (provider for provider, _ in counts))
    for provider in _OWING:
        for state in _OPEN:
            _LEASES.labels(provider, state).set(counts.get((provider, state), 0))
        _OLDEST_DEBT.labels(provider).set(oldest_s.get(provider, 0))


def looked(provider: str, at: datetime | None, *, reachable: bool) -> None:
    """How a provider was last looked at, by whichever broker."""
    _LAST_LOOK.labels(provider).set(0 if at is None else at.timestamp())
    _REACHABLE.labels(provider).set(reachable)


def break_glass(*, live: int, owed: int, overdue: int) -> None:
    """What is out by a break-glass, and the reviews that are owed; `overdue` are some of them."""
    _BREAK_GLASS.set(live)
    _REVIEWS.labels("owed").set(owed - overdue)
    _REVIEWS.labels("overdue").set(overdue)


def streams(more: int) -> None:
    """So many streams of the feed were opened, or closed."""
    _STREAMS.inc(more)


def cut_off() -> None:
    """A stream was ended because nobody read it."""
    _CUT_OFF.inc()


def sets_sent(outcome: str, count: int) -> None:
    """What receivers did with so many SETs: delivered, refused, failed."""
    _SETS_SENT.labels(outcome).inc(count)


def sets_received(outcome: str, count: int) -> None:
    """What we did with so many SETs of transmitters: accepted, repeated, refused."""
    _SETS_RECEIVED.labels(outcome).inc(count)


def set_refused(reason: str, trace_id: str) -> None:
    """A SET was pushed to us that is none; it costs no row, because anybody can cause it (INV-35)."""
    _log.info("set refused", extra={"fields": {"reason": reason, "trace_id": trace_id}})


def sets_waiting(counts: Mapping[str, int]) -> None:
    """As the rows have it now; of a stream that is gone nothing is said."""
    _SETS_WAITING.clear()
    for receiver, count in counts.items():
        _SETS_WAITING.labels(receiver).set(count)


def exposition() -> tuple[bytes, str]:
    """Everything, in Prometheus' text format, with its content type."""
    return generate_latest(), CONTENT_TYPE_LATEST


def serve_metrics(host: str, port: int, workers: int = 1) -> None:
    """Answer `/metrics` in a daemon thread, on the first port from `port` on that no other worker has.

    Each worker counts for itself. On one shared port a scrape would meet one or the other by chance, and counters
    would seem to run backwards.
    """
    for last in range(port, port + workers):
        try:
            start_http_server(last, addr=host)
            return
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE or last == port + workers - 1:
                raise


class JsonLines(logging.Formatter):
    """One JSON object a line: nothing in a message can start a new one (INV-31)."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": rfc3339(from_epoch(int(record.created))),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encoded(line)


def log_to(stream: TextIO = sys.stderr, *, level: int = logging.INFO) -> None:
    """Send every logger's lines there, as JSON."""
    # No line says from which file, thread or process it came, so nobody has to find out.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # what the logging documentation names for this
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # They log each request a second time, httpx with its URL.
    for name in ("httpx", "httpcore", "apscheduler", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
