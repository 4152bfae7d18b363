"""Wake-ups between the brokers on one database: something that stands above requests has changed, look now.

A hint and never the truth (INV-36). What changed is in rows; whoever hears nothing looks again within a second, and a
message says nothing but that it came, so that a forged one costs a look. Without Redis only this process is woken.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from redis import Redis
from redis.exceptions import RedisError

_log = logging.getLogger(__name__)

_CHANNEL = "broker:wake"
_DEADLINE_S = 0.5  # of a publish: it comes after the commit, and before the answer
_PAUSE_S = 5.0  # how long a Redis that failed is left alone
_LEAST_S = 0.1  # between two wake-ups: a flood of messages is not a flood of sweeps


class Wakeups:
    """Tell and be told. `url` is a Redis or Valkey; None for a broker that is alone."""

    def __init__(self, url: str | None = None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._monotonic = monotonic
        self._called = threading.Event()
        self._left_alone_until = 0.0
        self._publisher = None if url is None else _connection(url, read_timeout_s=_DEADLINE_S)

    def wake(self) -> None:
        """Wake everybody who listens, here and elsewhere. Never fails, never waits for long."""
        self._called.set()
        if self._publisher is None or self._monotonic() < self._left_alone_until:
            return
        try:
            self._publisher.publish(_CHANNEL, b"")
        except RedisError as problem:
            self._left_alone_until = self._monotonic() + _PAUSE_S
            _log.warning("wake-up not sent", extra={"fields": {"kind": type(problem).__name__}})

    def listen(self, on_wake: Callable[[], None]) -> Callable[[], None]:
        """Call `on_wake` on each wake-up, in a thread of its own; answers how to stop."""
        stop = threading.Event()
        threads = [threading.Thread(target=self._call, args=(on_wake, stop), name="wake-ups", daemon=True)]
        if self._url is not None:
            threads.append(threading.Thread(target=self._hear, args=(self._url, stop), name="redis", daemon=True))
        for thread in threads:
            thread.start()

        def stopped() -> None:
            stop.set()
            self._called.set()
            for thread in threads:
                thread.join(2 * _DEADLINE_S)

        return stopped

    def _call(self, on_wake: Callable[[], None], stop: threading.Event) -> None:
        while not stop.is_set():
            self._called.wait()
            self._called.clear()
            if not stop.is_set():
                try:
                    on_wake()
                except Exception:
                    # The next one, or the next second, does what this one did not.
                    _log.exception("wake-up failed")
                stop.wait(_LEAST_S)

    def _hear(self, url: str, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                with _connection(url, read_timeout_s=None) as redis, redis.pubsub() as channel:
                    channel.subscribe(_CHANNEL)
                    # What was said while nobody listened is not said again.
                    self._called.set()
                    while not stop.is_set():
                        message = channel.get_message(ignore_subscribe_messages=True, timeout=_DEADLINE_S)
                        if message is not None:
                            self._called.set()
            except RedisError as problem:
                _log.warning("wake-ups not heard", extra={"fields": {"kind": type(problem).__name__}})
                stop.wait(_PAUSE_S)


def _connection(url: str, *, read_timeout_s: float | None) -> Redis:
    return Redis.from_url(url, socket_connect_timeout=_DEADLINE_S, socket_timeout=read_timeout_s)
