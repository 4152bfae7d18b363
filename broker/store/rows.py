"""Many rows at once: written by COPY on PostgreSQL and one prepared statement on SQLite, and found by their values.

Statement building is most of what an insert costs in Python, so it is done once per table. Values are bound or
copied, never written into SQL (INV-31).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any

from sqlalchemy import JSON, ColumnElement, Connection, String, bindparam, func, insert, select
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from broker.domain.clock import epoch
from broker.store.models import Base, Instant

_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

# Below this COPY's fixed cost is more than it saves.
_WORTH_COPYING = 4

Row = Mapping[str, Any]


def among(db: Connection, column: ColumnElement[Any], values: Collection[str]) -> ColumnElement[bool]:
    """Of any number of values: as one parameter, because a statement takes only so many."""
    if db.dialect.name == "postgresql":
        return column == func.any(bindparam(None, list(values), type_=ARRAY(String)))
    listed = func.json_each(json.dumps(list(values))).table_valued("value")
    return column.in_(select(listed.c.value))


def insert_rows(db: Connection, model: type[Base], rows: Sequence[Row]) -> None:
    """Insert rows that name every column of `model`."""
    if not rows:
        return
    if db.dialect.name == "sqlite":
        statement, columns = _sqlite_insert(model)
        db.exec_driver_sql(statement, [tuple(values) for values in _converted(columns, rows)])
    elif len(rows) >= _WORTH_COPYING:
        statement, columns = _copy(model)
        _copied(db, statement, _converted(columns, rows))
    else:
        db.execute(insert(model), list(rows))


def insert_alike(
    db: Connection, model: type[Base], shared: Row, names: Sequence[str], own: Iterable[Sequence[Any]]
) -> None:
    """Insert a row like `shared` for each of `own`, which holds the columns `names`; those need no conversion."""
    sqlite = db.dialect.name == "sqlite"
    statement, columns = _sqlite_insert(model) if sqlite else _copy(model)
    places = [name for name, _ in columns]
    [values] = _converted(columns, [shared])
    fill = itemgetter(*(len(values) + names.index(name) if name in names else at for at, name in enumerate(places)))
    rows = (fill((*values, *mine)) for mine in own)
    if sqlite:
        db.exec_driver_sql(statement, list(rows))
    else:
        _copied(db, statement, rows)


def _copied(db: Connection, statement: str, rows: Iterable[Sequence[Any]]) -> None:
    driver: Any = db.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        for values in rows:
            copy.write_row(values)


Columns = tuple[tuple[str, Callable[[Any], Any]], ...]


def _converted(columns: Columns, rows: Sequence[Row]) -> Iterator[Sequence[Any]]:
    """The values of each row, in the order of the columns; only those that need it are converted."""
    names = itemgetter(*(name for name, _ in columns))
    changed = [(place, convert) for place, (_, convert) in enumerate(columns) if convert is not _same]
    for row in rows:
        values = list(names(row))
        for place, convert in changed:
            values[place] = convert(values[place])
        yield values


@lru_cache
def _sqlite_insert(model: type[Base]) -> tuple[str, Columns]:
    columns = _columns(model, instant=_epoch_or_none)
    names = ", ".join(f'"{name}"' for name, _ in columns)
    return f"INSERT INTO {model.__tablename__} ({names}) VALUES ({', '.join('?' * len(columns))})", columns  # noqa: S608


@lru_cache
def _copy(model: type[Base]) -> tuple[str, Columns]:
    columns = _columns(model, instant=_same)
    names = ", ".join(f'"{name}"' for name, _ in columns)
    return f"COPY {model.__tablename__} ({names}) FROM STDIN", columns


def _columns(model: type[Base], *, instant: Callable[[Any], Any]) -> Columns:
    def converter(kind: Any) -> Callable[[Any], Any]:
        if isinstance(kind, Instant):
            return instant
        if isinstance(kind, JSON | JSONB):
            return _json_or_none
        return _same

    return tuple((column.name, converter(column.type)) for column in model.__table__.columns)


def _same(value: Any) -> Any:
    return value


def _epoch_or_none(value: datetime | None) -> int | None:
    return None if value is None else epoch(value)


def _json_or_none(value: Any) -> str | None:
    # SQL NULL is what our nullable JSON columns mean by None.
    return None if value is None else _compact(value)
