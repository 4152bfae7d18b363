"""A worker keeps its threads together, away from the other workers, and in one memory (decision 0016)."""

import ctypes
import json
import multiprocessing
import os
import platform
import subprocess
import sys

import pytest

from broker.cli.server import _place_among, _share_memory

_ASK = """
import json, multiprocessing, os, sys
from broker.cli.server import stay_on_one_core

def choose(taken, chosen, go_on):
    stay_on_one_core(taken)
    chosen.put(sorted(os.sched_getaffinity(0)))
    go_on.wait(30)

forked = multiprocessing.get_context("fork")
taken, chosen, go_on = forked.Array("i", 2), forked.Queue(), forked.Event()
workers = [forked.Process(target=choose, args=(taken, chosen, go_on)) for _ in range(2)]
# One number between the two: their numbers are alike in what a remainder would see.
workers[0].start()
between = forked.Process(target=int)
between.start()
between.join()
workers[1].start()
answers = [chosen.get(timeout=30) for _ in workers]
go_on.set()
for worker in workers:
    worker.join(30)
print(json.dumps(answers))
"""


@pytest.fixture
def gone():
    """The number of a process that lives no more."""
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    return process.pid


def test_each_of_two_workers_stays_on_a_core_of_its_own():
    # In a process of their own: this one goes on using them all.
    before = os.sched_getaffinity(0)
    answer = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=True, timeout=60)
    one, other = json.loads(answer.stdout)
    assert (len(one), len(other)) == (1, 1)
    assert one != other or len(before) == 1
    assert os.sched_getaffinity(0) == before


def test_a_worker_that_is_started_again_takes_the_place_of_the_one_that_died(gone):
    taken = multiprocessing.Array("i", [os.getppid(), gone])
    assert _place_among(taken) == 1
    assert taken[:] == [os.getppid(), os.getpid()]


def test_where_every_place_is_held_it_shares_one():
    taken = multiprocessing.Array("i", [os.getppid()])
    assert _place_among(taken) == 0


_HEAPS = """
import ctypes, threading
from broker.cli.server import _share_memory

_share_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
allocated = threading.Barrier(16)
threads = [threading.Thread(target=lambda: (libc.malloc(1000), allocated.wait(30))) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(30)
told = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, told)
libc.fclose(told)
"""


def test_its_threads_allocate_from_two_heaps():
    answer = subprocess.run([sys.executable, "-c", _HEAPS], capture_output=True, text=True, check=True, timeout=60)
    # Another C library tells of none.
    assert answer.stdout.count("<heap nr=") == (2 if platform.libc_ver()[0] == "glibc" else 0)


def test_a_c_library_without_that_option_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    _share_memory()
