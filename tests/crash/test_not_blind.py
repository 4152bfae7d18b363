"""Bugs that are put into a broker on purpose, each seen by the oracle; and where there is none, it sees none."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.crash.bugs import BUGS
from tests.crash.cycles import a_cycle, judged
from tests.crash.launcher import NO_BUG
from tests.crash.outside import LIFE_S
from tests.processes import until


def a_task_ends_while_its_grant_is_made(cycle):
    task_id = until(cycle.client.open_task, what="a task")
    cycle.faults.set("intent", "delay before")
    cycle.faults.set("end", "linger before")
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(cycle.client.ask, task_id, ttl_s=LIFE_S)
        until(lambda: ("intent", "delay before") in cycle.faults.met(), what="an intent")
        cycle.client.end(task_id, "complete")
        asking.result()


def a_task_ends_while_the_target_takes_its_time(cycle):
    login = cycle.until_it_issues()
    with cycle.lane.world.target_held():
        cycle.client.end(login.task_id, "complete")
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            cycle.watch()


def one_token_is_shown_by_several_at_once(cycle):
    task_id = until(cycle.client.open_task, what="a task")
    token = cycle.broker.deployment.single_use_token()
    together = threading.Barrier(4)

    def ask():
        together.wait(10)
        cycle.client.ask_once(task_id, token, ttl_s=LIFE_S)

    with ThreadPoolExecutor(4) as pool:
        for asking in [pool.submit(ask) for _ in range(4)]:
            asking.result()


def a_login_that_nobody_owns(cycle):
    cycle.lane.plant()


def death_before_the_handle_is_durable(cycle):
    cycle.meet("handle", "kill before")


def death_before_the_grant_is_active(cycle):
    cycle.meet("confirm", "kill before")


def a_login_that_appears_after_its_token_died(cycle):
    def appeared():
        cycle.meet("issue", "leave")
        held = {lease.grant_id for lease in cycle.oracle.rows().leases if lease.state == "held"}
        # On a busy machine a token can be dead before its request arrives; then nothing is left to appear.
        return set(cycle.lane.world.logins().values()) - held

    until(appeared, what="a login whose token is dead")


PROVOKED = {
    "no task lock": (a_task_ends_while_its_grant_is_made, "active under a task that has ended"),
    "a 204 is death": (a_task_ends_while_the_target_takes_its_time, "released, and"),
    "check, then insert": (one_token_is_shown_by_several_at_once, "a token for one use was accepted"),
    "no reconcile": (a_login_that_nobody_owns, "is alive, and in no open row"),
    "secret before commit": (death_before_the_handle_is_durable, "released, and"),
    "hand out before TX 3": (death_before_the_grant_is_active, "was delivered, and was never active"),
    "nothing arrives late": (a_login_that_appears_after_its_token_died, "released, and"),
}


ATTEMPTS = 3
# These keep PostgreSQL from making logins, and others would wait for them.
ALONE = {"a 204 is death", "nothing arrives late"}
IN_TURN = (PROVOKED.keys() & ALONE, PROVOKED.keys() - ALONE)


def test_the_oracle_sees_every_seeded_bug(side_by_side):
    assert PROVOKED.keys() == BUGS.keys()
    for bugs in map(sorted, IN_TURN):
        unseen, told = list(bugs), []
        # What is provoked is a matter of moments, and a moment may be missed: then it is provoked once more.
        for _ in range(ATTEMPTS):
            verdicts = side_by_side([functools.partial(_provoked, bug, PROVOKED[bug][0]) for bug in unseen])
            told = [
                (bug, verdict)
                for bug, verdict in zip(unseen, verdicts, strict=True)
                if not any(PROVOKED[bug][1] in line for line in verdict.wrong)
            ]
            unseen = [bug for bug, _verdict in told]
            if not unseen:
                break
        assert not told, "\n".join(f"{bug} was not seen; {verdict}" for bug, verdict in told)


def test_the_oracle_sees_nothing_where_the_same_happens_to_a_broker_without_bugs(side_by_side):
    for bugs in map(sorted, IN_TURN):
        verdicts = side_by_side([functools.partial(_provoked, NO_BUG, PROVOKED[bug][0]) for bug in bugs])
        for verdict in verdicts:
            assert not verdict.wrong, str(verdict)


def _provoked(bug, provoke, lane):
    with a_cycle(lane, "postgresql", seed=bug, bug=bug) as cycle:
        cycle.be_up()
        provoke(cycle)
        return judged(cycle, "postgresql", bug)
