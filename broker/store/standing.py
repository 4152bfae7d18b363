"""What stands above single grants: refusals, configuration versions, status lists, idempotency keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from broker.domain.refusal import Refusal
from broker.store import locks, models
from broker.store.rows import insert_rows

_lockdowns = models.table_of(models.Lockdown)
_revocations = models.table_of(models.BulkRevocation)
_configurations = models.table_of(models.ConfigurationVersion)
_lists = models.table_of(models.StatusList)
_keys = models.table_of(models.IdempotencyKey)

# Bits in one status list: 2 each, 32 KiB before compression.
STATUS_LIST_SIZE = 2**17


def insert_lockdown(db: Connection, row: Mapping[str, Any]) -> None:
    insert_rows(db, models.Lockdown, [row])


def insert_bulk_revocation(db: Connection, row: Mapping[str, Any]) -> None:
    insert_rows(db, models.BulkRevocation, [row])


def standing_refusals(db: Connection) -> list[Refusal]:
    """Lockdowns not lifted, and bulk revocations whose rows have not all followed."""
    stand = [
        Refusal(id=row.id, axis=row.axis, value=row.value, reason=row.reason)
        for row in db.execute(select(_lockdowns).where(_lockdowns.c.lifted_at.is_(None)))
    ]
    return stand + unfollowed(db)


def unfollowed(db: Connection) -> list[Refusal]:
    statement = select(_revocations).where(_revocations.c.rows_followed_at.is_(None)).order_by(_revocations.c.id)
    return [
        Refusal(id=row.id, axis=row.axis, value=row.value, reason=row.reason, era=row.era)
        for row in db.execute(statement)
    ]


def who_revoked(db: Connection, revocation_id: str) -> str:
    statement = select(_revocations.c.revoked_by).where(_revocations.c.id == revocation_id)
    return str(db.execute(statement).scalar_one())


def followed(db: Connection, revocation_id: str, *, now: datetime) -> bool:
    """Whether it is done by this call, and not by another follower's."""
    where = (_revocations.c.id == revocation_id, _revocations.c.rows_followed_at.is_(None))
    done = update(_revocations).where(*where).values(rows_followed_at=now).returning(_revocations.c.id)
    return db.execute(done).one_or_none() is not None


def bulk_revocation(db: Connection, revocation_id: str) -> Row[Any] | None:
    return db.execute(select(_revocations).where(_revocations.c.id == revocation_id)).one_or_none()


def lockdown(db: Connection, lockdown_id: str) -> Row[Any] | None:
    return db.execute(select(_lockdowns).where(_lockdowns.c.id == lockdown_id)).one_or_none()


def lockdowns(db: Connection, *, standing: bool, before: str | None = None, limit: int = 1000) -> list[Row[Any]]:
    """Newest first, below the id `before`."""
    statement = select(_lockdowns).order_by(_lockdowns.c.id.desc())
    if standing:
        statement = statement.where(_lockdowns.c.lifted_at.is_(None))
    if before is not None:
        statement = statement.where(_lockdowns.c.id < before)
    return list(db.execute(statement.limit(limit)))


def lift(db: Connection, lockdown_id: str, *, now: datetime, by: str) -> Row[Any] | None:
    """The lifted row; None where there is no such lockdown standing."""
    statement = (
        update(_lockdowns)
        .where(_lockdowns.c.id == lockdown_id, _lockdowns.c.lifted_at.is_(None))
        .values(lifted_at=now, lifted_by=by)
        .returning(*_lockdowns.c)
    )
    return db.execute(statement).one_or_none()


def lifted_from_agents(db: Connection, *, since: datetime) -> dict[str, datetime]:
    """When the last lockdown over each agent was lifted, of those that were since a moment."""
    lifted = func.max(_lockdowns.c.lifted_at, type_=models.Instant())
    of_agents = (_lockdowns.c.axis == "agent", _lockdowns.c.lifted_at >= since)
    statement = select(_lockdowns.c.value, lifted.label("at")).where(*of_agents).group_by(_lockdowns.c.value)
    return {row.value: row.at for row in db.execute(statement)}


def has_lockdown(db: Connection, axis: str, value: str) -> bool:
    """Whether one stands over exactly this."""
    where = (_lockdowns.c.axis == axis, _lockdowns.c.value == value, _lockdowns.c.lifted_at.is_(None))
    return db.execute(select(_lockdowns.c.id).where(*where).limit(1)).first() is not None


def latest_configuration(db: Connection) -> Row[Any] | None:
    return db.execute(select(_configurations).order_by(_configurations.c.version.desc()).limit(1)).one_or_none()


def latest_version(db: Connection) -> int | None:
    version: int | None = db.execute(select(func.max(_configurations.c.version))).scalar_one()
    return version


def configuration(db: Connection, version: int) -> Row[Any] | None:
    return db.execute(select(_configurations).where(_configurations.c.version == version)).one_or_none()


def configurations(db: Connection, *, before: int | None = None, limit: int = 100) -> list[Row[Any]]:
    """Newest first, below the version `before`."""
    columns = [column for column in _configurations.c if column.name != "document"]
    statement = select(*columns).order_by(_configurations.c.version.desc())
    if before is not None:
        statement = statement.where(_configurations.c.version < before)
    return list(db.execute(statement.limit(limit)))


def has_configuration(db: Connection, sha256: str) -> int | None:
    """The version under which this very configuration was once applied."""
    statement = select(func.max(_configurations.c.version)).where(_configurations.c.sha256 == sha256)
    version: int | None = db.execute(statement).scalar_one()
    return version


def insert_configuration(db: Connection, row: Mapping[str, Any]) -> None:
    insert_rows(db, models.ConfigurationVersion, [row])


def reserve_indexes(db: Connection, count: int, *, last_expiry_at: datetime) -> tuple[int, int]:
    """(list, first index) of `count` status indexes nobody ever gets again."""
    locks.hold_status_lists(db)
    newest = db.execute(select(_lists).order_by(_lists.c.id.desc()).limit(1)).one_or_none()
    if newest is None or newest.next_index + count > STATUS_LIST_SIZE:
        made = 1 if newest is None else newest.id + 1
        row = {"id": made, "next_index": count, "last_expiry_at": last_expiry_at}
        insert_rows(db, models.StatusList, [row])
        return made, 0
    db.execute(
        update(_lists)
        .where(_lists.c.id == newest.id)
        .values(next_index=newest.next_index + count, last_expiry_at=max(last_expiry_at, newest.last_expiry_at))
    )
    return newest.id, newest.next_index


def status_list(db: Connection, list_id: int) -> Row[Any] | None:
    return db.execute(select(_lists).where(_lists.c.id == list_id)).one_or_none()


def status_lists(db: Connection, *, now: datetime) -> list[int]:
    """Those to which a live token may still point."""
    return list(db.execute(select(_lists.c.id).where(_lists.c.last_expiry_at > now).order_by(_lists.c.id)).scalars())


def claim_key(
    db: Connection, *, principal: str, key_sha256: str, request_sha256: str, made_id: str, forget_at: datetime
) -> tuple[str, str]:
    """(id it stands for, hash of its request): ours if the key was new, the first claimant's otherwise (INV-06).

    A claim by a transaction in flight is waited for.
    """
    values = {
        "principal": principal,
        "key_sha256": key_sha256,
        "request_sha256": request_sha256,
        "made_id": made_id,
        "forget_at": forget_at,
    }
    dialect = postgresql if db.dialect.name == "postgresql" else sqlite
    claim = dialect.insert(_keys).values(values).on_conflict_do_nothing().returning(_keys.c.made_id)
    if db.execute(claim).one_or_none() is not None:
        return made_id, request_sha256
    row = db.execute(
        select(_keys.c.made_id, _keys.c.request_sha256).where(
            _keys.c.principal == principal, _keys.c.key_sha256 == key_sha256
        )
    ).one()
    return row.made_id, row.request_sha256


def release_key(db: Connection, *, principal: str, key_sha256: str, made_id: str) -> None:
    """Forget a key under which nothing was made, if `made_id` is what it stands for: it may be somebody else's."""
    where = (_keys.c.principal == principal, _keys.c.key_sha256 == key_sha256, _keys.c.made_id == made_id)
    db.execute(delete(_keys).where(*where))


def repoint_key(db: Connection, *, principal: str, key_sha256: str, made_id: str, instead: str) -> bool:
    """Let a key that stands for `made_id` stand for something else; whether it did stand for it."""
    where = (_keys.c.principal == principal, _keys.c.key_sha256 == key_sha256, _keys.c.made_id == made_id)
    done = update(_keys).where(*where).values(made_id=instead).returning(_keys.c.made_id)
    return db.execute(done).one_or_none() is not None


def made_under(db: Connection, keys: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What (principal, key) pairs stand for already, claiming none."""
    if not keys:
        return {}
    pair = tuple_(_keys.c.principal, _keys.c.key_sha256)
    rows = db.execute(select(_keys.c.principal, _keys.c.key_sha256, _keys.c.made_id).where(pair.in_(list(keys))))
    return {(row.principal, row.key_sha256): row.made_id for row in rows}


def is_consumed(db: Connection, kind: str, key_sha256: str) -> bool:
    """A look before, which decides nothing: a proof is used by whoever inserts it."""
    proofs = models.table_of(models.ConsumedProof)
    where = (proofs.c.kind == kind, proofs.c.key_sha256 == key_sha256)
    return db.execute(select(proofs.c.kind).where(*where)).first() is not None


def forget(db: Connection, *, now: datetime, limit: int) -> int:
    """Drop proofs and idempotency keys that could not be accepted any more anyway, and allowances of windows past."""
    gone = 0
    for table in (models.table_of(models.ConsumedProof), _keys, models.table_of(models.Allowance)):
        primary_key = list(table.primary_key)
        # Two sweepers share the work, and neither waits for the other.
        due = select(*primary_key).where(table.c.forget_at <= now).limit(limit).with_for_update(skip_locked=True)
        gone += db.execute(delete(table).where(tuple_(*primary_key).in_(due))).rowcount
    return gone
