"""Every world that a protocol can reach, in breadth-first order: the first trace to a flaw is a shortest one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import TopologicalSorter

from tests.model.invariants import INVARIANTS, Invariant
from tests.model.protocols import Protocol
from tests.model.world import Move, World


@dataclass(frozen=True)
class Trace:
    """The moves from the start to one world."""

    protocol: Protocol
    moves: tuple[Move, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(move.name for move in self.moves)

    def has_in_order(self, *names: str) -> bool:
        """Whether moves with these beginnings come in this order, whatever comes between them."""
        remaining = iter(self.names)
        return all(any(done.startswith(name) for done in remaining) for name in names)

    def __str__(self) -> str:
        """One line a move, and beside it what the move has changed."""
        lines, before = [], self.protocol.start()
        for number, move in enumerate(self.moves, 1):
            changes = before.differences(move.after)
            # Where the issuer is follows from its moves, and what the witness remembers is no part of the world.
            shown = [
                f"{name} {_word(old)} → {_word(new)}"
                for name, (old, new) in changes.items()
                if name not in ("issuer", "handed_out", "was_active", "was_ended")
            ]
            lines.append(f"{number:>3}  {move.name:<64} {', '.join(shown)}".rstrip())
            before = move.after
        return "\n".join(lines)


def _word(value: object) -> str:
    return str(value) if isinstance(value, str) else {True: "yes", False: "no", None: "none"}[value]  # type: ignore[index]


@dataclass(frozen=True)
class Violation:
    invariant: Invariant
    worlds: int
    trace: Trace

    def __str__(self) -> str:
        where = f"{self.trace.protocol.name} ({self.trace.protocol.what})"
        return f"{where} breaks {self.invariant.id}: {self.invariant.sentence}\n{self.trace}"


@dataclass(frozen=True)
class Exploration:
    protocol: Protocol
    reached_by: Mapping[World, tuple[World, Move] | None]
    at_rest: frozenset[World]
    progress: Mapping[World, tuple[World, ...]]

    @property
    def worlds(self) -> int:
        return len(self.reached_by)

    @cached_property
    def violations(self) -> dict[str, Violation]:
        """By the id of the invariant: how many worlds break it, and a shortest way to one."""
        found = {}
        for invariant in INVARIANTS:
            # In the order in which they were reached: the nearest first.
            asked = [world for world in self.reached_by if world in self.at_rest or not invariant.only_at_rest]
            broken = [world for world in asked if not invariant.holds(world)]
            if broken:
                found[invariant.id] = Violation(invariant, len(broken), self.trace_to(broken[0]))
        return found

    def nearest(self, true: Callable[[World], bool]) -> Trace:
        """A shortest way to a world of which this is true; StopIteration where none is reached."""
        return self.trace_to(next(world for world in self.reached_by if true(world)))

    def trace_to(self, world: World) -> Trace:
        moves: list[Move] = []
        while (step := self.reached_by[world]) is not None:
            world, move = step
            moves.append(move)
        return Trace(self.protocol, tuple(reversed(moves)))

    def ends_of(self, world: World) -> set[World]:
        """The worlds in which things can come to rest from here on, if nothing goes wrong any more."""
        ahead, seen = [world], {world}
        while ahead:
            new = set(self.progress[ahead.pop()]) - seen
            seen |= new
            ahead += new
        return seen & self.at_rest

    def demand_that_every_run_ends(self) -> None:
        """Raise CycleError where programs could go round for ever though nothing goes wrong any more.

        Without a circle every run comes to rest once crashes and lost answers cease, so that what is said of the
        worlds at rest is said of how every run ends.
        """
        TopologicalSorter(self.progress).prepare()


@cache
def explore(protocol: Protocol) -> Exploration:
    start = protocol.start()
    reached_by: dict[World, tuple[World, Move] | None] = {start: None}
    progress: dict[World, tuple[World, ...]] = {}
    ahead = deque([start])
    while ahead:
        world = ahead.popleft()
        moves = list(protocol.moves(world))
        # At rest: only what nobody may count on could still come.
        progress[world] = tuple(move.after for move in moves if not move.may)
        for move in moves:
            if move.after not in reached_by:
                reached_by[move.after] = (world, move)
                ahead.append(move.after)
    at_rest = frozenset(world for world, after in progress.items() if not after)
    return Exploration(protocol, reached_by, at_rest, progress)
