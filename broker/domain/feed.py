"""The words of the feed: what ended, the text that carries it, the chain over those texts, a reader's place.

A verifier computes all of this too, in whatever language: docs/reference/feed.md is the same in prose. An event says
what ended in words that stand in a token, and nothing of why or by whom.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from broker.domain.clock import epoch, rfc3339
from broker.domain.errors import Invalid

# Whoever has a key that leaked chooses the `iat` of what it signs with it, so no time bounds that event.
FOR_EVER = 253_402_300_799
# Brokers read the time in whole seconds and agree to within less than one, so a token whose `iat` is this near to a
# revocation may have been issued before it or after it.
_UNSURE_S = 2
_MARGIN_S = 1
_IN_TOKENS = ("agent", "user", "resource")
POSITION_PATTERN = "^[A-Za-z0-9_-]{1,64}:(0|[1-9][0-9]{0,17})$"
_POSITION = re.compile(POSITION_PATTERN.strip("^$"), re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What no verifier may say yes to any more; `members` are those of the event beside `seq`, `at` and `kind`."""

    kind: str
    members: Mapping[str, Any] = field(default_factory=dict)


# What ended is not written in tokens: whoever would say yes asks a status list, or the broker, first.
LISTS = Ended(kind="lists")


def end_of_grant(grant_id: str) -> Ended:
    return Ended(kind="grant", members={"grant_id": grant_id})


def end_of_task(task_id: str) -> Ended:
    return Ended(kind="task", members={"task_id": task_id})


def end_of_trust(kid: str) -> Ended:
    return Ended(kind="tokens", members={"key": kid, "issued_before": FOR_EVER})


def end_along(axis: str, value: str, now: datetime) -> Ended:
    """What a bulk revocation along this axis, ordered at `now`, ended.

    A token does not say of which tasks its task is a part, who opened it, by which policies it was allowed, or which
    keys signed the tokens before it.
    """
    if axis == "all":
        which: dict[str, Any] = {"all": True}
    elif axis in _IN_TOKENS:
        which = {axis: value}
    else:
        return LISTS
    at = epoch(now)
    return Ended(kind="tokens", members={**which, "issued_before": at + _MARGIN_S, "unsure_after": at - _UNSURE_S})


def text_of(seq: int, at: datetime, kind: str, members: Mapping[str, Any]) -> str:
    """One event as it goes over the wire, byte for byte for ever: one line of ASCII.

    >>> from datetime import UTC
    >>> text_of(17, datetime(2026, 1, 1, tzinfo=UTC), "task", {"task_id": "task_01"})
    '{"seq":17,"at":"2026-01-01T00:00:00Z","kind":"task","task_id":"task_01"}'
    """
    return json.dumps({"seq": seq, "at": rfc3339(at), "kind": kind, **members}, separators=(",", ":"))


def first_head(feed_id: str) -> str:
    """The head of the chain before any event."""
    return _written(hashlib.sha256(feed_id.encode()).digest())


def next_head(head: str, text: str) -> str:
    """The head of the chain after the event with this text.

    >>> next_head(first_head("feed"), "{}") == next_head(first_head("feed"), "{ }")
    False
    """
    return _written(hashlib.sha256(base64.urlsafe_b64decode(head + "=") + text.encode()).digest())


def _written(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a reader has come: all events of this feed up to `seq`."""

    feed_id: str
    seq: int

    def __str__(self) -> str:
        return f"{self.feed_id}:{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """The inverse; Invalid for anything else.

        >>> Position.parse("feed:17").seq
        17
        """
        if not _POSITION.fullmatch(text):
            raise Invalid("after is <feed>:<seq>, as next_after of an earlier answer gives it", member="after")
        feed_id, _, seq = text.partition(":")
        return cls(feed_id=feed_id, seq=int(seq))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The feed at one moment; `waiting` says that something committed has no number yet."""

    feed_id: str
    seq: int
    head: str
    waiting: bool = False

    @property
    def position(self) -> Position:
        return Position(feed_id=self.feed_id, seq=self.seq)
