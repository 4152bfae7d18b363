"""The far side of a secret: the logins that a PostgreSQL itself has, whatever Vault knows of them.

A request that is cut in the middle can leave a database user that no lease knows, so only a look at the database finds
it. Which logins are ours is told by their name alone, and by all of it: what merely resembles one is never touched.

The server belongs to one broker: the users of two look alike.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.domain.identity import GrantId, is_id
from broker.domain.secret import Secret
from broker.providers.vault.setup import ENDING, USERNAME

DEADLINE = timedelta(seconds=10)  # of one look, and of the end of one login
MAX_FILE = 64 * 1024

# Between looks while sessions that were told to end do so.
CONFIRM_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, None)

_USERNAME = re.compile(USERNAME)
_HEIR = re.compile(r"[a-z_][a-z0-9_]{0,62}")
# Without what could make a part of a password look like a host, a port or a database: those are told in messages.
_URL = re.compile(r"postgres(?:ql)?://[^:@/?#\s]+(?::[^:@/?#\s]*)?@[A-Za-z0-9._:,%\[\]-]*/[^:@/?#\s]+(?:\?[^#@\s]*)?")

# What a person has to mend first: privileges, names that are not there, objects that depend on the user.
_REFUSALS = ("42", "28", "2B", "0L", "0P")

_LIST = """
SELECT rolname::text,
       CASE WHEN rolvaliduntil < '9999-01-01' THEN greatest(rolvaliduntil, 'epoch') END,
       (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE usesysid = roles.oid)
FROM pg_catalog.pg_roles AS roles
WHERE rolname::text COLLATE "C" ~ %s
ORDER BY 1
"""
_LOOK = """
SELECT (SELECT count(*) FROM pg_catalog.pg_roles WHERE rolname = %s),
       (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE usesysid = %s)
"""

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Login:
    """A login that was made for a grant. `sessions` is how many are open; it may be one that cannot log in any more."""

    name: str
    grant_id: GrantId
    valid_until: datetime | None
    sessions: int


class Logins(Protocol):
    """The logins of one target. Each method ends within its deadline."""

    def list_logins(self) -> Collection[Login]:
        """Every login whose name says that it was made for a grant."""

    def end(self, login: Login) -> None:
        """No new login, no open session, nothing owned, no role; idempotent. Returns only when that was looked at.

        One that cannot be dropped may not log in all the same.
        """


@dataclass(frozen=True, kw_only=True)
class Target:
    """A PostgreSQL of which Vault makes users, and how the broker looks at it. `heir` gets what a user leaves behind.

    The file holds the URL of the connection and its password, and is read again each time, so that it can be changed.
    """

    name: str
    url_file: Path
    heir: str

    def __post_init__(self) -> None:
        if not _HEIR.fullmatch(self.heir):
            raise Invalid("heir must be a PostgreSQL name in lower case", member="heir")


class PostgresLogins:
    """The logins of one PostgreSQL, seen through a connection of its own for each call."""

    def __init__(
        self,
        target: Target,
        *,
        deadline: timedelta = DEADLINE,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._target = target
        self._deadline_s = deadline.total_seconds()
        self._pause = pause or threading.Event().wait

    def list_logins(self) -> Collection[Login]:
        pattern = f"^(?:{USERNAME})$"
        rows = self._within("list the logins", lambda db: db.execute(_LIST, (pattern,)).fetchall())
        return tuple(
            Login(
                name=name,
                grant_id=grant_id,
                valid_until=until and until.astimezone(UTC).replace(microsecond=0),
                sessions=sessions,
            )
            for name, until, sessions in rows
            # Judged once more by what judges it before it is ended.
            if (grant_id := grant_of(name)) is not None
        )

    def end(self, login: Login) -> None:
        # Whoever made this value: what does not have the name of a grant's login is nobody's to end from here.
        if grant_of(login.name) is None or grant_of(login.name) != login.grant_id:
            raise ValueError("not the name of a login that was made for this grant")
        self._within("end a login", lambda db: self._end(db, login.name))

    def _end(self, db: psycopg.Connection, name: str) -> None:
        role = db.execute("SELECT oid FROM pg_catalog.pg_roles WHERE rolname = %s", (name,)).fetchone()
        if role is None:
            return
        failed: psycopg.Error | None = None
        try:
            db.execute("BEGIN")
            for statement in ENDING:
                names = {"user": Identifier(name), "text": Literal(name), "heir": Identifier(self._target.heir)}
                db.execute(SQL(statement).format(**names))
            db.execute("COMMIT")
        except psycopg.Error as problem:
            if problem.sqlstate is None:
                raise
            # Vault may be ending the same user, and be done before us: what is there now says whether it is gone.
            failed = problem
            db.execute("ROLLBACK")
        for pause_s in CONFIRM_PAUSES_S:
            roles, sessions = db.execute(_LOOK, (name, role[0])).fetchone() or (1, 0)
            if not roles and not sessions:
                return
            if roles and failed is not None:
                raise failed
            if pause_s is not None:
                self._pause(pause_s)
        raise ProviderUnavailable(
            f"the database {self._target.name} did not confirm that a login is gone",
            reason=f"{name}: {roles} roles and {sessions} sessions are left",
        )

    def _within(self, doing: str, ask: Callable[[psycopg.Connection], Found]) -> Found:
        """What `ask` answers on a connection that is cut at the deadline, however silent the server is."""
        url = self._url()
        wire: _Wire | None = None
        failure: ProviderRefused | ProviderUnavailable
        try:
            with psycopg.connect(
                url.reveal(),
                autocommit=True,
                prepare_threshold=None,
                connect_timeout=max(2, int(min(5.0, self._deadline_s))),
                application_name="agent-credential-broker",
            ) as db:
                wire = _Wire(db.fileno(), self._deadline_s)
                try:
                    # Theirs alone is what a name means, whatever the agents' users made; and a lock is waited for
                    # no longer than for an answer.
                    db.execute("SET search_path = pg_catalog")
                    db.execute(f"SET statement_timeout = {int(self._deadline_s * 1000)}")
                    return ask(db)
                finally:
                    wire.close()
        except (psycopg.Error, OSError, UnicodeError) as problem:
            failure = self._failure(doing, problem, url, late=wire is not None and wire.was_cut)
        # Out here, so that it has no context: that would be an error whose connection holds the password (INV-30).
        raise failure

    def _failure(
        self, doing: str, problem: Exception, url: Secret, *, late: bool
    ) -> ProviderRefused | ProviderUnavailable:
        state = getattr(problem, "sqlstate", None)
        if late:
            reason = f"it did not answer within {self._deadline_s:g} s"
        elif state is not None and isinstance(problem, psycopg.Error):
            reason = f"{state}: {problem.diag.message_primary}"
        else:
            reason = f"{type(problem).__name__}: {problem}"
        reason = _one_line(reason, without=urlsplit(url.reveal()).password or "")
        if state is not None and state.startswith(_REFUSALS):
            return ProviderRefused(f"the database {self._target.name} refused to {doing}", reason=reason)
        return ProviderUnavailable(f"the database {self._target.name} did not {doing}", reason=reason)

    def _url(self) -> Secret:
        path = self._target.url_file
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_FILE + 1)
            text = target_url(raw.decode("ascii", "replace").strip())
        except OSError as problem:
            reason = f"{path} cannot be read: {problem.strerror}"
        except Invalid as problem:
            reason = f"{path}: {problem.detail}"
        else:
            return Secret(text)
        raise ProviderRefused(
            f"the broker has nothing to log in to the database {self._target.name} with", reason=reason
        )


class _Wire:
    """The socket of a connection, shut after so long: whoever waits for an answer on it then has one."""

    def __init__(self, descriptor: int, deadline_s: float) -> None:
        # A descriptor of its own, so that no other connection is cut that got the same number meanwhile.
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._timer = threading.Timer(deadline_s, self._cut)
        self._timer.daemon = True
        self.was_cut = False
        self._timer.start()

    def _cut(self) -> None:
        self.was_cut = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end was faster

    def close(self) -> None:
        self._timer.cancel()
        self._timer.join()
        self._socket.close()


def grant_of(name: str) -> GrantId | None:
    """The grant that a user of PostgreSQL was made for, if that is what its name says.

    >>> grant_of("jit-grt-01m86tg4a0e00800476mt57fq0-sbA3ajOTUIK8")
    'grt_01m86tg4a0e00800476mt57fq0'
    >>> grant_of("jit-grt-01m86tg4a0e00800476mt57fq0-sbA3ajOTUIK8-x") is None
    True
    """
    # fullmatch: what only contains an id, or begins with one, is somebody else's.
    found = _USERNAME.fullmatch(name)
    if found is None:
        return None
    grant_id = f"grt_{found[1]}"
    return GrantId(grant_id) if is_id(grant_id, "grt") else None


def target_url(text: str) -> str:
    """The URL of a maintenance connection; `Invalid` says what is wrong without showing it."""
    if not _URL.fullmatch(text) or not text.isprintable():
        raise Invalid(
            "it is not postgresql://user:password@host:port/database alone, with odd characters of the password "
            "percent-encoded"
        )
    if any(name in ("password", "passfile", "service") for name, _ in parse_qsl(text.partition("?")[2])):
        raise Invalid(
            "it has a password, a passfile or a service behind its question mark; write the password before @"
        )
    return text


def _one_line(text: str, *, without: str) -> str:
    """For our own log: one line, printable, short, and without the password even if the other side repeats it."""
    for spelled in filter(None, {without, unquote(without)}):
        text = text.replace(spelled, "[not shown]")
    return " ".join(text.split()).encode("ascii", "backslashreplace").decode()[:300]
