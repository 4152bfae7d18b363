"""A program that is started, told what we are told, and does not outlive us.

Signals that ask us to stop go to it, and what it answers to them is what counts: nothing here gives up before it has
ended. Where we are killed and can tell nobody, the system kills it too (Linux, `PR_SET_PDEATHSIG`). What we prove
ourselves with stays ours: neither `/proc` nor a core file shows it to the program (INV-30).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell says it
_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FROM_A_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_SI_KERNEL = 0x80
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4

Limits = tuple[int, int]


class Stopped(BaseException):
    """We were told to stop before there was a program to tell."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class NotStarted(Exception):
    """The program cannot be started: a sentence, and the exit code that says it."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A signal to stop ends this block once, as `Stopped`; whatever comes after it waits until the block has ended."""
    before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    stopped = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        # Several may have arrived at once, and what the first one began is not to be interrupted by the second.
        if stopped:
            return
        stopped = True
        hold()
        raise Stopped(number)

    for number in _STOPPING:
        # `nohup` and the like ignore a signal for those they start, and for those that they start.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        # What still waits was meant for what is over now: ignoring it forgets it.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def hold() -> None:
    """From here on signals wait until somebody takes them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_SIGNALS, signal.SIGCHLD))


def closed() -> Limits:
    """Nobody of our user sees into us from here on, and no crash writes us down (INV-30).

    Answers how large a core file might be until now: that is for the program, which is seen and dumped as before.
    """
    before = resource.getrlimit(resource.RLIMIT_CORE)
    # What may be at most is left as it is: it could not be given back.
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))
    # The system undoes it in whatever is executed.
    if sys.platform.startswith("linux") and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return before


class Child:
    """A program that runs, with our environment, less and more of it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        variables: Mapping[str, str],
        without: Iterable[str] = (),
        descriptors: Sequence[int] = (),
        core: Limits,
    ) -> None:
        """Started, with `core` as the limits of its core files; raises NotStarted.

        Called in the main thread, before there are others.
        """
        # Whoever waits for us may have had its children reaped by nobody: then there is no exit code to be had.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        hold()
        us, die_with_us = os.getpid(), _dying_with_its_parent()

        def become() -> None:
            # In the child only: what is secret never stands in our own environment.
            for name in without:
                os.unsetenv(name)
            for name, value in variables.items():
                os.putenv(name, value)
            resource.setrlimit(resource.RLIMIT_CORE, core)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            die_with_us(us)

        try:
            self._process = subprocess.Popen(list(command), pass_fds=descriptors, preexec_fn=become)  # noqa: S603 - it is what was asked for
        except FileNotFoundError:
            raise NotStarted(f"there is no program {command[0]}", NOT_FOUND) from None
        except (OSError, ValueError) as problem:
            why = getattr(problem, "strerror", None) or "its arguments cannot be passed on"
            raise NotStarted(f"{command[0]} cannot be started: {why}", NOT_EXECUTABLE) from None

    def wait(self) -> int:
        """Its exit code, 128+n where signal n ended it; signals that come meanwhile are passed on."""
        while True:
            number, seen_by_both = _next_signal()
            if number == signal.SIGCHLD:
                code = self._process.poll()
                if code is not None:
                    return code if code >= 0 else 128 - code
            elif not seen_by_both:
                self._process.send_signal(number)


def _next_signal() -> tuple[int, bool]:
    """The next one, and whether the child has it too: a terminal tells everybody in the foreground."""
    waited_for = (*_SIGNALS, signal.SIGCHLD)
    if sys.platform == "darwin":
        return signal.sigwait(waited_for), False
    received = signal.sigwaitinfo(waited_for)
    seen_by_both = received.si_signo in _FROM_A_TERMINAL and received.si_code == _SI_KERNEL
    return received.si_signo, seen_by_both


def _dying_with_its_parent() -> Callable[[int], None]:
    """What the child does so that it is killed when its parent is; found out before there is a child."""
    if not sys.platform.startswith("linux"):
        return lambda _parent: None
    prctl = ctypes.CDLL(None).prctl

    def die_with(parent: int) -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            # It was killed before the system was asked.
            os.kill(os.getpid(), signal.SIGKILL)

    return die_with
