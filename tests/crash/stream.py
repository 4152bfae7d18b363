"""Clients that use a broker until it dies under them, what they remember, and what must be true afterwards."""

import random
import threading
from collections import Counter
from dataclasses import dataclass, field

import httpx
import sqlalchemy as sa

from tests.house import CRM
from tests.processes import BrokerProcess, Granted

CLIENTS = 8


@dataclass(frozen=True)
class Asked:
    """A request for a grant, so that it can be repeated to the letter."""

    task_id: str
    key: str

    def at(self, broker: BrokerProcess, client: httpx.Client) -> httpx.Response:
        body = {"task_id": self.task_id, "resource": CRM, "scopes": ["contacts:read"]}
        headers = broker.as_("summarizer", **{"Idempotency-Key": self.key})
        return client.post("/v1/grants", headers=headers, json=body)


@dataclass
class Remembered:
    """What the clients know: what was answered is certain, what was only asked may have happened or not."""

    opened: set[str] = field(default_factory=set)
    delivered: dict[str, Granted] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # idempotency key -> grant
    unanswered: set[Asked] = field(default_factory=set)
    completed: dict[str, dict] = field(default_factory=dict)
    completing: set[str] = field(default_factory=set)
    revoked: set[str] = field(default_factory=set)
    revoking: set[str] = field(default_factory=set)
    refused: list[httpx.Response] = field(default_factory=list)

    @property
    def answers(self) -> int:
        return len(self.opened) + len(self.delivered) + len(self.completed) + len(self.revoked)

    def delivered_for(self, ask: Asked, answer: httpx.Response) -> None:
        granted = Granted.of(answer.json())
        assert self.keys.setdefault(ask.key, granted.id) == granted.id, "one key, two grants (INV-06)"
        self.delivered[granted.id] = granted
        self.unanswered.discard(ask)


class Stream:
    """Several clients at once, each opening tasks, asking under them, handing back and completing."""

    def __init__(self, broker: BrokerProcess, remembered: Remembered, *, seed: int) -> None:
        self.broker = broker
        self.remembered = remembered
        self._stopped = threading.Event()
        self._trouble: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}-{number}"),), daemon=True)
            for number in range(CLIENTS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for the clients; raises what none of them should have met."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)
        if self._trouble:
            raise self._trouble[0]

    def _run(self, choose: random.Random) -> None:
        with httpx.Client(base_url=self.broker.url, timeout=30) as client:
            while not self._stopped.is_set():
                try:
                    self._job(choose, client)
                except httpx.TransportError:
                    # The broker died; what was asked may have been done.
                    return
                except BaseException as problem:
                    self._trouble.append(problem)
                    return

    def _job(self, choose: random.Random, client: httpx.Client) -> None:
        broker, remembered = self.broker, self.remembered
        body = {"purpose": "crash", "agents": ["summarizer"], "deadline_s": 3600}
        opened = client.post("/v1/tasks", headers=broker.as_("pipeline"), json=body)
        if not self._answered(opened, 201):
            return
        task_id = opened.json()["id"]
        remembered.opened.add(task_id)
        held = []
        for _ in range(choose.randint(1, 4)):
            ask = Asked(task_id, f"{choose.getrandbits(64):016x}")
            remembered.unanswered.add(ask)
            answer = ask.at(broker, client)
            if self._answered(answer, 201):
                remembered.delivered_for(ask, answer)
                held.append(remembered.keys[ask.key])
        if held and choose.random() < 0.4:
            grant_id = choose.choice(held)
            remembered.revoking.add(grant_id)
            if self._answered(client.post(f"/v1/grants/{grant_id}/revoke", headers=broker.as_("summarizer")), 200):
                remembered.revoked.add(grant_id)
        if choose.random() < 0.7:
            remembered.completing.add(task_id)
            ended = client.post(f"/v1/tasks/{task_id}/complete", headers=broker.as_("pipeline"))
            if self._answered(ended, 200):
                remembered.completed[task_id] = ended.json()

    def _answered(self, answer: httpx.Response, status: int) -> bool:
        if answer.status_code == status:
            return True
        # While its store is away the broker may say so, and when to come back; and nothing else.
        assert answer.status_code == 503, (answer.status_code, answer.text)
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["code"] == "unavailable"
        self.remembered.refused.append(answer)
        return False


def retry_what_was_not_answered(broker: BrokerProcess, remembered: Remembered) -> None:
    """INV-06: the same key again gives the grant that was made, or makes it now; or its task has ended meanwhile."""
    with httpx.Client(base_url=broker.url, timeout=30) as client:
        for ask in sorted(remembered.unanswered, key=lambda ask: ask.key):
            answer = ask.at(broker, client)
            if answer.status_code == 201:
                remembered.delivered_for(ask, answer)
            else:
                assert answer.status_code == 409, answer.text
                assert ask.task_id in remembered.completing
                remembered.unanswered.discard(ask)


def check(broker: BrokerProcess, remembered: Remembered) -> None:
    """The oracle: what the clients were told against what is in the database, and what the broker says of it now."""
    engine = sa.create_engine(broker.deployment.store_url)
    with engine.connect() as db:
        tasks = {row.id: row for row in db.execute(sa.text("SELECT id, state FROM tasks"))}
        grants = {row.id: row for row in db.execute(sa.text("SELECT id, task_id, state, jti FROM grants"))}
        events = list(db.execute(sa.text("SELECT type, task_id, grant_id FROM events")))
        made = dict(db.execute(sa.text("SELECT made_id, count(*) FROM idempotency_keys GROUP BY made_id")).all())
    engine.dispose()
    by_grant = Counter((event.grant_id, event.type) for event in events if event.grant_id)
    by_task = Counter((event.task_id, event.type) for event in events if event.type.startswith("task."))

    for granted in remembered.delivered.values():
        assert granted.id in grants, "a credential left before its grant was durable (INV-01)"
    for grant_id in remembered.revoked:
        assert grants[grant_id].state == "revoked", "a revocation that was answered was forgotten (INV-23)"
    for task_id, receipt in remembered.completed.items():
        assert tasks[task_id].state == "completed", "an end that was answered was forgotten (INV-23)"
        in_rows = {grant.id for grant in grants.values() if grant.task_id == task_id}
        assert {line["grant_id"] for line in receipt["grants"]} == in_rows, "the receipt left one out"
    assert remembered.opened <= set(tasks)

    for grant in grants.values():
        # Nothing is live under a task that ended (INV-12) ...
        assert tasks[grant.task_id].state == "active" or grant.state != "active"
        # ... each change has its event, once, in the same transaction (INV-32) ...
        assert by_grant[grant.id, "grant.issued"] == 1
        assert by_grant[grant.id, "grant.revoked"] == (1 if grant.state == "revoked" else 0)
        # ... and each was asked for under a key of its own (INV-06).
        assert made[grant.id] == 1
    for task in tasks.values():
        assert by_task[task.id, "task.opened"] == 1
        assert by_task[task.id, "task.completed"] == (1 if task.state == "completed" else 0)
    # No event speaks of what is not there.
    assert {grant_id for grant_id, _ in by_grant} == set(grants)
    assert {task_id for task_id, _ in by_task} == set(tasks)
    assert set(made) == set(grants)

    uncertain = remembered.revoking - remembered.revoked
    with httpx.Client(base_url=broker.url, timeout=30) as client:
        for granted in remembered.delivered.values():
            ended = granted.task_id in remembered.completed or granted.id in remembered.revoked
            if ended:
                assert not is_active(broker, client, granted), "what was ended is live again (INV-23)"
            elif granted.id not in uncertain and granted.task_id not in remembered.completing:
                assert is_active(broker, client, granted), "a credential that was handed out opens nothing"


def is_active(broker: BrokerProcess, client: httpx.Client, granted: Granted) -> bool:
    answer = client.post("/oauth2/introspect", data={"token": granted.token}, headers=broker.as_("crm-api"))
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["active"])
