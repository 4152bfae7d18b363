"""Named points at which a broker process of the tests dies, loses what it was told, waits, or has its store fail.

The product has no hooks: `arm` wraps the functions at its seams, in the process of `tests.crash.launcher` and nowhere
else. A fault is a file in a directory: the first to pass its point takes the file away and with it the fault, so that
each happens once, across processes and restarts.

There are two kinds of points. A commit is named by what it makes durable; what can happen happens at the commit
itself, so a database error before it is a rollback and one after it an unknown outcome. A call is one to the outside.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg

from broker.domain.errors import ProviderUnavailable
from broker.providers.vault import VaultProvider
from broker.providers.vault import provider as vault
from broker.providers.vault.calls import Calls
from broker.providers.vault.ending import Ending
from broker.services import debts, issuance, reconciliation, revocation, sweeper, tasks
from broker.services.debts import Debts
from broker.services.secrets import Secrets
from broker.store.database import Database

COMMITS = {
    "intent": "TX 1: a grant is approved, a lease intended",
    "handle": "TX 2: what revokes the secret",
    "confirm": "TX 3: lease held and grant active",
    "give up": "an issue that failed is owed",
    "recover": "an intent whose issuer did not come back is owed",
    "end": "a task ends, with everything under it",
    "revoke": "a grant is revoked",
    "expire": "time ended a grant",
    "claim": "debts are claimed for paying",
    "fail": "a debt was not paid",
    "release": "a debt is paid",
    "adopt": "what nobody owns is owed",
    "gone": "what is held and is gone is ended",
    "looked": "a look at the provider is complete",
}
CALLS = {
    "prepare": "the child token is made",
    "issue": "the secret is read",
    "revoke accessor": "the child token is revoked",
    "revoke lease": "the lease is revoked with sync",
    "look up": "token and lease are looked up",
    "list": "what is alive is listed",
}
ANSWER = "hand out"  # between TX 3 and the answer

AT_A_COMMIT = ("kill before", "kill after", "error before", "error after", "delay before")
AT_A_CALL = ("kill before", "kill after", "refuse", "lose", "delay before")
LATE = ("late", "leave")  # only where something is made
# What leaves a secret that nobody heard of comes first, because it is owed until it would have ended by itself.
CELLS: tuple[tuple[str, str], ...] = (
    *((point, action) for point in ("prepare", "issue") for action in LATE),
    *((point, action) for point in CALLS for action in AT_A_CALL),
    *((point, action) for point in COMMITS for action in AT_A_COMMIT),
    (ANSWER, "kill before"),
    (ANSWER, "delay before"),
)
DELAY_S = 1.5
_DELAYS_S = {"delay before": DELAY_S, "linger before": 3 * DELAY_S}

# What takes minutes in production takes seconds here, in the same order: every deadline of one issue is shorter than
# the time after which its issuer is taken for dead, and what can still arrive has arrived before anything is settled.
ISSUE_WITHIN = timedelta(seconds=5)
CLAIMED_FOR = timedelta(seconds=3)
SETTLES_AFTER = timedelta(seconds=6)
OLD_ENOUGH = timedelta(seconds=7)
LOOKS_EVERY = timedelta(seconds=1)

# What the transaction that is open in this context is about to make durable.
_making: ContextVar[str | None] = ContextVar("making", default=None)


@dataclass(frozen=True)
class Faults:
    """The faults of one deployment: set by a test, met by its brokers."""

    directory: Path

    @property
    def _met(self) -> Path:
        return self.directory / "met.log"

    def set(self, point: str, action: str) -> None:
        self.directory.mkdir(exist_ok=True)
        unseen = self.directory / f".{point}"
        unseen.write_text(action)
        unseen.rename(self.directory / point)

    def unset(self) -> None:
        for point in (*COMMITS, *CALLS, ANSWER):
            (self.directory / point).unlink(missing_ok=True)

    def take(self, point: str) -> str | None:
        """What is to happen here, if something is; to one who asks, once."""
        with contextlib.suppress(FileNotFoundError):
            action = (self.directory / point).read_text()
            (self.directory / point).unlink()
            with self._met.open("a") as met:
                met.write(json.dumps([point, action]) + "\n")
            return action
        return None

    def met(self) -> list[tuple[str, str]]:
        if not self._met.exists():
            return []
        return [tuple(json.loads(line)) for line in self._met.read_text().splitlines()]


def arm(faults: Faults) -> None:
    """Shorten what is waited for, and wrap every seam. For this process, from now on."""
    _shorten()
    _wrap_commits(faults)
    _wrap_calls(faults)


def _shorten() -> None:
    from broker.services import secrets

    secrets.ISSUE_WITHIN = ISSUE_WITHIN
    debts._CLAIMED_FOR = CLAIMED_FOR
    debts._LOOK_AGAIN = LOOKS_EVERY
    debts.OLD_ENOUGH = reconciliation.OLD_ENOUGH = OLD_ENOUGH
    reconciliation.EVERY = LOOKS_EVERY
    vault.MAX_REQUEST, vault.MARGIN = SETTLES_AFTER, timedelta(0)


# --- Commits ------------------------------------------------------------------------------------------------------


def _wrap_commits(faults: Faults) -> None:
    opened = Database.__init__

    @functools.wraps(opened)
    def open_(self: Database, *arguments: Any, **settings: Any) -> None:
        opened(self, *arguments, **settings)
        dialect = self.engine.dialect
        dialect.do_commit = _committing(faults, dialect.do_commit, dialect.loaded_dbapi)
        dialect.do_rollback = _forgetting(dialect.do_rollback)

    Database.__init__ = open_
    # What is called in a transaction, and only when it has something to write.
    for owner, name, point in (
        (issuance, "insert_leases", "intent"),
        (debts, "end_grants", "recover"),
        (tasks, "end_tasks", "end"),
        (revocation, "end_with_descendants", "revoke"),
        (sweeper, "end_grants", "expire"),
        (Debts, "_released", "release"),
        (debts.leases, "claim_owed", "claim"),
        (reconciliation, "_debt", "adopt"),
        (reconciliation, "end_grants", "gone"),
        (reconciliation.leases, "looked", "looked"),
    ):
        setattr(owner, name, _naming_what_it_wrote(getattr(owner, name), point))
    # What opens one transaction and does nothing else.
    for owner, name, point in (
        (Secrets, "_commit_handle", "handle"),
        (Secrets, "_confirm", "confirm"),
        (Secrets, "_give_up", "give up"),
        (Debts, "_failed", "fail"),
    ):
        setattr(owner, name, _naming(getattr(owner, name), point))


def _naming(function: Callable[..., Any], point: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def named(*arguments: Any, **more: Any) -> Any:
        _making.set(point)
        try:
            return function(*arguments, **more)
        finally:
            _making.set(None)

    return named


def _naming_what_it_wrote(function: Callable[..., Any], point: str) -> Callable[..., Any]:
    """The point is that of the transaction in which the function answered that it wrote something."""

    @functools.wraps(function)
    def named(*arguments: Any, **more: Any) -> Any:
        answer = function(*arguments, **more)
        # What answers nothing was given what it wrote.
        if answer or (answer is None and arguments[1]):
            _making.set(point)
        return answer

    return named


def _committing(faults: Faults, commit: Callable[[Any], None], dbapi: Any) -> Callable[[Any], None]:
    def commit_(connection: Any) -> None:
        # On PostgreSQL a reader's commit ends nothing.
        driver = getattr(connection, "driver_connection", connection)
        if isinstance(driver, psycopg.Connection) and driver.autocommit:
            commit(connection)
            return
        point = _making.get()
        _making.set(None)
        action = faults.take(point) if point else None
        with _around(action):
            if action == "error before":
                raise dbapi.OperationalError("the connection broke before the commit")
            commit(connection)
            if action == "error after":
                raise dbapi.OperationalError("the connection broke before the answer to the commit")

    return commit_


def _forgetting(rollback: Callable[[Any], None]) -> Callable[[Any], None]:
    def rollback_(connection: Any) -> None:
        _making.set(None)
        rollback(connection)

    return rollback_


# --- Calls to the outside -----------------------------------------------------------------------------------------


def _wrap_calls(faults: Faults) -> None:
    for owner, name, point in (
        (VaultProvider, "_child_token", "prepare"),
        (VaultProvider, "issue", "issue"),
        (Calls, "revoke_accessor", "revoke accessor"),
        (Calls, "revoke_lease", "revoke lease"),
        (Ending, "_alive", "look up"),
        (VaultProvider, "list_live", "list"),
    ):
        setattr(owner, name, _calling(getattr(owner, name), point, faults))
    obtain = Secrets.obtain

    @functools.wraps(obtain)
    def obtain_(self: Secrets, intent: Any) -> Any:
        issued = obtain(self, intent)
        with _around(faults.take(ANSWER)):
            return issued

    Secrets.obtain = obtain_


def _calling(call: Callable[..., Any], point: str, faults: Faults) -> Callable[..., Any]:
    @functools.wraps(call)
    def call_(*arguments: Any, **more: Any) -> Any:
        action = faults.take(point)
        if action == "refuse":
            raise _unanswered(point)
        if action in LATE:
            _beside(lambda: call(*arguments, **more), after_s=DELAY_S if action == "late" else 0)
            raise _unanswered(point)
        with _around(action):
            answer = call(*arguments, **more)
        if action == "lose":
            raise _unanswered(point)
        return answer

    return call_


def _beside(call: Callable[[], Any], *, after_s: float) -> None:
    """The request stays under way when nobody waits for it any more."""

    def run() -> None:
        time.sleep(after_s)
        # What comes of it, nobody hears.
        with contextlib.suppress(Exception):
            call()

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(0.3)


def _unanswered(point: str) -> ProviderUnavailable:
    return ProviderUnavailable("Vault did not answer", reason=f"the connection broke: {point}")


@contextmanager
def _around(action: str | None) -> Iterator[None]:
    if action == "kill before":
        _die()
    if action in _DELAYS_S:
        time.sleep(_DELAYS_S[action])
    try:
        yield
    finally:
        # However it came out.
        if action == "kill after":
            _die()


def _die() -> None:
    """As a power cut does: every process of this broker at once."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
    # The signal may reach another thread first; this one does nothing more.
    threading.Event().wait()
