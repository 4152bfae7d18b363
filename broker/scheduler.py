"""APScheduler, waking what works by rows. It holds no truth: a missed run costs tidiness, never safety."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

from apscheduler.events import EVENT_SCHEDULER_SHUTDOWN
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler

from broker import telemetry
from broker.domain.clock import system_clock
from broker.domain.errors import BrokerError
from broker.wiring import Broker

_log = logging.getLogger(__name__)


def jobs(broker: Broker) -> tuple[tuple[str, Callable[[], None], int], ...]:
    """The fixed table: name, what to do, every how many seconds."""

    def sweep() -> None:
        started = time.perf_counter()
        swept = broker.sweeper.sweep()
        telemetry.swept(asdict(swept), time.perf_counter() - started)

    def recover() -> None:
        broker.debts.recover()

    def pay() -> None:
        broker.debts.begin_to_pay()

    def reconcile() -> None:
        broker.reconciliation.run()

    def decide_again() -> None:
        broker.redeciding.run()

    def tell() -> None:
        broker.feed.advance()

    def alert() -> None:
        broker.alerting.send_due()

    def notify() -> None:
        broker.notifying.send_due()

    def review() -> None:
        broker.reviews.note_overdue()

    def transmit() -> None:
        broker.transmitting.run()

    def listen() -> None:
        broker.receiving.poll()

    def measure() -> None:
        looks, outstanding = broker.reconciliation.looks(), broker.leases.measure()
        for look in looks:
            telemetry.looked(look.provider, look.looked_at, reachable=look.reachable)
        telemetry.sets_waiting(broker.transmitting.backlog())
        telemetry.owed(outstanding.counts, outstanding.oldest_s, [look.provider for look in looks])
        broken = broker.reviews.measure()
        telemetry.break_glass(live=broken.live, owed=broken.owed, overdue=broken.overdue)

    # Each its own, so that a provider that hangs delays neither what time ends nor what another is owed.
    return (
        ("sweep", sweep, 1),
        ("recover", recover, 1),
        ("pay", pay, 1),
        ("reconcile", reconcile, 1),
        ("decide again", decide_again, 1),
        ("tell", tell, 1),
        ("alert", alert, 1),
        ("notify", notify, 1),
        ("review", review, 5),
        ("transmit", transmit, 1),
        ("listen", listen, 5),
        ("measure", measure, 5),
        ("look again", broker.look_again, 1),
        ("confirm keys", broker.keys.tend, 10),
    )


def start(broker: Broker, *, only: tuple[str, ...] | None = None) -> BackgroundScheduler:
    """A running scheduler; the caller shuts it down. A wake-up from any broker runs its jobs at once.

    The default misfire grace of one second would silently drop the very runs that follow a pause.
    """
    scheduler = BackgroundScheduler(
        job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1}, timezone="UTC"
    )
    table = [(name, _reported(name, job), every) for name, job, every in jobs(broker) if only is None or name in only]
    begins = system_clock()
    for place, (name, job, seconds) in enumerate(table):
        # One after the other: all in the same moment, every second, they are what a request waits longest for.
        first = begins + timedelta(seconds=place / len(table))
        scheduler.add_job(job, "interval", seconds=seconds, id=name, next_run_time=first)
        # Beside the regular runs, for wake-ups. It stays: a job that is removed once it ran, as one without a trigger
        # is, cannot be found any more by a scheduler that is shut down in between, whose thread then dies of it.
        scheduler.add_job(job, "interval", days=365, id=f"{name}, now", next_run_time=None)
    scheduler.start()

    def run_now() -> None:
        now = system_clock()
        # A scheduler that is being shut down finds no job, and needs none.
        with suppress(JobLookupError):
            for name, _, _ in table:
                scheduler.modify_job(f"{name}, now", next_run_time=now)

    stop_listening = broker.wakeups.listen(run_now)
    scheduler.add_listener(lambda _event: stop_listening(), EVENT_SCHEDULER_SHUTDOWN)
    return scheduler


def _reported(name: str, job: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            job()
        except BrokerError as problem:
            fields = {"job": name, "detail": problem.detail, "reason": getattr(problem, "reason", None)}
            _log.warning("job refused", extra={"fields": fields})
        except Exception:
            # The next run tries again; what is owed is in rows.
            _log.exception("job failed", extra={"fields": {"job": name}})

    return run
