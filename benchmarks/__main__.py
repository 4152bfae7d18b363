"""`make bench`: every figure of docs/performance.md, in one run.

python -m benchmarks                    # all, on both stores
python -m benchmarks --only sqlite      # one store
python -m benchmarks --quick            # only the hot paths
python -m benchmarks --peer openbao     # and OpenBao beside the broker on PostgreSQL, under the same load
python -m benchmarks --decisions        # instead: a decision among a thousand policies, without a server
python -m benchmarks --feed             # instead: the feed, and status lists
python -m benchmarks --secrets          # instead: secrets of a real OpenBao, through the broker and read directly
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import psycopg
import sqlalchemy as sa

from benchmarks import client, decided_again, decisions, feed, lists, load, openbao, rows, secrets, verifying
from benchmarks.servers import (
    AGENTS,
    LIMITS,
    RESOURCE,
    Bench,
    bench_settings,
    broker_on,
    no_op_server,
    postgres,
    prepare,
    resident_mib,
)

_FORM = "application/x-www-form-urlencoded"
_AGENTS_A_TASK = 100
_LIFE_S = 20  # so that no agent holds more live grants than its limit, however long this runs
_GRANTS_IN_MEMORY = 100_000
_ENDED_TOGETHER = 10_000
_ENDED_TOGETHER_QUICKLY = 1_000
_SECRETS_ONE_BY_ONE = 300
_SECRETS_ENDED_TOGETHER = 200
_CLOSINGS = 3
_DEBTS = 10_000
_DECIDED_AGAIN = 100_000
_URGENT = 5  # of each kind
_STREAMS = (100, 1_000)
_STREAMS_HELD = 5_000
_TOLD = 20  # ends, one after the other
_REPLAYED = 100_000
_LISTS = 8  # a million tokens
_ENDS_IN_LISTS = 40
_CHECKS = 4000  # fewer than a status list of the fake broker has places


class Report:
    """Figures as they come, and their ratios to the no-op of the same run."""

    def __init__(self) -> None:
        self.no_op = 0.0

    def title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def rate(self, name: str, figures: load.Figures) -> None:
        ratio = f"   {figures.per_second / self.no_op:4.2f} × no-op" if self.no_op else ""
        failed = f"   {figures.failed} FAILED" if figures.failed else ""
        print(
            f"  {name:<42} {figures.per_second:8,.0f}/s   p50 {figures.p50:6.1f} ms   p99 {figures.p99:6.1f} ms"
            f"{ratio}{failed}",
            flush=True,
        )

    def ended(self, name: str, ended: load.Ended, what: str) -> None:
        self.value(name, f"{ended.seconds:8.2f} s for {ended.count:,} {what}")

    def value(self, name: str, value: str) -> None:
        print(f"  {name:<42} {value}", flush=True)


def on_sqlite(bench: Bench) -> bool:
    return bench.settings.store_url.startswith("sqlite")


def open_task(bench: Bench, agents: list[str]) -> str:
    body = {"purpose": "summarise the leads of May", "agents": agents, "deadline_s": 86_400}
    headers = {"Authorization": f"Bearer {bench.token('pipeline')}"}
    answer = httpx.post(f"{bench.settings.issuer}/v1/tasks", json=body, headers=headers, timeout=30)
    answer.raise_for_status()
    return str(answer.json()["id"])


def grant_request(bench: Bench, agent: str, task: str, ttl_s: int) -> bytes:
    body = {"task_id": task, "resource": RESOURCE, "scopes": ["contacts:read"], "ttl_s": ttl_s}
    return load.post(f"127.0.0.1:{bench.port}", "/v1/grants", json.dumps(body).encode(), token=bench.token(agent))


def fleet_requests(bench: Bench) -> list[bytes]:
    """One request of every agent, a hundred agents a task."""
    requests = []
    for first in range(0, AGENTS, _AGENTS_A_TASK):
        agents = [f"agent-{number}" for number in range(first, first + _AGENTS_A_TASK)]
        task = open_task(bench, agents)
        requests += [grant_request(bench, agent, task, _LIFE_S) for agent in agents]
    return requests


def credential(request: bytes, port: int) -> str:
    answer = load.once(port, request)
    return str(json.loads(answer)["credential"]["token"])


def measure_http(report: Report, bench: Bench, seconds: float, *, quick: bool) -> load.Figures:
    with broker_on(bench) as pid:
        requests = fleet_requests(bench)
        # Every token verified once and every slice parsed: the first second of a broker's life is not its speed.
        load.run(bench.port, requests, count=AGENTS, expect=b"201")
        figures = load.run(bench.port, requests, seconds=seconds, expect=b"201")
        report.rate("grants, 32 connections", figures)
        report.rate("grants, 1 connection", load.run(bench.port, requests, seconds=2, connections=1, expect=b"201"))
        host, verifier = f"127.0.0.1:{bench.port}", bench.token("crm-api")
        looks = [
            load.post(host, "/oauth2/introspect", f"token={token}".encode(), token=verifier, media_type=_FORM)
            for token in (credential(request, bench.port) for request in requests[:200])
        ]
        load.run(bench.port, looks, count=1000)
        report.rate("introspection, 32 connections", load.run(bench.port, looks, seconds=seconds))
        if on_sqlite(bench):
            agents = [f"agent-{number}" for number in range(client.STARTS)]
            tokens = [bench.token(agent) for agent in agents]
            start = client.measure_start(bench.settings.issuer, tokens, open_task(bench, agents), RESOURCE)
            report.value("SDK, from its import to a first credential", start.told)
        # The worker is the same on both stores, and on the quicker one it is known sooner.
        if not quick and on_sqlite(bench):
            made = figures.requests
            while made < _GRANTS_IN_MEMORY:
                made += load.run(bench.port, requests, count=20_000, expect=b"201").requests
            report.value("memory of the worker", f"{resident_mib(pid):.0f} MiB after {made:,} grants")
    return figures


def measure_end(report: Report, bench: Bench, count: int) -> load.Ended:
    """Completing a task of this many live grants, as its orchestrator sees it, and a verifier."""
    with broker_on(bench):
        agents = [f"agent-{number}" for number in range(_AGENTS_A_TASK)]
        # Those of the runs before have to be over, or their agents are at their limit.
        time.sleep(_LIFE_S)
        task = open_task(bench, agents)
        requests = [grant_request(bench, agent, task, 600) for agent in agents]
        load.run(bench.port, requests, seconds=300, count=count - 1, expect=b"201")
        token = credential(requests[-1], bench.port)
        headers = {"Authorization": f"Bearer {bench.token('pipeline')}"}
        started = time.perf_counter()
        answer = httpx.post(f"{bench.settings.issuer}/v1/tasks/{task}/complete", headers=headers, timeout=60)
        took = time.perf_counter() - started
        answer.raise_for_status()
        verifier = {"Authorization": f"Bearer {bench.token('crm-api')}"}
        look = httpx.post(f"{bench.settings.issuer}/oauth2/introspect", data={"token": token}, headers=verifier)
        if look.json() != {"active": False}:
            raise SystemExit(f"a token of a completed task is still active: {look.json()}")
        ended = load.Ended(count=answer.json()["totals"]["ended"], seconds=took)
        report.ended("completing a task", ended, "live grants")
        return ended


def measure_sweep(report: Report, bench: Bench) -> None:
    swept, seconds = rows.sweep_of_due_grants(bench, 100_000)
    report.value("sweep of due grants", f"{swept / seconds:,.0f} rows/s")
    report.value("empty sweep over a million live grants", f"{rows.empty_sweep(bench, 1_000_000) * 1000:.1f} ms")


def measure_decisions(report: Report, bench: Bench, seconds: float) -> None:
    """Live grants decided again, and a draft replayed; the figures of both are of whole rows read from the store."""
    report.value("a draft replayed", f"{decided_again.replaying(bench, _DECIDED_AGAIN):,.0f} recorded requests/s")
    unchanged, some_end = decided_again.deciding_again(bench, _DECIDED_AGAIN)
    report.value("decided again, and nothing changes", unchanged.told)
    report.value("decided again, and some end", some_end.told)
    with broker_on(bench):
        requests = fleet_requests(bench)[: decided_again.IDLE]
        load.run(bench.port, requests, count=AGENTS, expect=b"201")
        before, meanwhile, took = decided_again.beside_issuing(bench, requests, _DECIDED_AGAIN, round(seconds))
        value = f"{meanwhile:,.0f} grants/s, {meanwhile / before:.2f} × before"
        report.value(f"  by a broker that issues, in {took:.0f} s", value)


def measure_limits(report: Report, bench: Bench, seconds: float) -> None:
    """Grants beside limits that are counted down and handed out all the time, and beside such that are never near.

    By turns, because a machine is not as fast in every minute.
    """
    near = replace(LIMITS, requests_per_task=20_000, requests_per_resource=200_000, requests_per_issuer=200_000)
    names = ("requests_per_agent", "requests_per_task", "requests_per_resource", "requests_per_issuer")
    far = replace(near, **dict.fromkeys(names, 1_000_000_000))
    rates: dict[str, list[float]] = {"near": [], "far": []}
    for name, limits in (("near", near), ("far", far), ("far", far), ("near", near)):
        limited = replace(bench, settings=replace(bench.settings, limits=limits))
        # What was handed out by a bound that is far would be beyond one that is near.
        rows.forget_allowances(limited)
        with broker_on(limited):
            requests = fleet_requests(limited)
            load.run(limited.port, requests, count=AGENTS, expect=b"201")
            figures = load.run(limited.port, requests, seconds=seconds, expect=b"201")
            if figures.failed:
                raise SystemExit(f"{figures.failed} requests were refused: with refusals this is no figure")
            rates[name].append(figures.per_second)
    on, off = (sum(rates[name]) / len(rates[name]) for name in ("near", "far"))
    report.value("limits on, beside effectively off", f"{on:,.0f}/s and {off:,.0f}/s, {on / off:.2f} ×")


def measure_feed(report: Report, bench: Bench, *, quick: bool) -> None:
    with_feed = feed.with_feed(bench)
    for streams in _STREAMS[: 1 if quick else 2]:
        propagated = feed.propagation(with_feed, streams, _TOLD)
        report.value(f"a task's end, to {streams:,} streams", propagated.told)
    if not (quick or on_sqlite(bench)):
        before, held = feed.memory_of_streams(with_feed, _STREAMS_HELD)
        report.value(f"memory with {_STREAMS_HELD:,} streams", f"{held:.0f} MiB, {before:.0f} MiB without")
    if not quick:
        report.value(f"replay of {_REPLAYED:,} events", f"{feed.replay(with_feed, _REPLAYED):.2f} s")
        measure_lists(report, bench)


def measure_lists(report: Report, bench: Bench) -> None:
    with broker_on(bench):
        agents = [f"agent-{number}" for number in range(_ENDS_IN_LISTS)]
        tasks = [open_task(bench, [agent]) for agent in agents]
        tokens = [
            (credential(grant_request(bench, agent, task, 600), bench.port), task)
            for agent, task in zip(agents, tasks, strict=True)
        ]
        middle, last = lists.until_refused(bench, tokens)
        report.value("a task's end, by status list alone", f"p50 {middle:.1f} s   the last of all {last:.1f} s")
    measured = lists.measure(bench, _LISTS)
    report.value(f"lists of {measured.tokens:,} tokens, 1 % over", measured.told)


def measure_two_workers(report: Report, bench: Bench, seconds: float) -> None:
    two = replace(bench, settings=replace(bench.settings, server=replace(bench.settings.server, workers=2)))
    with broker_on(two):
        requests = fleet_requests(two)
        load.run(two.port, requests, count=2 * AGENTS, expect=b"201")
        report.rate("grants, 32 connections, 2 workers", load.run(two.port, requests, seconds=seconds, expect=b"201"))


def measure_store(report: Report, bench: Bench, options: argparse.Namespace) -> None:
    # The peer has no store but PostgreSQL in common with us. Each of its figures is taken right after ours: minutes
    # later a machine may be another.
    beside = bench.settings.source.parent / "openbao" if options.peer and not on_sqlite(bench) else None
    prepare(bench)
    if options.feed:
        measure_feed(report, bench, quick=options.quick)
        return
    if not on_sqlite(bench):
        measure_two_workers(report, bench, options.seconds)
    grants = measure_http(report, bench, options.seconds, quick=options.quick)
    measure_limits(report, bench, options.seconds)
    if beside:
        logins = openbao.measure_logins(beside / "logins", options.seconds, _LIFE_S)
        report.rate(f"OpenBao {openbao.version()}: logins, 32 connections", logins)
        report.value("  a grant beside it", openbao.rates_beside(grants, logins))
    if beside or not options.quick:
        together = _ENDED_TOGETHER_QUICKLY if options.quick else _ENDED_TOGETHER
        ended = measure_end(report, bench, together)
        if beside:
            revoked = openbao.measure_revocation(beside / "revocation", together)
            report.ended(f"OpenBao {openbao.version()}: revoking a token", revoked, "children")
            report.value("  a task beside it", openbao.ends_beside(ended, revoked))
    if not options.quick:
        measure_sweep(report, bench)
        measure_decisions(report, bench, options.seconds)


def measure_verifier(report: Report, count: int) -> None:
    checks = verifying.measure(count)
    report.value("a token that was here before", checks.seen.told)
    report.value("a new token", checks.new.told)
    report.value("a bound token that was here, a new proof", checks.bound.told)


def measure_secrets(report: Report, root: Path, options: argparse.Namespace) -> None:
    """One PostgreSQL is where OpenBao makes logins, and the broker's store where that is not SQLite."""
    stores = [name for name in ("SQLite", "PostgreSQL") if options.only in (None, name.lower())]
    with postgres(root / "postgres") as url:
        with psycopg.connect(secrets.dsn(url), autocommit=True) as db:
            db.execute("CREATE DATABASE orders")
        target = sa.make_url(url).set(database="orders").render_as_string(hide_password=False)
        with secrets.outside(root / "openbao", target) as outside:
            for name in stores:
                report.title(f"Logins at PostgreSQL made by OpenBao {openbao.version()}, the broker's store on {name}")
                store = url if name == "PostgreSQL" else f"sqlite:///{root}/sqlite/broker.db"
                bench = secrets.with_secrets(bench_settings(root / name.lower(), store), outside)
                prepare(bench)
                with broker_on(bench), secrets.house(bench, outside) as house:
                    measure_secrets_of(report, house, options)


def measure_secrets_of(report: Report, house: secrets.House, options: argparse.Namespace) -> None:
    count = _SECRETS_ONE_BY_ONE // 3 if options.quick else _SECRETS_ONE_BY_ONE
    one = secrets.measure_one_client(house, count)
    many = secrets.measure_many_clients(house, options.seconds)
    for beside, clients in ((one, "1 client"), (many, f"{secrets.CLIENTS} clients")):
        report.rate(f"read from OpenBao, {clients}", beside.direct)
        report.rate(f"the same, a token for each, {clients}", beside.with_own_token)
        report.rate(f"through the broker, {clients}", beside.ours)
        report.value("  what it adds to a read", beside.added)
        report.value("  its rate", beside.rate)
    closed = secrets.median_of(
        [secrets.measure_closing(house, _SECRETS_ENDED_TOGETHER) for _ in range(1 if options.quick else _CLOSINGS)]
    )
    report.value(f"closing a task of {closed.count} secrets", closed.ours)
    report.value(f"OpenBao: revoke-prefix of {closed.count}", f"{closed.theirs:8.2f} s")
    report.value("  all dead, beside it", f"{closed.ratio:.2f} × its time")
    report.value(f"OpenBao: the tokens of {closed.count} as well", f"{closed.theirs_with_tokens:8.2f} s")
    report.value("  all dead, beside it", f"{closed.ratio_with_tokens:.2f} × its time")
    if not options.quick:
        urgent = secrets.measure_backlog(house, _DEBTS, _URGENT)
        report.value(f"urgent, before {urgent.owed} debts: one grant", urgent.told(urgent.one))
        report.value("  along an axis", urgent.told(urgent.along_an_axis))


def options_from(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure the broker beside a no-op.")
    parser.add_argument("--only", choices=["sqlite", "postgresql"], help="one store instead of both")
    parser.add_argument("--seconds", type=float, default=5, help="how long each rate is measured (default: 5)")
    parser.add_argument("--quick", action="store_true", help="only the hot paths")
    parser.add_argument("--peer", choices=["openbao"], help="its nearest equal, under the same load on PostgreSQL")
    parser.add_argument("--secrets", action="store_true", help="instead: secrets of a real OpenBao, also read directly")
    parser.add_argument("--decisions", action="store_true", help="instead: one decision among a thousand policies")
    parser.add_argument("--feed", action="store_true", help="instead: streams of the feed, and status lists")
    options = parser.parse_args(arguments)
    if options.peer and options.secrets:
        parser.error("--secrets is measured by itself: leave out --peer openbao")
    if options.peer and options.only == "sqlite":
        parser.error("--peer openbao is measured on PostgreSQL: leave out --only sqlite")
    if (options.peer or options.secrets) and not openbao.is_installed():
        parser.error(openbao.NOT_INSTALLED.format(arguments="--secrets" if options.secrets else "--peer openbao"))
    return options


def main() -> None:
    options = options_from()
    # So that the servers end with us, and not only when they are asked to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report = Report()
    if options.decisions or not (options.quick or options.secrets):
        report.title("The engine")
        report.value("a decision over 1,000 policies", decisions.measure().told)
    if options.decisions:
        return
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as directory:
        root = Path(directory)
        with no_op_server() as port:
            request = load.post(f"127.0.0.1:{port}", "/no-op", b"{}")
            load.run(port, [request], count=1000)
            figures = load.run(port, [request], seconds=options.seconds)
            report.rate("no-op Flask POST on the same server", figures)
            report.no_op = figures.per_second
        if options.secrets:
            measure_secrets(report, root, options)
            return
        report.title("A check in the verifier SDK, in the API's own process")
        measure_verifier(report, _CHECKS)
        if options.only != "postgresql":
            report.title("SQLite (synchronous=FULL)")
            measure_store(report, bench_settings(root / "sqlite", f"sqlite:///{root}/sqlite/broker.db"), options)
        if options.only != "sqlite":
            report.title("PostgreSQL (fsync and synchronous_commit on)")
            with postgres(root / "postgres") as url:
                measure_store(report, bench_settings(root / "pg", url), options)


if __name__ == "__main__":
    main()
