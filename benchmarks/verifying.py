"""What a check costs an API that is protected by the SDK, in its own process: the feed is followed meanwhile."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from broker.conformance.fake_broker import AUDIENCE, SCOPE, FakeBroker
from broker.sdk import DpopKey
from broker.sdk.verifier import Verifier

_URL = f"{AUDIENCE}/contacts"
_READY_WITHIN_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Microseconds of one check: the one in the middle, and the one that 99 % are not slower than."""

    p50: float
    p99: float

    @property
    def told(self) -> str:
        return f"p50 {self.p50:6.1f} µs   p99 {self.p99:6.1f} µs"


@dataclass(frozen=True, kw_only=True)
class Measured:
    seen: Checks
    new: Checks
    bound: Checks


def measure(count: int) -> Measured:
    """Checks of a token that was here before, of new ones, and of a bound one with a new proof each time."""
    key = DpopKey.generate()
    # Not in this process: its threads would be measured as well.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_broker, args=(theirs, key.thumbprint(), count), daemon=True)
    process.start()
    theirs.close()  # or the end of the process would not be the end of the pipe
    try:
        url, bound, (first, *new) = ours.recv()
        with Verifier(url, AUDIENCE, token_source="a-workload-token") as verifier:
            verifier.check(f"Bearer {first}", "GET", _URL)
            _until_the_feed_answers(verifier)
            proofs = [key.proof("GET", _URL, access_token=bound) for _ in range(count)]
            return Measured(
                seen=_timed(verifier, [(f"Bearer {first}", None)] * count),
                new=_timed(verifier, [(f"Bearer {token}", None) for token in new]),
                bound=_timed(verifier, [(f"DPoP {bound}", proof) for proof in proofs]),
            )
    finally:
        ours.close()
        process.join(10)


def _broker(pipe: Connection, thumbprint: str, count: int) -> None:
    """A fake broker, until the other end of the pipe is closed."""
    broker = FakeBroker()
    bound = broker.issue(cnf={"jkt": thumbprint})
    pipe.send((broker.url, bound.token, [broker.issue().token for _ in range(count + 1)]))
    with contextlib.suppress(EOFError):
        pipe.recv()
    broker.close()


def _timed(verifier: Verifier, requests: Sequence[tuple[str, str | None]]) -> Checks:
    took = []
    for authorization, proof in requests:
        started = time.perf_counter_ns()
        verifier.check(authorization, "GET", _URL, proof, SCOPE)
        took.append((time.perf_counter_ns() - started) / 1000)
    cuts = statistics.quantiles(took, n=100)
    return Checks(p50=cuts[49], p99=cuts[98])


def _until_the_feed_answers(verifier: Verifier) -> None:
    ends_at = time.monotonic() + _READY_WITHIN_S
    while verifier.state().channel != "stream":
        if time.monotonic() >= ends_at:
            raise SystemExit(f"the verifier does not follow the feed: {verifier.state().problem}")
        time.sleep(0.05)
