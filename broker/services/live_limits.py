"""How many live grants there may be: of one agent always, of a task, a resource or an issuer where a bound is set.

Counted in rows, behind locks that whoever would add one holds: exact over all brokers (INV-34). Brokers that issue for
one counted thing take turns, which is why only agents are counted unasked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from broker.domain.catalogue import Catalogue, Limits
from broker.domain.errors import LimitExceeded, Unavailable
from broker.domain.identity import is_id
from broker.store.grants import count_live

# What a column of a grant is called in the name of its limit.
_CALLED = {"task_id": "task", "resource": "resource", "issuer": "issuer"}
_COME_AGAIN_S = 5

Thing = tuple[str, str]  # a column of a grant, and a value of it


@dataclass(frozen=True, kw_only=True)
class For:
    """What one grant would count towards beside its agent; no task where it is yet to be opened."""

    task_id: str | None
    resource: str
    issuer: str


def agent_bound(limits: Limits, catalogue: Catalogue, agent: str) -> int:
    rule = catalogue.rule(agent)
    return limits.max_live_per_agent if rule is None or rule.max_live is None else rule.max_live


def bounds(limits: Limits, catalogue: Catalogue, wanted: Iterable[For]) -> dict[Thing, int]:
    """What is counted of these, and how many there may be of each."""
    found: dict[Thing, int | None] = {}
    for one in wanted:
        resource, issuer = catalogue.find_resource(one.resource), catalogue.issuer(one.issuer)
        if one.task_id is not None and is_id(one.task_id, "task"):
            found["task_id", one.task_id] = limits.max_live_per_task
        if resource is not None:
            own = resource.max_live
            found["resource", one.resource] = limits.max_live_per_resource if own is None else own
        if issuer is not None:
            own = issuer.max_live
            found["issuer", one.issuer] = limits.max_live_per_issuer if own is None else own
    return {thing: bound for thing, bound in found.items() if bound is not None}


def locks_of(counted: Iterable[Thing]) -> list[str]:
    """The names under which `broker.store.locks` holds them."""
    return [f"{column} {value}" for column, value in counted]


def count(db: Connection, counted: Mapping[Thing, int], now: datetime) -> dict[Thing, int]:
    """How many live grants each has, to one more than there may be; whoever decides by it holds their locks."""
    found: dict[Thing, int] = {}
    for column in _CALLED:
        values = [value for of, value in counted if of == column]
        if values:
            at_most = 1 + max(counted[column, value] for value in values)
            held = count_live(db, values, now=now, at_most=at_most, by=column)
            found |= {(column, value): held[value] for value in values}
    return found


def require_room(
    one: For,
    live: Mapping[Thing, int],
    limits: Limits,
    catalogue: Catalogue,
    *,
    counted_already: bool = False,
) -> None:
    """LimitExceeded where another grant, or one that is `counted_already`, would be more than there may be."""
    for (column, value), bound in bounds(limits, catalogue, [one]).items():
        if (column, value) not in live:
            # The bound came between the look that the locks were taken by, and the locks.
            raise Unavailable("the configuration changed while this was asked: try again")
        if live[column, value] - counted_already >= bound:
            raise reached(_CALLED[column], value, bound)


def require_room_of_agent(agent: str, held: int, bound: int) -> None:
    if held >= bound:
        raise LimitExceeded(
            f"{agent} holds {bound} live grants, its limit: revoke what is no longer needed, or wait until it expires",
            limit="max_live_per_agent",
            value=bound,
            retry_after_s=_COME_AGAIN_S,
        )


def reached(axis: str, value: str, bound: int) -> LimitExceeded:
    return LimitExceeded(
        f"{axis} {value[:200]} has {bound} live grants, all there may be (limits.live_per_{axis}): revoke what is no "
        "longer needed, or wait until it expires",
        limit=f"live_per_{axis}",
        value=bound,
        retry_after_s=_COME_AGAIN_S,
    )


def things_of(one: For) -> Collection[Thing]:
    """What it counts towards, whether there is a bound or not."""
    found = [("resource", one.resource), ("issuer", one.issuer)]
    return found if one.task_id is None else [*found, ("task_id", one.task_id)]
