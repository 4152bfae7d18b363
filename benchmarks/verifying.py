"""What a check costs an API that is protected by the SDK, in its own process: the feed is followed meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

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
    broker = FakeBroker()
    try:
        with Verifier(broker.url, AUDIENCE, token_source="a-workload-token") as verifier:
            verifier.check(f"Bearer {broker.issue().token}", "GET", _URL)
            _until_the_feed_answers(verifier)
            known = f"Bearer {broker.issue().token}"
            verifier.check(known, "GET", _URL)
            key = DpopKey.generate()
            bound = broker.issue(bound_to=key)
            proofs = [key.proof("GET", _URL, access_token=bound.token) for _ in range(count)]
            return Measured(
                seen=_timed(verifier, [(known, None)] * count),
                new=_timed(verifier, [(f"Bearer {broker.issue().token}", None) for _ in range(count)]),
                bound=_timed(verifier, [(f"DPoP {bound.token}", proof) for proof in proofs]),
            )
    finally:
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
