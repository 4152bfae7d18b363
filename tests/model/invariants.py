"""What must be true of every world that can be reached, or of every one in which things have come to rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from broker.domain.lifecycle import GrantState, LeaseState, TaskState
from tests.model.world import Login, World


@dataclass(frozen=True, kw_only=True)
class Invariant:
    id: str
    sentence: str
    holds: Callable[[World], bool]
    only_at_rest: bool = False


def _handed_out_only_what_was_active(world: World) -> bool:
    return world.was_active or not world.handed_out


def _has_a_handle_before_it_asks(world: World) -> bool:
    something_outside = world.under_way or world.login is Login.ALIVE
    return world.accessor or world.reference or not something_outside


def _alive_is_accounted_for(world: World) -> bool:
    held = world.lease is LeaseState.HELD and world.grant is GrantState.ACTIVE
    return held or world.owed or world.login is not Login.ALIVE


def _released_is_dead(world: World) -> bool:
    return world.lease is not LeaseState.RELEASED or world.login is not Login.ALIVE


def _ended_task_has_nothing_active(world: World) -> bool:
    return world.task is TaskState.ACTIVE or world.grant is not GrantState.ACTIVE


def _ended_stays_ended(world: World) -> bool:
    return not world.was_ended or world.grant is not GrantState.ACTIVE


def _no_debt_is_left(world: World) -> bool:
    return world.lease in (None, LeaseState.HELD, LeaseState.RELEASED)


INVARIANTS = (
    Invariant(
        id="INV-01",
        sentence="no credential is handed out before its grant is durably active",
        holds=_handed_out_only_what_was_active,
    ),
    Invariant(
        id="INV-02",
        sentence="a durable row has the handle before the secret is asked for",
        holds=_has_a_handle_before_it_asks,
    ),
    Invariant(
        id="INV-03",
        sentence="at rest, no credential is alive that no row accounts for",
        holds=_alive_is_accounted_for,
        only_at_rest=True,
    ),
    Invariant(
        id="INV-04",
        sentence="no lease is released while its credential is alive",
        holds=_released_is_dead,
    ),
    Invariant(
        id="INV-12",
        sentence="no grant is active whose task has ended",
        holds=_ended_task_has_nothing_active,
    ),
    Invariant(
        id="INV-23",
        sentence="no grant that was ended is active again",
        holds=_ended_stays_ended,
    ),
    # The other half of INV-04, and the fifth journey: the debt is open until the death is confirmed, and then it ends.
    Invariant(
        id="debts end",
        sentence="at rest, no intent and no debt is left over",
        holds=_no_debt_is_left,
        only_at_rest=True,
    ),
)
