"""Leases: what is owed outside, in the order in which it is paid.

States move through `broker.store.transitions`; here is what is found, claimed, and noted without a state changing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    case,
    false,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from broker.domain.lease import Lease
from broker.domain.lifecycle import GrantState, LeaseState
from broker.store import models
from broker.store.rows import among, insert_rows

_leases = models.table_of(models.Lease)
_grants = models.table_of(models.Grant)
_looks = models.table_of(models.ProviderLook)
_NAMES = tuple(entry.name for entry in fields(Lease))
_values_of = attrgetter(*_NAMES)
_SELECT = select(*(_leases.c[name] for name in _NAMES))

# Written out, so that SQLite takes the partial indexes, which spell it the same way.
_OWED = _leases.c.state.in_(
    bindparam("owed", [str(LeaseState.REVOKING), str(LeaseState.STUCK)], expanding=True, literal_execute=True)
)
_NEXT_OWED = select(func.min(_leases.c.provider)).where(_OWED, _leases.c.provider > bindparam("after"))
_INTENDED = _leases.c.state == literal_column("'intended'")
_OPEN = _leases.c.state != literal_column("'released'")

# A grant that was revoked says when, one that expired did so then; of others there was no authority to end.
_SINCE = case(
    (_grants.c.state == str(GrantState.REVOKED), func.coalesce(_grants.c.revoked_at, _grants.c.expires_at)),
    (_grants.c.state == str(GrantState.EXPIRED), _grants.c.expires_at),
    else_=_leases.c.created_at,
).label("since")

# What the event of a moved lease speaks of.
LEASE_FACTS = ("id", "grant_id", "provider", "attempts", "dead_at", "unknown")


def insert_leases(db: Connection, leases: Sequence[Lease]) -> None:
    insert_rows(
        db,
        models.Lease,
        [dict(zip(_NAMES, _values_of(lease), strict=True)) | {"state": str(lease.state)} for lease in leases],
    )


def lease_of(row: Any) -> Lease:
    return Lease(**(dict(zip(_NAMES, _values_of(row), strict=True)) | {"state": LeaseState(row.state)}))


def find_lease(db: Connection, lease_id: str) -> Lease | None:
    row = db.execute(_SELECT.where(_leases.c.id == lease_id)).one_or_none()
    return None if row is None else lease_of(row)


def leases_of(db: Connection, grant_ids: Collection[str]) -> dict[str, Lease]:
    """The lease of each grant that has one; of several the one that is owed most: the open before the released."""
    if not grant_ids:
        return {}
    found: dict[str, Lease] = {}
    for row in db.execute(_SELECT.where(of_grants(db, grant_ids)).order_by(_leases.c.id)):
        lease = lease_of(row)
        known = found.get(row.grant_id)
        if known is None or known.state is LeaseState.RELEASED or lease.state is not LeaseState.RELEASED:
            found[row.grant_id] = lease
    return found


def with_id(lease_id: str) -> ColumnElement[bool]:
    return _leases.c.id == lease_id


def with_ids(lease_ids: Collection[str]) -> ColumnElement[bool]:
    return _leases.c.id.in_(lease_ids)


def known_by(reference: str | None) -> ColumnElement[bool]:
    return _leases.c.reference.is_not_distinct_from(reference)


def as_they_were(claimed: Collection[Lease]) -> ColumnElement[bool]:
    """Those whom nobody has claimed since, and of which nothing was learnt since: that is owed too (INV-07)."""
    return or_(
        false(), *(and_(with_id(lease.id), claimed_by(lease.fence), known_by(lease.reference)) for lease in claimed)
    )


def not_abandoned() -> ColumnElement[bool]:
    return _leases.c.abandoned_at.is_(None)


def of_grants(db: Connection, grant_ids: Collection[str]) -> ColumnElement[bool]:
    return among(db, _leases.c.grant_id, grant_ids)


def not_owed_yet() -> ColumnElement[bool]:
    """What ends with its grant: a debt that is being paid already goes on as it is."""
    return _leases.c.state.in_([str(LeaseState.INTENDED), str(LeaseState.HELD)])


def in_state(*states: LeaseState) -> ColumnElement[bool]:
    return _leases.c.state.in_([str(state) for state in states])


def claimed_by(fence: int) -> ColumnElement[bool]:
    """Whoever claimed it last may change it, and nobody before (INV-07)."""
    return _leases.c.fence == fence


def providers_owed(db: Connection) -> list[str]:
    """Those to whom anything is owed, due or not."""
    # One probe of the index for each: how much is owed to one costs nothing.
    found: list[str] = []
    after = ""
    while (provider := db.execute(_NEXT_OWED, {"after": after}).scalar_one()) is not None:
        found.append(provider)
        after = provider
    return found


def providers_owed_for(db: Connection, grant_ids: Collection[str]) -> list[str]:
    """Those to whom anything is owed for one of these grants."""
    owed = select(_leases.c.provider).where(_OWED, of_grants(db, grant_ids)).distinct()
    return list(db.execute(owed.order_by(_leases.c.provider)).scalars())


def any_owed(db: Connection, provider: str, *, now: datetime) -> bool:
    due = select(_leases.c.id).where(_OWED, _leases.c.provider == provider, _leases.c.next_attempt_at <= now).limit(1)
    return db.execute(due).first() is not None


def claim_owed(
    db: Connection,
    provider: str,
    *,
    now: datetime,
    again_at: datetime,
    limit: int,
    at_most_urgency: int,
    grants: Collection[str] = (),
) -> list[Lease]:
    """Take the most urgent debts to a provider that are due, so that nobody else does before `again_at`.

    A compare-and-set: SQLite drops SKIP LOCKED silently and has one writer anyway.
    """
    of_provider = (_OWED, _leases.c.provider == provider)
    due = select(_leases.c.id).where(
        *of_provider, _leases.c.next_attempt_at <= now, _leases.c.urgency <= at_most_urgency
    )
    if grants:
        due = due.where(of_grants(db, grants))
    due = due.order_by(_leases.c.urgency, _leases.c.next_attempt_at).limit(limit).with_for_update(skip_locked=True)
    claim = (
        update(_leases)
        .where(_leases.c.id.in_(due), _leases.c.next_attempt_at <= now)
        .values(next_attempt_at=again_at, fence=_leases.c.fence + 1)
        .returning(*(_leases.c[name] for name in _NAMES))
    )
    return sorted((lease_of(row) for row in db.execute(claim)), key=lambda lease: (lease.urgency, lease.id))


def note(db: Connection, lease_id: str, *where: ColumnElement[bool], **values: Any) -> bool:
    """Write what is known of a lease without moving it; whether it was there to be written to."""
    statement = update(_leases).where(_leases.c.id == lease_id, *where).values(**values).returning(_leases.c.id)
    return db.execute(statement).one_or_none() is not None


def learn(db: Connection, lease_id: str, **values: Any) -> bool:
    """Write what its issuer still heard of a lease that is owed already; whether it is.

    Whoever is paying it asked without knowing this: it is claimed away from them, and what they waited for is void.
    """
    owed = in_state(LeaseState.REVOKING, LeaseState.STUCK)
    return note(db, lease_id, owed, fence=_leases.c.fence + 1, dead_at=None, settles_at=None, **values)


def abandoned_intents(db: Connection, *, now: datetime, limit: int) -> list[Lease]:
    """Intents whose issuer had all the time there is, and neither confirmed nor gave up."""
    statement = _SELECT.where(_INTENDED, _leases.c.issue_by <= now).order_by(_leases.c.issue_by).limit(limit)
    return [lease_of(row) for row in db.execute(statement)]


def open_leases(db: Connection, provider: str) -> list[Lease]:
    """Every lease of a provider that is not released."""
    return [lease_of(row) for row in db.execute(_SELECT.where(_OPEN, _leases.c.provider == provider))]


def open_settings(db: Connection, provider: str) -> list[Mapping[str, Any]]:
    """The settings of every source that a lease which is not released came from."""
    statement = select(_leases.c.settings).where(_OPEN, _leases.c.provider == provider)
    seen = {json.dumps(settings, sort_keys=True): settings for settings in db.execute(statement).scalars()}
    return list(seen.values())


def open_references(db: Connection, provider: str, references: Collection[str]) -> set[str]:
    """Those of the references that a lease which is not released accounts for."""
    if not references:
        return set()
    named = among(db, _leases.c.reference, references)
    statement = select(_leases.c.reference).where(_OPEN, _leases.c.provider == provider, named)
    return set(db.execute(statement).scalars())


def accounted_for(db: Connection, grant_ids: Collection[str]) -> set[str]:
    """The grants whose secrets have a lease that is made, held, or being paid by its own name.

    Where nobody heard of one, its provider may not know it either, and nothing that is being paid accounts for it.
    """
    if not grant_ids:
        return set()
    living = in_state(LeaseState.INTENDED, LeaseState.HELD)
    paid = _OWED & _leases.c.reference.is_not(None) & ~_leases.c.unknown
    return set(db.execute(select(_leases.c.grant_id).where(of_grants(db, grant_ids), living | paid)).scalars())


def owed_since(db: Connection, lease_ids: Collection[str]) -> dict[str, datetime]:
    """Since when each is owed: when the authority of its grant ended. Not of a lease whose grant may still live.

    What nobody owns, and what was made for a grant that never came to be, is owed since we know of it.
    """
    if not lease_ids:
        return {}
    statement = select(_leases.c.id, _SINCE).join_from(_leases, _grants, isouter=True)
    ended = _leases.c.state.not_in([str(LeaseState.INTENDED), str(LeaseState.HELD)])
    return {row.id: row.since for row in db.execute(statement.where(with_ids(lease_ids), ended))}


def oldest_owed(db: Connection) -> dict[str, datetime]:
    """By provider, since when the oldest debt is owed that nobody abandoned."""
    statement = select(_leases.c.provider, func.min(_SINCE).label("since")).join_from(_leases, _grants, isouter=True)
    owed = statement.where(_OWED, not_abandoned()).group_by(_leases.c.provider)
    return {row.provider: row.since for row in db.execute(owed)}


def count_by_state(db: Connection) -> dict[tuple[str, str], int]:
    """How many leases that are not released there are, by (provider, state)."""
    statement = (
        select(_leases.c.provider, _leases.c.state, func.count())
        .where(_OPEN)
        .group_by(_leases.c.provider, _leases.c.state)
    )
    return {(provider, state): count for provider, state, count in db.execute(statement)}


def matching(*, state: str | None = None, provider: str | None = None, grant: str | None = None) -> list[Any]:
    wanted = {"state": state, "provider": provider, "grant_id": grant}
    return [_leases.c[name] == value for name, value in wanted.items() if value is not None]


def page_of_leases(
    db: Connection, *, where: Iterable[ColumnElement[bool]], before: str | None, limit: int
) -> list[Lease]:
    """Newest first, below the id `before`."""
    statement = _SELECT.where(*where).order_by(_leases.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(_leases.c.id < before)
    return [lease_of(row) for row in db.execute(statement)]


# --- When a provider was last compared with our rows ----------------------------------------------------------------


# Composed once: each issue asks it twice.
_LAST_LOOK = select(_looks.c.number, _looks.c.began_at, _looks.c.wanted_at).where(
    _looks.c.provider == bindparam("provider")
)


def last_look(db: Connection, provider: str) -> Any:
    """None, or a row: `number`: how many looks there were; `began_at`: when the last began; `wanted_at`."""
    return db.execute(_LAST_LOOK, {"provider": provider}).one_or_none()


def looks(db: Connection) -> dict[str, datetime]:
    """When the last complete look at each provider began, if there was one."""
    statement = select(_looks.c.provider, _looks.c.began_at).where(_looks.c.began_at.is_not(None))
    return {row.provider: row.began_at for row in db.execute(statement)}


def want_look(db: Connection, provider: str, *, now: datetime) -> None:
    """Ask whoever reconciles to do it soon."""
    dialect = postgresql if db.dialect.name == "postgresql" else sqlite
    wanted = dialect.insert(_looks).values(provider=provider, number=0, wanted_at=now)
    db.execute(wanted.on_conflict_do_update(index_elements=[_looks.c.provider], set_={"wanted_at": now}))


def looked(db: Connection, provider: str, *, began_at: datetime) -> int:
    """Note a look that is complete; answers how many there were."""
    dialect = postgresql if db.dialect.name == "postgresql" else sqlite
    done = dialect.insert(_looks).values(provider=provider, number=1, began_at=began_at)
    number = _looks.c.number + 1
    statement = done.on_conflict_do_update(
        index_elements=[_looks.c.provider], set_={"number": number, "began_at": began_at}
    ).returning(_looks.c.number)
    return int(db.execute(statement).scalar_one())
