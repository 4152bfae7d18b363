"""How the demo notices that a step did not behave: what was expected, and what came instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx

from broker.sdk import BrokerError, Refused

T = TypeVar("T")


class DemoFailed(Exception):
    """`log` is the end of the log of `whose` process that may say why."""

    def __init__(self, expected: str, came: object, *, whose: str = "", log: Sequence[str] = ()) -> None:
        super().__init__(f"expected {expected}, but: {came}")
        self.whose = whose
        self.log = log


def expect(expected: str, holds: bool, came: object) -> None:
    if not holds:
        raise DemoFailed(expected, came)


def answer(expected: str, ask: Callable[[], T]) -> T:
    """What came back, where it must not be a refusal."""
    try:
        return ask()
    except (BrokerError, httpx.HTTPError) as problem:
        raise DemoFailed(expected, str(problem) or type(problem).__name__) from None


def refusal(expected: str, ask: Callable[[], object]) -> Refused:
    """How it was refused, where it must be."""
    try:
        ask()
    except Refused as refused:
        return refused
    except (BrokerError, httpx.HTTPError) as problem:
        raise DemoFailed(expected, str(problem) or type(problem).__name__) from None
    raise DemoFailed(expected, "it was allowed")
