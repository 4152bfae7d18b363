"""`make chaos N=…`: random crash cycles, each judged; how many, from which seed, and what they came to."""

from __future__ import annotations

import queue
import secrets
import threading
import traceback
from collections import Counter

import click
from rich.console import Console
from rich.table import Table

from tests.crash.cycles import Verdict, run_at_random
from tests.crash.outside import Lane, World, a_world

STORES = ("sqlite", "postgresql")


@click.command()
@click.option("--cycles", "-n", default=50, show_default=True, help="How many.")
@click.option("--seed", type=int, help="Of the first; each has the next number. At random if it is not given.")
@click.option("--lanes", default=6, show_default=True, help="How many cycles are under way at once.")
@click.option("--store", type=click.Choice(STORES), help="One kind of database, instead of both in turn.")
def chaos(cycles: int, seed: int | None, lanes: int, store: str | None) -> None:
    """Brokers that die, lose answers, wait, and lose their database, at random; a seed repeats its cycle's plan."""
    console = Console()
    first = secrets.randbelow(10**6) if seed is None else seed
    console.print(f"{cycles} cycles, seeds {first} to {first + cycles - 1}, {lanes} at once")
    with a_world(lanes) as world:
        verdicts = _all(console, world, range(first, first + cycles), store)
        unheard_of = world.unheard_of()
    _show(console, verdicts)
    for name in unheard_of:
        console.print(f"{name} can log in, and no cycle had a row of its grant", style="red", markup=False)
    wrong = [verdict for verdict in verdicts if verdict.wrong]
    for verdict in wrong:
        _tell(console, verdict)
    raise SystemExit(1 if wrong or unheard_of else 0)


def _all(console: Console, world: World, seeds: range, store: str | None) -> list[Verdict]:
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in seeds:
        waiting.put(seed)
    verdicts: list[Verdict] = []
    threads = [threading.Thread(target=_work, args=(console, lane, waiting, verdicts, store)) for lane in world.lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdicts


def _work(
    console: Console, lane: Lane, waiting: queue.SimpleQueue[int], verdicts: list[Verdict], store: str | None
) -> None:
    while not waiting.empty():
        try:
            seed = waiting.get_nowait()
        except queue.Empty:
            return
        kind = store or STORES[seed % len(STORES)]
        try:
            verdict = run_at_random(lane, kind, seed)
        except Exception:
            # A cycle that could not be finished proves nothing, and is no success.
            verdict = Verdict(str(seed), kind, [traceback.format_exc()], [], 0.0)
        verdicts.append(verdict)
        outcome = "[red]wrong[/]" if verdict.wrong else f"settled {verdict.settled_s:4.1f} s after its tasks ended"
        faults = ", ".join(f"{point}: {action}" for point, action in verdict.met) or "killed at random"
        console.print(f"{len(verdicts):5} seed {seed} {kind:10} {outcome}; {faults}", soft_wrap=True)
        if verdict.wrong:
            _tell(console, verdict)


def _tell(console: Console, verdict: Verdict) -> None:
    console.print(str(verdict), style="red", markup=False, soft_wrap=True)
    console.print(f"again: make chaos N=1 SEED={verdict.seed} STORE={verdict.store}")


def _show(console: Console, verdicts: list[Verdict]) -> None:
    total: Counter[str] = sum((verdict.figures for verdict in verdicts), Counter())
    settled = sorted(verdict.settled_s for verdict in verdicts if not verdict.wrong)
    table = Table("figure", "value")
    table.add_row("cycles", str(len(verdicts)))
    for store in STORES:
        table.add_row(f"on {store}", str(sum(verdict.store == store for verdict in verdicts)))
    table.add_row("faults met", str(sum(len(verdict.met) for verdict in verdicts)))
    table.add_row("different faults met", str(len({fault for verdict in verdicts for fault in verdict.met})))
    for name, value in sorted(total.items()):
        table.add_row(name, str(value))
    if settled:
        table.add_row("everything dead after, median s", f"{settled[len(settled) // 2]:.1f}")
        table.add_row("everything dead after, longest s", f"{settled[-1]:.1f}")
    table.add_row("cycles in which something was wrong", str(sum(bool(verdict.wrong) for verdict in verdicts)))
    console.print(table)


if __name__ == "__main__":
    chaos()
