"""Allowances: how much of a limit each broker may use by itself, handed out of one row for all of them.

A row says how much of one window is taken, and a broker takes what it needs and some of the rest ahead, so that it
comes here once for many requests. What is handed out and not used is lost until the window is over: a broker that dies
makes a limit tighter, and none makes it looser (INV-34).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select, text

from broker.domain.clock import epoch
from broker.store import models
from broker.store.rows import among

AHEAD = 8  # this part of what is left is handed out beyond what is needed now
MOST_AHEAD = 1_000  # and no more: a bound that is lowered meets what was handed out by the one before

_allowances = models.table_of(models.Allowance)
_BASE = "CASE WHEN held.window_start >= excluded.window_start THEN held.taken ELSE 0 END"
_LEFT = f"{{greatest}}(excluded.bound - {_BASE}, 0)"
_MORE = f"{{least}}({{greatest}}({_LEFT} - excluded.asked, 0) / {AHEAD}, {MOST_AHEAD})"
_GIVEN = f"{{least}}({_LEFT}, excluded.asked + {_MORE})"
_TAKE = f"""
    INSERT INTO allowances AS held (name, key_sha256, window_start, bound, asked, given, taken, forget_at)
    SELECT name, key_sha256, window_start, bound, asked, given, given, {{forget_at}} FROM {{wanted}}
    WHERE true
    ORDER BY name, key_sha256
    ON CONFLICT (name, key_sha256) DO UPDATE SET
        window_start = {{greatest}}(held.window_start, excluded.window_start),
        bound = excluded.bound,
        asked = excluded.asked,
        given = {_GIVEN},
        taken = {_BASE} + {_GIVEN},
        forget_at = {{greatest}}(held.forget_at, excluded.forget_at)
    RETURNING name, key_sha256, given
"""  # noqa: S608 - of constants
_COLUMNS = "name text, key_sha256 text, window_start bigint, bound bigint, asked bigint, given bigint, forget_at bigint"
_MEMBERS = ", ".join(
    f"json_extract(value, '$.{column.split()[0]}') AS {column.split()[0]}" for column in _COLUMNS.split(", ")
)
_TAKE_ON = {
    # Ordered, so that two brokers that want the same rows take them in one order.
    "postgresql": text(
        _TAKE.format(
            greatest="greatest",
            least="least",
            forget_at="to_timestamp(forget_at)",
            wanted=f"json_to_recordset(CAST(:wanted AS json)) AS wanted ({_COLUMNS})",
        )
    ),
    "sqlite": text(
        _TAKE.format(
            greatest="max",
            least="min",
            forget_at="forget_at",
            wanted=f"(SELECT {_MEMBERS} FROM json_each(:wanted)) AS wanted",  # noqa: S608 - of constants
        )
    ),
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """`asked` of one limit, of which `bound` are there in the window that began at `window_start`."""

    name: str
    key_sha256: str
    window_start: int
    bound: int
    asked: int
    forget_at: datetime

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.key_sha256


def take(db: Connection, wanted: Sequence[Wanted]) -> dict[tuple[str, str], int]:
    """How many of each are ours now: fewer than asked where no more are left, more where many are."""
    if not wanted:
        return {}
    rows = [
        {
            "name": one.name,
            "key_sha256": one.key_sha256,
            "window_start": one.window_start,
            "bound": one.bound,
            "asked": one.asked,
            # Of a row that is not there yet; of one that is, the statement finds it out.
            "given": min(one.bound, one.asked + min(max(one.bound - one.asked, 0) // AHEAD, MOST_AHEAD)),
            "forget_at": epoch(one.forget_at),
        }
        for one in wanted
    ]
    found: Any = db.execute(_TAKE_ON[db.dialect.name], {"wanted": json.dumps(rows)})
    return {(row.name, row.key_sha256): row.given for row in found}


def taken_in(db: Connection, name: str, windows: Mapping[str, int]) -> set[str]:
    """Of these keys of one limit, those of which anything was taken in their window, or in a later one."""
    where = (_allowances.c.name == name, among(db, _allowances.c.key_sha256, list(windows)))
    rows = db.execute(select(_allowances.c.key_sha256, _allowances.c.window_start).where(*where))
    return {row.key_sha256 for row in rows if row.window_start >= windows[row.key_sha256]}
