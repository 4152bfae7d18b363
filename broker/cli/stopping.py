"""Being told to stop, in a process of many threads: by SIGTERM, or SIGINT at a terminal.

The system hands a signal to any thread that does not block it. Python runs its handler in the main thread alone, and
does not wake it when another thread took the signal: a main thread that only waits then waits for ever. So every
thread blocks these signals, and one waits for them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_AGAIN_S = 0.05


@contextmanager
def waited_for() -> Iterator[Callable[[], None]]:
    """A main thread that does nothing but wait, by what this gives, until it is told to stop.

    Entered before any thread is started: what a thread blocks, those it starts block too.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield _wait
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _wait() -> None:
    signal.sigwait(_SIGNALS)


def also_before_it_serves() -> None:
    """Have the processes that are forked from now on end when they are told to before they have a handler of their own.

    A fork has the handler of its parent, which would only note in the fork's own memory that somebody else is to stop:
    a worker that is told at its start would not have heard, and be waited for until it is killed.
    """
    kept: list[set[int]] = []

    def before() -> None:
        # What comes between the fork and the line that hears it waits meanwhile.
        kept.append(signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS))

    def in_parent() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept.pop())

    def in_child() -> None:
        # SIGINT is the terminal's word to all of them: the parent heard it too, and tells its workers by SIGTERM.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, kept.pop())

    os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)


def in_worker(stop: Callable[[], None]) -> None:
    """Have a worker of the server stop when it is told to: `stop` first, then the server's own handler.

    Called before any thread is started, and before the server has set its handler; whoever is told earlier is heard
    when it has.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    before = signal.getsignal(signal.SIGTERM)

    def listen() -> None:
        while True:
            number = signal.sigwait(_SIGNALS)
            stop()
            while signal.getsignal(signal.SIGTERM) is before:
                time.sleep(_LOOK_AGAIN_S)
            handler = signal.getsignal(number)
            if callable(handler):
                handler(number, None)

    threading.Thread(target=listen, name="told to stop", daemon=True).start()
