"""A fake broker over real HTTP, verifiers of its tokens, and clocks that move when told."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from broker.conformance.fake_broker import AUDIENCE, FakeBroker
from broker.sdk import Timing
from broker.sdk.clock import system_clock
from broker.sdk.verifier import Refused, Verifier

URL = f"{AUDIENCE}/contacts"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass
class Clocks:
    """A wall clock and a monotonic one, which a test moves together or one without the other."""

    wall: datetime = NOW
    monotonic: float = 1000.0

    def forward(self, seconds):
        self.wall += timedelta(seconds=seconds)
        self.monotonic += seconds

    def timing(self):
        return Timing(now=lambda: self.wall, monotonic=lambda: self.monotonic)


class Wrong:
    """This machine's time, `off_s` seconds away from everybody else's."""

    def __init__(self, off_s):
        self.off_s = off_s

    def timing(self):
        return Timing(now=lambda: system_clock() + timedelta(seconds=self.off_s))


@pytest.fixture
def clocks():
    return Clocks()


@pytest.fixture
def broker():
    made = FakeBroker(every_s=0.1)
    yield made
    made.close()


@pytest.fixture
def verifier_of(broker):
    """Verifiers of the fake broker; closed at the end."""
    made = []

    def make(**settings):
        settings = {"token_source": "a-workload-token"} | settings
        made.append(Verifier(broker.url, settings.pop("audience", AUDIENCE), **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def verifier(verifier_of):
    return verifier_of()


def bearer(issued):
    return f"Bearer {getattr(issued, 'token', issued)}"


def why(verifier, issued, **more):
    """The code of the refusal; None where there was none."""
    try:
        verifier.check(
            more.pop("authorization", bearer(issued)), more.pop("method", "GET"), more.pop("url", URL), **more
        )
    except Refused as refused:
        return refused.code
    return None
