"""How many clients may keep us waiting for a body at once (INV-27, INV-35).

A body is read by a thread that answers requests, and the server's reader can be neither interrupted nor left to
another thread: who announces a thousand bytes and sends one keeps that thread until it goes. So each kind of request
reads in a lane of its own, and all lanes together are fewer than the threads: whatever is held up, health, reading and
ending authority find one. Cutting off slow clients is the work of the proxy in front, which has their connections.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from broker.domain.errors import Unavailable
from broker.domain.identity import Caller, Role


class Lane:
    """So many bodies are read at once; one more is refused at once, and does not wait.

    A caller that is known gets two thirds of the lane, so that one gone wrong leaves room for the others.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._guard = threading.Lock()
        self._reading = 0
        self._of_caller: Counter[str] = Counter()

    def read(self, read: Callable[[], bytes], by: str | None = None) -> bytes:
        """What `read` gives; Unavailable where too many are being read already."""
        self._enter(by)
        try:
            return read()
        finally:
            self._leave(by)

    def _enter(self, by: str | None) -> None:
        with self._guard:
            alone = by is not None and self._of_caller[by] >= self.at_once * 2 // 3
            if alone or self._reading >= self.at_once:
                raise Unavailable("more bodies are on their way than this broker reads at once: try again")
            self._reading += 1
            if by is not None:
                self._of_caller[by] += 1

    def _leave(self, by: str | None) -> None:
        with self._guard:
            self._reading -= 1
            if by is not None:
                self._of_caller[by] -= 1
                if not self._of_caller[by]:
                    del self._of_caller[by]


class Bodies:
    """The lanes of one process."""

    def __init__(self) -> None:
        self.unproven = Lane(72)
        self.unproven_revoking = Lane(24)
        self.proven = Lane(24)
        self.ending = Lane(16)

    @property
    def at_once(self) -> int:
        """How many threads bodies may hold, all lanes together."""
        return sum(lane.at_once for lane in vars(self).values())

    def read(self, read: Callable[[], bytes], caller: Caller | None, *, ends: bool) -> bytes:
        """What `read` gives, in the caller's lane."""
        return self.lane(caller, ends=ends).read(read, None if caller is None else caller.name)

    def lane(self, caller: Caller | None, *, ends: bool) -> Lane:
        """Where this caller's body is read; None is whoever proves itself by the body. `ends`: it ends authority.

        Agents hand back what is their own. They stay out of the lane of those who end what others hold, so that an
        agent gone wrong cannot fill it.
        """
        if caller is None:
            return self.unproven_revoking if ends else self.unproven
        if ends and (caller.has(Role.ADMIN) or caller.has(Role.ORCHESTRATOR)):
            return self.ending
        return self.proven
