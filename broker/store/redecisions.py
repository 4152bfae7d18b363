"""Runs in which live grants are decided again: ordered, divided into shares, claimed share by share, counted.

A share is claimed by compare-and-set with a fence, and given back by the time at which it is due again: a broker that
died in the middle is followed by another, and changes nothing any more (INV-07).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    Row,
    Select,
    Text,
    case,
    cast,
    delete,
    extract,
    func,
    select,
    type_coerce,
    update,
)

from broker.domain.identity import first_id
from broker.domain.lifecycle import GrantState
from broker.domain.policy.reading import Path
from broker.store import models
from broker.store.grants import padded, unended, unexpired
from broker.store.rows import among, insert_rows
from broker.store.transitions import GRANT_FACTS

_runs = models.table_of(models.Redecision)
_shares = models.table_of(models.RedecisionShare)
_grants = models.table_of(models.Grant)
_tasks = models.table_of(models.Task)

_READ_AT_ONCE = 100
_GIVEN = (str(GrantState.APPROVED), str(GrantState.ACTIVE))
_OF_GRANT = (
    "id", "task_id", "state", "agent", "issuer", "subject", "orchestrator", "on_behalf_of", "resource", "provider",
    "jti", "created_at", "expires_at", "ttl_s", "intent", "policies", "policy_version", "break_glass",
    "chain",
)  # fmt: skip
_terms = _grants.c.terms
_decided_at = cast(_terms["decided_at"].as_string(), BigInteger)  # seconds since 1970, which outgrow an integer in 2038
# What was decided, with all that is needed to ask it again. JSON as text, and of the large objects only what is asked
# for: reading it is most of what a hundred thousand rows cost, and most of them are alike.
RECORDED: Select[Any] = select(
    *(_grants.c[name] for name in _OF_GRANT),
    _grants.c.jkt.is_not(None).label("sender_bound"),
    cast(_grants.c.scopes, Text).label("scopes"),
    cast(_grants.c.claimed, Text).label("claimed"),
    _grants.c.decision["outcome"].as_string().label("outcome"),
    cast(_grants.c.decision["approvals"], Text).label("approvals"),
    _decided_at.label("decided_at"),
    _terms["ttl_s"].as_integer().label("asked_ttl_s"),
    _terms["delegation_depth"].as_integer().label("delegation_depth"),
    _terms["risk"].as_string().label("risk"),
    _terms["live_grants"].as_integer().label("live_grants"),
    _terms["recent_denials"].as_integer().label("recent_denials"),
    cast(_terms["user_attributes"], Text).label("user_attributes"),
    cast(_terms["approved"], Text).label("approved"),
    _tasks.c.purpose,
    _tasks.c.implicit,
    cast(_tasks.c.labels, Text).label("labels"),
    _tasks.c.created_at.label("task_created_at"),
).join_from(_grants, _tasks, _tasks.c.id == _grants.c.task_id)

# What is looked at of every grant. One that does not say when it was decided is like no other.
_ALWAYS: tuple[ColumnElement[Any], ...] = (
    *(_grants.c[name] for name in ("agent", "issuer", "subject", "on_behalf_of", "resource", "provider", "state")),
    *(_grants.c[name] for name in ("policies", "policy_version", "ttl_s", "break_glass")),
    _grants.c.jkt.is_not(None),
    cast(_grants.c.scopes, Text),
    cast(_grants.c.decision["approvals"], Text),
    _terms["ttl_s"].as_integer(),
    _terms["risk"].as_string(),
    case((_decided_at.is_(None), _grants.c.id)),
)
# What is looked at where a policy reads it.
_WHERE_READ: Mapping[Path, tuple[ColumnElement[Any], ...]] = {
    ("task", "id"): (_grants.c.task_id,),
    ("task", "purpose"): (_tasks.c.purpose, _tasks.c.implicit),
    ("task", "age_s"): (_decided_at, _tasks.c.created_at),
    ("task", "orchestrator"): (_grants.c.orchestrator,),
    ("task", "labels"): (cast(_tasks.c.labels, Text),),
    ("intent",): (_grants.c.intent,),
    ("ttl_s",): (),
    ("scopes",): (),
    ("sender_bound",): (),
    ("break_glass",): (),
    ("delegation_depth",): (_terms["delegation_depth"].as_integer(),),
    ("delegation_chain",): (_grants.c.chain,),
    ("delegation_root",): (_grants.c.chain,),
    ("user",): (),
    ("user_attributes",): (cast(_terms["user_attributes"], Text),),
    ("approvals", "count"): (cast(_terms["approved"], Text),),
    ("approvals", "by"): (cast(_terms["approved"], Text),),
    ("approvals", "groups"): (cast(_terms["approved"], Text),),
    ("risk",): (),
    ("agent", "live_grants"): (_terms["live_grants"].as_integer(),),
    ("agent", "recent_denials"): (_terms["recent_denials"].as_integer(),),
    ("time", "hour"): (_decided_at,),
    ("time", "weekday"): (_decided_at,),
    ("local", "zone"): (),
    ("local", "hour"): (_decided_at,),
    ("local", "minute"): (_decided_at,),
    ("local", "weekday"): (_decided_at,),
    ("claimed",): (cast(_grants.c.claimed, Text),),
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of a run, as it was claimed."""

    run: Row[Any]
    number: int
    first_id: str
    last_id: str
    fence: int


def order(db: Connection, row: Mapping[str, Any]) -> None:
    insert_rows(db, models.Redecision, [{**row, "planned_at": None, "undecided_at": None, "finished_at": None}])


def any_open(db: Connection) -> bool:
    return db.execute(select(_runs.c.id).where(_runs.c.finished_at.is_(None)).limit(1)).first() is not None


def plan(db: Connection, *, now: datetime, size: int) -> int:
    """Divide every run that is not yet into shares of so many grants; answers how many runs. One planner at a time."""
    waiting = select(_runs).where(_runs.c.finished_at.is_(None), _runs.c.planned_at.is_(None))
    runs = db.execute(waiting.order_by(_runs.c.id.desc()).with_for_update(skip_locked=True)).fetchall()
    whole = next((run for run in runs if run.agent is None and run.user is None), None)
    if whole is not None:
        _supersede(db, whole, now=now)
    for run in runs:
        if run is not whole and run.agent is None and run.user is None:
            continue
        number = func.row_number().over(order_by=_grants.c.id) - 1
        numbered = (
            select(_grants.c.id, cast(number // size, Integer).label("share"))
            .where(unended(), unexpired(now), *_covered(run))
            .subquery()
        )
        divided = select(
            numbered.c.share, func.min(numbered.c.id).label("first"), func.max(numbered.c.id).label("last")
        )
        rest = {"fence": 0, "due_at": now, "done_at": None, "looked_at": 0, "ended": 0, "shortened": 0}
        shares = [
            {"redecision_id": run.id, "number": row.share, "first_id": row.first, "last_id": row.last, **rest}
            for row in db.execute(divided.group_by(numbered.c.share))
        ]
        insert_rows(db, models.RedecisionShare, shares)
        db.execute(update(_runs).where(_runs.c.id == run.id).values(planned_at=now))
    return len(runs)


def _supersede(db: Connection, whole: Row[Any], *, now: datetime) -> None:
    """Close what earlier versions ordered: the newest covers all that they did, by what counts now."""
    earlier = (_runs.c.finished_at.is_(None), _runs.c.agent.is_(None), _runs.c.user.is_(None), _runs.c.id < whole.id)
    closed = db.execute(update(_runs).where(*earlier).values(finished_at=now).returning(_runs.c.id)).scalars().all()
    db.execute(delete(_shares).where(_shares.c.redecision_id.in_(closed)))


def _covered(run: Row[Any]) -> Iterator[Any]:
    yield _grants.c.era <= run.era
    if run.agent is not None:
        yield _grants.c.agent == run.agent
    if run.user is not None:
        yield _grants.c.on_behalf_of == run.user


def claim(db: Connection, *, now: datetime, again_at: datetime) -> Share | None:
    """The next share that is due, so that nobody else takes it before `again_at`."""
    due = (
        select(_shares)
        .where(_shares.c.done_at.is_(None), _shares.c.due_at <= now)
        # What was ordered last goes first: of an agent at risk there are few, of a new version all.
        .order_by(_shares.c.redecision_id.desc(), _shares.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    # Its own statement: within the update PostgreSQL may ask for "the next one" more than once, and take them all.
    row = db.execute(due).one_or_none()
    if row is None:
        return None
    run = db.execute(select(_runs).where(_runs.c.id == row.redecision_id)).one()
    seen = Share(run=run, number=row.number, first_id=row.first_id, last_id=row.last_id, fence=row.fence)
    if not _written(db, seen, fence=row.fence + 1, due_at=again_at):
        return None
    return replace(seen, fence=row.fence + 1)


def kinds(db: Connection, share: Share, *, now: datetime, facts: Collection[Path]) -> Iterator[tuple[Row[Any], str]]:
    """The grants of a share that are given now, those together that are alike in all that an answer may hang on.

    Of each kind one, with all that is needed to ask about it again, and the ids of all, parted by blanks. `facts` are
    those that a policy reads; when it was decided is not looked at, unless it is one of them. It is one statement:
    what is alike and what is asked about are of one moment.
    """
    alike = (
        select(func.min(_grants.c.id).label("id"), func.aggregate_strings(_grants.c.id, " ").label("ids"))
        .join_from(_grants, _tasks, _tasks.c.id == _grants.c.task_id)
        .where(*_of_share(share, now))
        .group_by(*_alike_in(db, facts))
        .subquery()
    )
    found = db.execute(RECORDED.add_columns(alike.c.ids).join(alike, alike.c.id == _grants.c.id))
    return ((row, row.ids) for part in found.partitions(_READ_AT_ONCE) for row in part)


def recorded(db: Connection, share: Share, *, now: datetime, ids: Collection[str]) -> Sequence[Row[Any]]:
    """Those of a share's grants, as far as they are given now."""
    among_them = (among(db, _grants.c.id, ids), *_of_share(share, now))
    return db.execute(RECORDED.where(*among_them).order_by(_grants.c.id)).fetchall()


def _of_share(share: Share, now: datetime) -> Iterator[ColumnElement[bool]]:
    yield _grants.c.id.between(share.first_id, share.last_id)
    yield _grants.c.state.in_(_GIVEN)
    yield unexpired(now)
    yield from _covered(share.run)


def _alike_in(db: Connection, facts: Collection[Path]) -> Iterator[ColumnElement[Any]]:
    yield from _ALWAYS
    # How long it lives, in seconds from when it was decided.
    if db.dialect.name == "postgresql":
        ends_at: ColumnElement[int] = cast(func.floor(extract("epoch", _grants.c.expires_at)), BigInteger)
    else:
        ends_at = type_coerce(_grants.c.expires_at, Integer)
    yield ends_at - _decided_at
    for path in facts:
        # A fact that is not known here makes each grant a kind of its own.
        yield from _WHERE_READ.get(path, (_grants.c.id,))


def live(db: Connection, *, now: datetime, after: str, limit: int) -> Sequence[Row[Any]]:
    """The same of everybody's, in the order of their ids."""
    statement = RECORDED.where(unended(), _grants.c.state.in_(_GIVEN), unexpired(now), _grants.c.id > after)
    return db.execute(statement.order_by(_grants.c.id).limit(limit)).fetchall()


def asked_since(db: Connection, since: datetime, *, before: str | None, limit: int) -> Sequence[Row[Any]]:
    """What was asked since then and decided, newest first, below the id `before`; ids begin with their time."""
    statement = RECORDED.where(_grants.c.id >= first_id("grt", since)).order_by(_grants.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(_grants.c.id < before)
    return db.execute(statement).fetchall()


def is_ours(db: Connection, share: Share) -> bool:
    """Whether nobody took it over; then nobody does until this transaction ends (INV-07)."""
    return _written(db, share, fence=share.fence)


def note(db: Connection, share: Share, *, looked_at: int, ended: int, shortened: int) -> None:
    """Count what was done of it. Looked at is what there was the last time, the others add up."""
    more = {"ended": _shares.c.ended + ended, "shortened": _shares.c.shortened + shortened}
    _written(db, share, looked_at=looked_at, **more)


def give_back(db: Connection, share: Share, *, due_at: datetime) -> None:
    _written(db, share, due_at=due_at)


def done(db: Connection, share: Share, *, now: datetime) -> None:
    _written(db, share, done_at=now)


def _written(db: Connection, share: Share, **values: Any) -> bool:
    mine = (
        _shares.c.redecision_id == share.run.id,
        _shares.c.number == share.number,
        _shares.c.fence == share.fence,
        _shares.c.done_at.is_(None),
    )
    return db.execute(update(_shares).where(*mine).values(**values)).rowcount == 1


def lock_grants(db: Connection, ids: Collection[str]) -> dict[str, Any]:
    """Those that nobody else holds and that are still given, locked in one order; nobody is waited for."""
    columns = (_grants.c.id, _grants.c.jti, _grants.c.expires_at, _grants.c.policies, _grants.c.state)
    statement = select(*columns).where(among(db, _grants.c.id, ids), _grants.c.state.in_(_GIVEN))
    rows = db.execute(statement.order_by(_grants.c.id).with_for_update(skip_locked=True))
    return {row.id: row for row in rows}


def hold_below(db: Connection, held: dict[str, Any]) -> dict[str, list[Row[Any]]]:
    """What was handed down from these, by them, locked too; those of which somebody else holds a part are let go of.

    Nobody is waited for: a task that ends takes its grants in an order of its own.
    """
    above: dict[str, set[str]] = {grant_id: {grant_id} for grant_id in held}
    below: dict[str, dict[str, Row[Any]]] = {}
    level = list(held)
    facts = (*(_grants.c[name] for name in GRANT_FACTS), _grants.c.parent_grant_id, _grants.c.expires_at)
    while level:
        parts = (among(db, _grants.c.parent_grant_id, level), unended())
        there = db.execute(select(_grants.c.id, _grants.c.parent_grant_id).where(*parts)).fetchall()
        if not there:
            break
        rows = db.execute(select(*facts).where(*parts).order_by(_grants.c.id).with_for_update(skip_locked=True)).all()
        for row in rows:
            # Some of them may be held for themselves too: then what is below is below both.
            above[row.id] = above.get(row.id, set()) | above[row.parent_grant_id]
            for root in above[row.parent_grant_id]:
                below.setdefault(root, {})[row.id] = row
        ours = {row.id for row in rows}
        for row in there:
            if row.id not in ours:
                for root in above[row.parent_grant_id]:
                    held.pop(root, None)
        level = sorted(ours)
    return {root: list(rows.values()) for root, rows in below.items() if root in held}


def among_ids(db: Connection, ids: Collection[str]) -> ColumnElement[bool]:
    return among(db, _grants.c.id, ids)


def given(db: Connection, ids: Collection[str]) -> set[str]:
    """Which of these are still given, whoever holds them."""
    statement = select(_grants.c.id).where(among(db, _grants.c.id, ids), _grants.c.state.in_(_GIVEN))
    return set(db.execute(statement).scalars())


def shorten(db: Connection, ids: Collection[str], until: datetime) -> None:
    """Let grants that the caller holds end earlier; none ends later by this."""
    where = (among(db, _grants.c.id, ids), _grants.c.expires_at > until)
    db.execute(update(_grants).where(*where).values(expires_at=until))


def stand_on(db: Connection, ids: Collection[str], policies: Sequence[str]) -> None:
    """Write, for grants that the caller holds, all policies that they stand on now."""
    db.execute(update(_grants).where(among(db, _grants.c.id, ids)).values(policies=padded(policies)))


def note_undecided(db: Connection, run_id: str, *, now: datetime) -> bool:
    """Whether it is noted by this call, and was not before."""
    where = (_runs.c.id == run_id, _runs.c.undecided_at.is_(None))
    return db.execute(update(_runs).where(*where).values(undecided_at=now)).rowcount == 1


def finish(db: Connection, *, now: datetime) -> list[tuple[Row[Any], Row[Any]]]:
    """Close the runs of which every share is done; answers each with what its shares come to together."""
    undone = select(_shares.c.redecision_id).where(_shares.c.done_at.is_(None))
    complete = (_runs.c.finished_at.is_(None), _runs.c.planned_at.is_not(None), _runs.c.id.not_in(undone))
    closed = db.execute(update(_runs).where(*complete).values(finished_at=now).returning(*_runs.c)).fetchall()
    counted = []
    for run in closed:
        sums = (func.coalesce(func.sum(_shares.c[name]), 0).label(name) for name in ("looked_at", "ended", "shortened"))
        counted.append((run, db.execute(select(*sums).where(_shares.c.redecision_id == run.id)).one()))
        db.execute(delete(_shares).where(_shares.c.redecision_id == run.id))
    return counted
