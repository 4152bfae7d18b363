"""Clients of a broker that dies under them, and the log of what they received."""

from __future__ import annotations

import copy
import random
import threading
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import httpx

from tests.crash.outside import ORDERS, World
from tests.house import CRM
from tests.processes import JWT_BEARER, BrokerProcess

# What a broker may say while its store or the outside does not answer, or when somebody else was first.
_MAY_SAY = {201, 200, 409, 502, 503}


@dataclass(frozen=True)
class Received:
    """One credential in a client's hand."""

    grant_id: str
    task_id: str
    key: str
    resource: str
    credential: Mapping[str, Any] = field(repr=False)


@dataclass
class Log:
    """What was answered is certain; what was only asked may have happened or not."""

    received: list[Received] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)  # task -> the state it was answered to have
    revoked: set[str] = field(default_factory=set)  # grants that were answered to be
    proofs: Counter[str] = field(default_factory=Counter)  # how often a token for one use was accepted
    trouble: list[str] = field(default_factory=list)
    figures: Counter[str] = field(default_factory=Counter)

    def so_far(self) -> Log:
        """As it is now, while clients go on."""
        return replace(self, **{entry.name: copy.copy(getattr(self, entry.name)) for entry in fields(self)})


class Client:
    """Says one thing after another, and keeps what it was told."""

    def __init__(self, broker: BrokerProcess, world: World, log: Log, choose: random.Random) -> None:
        self.broker = broker
        self.world = world
        self.log = log
        self.choose = choose
        self._http = httpx.Client(base_url=broker.url, timeout=30)

    def close(self) -> None:
        self._http.close()

    def open_task(self) -> str | None:
        body = {"purpose": "crash", "agents": ["summarizer", "courier"], "deadline_s": 3600}
        answer = self._say("/v1/tasks", "pipeline", body)
        if answer is None or answer.status_code != 201:
            return None
        task_id = str(answer.json()["id"])
        self.log.opened.add(task_id)
        return task_id

    def ask(self, task_id: str, *, ttl_s: int, resource: str = ORDERS, key: str | None = None) -> Received | None:
        """A credential, and whether it opens what it is for; None for every other answer, and for none."""
        key = key or uuid.uuid4().hex
        scope = "select" if resource == ORDERS else "contacts:read"
        body = {"task_id": task_id, "resource": resource, "scopes": [scope], "ttl_s": ttl_s}
        answer = self._say("/v1/grants", "summarizer", body, **{"Idempotency-Key": key})
        if answer is None or answer.status_code != 201:
            return None
        return self._received(answer, key)

    def ask_once(self, task_id: str, token: str, *, ttl_s: int) -> Received | None:
        """The same with a workload token for one use."""
        body = {"task_id": task_id, "resource": ORDERS, "scopes": ["select"], "ttl_s": ttl_s}
        try:
            headers = {"Authorization": f"Bearer {token}"}
            answer = self._http.post("/v1/grants", headers=headers, json=body)
        except httpx.TransportError:
            return None
        if answer.status_code == 401:
            return None
        # Whatever else it came to, it came in.
        self.log.proofs[token] += 1
        return self._received(answer, uuid.uuid4().hex) if answer.status_code == 201 else None

    def _received(self, answer: httpx.Response, key: str) -> Received:
        grant, credential = answer.json()["grant"], answer.json()["credential"]
        received = Received(grant["id"], grant["task_id"], key, grant["resource"], credential)
        self.log.received.append(received)
        self.log.figures["credentials received"] += 1
        if received.resource == ORDERS and self.world.opens(credential["data"]):
            self.log.figures["logins that worked"] += 1
        return received

    def end(self, task_id: str, how: str) -> None:
        """`complete`, `fail` or `cancel`."""
        answer = self._say(f"/v1/tasks/{task_id}/{how}", "pipeline", {"reason": "crash"} if how != "complete" else None)
        if answer is not None and answer.status_code == 200:
            self.log.ended[task_id] = answer.json()["outcome"]
            self._read(answer.json())

    def revoke(self, grant_id: str) -> None:
        """As an admin does."""
        answer = self._say(f"/v1/grants/{grant_id}/revoke", "ada", {"reason": "crash"})
        if answer is not None and answer.status_code == 200:
            # One that had expired is answered to have, whether or not a sweep came by.
            if answer.json()["outcome"] == "revoked":
                self.log.revoked.add(grant_id)
            self._read(answer.json())

    def _read(self, receipt: Mapping[str, Any]) -> None:
        """What it calls dead must be dead already."""
        dead = {
            line["grant_id"] for line in receipt["grants"] if line["confirmed_dead_at"] and line["provider"] == "vault"
        }
        if dead:
            for name, grant_id in self.world.logins().items():
                if grant_id in dead:
                    self.log.trouble.append(f"a receipt calls {grant_id} dead, and {name} can log in")

    def _say(self, path: str, by: str, body: Any = None, **headers: str) -> httpx.Response | None:
        self.log.figures["requests"] += 1
        try:
            answer = self._http.post(path, headers=self.broker.as_(by, **headers), json=body)
        except httpx.TransportError:
            self.log.figures["unanswered"] += 1
            return None
        if answer.status_code not in _MAY_SAY:
            self.log.trouble.append(f"{path} was answered with {answer.status_code}: {answer.text[:300]}")
        if answer.status_code >= 400:
            self.log.figures["refused"] += 1
        return answer

    def is_active(self, received: Received) -> bool:
        token = received.credential["token"]
        assertion = {"client_assertion_type": JWT_BEARER, "client_assertion": self.broker.deployment.token("crm-api")}
        answer = self._http.post("/oauth2/introspect", data={"token": token, **assertion})
        return answer.status_code != 200 or bool(answer.json()["active"])

    def job(self, *, ttl_s: int, ending: str) -> Received | None:
        """A task with a database login and a token, ended as it is told: `revoke` is an admin's, `leave` nobody's."""
        task_id = self.open_task()
        if task_id is None:
            return None
        key = uuid.uuid4().hex
        login = self.ask(task_id, ttl_s=ttl_s, key=key)
        self.ask(task_id, ttl_s=ttl_s, resource=CRM)
        if login is None and self.choose.random() < 0.5:
            login = self.ask(task_id, ttl_s=ttl_s, key=key)
        if ending == "revoke":
            if login is not None:
                self.revoke(login.grant_id)
        elif ending != "leave":
            self.end(task_id, ending)
        return login


class Crowd:
    """Several clients at once, until they are told to stop or their broker is gone."""

    def __init__(self, broker: BrokerProcess, world: World, log: Log, seed: str, *, clients: int = 3) -> None:
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=(broker, world, log, random.Random(f"{seed} {number}")), daemon=True
            )
            for number in range(clients)
        ]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client was not answered for a minute"

    def _run(self, broker: BrokerProcess, world: World, log: Log, choose: random.Random) -> None:
        client = Client(broker, world, log, choose)
        try:
            while not self._stopped.wait(0.05):
                ttl_s = choose.choice((3, 40, 40))
                client.job(ttl_s=ttl_s, ending=choose.choice(("complete", "cancel", "fail", "revoke", "leave")))
        except Exception as problem:
            log.trouble.append(f"{type(problem).__name__}: {problem}")
        finally:
            client.close()
