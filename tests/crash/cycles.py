"""One cycle: a broker that meets its faults, is started again each time it died, settles, and is judged.

A cycle has a database of its own and is planned from its seed alone, so the same seed gives the same plan.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.crash.clients import Client, Crowd, Log, Received
from tests.crash.failpoints import CELLS, DELAY_S, Faults
from tests.crash.launcher import NO_BUG, Launcher
from tests.crash.oracle import Oracle
from tests.crash.outside import LIFE_S, ORDERS, Lane
from tests.house import CRM
from tests.processes import BrokerProcess, Deployment, until

SHORT_S = 2
# After the last fault: until an intent is taken for dead, what can arrive late has, it was looked for, and every
# debt that failed was tried again.
SETTLES_WITHIN_S = 25

# What has to go wrong besides, so that a point is reached at all.
_ALSO: dict[str, tuple[tuple[str, str], ...]] = {
    "give up": (("issue", "lose"),),
    "recover": (("confirm", "error before"), ("give up", "error before")),
    "fail": (("look up", "refuse"),),
}


@dataclass(frozen=True)
class Verdict:
    """What came of a cycle. `wrong` is empty, or the claim is not true."""

    seed: str
    store: str
    wrong: list[str]
    met: list[tuple[str, str]]
    settled_s: float
    figures: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        faults = ", ".join(f"{point}: {action}" for point, action in self.met)
        return "\n".join([f"seed {self.seed} on {self.store}, after {faults or 'no fault'}:", *self.wrong])


class CrashingBroker(BrokerProcess):
    """A `broker serve` that dies where its faults say."""

    def __init__(self, deployment: Deployment, launcher: Launcher, faults: Faults, bug: str) -> None:
        super().__init__(deployment, (), {})
        self._launcher = launcher
        self._faults = faults
        self._bug = bug

    def start(self) -> None:
        # The first of its processes may be gone, and a worker not yet; it would keep the address.
        until(lambda: not self._has_processes(), what="the end of the one before")
        self._process = self._launcher.launch(
            faults=self._faults.directory,
            bug=self._bug,
            command=["serve", "--config", str(self.deployment.configuration)],
            environment={"BROKER__SERVER__LISTEN": f"127.0.0.1:{self.port}"},
            log=self.log,
        )

    def _has_processes(self) -> bool:
        if self._process is None:
            return False
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None


class Cycle:
    def __init__(self, lane: Lane, deployment: Deployment, faults: Faults, *, seed: str, bug: str = NO_BUG) -> None:
        self.lane = lane
        self.faults = faults
        self.log = Log()
        self.broker = CrashingBroker(deployment, lane.world.launcher, faults, bug)
        self.oracle = Oracle(lane, deployment.store_url, self.log)
        self.choose = random.Random(seed)
        self.client = Client(self.broker, lane.world, self.log, self.choose)
        self.wrong: list[str] = []

    def close(self) -> None:
        self.client.close()
        self.broker.end()
        self.oracle.close()

    def be_up(self) -> None:
        """Running, and so far that it hands out logins; a login that nobody ends is left for what comes."""
        if not self.broker.is_up:
            self._start()
            self.until_it_issues()

    def _start(self) -> None:
        self.broker.start()
        self.broker.until_ready()

    def until_it_issues(self) -> Received:
        task_id = until(self.client.open_task, what="a task")
        received: Received = until(lambda: self.client.ask(task_id, ttl_s=LIFE_S), what="a login")
        return received

    def meet(self, point: str, action: str) -> None:
        """Let the broker meet this fault, and start it again if it died of it."""
        self.be_up()
        before = self.faults.met().count((point, action))
        with self.lane.world.target_held() if action == "leave" and point == "issue" else contextlib.nullcontext():
            for other in _ALSO.get(point, ()):
                self.faults.set(*other)
            forgotten = self.until_it_issues() if point == "gone" else None
            self.faults.set(point, action)
            if point == "adopt":
                self.lane.plant()
            if forgotten is not None:
                self._forget(forgotten)

            def met() -> bool:
                if self.faults.met().count((point, action)) == before:
                    self._provoke(point)
                return self.faults.met().count((point, action)) > before

            until(met, what=f"{point}: {action}")
            if action == "leave" and point == "issue":
                # Until its token is dead for certain, and what it is about to make is not.
                time.sleep(DELAY_S)
        if action.startswith("kill"):
            until(lambda: not self.broker.is_up, what="the broker's death")
            self.log.figures["kills"] += 1
        self.faults.unset()

    def _provoke(self, point: str) -> None:
        match point:
            case "looked" | "list" | "adopt" | "gone":
                return
            case "revoke":
                self.client.job(ttl_s=LIFE_S, ending="revoke")
            case "expire":
                self.client.job(ttl_s=SHORT_S, ending="leave")
            case "recover":
                # Whatever ends its task pays for it, and then there is nothing to recover.
                self.client.job(ttl_s=LIFE_S, ending="leave")
            case _:
                self.client.job(ttl_s=LIFE_S, ending=self.choose.choice(("complete", "cancel", "fail")))

    def _forget(self, received: Received) -> None:
        for lease in self.oracle.rows().leases_of(received.grant_id):
            if lease.reference is not None:
                self.lane.forget(lease.reference)

    def weather(self, seconds: float) -> None:
        """Several clients at once, and whatever faults are set."""
        with Crowd(self.broker, self.lane.world, self.log, str(self.choose.random())):
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and self.broker.is_up:
                self.watch()
                time.sleep(0.2)
        if not self.broker.is_up:
            self.log.figures["kills"] += 1

    def watch(self) -> None:
        """A look in the middle of it all: what is wrong now is wrong, whatever comes of it."""
        self.log.trouble += [line for line in self.oracle.look().wrong if line not in self.log.trouble]

    def settle(self, *, to_the_end: bool = False) -> float:
        """End every task, and see everything end; answers how long that took. To the end: until every debt is paid."""
        self.faults.unset()
        if not self.broker.is_up:
            self._start()
        self._end_every_task()
        began = time.monotonic()
        while True:
            found = self.oracle.look()
            self.wrong = found.wrong
            if found.wrong:
                break
            if not found.unsettled:
                break
            if time.monotonic() > began + SETTLES_WITHIN_S:
                self.wrong = [f"after {SETTLES_WITHIN_S} s {line}" for line in found.unsettled]
                break
            time.sleep(0.25)
        took = time.monotonic() - began
        if not self.wrong:
            self._nothing_opens()
        self.log.figures["debts still held"] = found.open_debts
        while to_the_end and not self.wrong and found.open_debts:
            found = self.oracle.look()
            self.wrong = found.wrong
            if time.monotonic() > began + LIFE_S + SETTLES_WITHIN_S:
                self.wrong.append(f"{found.open_debts} debts are never paid")
            time.sleep(0.25)
        self.log.figures.update(found.figures)
        return took

    def _end_every_task(self) -> None:
        active = [task.id for task in self.oracle.rows().tasks.values() if task.state == "active"]
        for task_id in active:
            until(lambda task_id=task_id: self._ended(task_id), what=f"the end of {task_id}")

    def _ended(self, task_id: str) -> bool:
        self.client.end(task_id, self.choose.choice(("complete", "cancel", "fail")))
        return task_id in self.log.ended

    def _nothing_opens(self) -> None:
        """Every task has ended, so nothing that was handed out may open anything."""
        for received in self.log.received:
            if received.resource == CRM and self.client.is_active(received):
                self.wrong.append(f"the token of {received.grant_id} is active")
            if received.resource == ORDERS and self.lane.world.opens(received.credential["data"]):
                self.wrong.append(f"the login of {received.grant_id} opens")


@contextmanager
def a_cycle(lane: Lane, store: str, *, seed: str, bug: str = NO_BUG) -> Iterator[Cycle]:
    with lane.world.deployment(lane, store) as (deployment, faults):
        cycle = Cycle(lane, deployment, faults, seed=seed, bug=bug)
        try:
            yield cycle
        finally:
            cycle.close()
            lane.clear()


def judged(cycle: Cycle, store: str, seed: str, *, to_the_end: bool = False) -> Verdict:
    settled_s = cycle.settle(to_the_end=to_the_end)
    return Verdict(seed, store, cycle.wrong, cycle.faults.met(), settled_s, cycle.log.figures)


def run_through(lane: Lane, store: str, cells: Sequence[tuple[str, str]], *, to_the_end: bool = True) -> Verdict:
    """One cell after the other, and one verdict over all that they left."""
    seed = f"{len(cells)} cells"
    with a_cycle(lane, store, seed=seed) as cycle:
        for point, action in cells:
            cycle.meet(point, action)
        return judged(cycle, store, seed, to_the_end=to_the_end)


def run_at_random(lane: Lane, store: str, seed: int) -> Verdict:
    """Clients at work while a few faults wait for them; the broker is killed at last, if nothing else did it."""
    choose = random.Random(seed)
    with a_cycle(lane, store, seed=str(seed)) as cycle:
        cycle.be_up()
        for point, action in choose.sample(CELLS, choose.randint(1, 4)):
            cycle.faults.set(point, action)
            for other in _ALSO.get(point, ()):
                cycle.faults.set(*other)
        if choose.random() < 0.3:
            lane.plant()
        held = lane.world.target_held() if choose.random() < 0.15 else contextlib.nullcontext()
        with held:
            cycle.weather(choose.uniform(0.3, DELAY_S))
        cycle.weather(choose.uniform(0.5, 2.5))
        if cycle.broker.is_up and choose.random() < 0.7:
            cycle.broker.kill()
            cycle.log.figures["kills"] += 1
        return judged(cycle, store, str(seed), to_the_end=choose.random() < 0.1)
