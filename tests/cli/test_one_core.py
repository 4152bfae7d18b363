"""A worker keeps its threads together (decision 0016)."""

import os
import subprocess
import sys

_ASK = """
import os
from broker.cli.server import stay_on_one_core
stay_on_one_core()
print(len(os.sched_getaffinity(0)))
"""


def test_a_worker_stays_on_one_of_the_cores_it_may_use():
    # In a process of its own: this one goes on using them all.
    before = os.sched_getaffinity(0)
    answer = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "1"
    assert os.sched_getaffinity(0) == before
