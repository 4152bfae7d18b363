"""The feed's rows: an outbox that is written with what ends authority, and the numbered events that readers get.

Outbox ids commit out of order, so nobody reads them by `id > last`: whoever holds the one row of `feed` takes all that
is committed, gives it the next numbers and carries the chain on, in one transaction. A crash leaves it all as it was.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, exists, func, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from broker.domain.feed import LISTS, Ended, Seen, end_of_grant, first_head, next_head, text_of
from broker.domain.lifecycle import TaskState
from broker.store import models
from broker.store.database import announced
from broker.store.rows import insert_rows

CHANNEL = "broker_feed"

_feed = models.table_of(models.Feed)
_outbox = models.table_of(models.FeedOutbox)
_events = models.table_of(models.FeedEvent)
_shortened = models.table_of(models.ShortenedGrant)
_grants = models.table_of(models.Grant)
_tasks = models.table_of(models.Task)
_NOTIFY = text("SELECT pg_notify(:channel, '')")
# One statement, so one moment: with nothing waiting, `seq` is all that was committed before it.
_LOOK = select(_feed.c.feed_id, _feed.c.seq, _feed.c.head, exists(select(_outbox.c.id)).label("waiting"))
_LISTS_LOOK = select(_feed.c.lists_seq, exists(select(_outbox.c.id).where(_outbox.c.kind == LISTS.kind)))


def announce(db: Connection, at: datetime, ended: Iterable[Ended]) -> None:
    """Have the feed say that this ended, if the caller's transaction commits; its readers are woken by the commit."""
    rows = [{"at": at, "kind": one.kind, "members": dict(one.members)} for one in ended]
    if not rows:
        return
    db.execute(insert(_outbox), rows)
    if db.dialect.name == "postgresql":
        db.execute(_NOTIFY, {"channel": CHANNEL})
    announced()


def look(db: Connection) -> Seen:
    return Seen(**db.execute(_LOOK).one()._mapping)


def newest_lists(db: Connection) -> int | None:
    """The number of the newest event that sends readers to the status lists; None while one has no number yet."""
    lists_seq, waiting = db.execute(_LISTS_LOOK).one()
    return None if waiting else int(lists_seq)


def number(db: Connection, *, now: datetime, at_most: int) -> int:
    """Give numbers to so much of what is committed, and answer how much that was; less than asked is all of it."""
    feed = _held(db)
    waiting = db.execute(select(_outbox).order_by(_outbox.c.id).limit(at_most)).fetchall()
    if not waiting:
        return 0
    seq, head, lists_seq = feed.seq, feed.head, feed.lists_seq
    rows = []
    for row in waiting:
        seq += 1
        said = text_of(seq, row.at, row.kind, row.members)
        head = next_head(head, said)
        lists_seq = seq if row.kind == LISTS.kind else lists_seq
        rows.append({"seq": seq, "text": said, "head": head, "numbered_at": now})
    insert_rows(db, models.FeedEvent, rows)
    db.execute(delete(_outbox).where(_outbox.c.id.in_([row.id for row in waiting])))
    db.execute(update(_feed).values(seq=seq, head=head, lists_seq=lists_seq))
    return len(waiting)


def _held(db: Connection) -> Row[Any]:
    """The row of the feed, which is ours until this transaction ends; it gets its id when it is first held."""
    # Its own statement: what is taken from the outbox is read after everybody who held the row before has committed.
    feed = db.execute(select(_feed).with_for_update()).one()
    return feed if feed.feed_id else _begun(db)


def _begun(db: Connection) -> Row[Any]:
    feed_id = secrets.token_urlsafe(16)
    values = {"feed_id": feed_id, "seq": 0, "head": first_head(feed_id), "lists_seq": 0}
    return db.execute(update(_feed).values(**values).returning(*_feed.c)).one()


def renew(db: Connection, *, now: datetime, instead_of: str | None = None) -> bool:
    """Begin another feed, if it still is the one it is to replace: every reader starts anew.

    What the old one said last may be missing in a status list that is kept somewhere, so the first event sends every
    reader to the lists.
    """
    feed = _held(db)
    if instead_of is not None and feed.feed_id != instead_of:
        return False
    db.execute(delete(_events))
    _begun(db)
    announce(db, now, [LISTS])
    return True


def page(db: Connection, *, after: int, upto: int, limit: int) -> Sequence[Row[*tuple[Any, ...]]]:
    """(seq, text, head) of the events above one number up to another, so many of them at most, in their order."""
    columns = (_events.c.seq, _events.c.text, _events.c.head)
    where = (_events.c.seq > after, _events.c.seq <= upto)
    return db.execute(select(*columns).where(*where).order_by(_events.c.seq).limit(limit)).fetchall()


def oldest(db: Connection) -> int | None:
    """The number of the oldest event that is kept."""
    seq: int | None = db.execute(select(func.min(_events.c.seq))).scalar_one()
    return seq


def before(db: Connection, moment: datetime) -> Row[*tuple[Any, ...]] | None:
    """(seq, head) of the newest event that had its number before this moment, among those that are kept."""
    # From the newest down: those that are younger are few.
    statement = select(_events.c.seq, _events.c.head).where(_events.c.numbered_at < moment)
    return db.execute(statement.order_by(_events.c.seq.desc()).limit(1)).one_or_none()


def forget(db: Connection, *, numbered_before: datetime, limit: int) -> int:
    """Drop the oldest events, but for the newest of those that are due: a reader may be sent to just behind it."""
    some = select(_events.c.seq, _events.c.numbered_at).order_by(_events.c.seq).limit(limit).subquery()
    last = db.execute(select(func.max(some.c.seq)).where(some.c.numbered_at < numbered_before)).scalar_one()
    return 0 if last is None else db.execute(delete(_events).where(_events.c.seq < last)).rowcount


def heartbeats_lost(db: Connection, *, before: datetime, now: datetime) -> bool:
    """Whether a task that lost its heartbeat so long ago is still to be ended, and so not told of."""
    active = _tasks.c.state == str(TaskState.ACTIVE)
    lost = (active, _tasks.c.heartbeat_due_at <= before, _tasks.c.deadline_at > now)
    return db.execute(select(_tasks.c.id).where(*lost).limit(1)).first() is not None


def note_shortened(db: Connection, ids: Collection[str], *, ends_at: datetime, token_ends_at: datetime) -> None:
    """Remember that these grants end then, while a token of them may say a later time."""
    dialect = postgresql if db.dialect.name == "postgresql" else sqlite
    made = dialect.insert(_shortened)
    later = func.greatest if db.dialect.name == "postgresql" else func.max
    noted = made.on_conflict_do_update(
        index_elements=[_shortened.c.grant_id],
        set_={
            "ends_at": made.excluded.ends_at,
            "token_ends_at": later(_shortened.c.token_ends_at, made.excluded.token_ends_at),
        },
    )
    rows = [{"grant_id": id_, "ends_at": ends_at, "token_ends_at": token_ends_at} for id_ in ids]
    if rows:
        db.execute(noted, rows)


def any_shortened_due(db: Connection, *, now: datetime) -> bool:
    return db.execute(select(_shortened.c.grant_id).where(_shortened.c.ends_at <= now).limit(1)).first() is not None


def tell_shortened(db: Connection, *, now: datetime, at_most: int) -> int:
    """Announce so many of the shortened grants that have come to their end; what was renewed since ends later."""
    due = (
        select(_shortened.c.grant_id, _shortened.c.token_ends_at, _grants.c.expires_at)
        .join(_grants, _grants.c.id == _shortened.c.grant_id)
        .where(_shortened.c.ends_at <= now)
        .limit(at_most)
        .with_for_update(of=_shortened, skip_locked=True)
    )
    rows = db.execute(due).fetchall()
    for row in rows:
        if now < row.expires_at < row.token_ends_at:
            mine = _shortened.c.grant_id == row.grant_id
            db.execute(update(_shortened).where(mine).values(ends_at=row.expires_at))
        else:
            db.execute(delete(_shortened).where(_shortened.c.grant_id == row.grant_id))
    # By its own `exp` the token is over anyway.
    ended = [row.grant_id for row in rows if row.expires_at <= now < row.token_ends_at]
    announce(db, now, [end_of_grant(grant_id) for grant_id in ended])
    return len(rows)
