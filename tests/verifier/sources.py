"""Brokers that a verifier can follow, behind one handle: the contract of `test_contract` is asked of each of them.

Another source is a class with these verbs, and a line in `SOURCES`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from broker.conformance.fake_broker import AUDIENCE, FakeBroker, Issued
from broker.sdk import DpopKey


class Source(Protocol):
    url: str
    audience: str
    token_source: Any

    def issue(self, *, agent: str = "summarizer", bound_to: DpopKey | None = None) -> Any:
        """A live token: it has `token`, `grant_id` and `task_id`. Each is of a task of its own."""

    def revoke_grant(self, issued: Any) -> None: ...

    def end_task(self, issued: Any) -> None: ...

    def revoke(self, axis: str, value: str) -> None:
        """Along `agent` or `resource`: what is out, and not what comes."""

    def rotate_keys(self) -> None:
        """What is issued from now on is signed by another key."""

    def stop(self) -> None: ...

    def start(self) -> None: ...

    def without(self, *channels: str) -> contextlib.AbstractContextManager[None]:
        """For so long these of `stream`, `poll`, `lists` do not answer."""


class FakeSource:
    audience = AUDIENCE
    token_source = "a-workload-token"

    def __init__(self) -> None:
        self._broker = FakeBroker(every_s=0.1)
        self.url = self._broker.url
        self.stop, self.start, self.without = self._broker.stop, self._broker.start, self._broker.without

    def issue(self, *, agent: str = "summarizer", bound_to: DpopKey | None = None) -> Issued:
        return self._broker.issue(sub=agent, client_id=agent, bound_to=bound_to)

    def revoke_grant(self, issued: Issued) -> None:
        self._broker.revoke("grant", grant_id=issued.grant_id)

    def end_task(self, issued: Issued) -> None:
        self._broker.revoke("task", task_id=issued.task_id)

    def revoke(self, axis: str, value: str) -> None:
        self._broker.revoke("tokens", **{axis: value}, issued_before=self._broker.now())

    def rotate_keys(self) -> None:
        self._broker.rotate()


@contextmanager
def fake(directory: Path) -> Iterator[Source]:
    source = FakeSource()
    try:
        yield source
    finally:
        source.stop()


SOURCES: dict[str, Callable[[Path], contextlib.AbstractContextManager[Source]]] = {"fake": fake}
