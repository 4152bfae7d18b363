"""What the SDK costs a program that begins: from its import to the first credential, beyond the way to the broker.

Each start is an interpreter of its own. The way is what the same request costs once all is loaded and connected; what
is left is loading the SDK, making a client and a first connection.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

STARTS = 16
_PROGRAM = """
import json, sys, time
url, token, task, resource = json.loads(sys.stdin.readline())
began = time.perf_counter()
from broker.sdk import Client
loaded = time.perf_counter()
with Client(url, token=token) as client:
    client.request_grant(task, resource, ["contacts:read"], 20)
    first = time.perf_counter()
    ways = []
    for _ in range(5):
        before = time.perf_counter()
        client.request_grant(task, resource, ["contacts:read"], 20)
        ways.append(time.perf_counter() - before)
print(json.dumps({"loading": loaded - began, "first": first - began, "way": sorted(ways)[2]}))
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Medians, in seconds."""

    loading: float
    beyond: float
    least: float

    @property
    def told(self) -> str:
        return (
            f"{1000 * self.beyond:.0f} ms beyond the way (the best {1000 * self.least:.0f} ms), "
            f"{1000 * self.loading:.0f} ms of it loading"
        )


def measure_start(url: str, tokens: Sequence[str], task: str, resource: str) -> Start:
    """From the start of the SDK to the first credential; the interpreter itself is not counted.

    A start for each token, of an agent each: one alone would come near the limit of what it may hold.
    """
    # Compiled once, as what pip installs is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    figures = []
    for token in tokens:
        command = [sys.executable, "-c", _PROGRAM]
        asked = json.dumps([url, token, task, resource])
        ran = subprocess.run(
            command, input=asked, capture_output=True, text=True, check=False, timeout=60, env=environment
        )
        if ran.returncode != 0:
            raise SystemExit(f"a program with the SDK failed: {ran.stderr[-2000:]}")
        figures.append(json.loads(ran.stdout))
    # The first one reads the files that the others find in memory.
    beyond = [figure["first"] - figure["way"] for figure in figures[1:]]
    return Start(
        loading=statistics.median(figure["loading"] for figure in figures[1:]),
        beyond=statistics.median(beyond),
        least=min(beyond),
    )
