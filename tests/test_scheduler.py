"""The jobs: what one of them could not do is said, with what keeps it from being done."""

import threading
import time

from broker import scheduler
from broker.domain.errors import ProviderUnavailable


def test_a_job_that_was_refused_says_what_the_outside_said(caplog):
    def look():
        raise ProviderUnavailable("Vault did not say whether it could list them", reason="database/creds/jit: 403")

    scheduler._reported("reconcile", look)()
    (record,) = caplog.records
    assert (record.fields["job"], record.fields["reason"]) == ("reconcile", "database/creds/jit: 403")


def test_it_can_be_shut_down_just_as_it_is_woken(house):
    """Its thread has found a job due when it is told to end: neither dies of the other."""
    running = scheduler.start(house.broker, only=("pay",))
    jobs, found, ending = running._jobstores["default"], threading.Event(), threading.Event()
    get_due_jobs = jobs.get_due_jobs

    def slowly(now):
        due = get_due_jobs(now)
        if any(job.id == "pay, now" for job in due):
            found.set()
            assert ending.wait(10)
        return due

    jobs.get_due_jobs = slowly
    house.broker.wakeups.wake()
    assert found.wait(10)
    end = threading.Thread(target=running.shutdown)
    end.start()
    while running.running:
        time.sleep(0.001)
    ending.set()
    end.join(10)
    assert not end.is_alive()
    assert not any(thread.name == "APScheduler" for thread in threading.enumerate())


def test_a_wake_up_runs_a_job_at_once_as_often_as_it_comes(house):
    paid = threading.Semaphore(0)
    house.broker.debts.begin_to_pay = paid.release
    running = scheduler.start(house.broker, only=("pay",))
    try:
        running.modify_job("pay", next_run_time=None)
        for _ in range(3):
            house.broker.wakeups.wake()
            assert paid.acquire(timeout=10)
    finally:
        running.shutdown()


def test_no_two_jobs_are_due_in_the_same_moment(house):
    running = scheduler.start(house.broker)
    try:
        regular = [job for job in running.get_jobs() if not job.id.endswith(", now")]
        due = [job.next_run_time.microsecond for job in regular]
    finally:
        running.shutdown()
    assert len(due) == len(set(due)) == len(scheduler.jobs(house.broker))
