"""Bugs that a broker of the tests can be started with, one at a time: each is a mistake that looks like a saving.

They are put in place of the product's functions in the process that `tests.crash.launcher` started. The oracle must
see every one of them; a harness that does not is blind.
"""

from __future__ import annotations

import contextvars
import hashlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import Connection, select

from broker.domain.grant import DynamicSecret, Issued
from broker.domain.lifecycle import GrantState, LeaseState
from broker.domain.task import Task
from broker.providers.base import Handle, IssuedSecret, SecretRequest
from broker.providers.vault import VaultProvider
from broker.services import proofs
from broker.services import tasks as task_service
from broker.services.debts import Debts
from broker.services.reconciliation import Reconciliation
from broker.services.secrets import Intent, Secrets
from broker.store import locks, models
from broker.store.tasks import Tasks, find_task


def seed(name: str) -> None:
    """From now on this process has the bug."""
    BUGS[name]()


def no_task_lock() -> None:
    """TX 1 and TX 3 look at the task and do not hold it, and whoever ends it waits for nobody (INV-12)."""
    hold = locks.hold_for_issuing

    def hold_for_issuing(
        db: Connection, *, agents: Collection[str], tasks: Collection[str], counted: Collection[str] = ()
    ) -> None:
        hold(db, agents=agents, tasks=(), counted=counted)

    def only_look(_self: Tasks, db: Connection, ids: Collection[str]) -> Mapping[str, Task]:
        found = {task_id: find_task(db, task_id) for task_id in ids}
        return {task_id: task for task_id, task in found.items() if task is not None}

    locks.hold_for_issuing = hold_for_issuing
    Tasks.hold_shared = only_look
    task_service.tasks.hold = lambda _db, _ids: None


def a_204_is_death() -> None:
    """The token's death is queued, and what is queued is taken for done (INV-04)."""

    def revoke(self: VaultProvider, handle: Handle | None, reference: str | None) -> None:
        if handle is not None:
            self._calls.revoke_accessor(handle.value)

    VaultProvider.revoke = revoke
    del VaultProvider.revoke_many


def check_then_insert() -> None:
    """A proof is looked for, and inserted if it was not there (INV-20)."""
    consumed = models.table_of(models.ConsumedProof)

    def consume(db: Connection, kind: str, key: str, *, forget_at: datetime, now: datetime) -> bool:
        digest = hashlib.sha256(key.encode()).hexdigest()
        if db.execute(select(consumed.c.kind).where(consumed.c.key_sha256 == digest)).first() is not None:
            return False
        time.sleep(0.2)
        row = {"kind": kind, "key_sha256": digest, "forget_at": forget_at}
        dialect = proofs.sqlite if db.dialect.name == "sqlite" else proofs.postgresql
        db.execute(dialect.insert(consumed).values(row).on_conflict_do_nothing())
        return True

    proofs.consume = consume


def no_reconcile() -> None:
    """What is alive and in no row is not looked for (INV-03)."""
    Reconciliation._owe_what_nobody_owns = lambda _self, _name, _strangers, _now: 0


def secret_before_commit() -> None:
    """The secret is read before what revokes it is durable: one round trip earlier (INV-02)."""
    prepare, issue = VaultProvider.prepare, VaultProvider.issue
    read: dict[str, IssuedSecret] = {}

    def prepare_and_read(self: VaultProvider, request: SecretRequest, ttl: timedelta) -> Handle:
        handle = prepare(self, request, ttl)
        read[handle.value] = issue(self, handle, request, ttl)
        return handle

    VaultProvider.prepare = prepare_and_read
    VaultProvider.issue = lambda _self, handle, _request, _ttl: read.pop(handle.value)


def hand_out_before_confirm() -> None:
    """The answer leaves while TX 3 is on its way (INV-01)."""
    confirm: Callable[..., Issued] = Secrets._confirm

    def soon(self: Secrets, intent: Intent, secret: IssuedSecret, revocation_class: str) -> Issued:
        def commit() -> None:
            time.sleep(0.5)
            confirm(self, intent, secret, revocation_class)

        threading.Thread(target=contextvars.copy_context().run, args=(commit,), daemon=True).start()
        grant, lease = intent.grant, intent.lease
        now, ends_at = self._clock(), min(grant.expires_at, secret.expires_at)
        return Issued(
            grant=replace(grant, state=GrantState.ACTIVE, issued_at=now, expires_at=ends_at),
            credential=DynamicSecret(type="database", data=secret.data, expires_at=ends_at),
            lease=replace(lease, state=LeaseState.HELD, revocation_class=revocation_class),
        )

    Secrets._confirm = soon


def nothing_arrives_late() -> None:
    """A secret nobody heard of is dead as soon as its token is (INV-04)."""
    died_at = Debts._died_at
    Debts._died_at = lambda self, lease, now: died_at(self, replace(lease, unknown=False), now)


BUGS: Mapping[str, Callable[[], None]] = {
    "no task lock": no_task_lock,
    "a 204 is death": a_204_is_death,
    "check, then insert": check_then_insert,
    "no reconcile": no_reconcile,
    "secret before commit": secret_before_commit,
    "hand out before TX 3": hand_out_before_confirm,
    "nothing arrives late": nothing_arrives_late,
}
