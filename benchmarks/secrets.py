"""Secrets of a real OpenBao through the broker, beside the same secrets read from it directly, in the same run.

The secrets are logins that OpenBao makes at a real PostgreSQL. What stands beside the broker is the least that could be
done instead: to read with a token that is there already; and what whoever wants to revoke each by itself has to do, to
make a token for each and read with that. No figure of an end is given before nobody it was about can log in any more.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from benchmarks import load, openbao
from benchmarks.servers import Bench
from broker.domain.catalogue import Resource
from broker.domain.clock import system_clock
from broker.domain.identity import new_id
from broker.domain.lease import Lease, RevocationClass, Urgency
from broker.domain.lifecycle import LeaseState
from broker.providers.vault import SecretSource, VaultSettings
from broker.providers.vault.setup import DatabaseRole, Layout, app_role, policies_and_token_roles
from broker.store import leases
from broker.wiring import Broker, build

RESOURCE = "urn:db:orders:readonly"
CLIENTS = 16

_TABLE = {"engine": "database", "role": "jit-orders-ro"}
_SOURCE = SecretSource.parse(_TABLE)
_PREFIX = f"{_SOURCE.path}/"
_ADMINISTRATOR, _GROUP = "vault_admin", "jit_orders_ro"
_POLICY = f"""@id("read-orders")
permit (principal, action == Action::"select", resource == Resource::"{RESOURCE}")
when {{ principal.owner == "crm-team" && context.ttl_s <= 600 && context.task.purpose like "*orders*" }};"""
_LIFE_S = 600  # of role and grant alike, and longer than any measurement
_AGENTS_A_TASK = 100
_WARM = 20
_PATIENCE_S = 60
_LOOK_EVERY_S = 0.02
_RECEIPT_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Outside:
    """An OpenBao that makes logins at a PostgreSQL, and three ways to its secrets.

    `reader` reads them; `maker` makes tokens that read them, as the broker's own does; by `login` the broker logs in.
    """

    bao: openbao.OpenBao
    target: str
    reader: str
    maker: str
    login: VaultSettings

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.bao.port}"

    def read(self, token: str) -> bytes:
        return load.get(self.host, f"/v1/{_SOURCE.path}", token=token)

    def make_token(self) -> bytes:
        """What the broker asks for too, but for the grant's name in it."""
        body = {"ttl": f"{_LIFE_S}s", "explicit_max_ttl": f"{_LIFE_S}s", "renewable": False}
        return load.post(self.host, "/v1/auth/token/create/jit", json.dumps(body).encode(), token=self.maker)

    def read_with_what_was_made(self, answer: bytes) -> bytes:
        return self.read(json.loads(answer)["auth"]["client_token"])

    def logins(self) -> int:
        """How many users PostgreSQL has that were made for somebody."""
        of_agents = "rolcanlogin AND NOT rolsuper AND rolname <> %s AND pg_has_role(oid, %s, 'member')"
        question = f"SELECT count(*) FROM pg_roles WHERE {of_agents}"
        return self._count(question, _ADMINISTRATOR, _GROUP)

    def has_login(self, name: str) -> bool:
        return self._count("SELECT count(*) FROM pg_roles WHERE rolname = %s", name) > 0

    def _count(self, question: str, *values: str) -> int:
        with psycopg.connect(dsn(self.target), autocommit=True) as db:
            row = db.execute(question, values).fetchone()
        return int(row[0]) if row else 0

    def revoke_all(self) -> None:
        """With one request, answered when it is done."""
        self.bao.root("POST", f"sys/leases/revoke-prefix/{_SOURCE.path}", {"sync": True})

    def revoke_tokens(self) -> None:
        """All that were made for one secret each, and so what was read with them; answered when both are gone."""
        self.bao.root("POST", "sys/leases/revoke-prefix/auth/token/create/jit", {"sync": True})
        ends_at = time.monotonic() + _PATIENCE_S
        while self.logins() and time.monotonic() < ends_at:
            time.sleep(_LOOK_EVERY_S / 4)

    def require(self, logins: int) -> None:
        found = self.logins()
        if found != logins:
            raise SystemExit(f"PostgreSQL has {found} logins that were made for somebody, instead of {logins}")


@contextmanager
def outside(directory: Path, target: str) -> Iterator[Outside]:
    """Both set up as `broker vault setup` does; OpenBao ends with the block. `target`: the URL of an empty database."""
    layout = Layout(sources=(_SOURCE,), max_ttl=timedelta(seconds=_LIFE_S))
    role = DatabaseRole(
        source=_SOURCE,
        connection="orders",
        member_of=_GROUP,
        heir="jit_orders_heir",
        max_ttl=timedelta(seconds=_LIFE_S),
    )
    with psycopg.connect(dsn(target), autocommit=True) as db:
        db.execute(role.target_sql(administrator=_ADMINISTRATOR))
    with openbao.running(directory, openbao.ON_RAFT) as bao:
        bao.root("POST", "sys/mounts/database", {"type": "database"})
        url = sa.make_url(target)
        connection = f"host={url.query['host']} dbname={url.database} user={{{{username}}}} password={{{{password}}}}"
        body = {
            "plugin_name": "postgresql-database-plugin",
            "allowed_roles": ["jit-orders-ro"],
            "connection_url": connection,
            "username": _ADMINISTRATOR,
            "password": secrets.token_hex(8),
        }
        bao.root("POST", "database/config/orders", body)
        for request in (*policies_and_token_roles(layout), *app_role(layout), *role.requests()):
            bao.root("POST", request.path, request.body)
        role_id = bao.root("GET", "auth/approle/role/jit-broker/role-id")["data"]["role_id"]
        secret_id = bao.root("POST", "auth/approle/role/jit-broker/secret-id")["data"]["secret_id"]
        files = {"role_id_file": directory / "role-id", "secret_id_file": directory / "secret-id"}
        for file, text in zip(files.values(), (role_id, secret_id), strict=True):
            file.touch(mode=0o600)
            file.write_text(text)
        table = {
            "address": f"http://127.0.0.1:{bao.port}",
            "auth": {"method": "approle", **{name: str(file) for name, file in files.items()}},
            "lease_prefix_exclusive": True,
        }
        yield Outside(
            bao=bao,
            target=target,
            reader=_token(bao, layout.child_policy),
            maker=_token(bao, layout.broker_policy),
            login=VaultSettings.parse(table),
        )


def with_secrets(bench: Bench, beyond: Outside) -> Bench:
    """The same broker with one more resource and policy, and the way to OpenBao."""
    of_bench = bench.settings.catalogue
    resource = Resource(
        identifier=RESOURCE, provider="vault", scopes=("select",), max_ttl_s=_LIFE_S, settings=dict(_TABLE)
    )
    catalogue = replace(
        of_bench,
        resources=(*of_bench.resources, resource),
        policies={**of_bench.policies, "orders.cedar": _POLICY},
    )
    return replace(bench, settings=replace(bench.settings, vault=beyond.login, catalogue=catalogue))


@dataclass(frozen=True, kw_only=True)
class House:
    """A broker that serves, with OpenBao beyond it; an orchestrator and an admin who speak to it."""

    bench: Bench
    outside: Outside
    pipeline: load.Line
    ada: load.Line

    def open_task(self, agents: Sequence[str]) -> str:
        body = {"purpose": "summarise the orders of May", "agents": list(agents), "deadline_s": 86_400}
        return str(json.loads(self.pipeline.ask("POST", "/v1/tasks", json.dumps(body).encode()))["id"])

    def complete(self, task: str) -> Any:
        """The receipt, when everything is confirmed dead."""
        receipt = json.loads(self.pipeline.ask("POST", f"/v1/tasks/{task}/complete"))
        return self.settled(task, receipt)

    def settled(self, task: str, receipt: Any) -> Any:
        ends_at = time.monotonic() + _PATIENCE_S
        while receipt["totals"]["outstanding"]:
            if time.monotonic() > ends_at:
                raise SystemExit(f"after {_PATIENCE_S} s this is not confirmed dead: {receipt['totals']}")
            time.sleep(_RECEIPT_EVERY_S)
            receipt = json.loads(self.pipeline.ask("GET", f"/v1/tasks/{task}/receipt"))
        return receipt

    def owes(self) -> bool:
        """Asked so that it costs the broker little: a receipt of hundreds of lines keeps it from paying them."""
        return bool(json.loads(self.ada.ask("GET", "/v1/leases?state=revoking&limit=1"))["items"])

    def state_of(self, task: str) -> str:
        return str(json.loads(self.ada.ask("GET", f"/v1/tasks/{task}"))["state"])

    def requests(self, task: str, agents: Sequence[str]) -> list[bytes]:
        return [
            load.post(f"127.0.0.1:{self.bench.port}", "/v1/grants", _asking(task), token=self.bench.token(agent))
            for agent in agents
        ]

    def wait_until_it_issues(self) -> None:
        """It issues nothing before it has looked at what lives."""
        task = self.open_task(["agent-0"])
        (request,) = self.requests(task, ["agent-0"])
        ends_at = time.monotonic() + _PATIENCE_S
        while "credential" not in (answer := json.loads(load.once(self.bench.port, request))):
            if time.monotonic() > ends_at:
                raise SystemExit(f"the broker gives no secret: {answer}")
            time.sleep(_LOOK_EVERY_S)
        self.complete(task)


@contextmanager
def house(bench: Bench, beyond: Outside) -> Iterator[House]:
    """Of a broker that is served already, once it gives secrets."""
    pipeline, ada = (load.Line(bench.port, bench.token(name)) for name in ("pipeline", "ada"))
    try:
        made = House(bench=bench, outside=beyond, pipeline=pipeline, ada=ada)
        made.wait_until_it_issues()
        yield made
    finally:
        pipeline.close()
        ada.close()


def dsn(url: str) -> str:
    """As psycopg takes it."""
    parts = sa.make_url(url)
    return f"host={parts.query['host']} dbname={parts.database} user={parts.username}"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The same secret three ways: read with a token that is there, with one made for it, and through the broker."""

    direct: load.Figures
    with_own_token: load.Figures
    ours: load.Figures

    @property
    def added(self) -> str:
        """What the broker adds to a read with a token that is there."""
        return f"p50 {self.ours.p50 - self.direct.p50:+.1f} ms   p99 {self.ours.p99 - self.direct.p99:+.1f} ms"

    @property
    def rate(self) -> str:
        return (
            f"{self.ours.per_second / self.direct.per_second:.2f} × its rate, "
            f"{self.ours.per_second / self.with_own_token.per_second:.2f} × that with a token for each"
        )


@dataclass(frozen=True, kw_only=True)
class Closed:
    """Seconds after a task of so many secrets was to be completed; `theirs`: as many revoked by their prefix.

    That leaves the tokens they were read with alive; `theirs_with_tokens`: as many, by the prefix of their tokens.
    """

    count: int
    authority_ended: float
    answered: float
    dead: float
    theirs: float
    theirs_with_tokens: float

    @property
    def ours(self) -> str:
        return (
            f"{self.dead:8.2f} s until all are confirmed dead; "
            f"authority ended after {self.authority_ended * 1000:.0f} ms, answer after {self.answered:.2f} s"
        )

    @property
    def ratio(self) -> float:
        return self.dead / self.theirs

    @property
    def ratio_with_tokens(self) -> float:
        return self.dead / self.theirs_with_tokens


@dataclass(frozen=True, kw_only=True)
class UrgentOnes:
    """Seconds until what an admin revoked was confirmed dead; `before` and `left`: debts, at the first and the last."""

    one: Sequence[float]
    along_an_axis: Sequence[float]
    before: int
    left: int

    @property
    def owed(self) -> str:
        return f"{self.before:,} to {self.left:,}"

    def told(self, seconds: Sequence[float]) -> str:
        return f"{max(seconds):8.2f} s until it is confirmed dead, at most; {min(seconds):.2f} s at least"


def measure_one_client(house: House, count: int) -> Beside:
    """One secret after the other, each of the three ways in turn, so that a machine that changes changes for all."""
    beyond, port = house.outside, house.bench.port
    agents = [f"agent-{number}" for number in range(_AGENTS_A_TASK)]
    task = house.open_task(agents)
    direct, making, reading = (load.Line(beyond.bao.port, token) for token in (beyond.reader, beyond.maker, ""))
    through = load.Line(port, "")
    tokens = [house.bench.token(agent) for agent in agents]
    path, child = f"/v1/{_SOURCE.path}", beyond.make_token().partition(b"\r\n\r\n")[2]

    def read_directly(_number: int) -> None:
        direct.ask("GET", path)

    def read_with_own_token(_number: int) -> None:
        made = json.loads(making.ask("POST", "/v1/auth/token/create/jit", child))
        reading.ask("GET", path, token=made["auth"]["client_token"])

    def ask_the_broker(number: int) -> None:
        through.ask("POST", "/v1/grants", _asking(task), token=tokens[number % len(tokens)])

    ways: tuple[Callable[[int], None], ...] = (read_directly, read_with_own_token, ask_the_broker)
    took: list[list[float]] = [[] for _ in ways]
    for number in range(_WARM + count):
        for way, seconds in zip(ways, took, strict=True):
            began = time.perf_counter()
            way(number)
            if number >= _WARM:
                seconds.append(time.perf_counter() - began)
    for line in (direct, making, reading, through):
        line.close()
    beyond.require(logins=len(ways) * (_WARM + count))
    house.complete(task)
    beyond.revoke_all()
    figures = [load.figures_of(seconds, took=sum(seconds)) for seconds in took]
    return Beside(direct=figures[0], with_own_token=figures[1], ours=figures[2])


def measure_many_clients(house: House, seconds: float) -> Beside:
    """As many as can be had by so many clients, each way for itself and from the same start: nobody has a login."""
    beyond = house.outside
    agents = [f"agent-{number}" for number in range(_AGENTS_A_TASK)]
    task = house.open_task(agents)
    requests = house.requests(task, agents)
    # The first request of each agent is slower, because its token is new.
    load.run(house.bench.port, requests, count=_AGENTS_A_TASK, connections=CLIENTS, expect=b"201")
    house.complete(task)
    task = house.open_task(agents)
    requests = house.requests(task, agents)
    ours = load.run(house.bench.port, requests, seconds=seconds, connections=CLIENTS, expect=b"201")
    beyond.require(logins=ours.requests - ours.failed)
    house.complete(task)
    beyond.require(logins=0)
    direct = load.run(beyond.bao.port, [beyond.read(beyond.reader)], seconds=seconds, connections=CLIENTS)
    beyond.require(logins=direct.requests - direct.failed)
    beyond.revoke_all()
    with_own_token = _with_own_tokens(beyond, seconds=seconds)
    beyond.require(logins=with_own_token.requests - with_own_token.failed)
    beyond.revoke_all()
    return Beside(direct=direct, with_own_token=with_own_token, ours=ours)


def measure_closing(house: House, count: int) -> Closed:
    """Completing a task that has so many secrets; and OpenBao, revoking as many of the same kind by their prefix."""
    beyond = house.outside
    agents = [f"agent-{number}" for number in range(_AGENTS_A_TASK)]
    task = house.open_task(agents)
    load.run(house.bench.port, house.requests(task, agents), count=count, connections=CLIENTS, expect=b"201")
    beyond.require(logins=count)
    with ThreadPoolExecutor(1) as aside:
        began = time.perf_counter()
        asked = aside.submit(house.pipeline.ask, "POST", f"/v1/tasks/{task}/complete")
        while house.state_of(task) == "active":
            time.sleep(_LOOK_EVERY_S / 4)
        ended = time.perf_counter() - began
        receipt = json.loads(asked.result())
        answered = time.perf_counter() - began
    if receipt["totals"]["outstanding"]:
        while house.owes():
            time.sleep(_LOOK_EVERY_S)
        receipt = house.settled(task, json.loads(house.pipeline.ask("GET", f"/v1/tasks/{task}/receipt")))
    dead = time.perf_counter() - began
    beyond.require(logins=0)
    if receipt["totals"] != {"ended": count, "confirmed_dead": count, "outstanding": 0}:
        raise SystemExit(f"a task of {count} secrets ended like this: {receipt['totals']}")
    theirs = []
    for revoke in (beyond.revoke_all, beyond.revoke_tokens):
        # Those of what was measured before live on where their leases were revoked.
        beyond.revoke_tokens()
        _with_own_tokens(beyond, count=count)
        beyond.require(logins=count)
        began = time.perf_counter()
        revoke()
        theirs.append(time.perf_counter() - began)
        beyond.require(logins=0)
    return Closed(
        count=count,
        authority_ended=ended,
        answered=answered,
        dead=dead,
        theirs=theirs[0],
        theirs_with_tokens=theirs[1],
    )


def median_of(rounds: Sequence[Closed]) -> Closed:
    """The one whose ratio is in the middle."""
    return sorted(rounds, key=lambda closed: closed.ratio)[len(rounds) // 2]


def measure_backlog(house: House, debts: int, times: int) -> UrgentOnes:
    """Revocations by an admin, one after the other, while so many debts are being paid."""
    beyond, agents = house.outside, ["agent-0"]
    tasks = [house.open_task(agents) for _ in range(2 * times)]
    grants = []
    for task in tasks:
        (request,) = house.requests(task, agents)
        grants.append(json.loads(load.once(house.bench.port, request)))
    broker = build(house.bench.settings)
    try:
        _owe(broker, debts)
        first = _owed(broker)
        one: list[float] = []
        along_an_axis: list[float] = []
        for number, (task, answer) in enumerate(zip(tasks, grants, strict=True)):
            began = time.perf_counter()
            if number % 2:
                body = {"task": task, "reason": "its log was found in the open"}
                house.ada.ask("POST", "/v1/revocations", json.dumps(body).encode())
                receipt = json.loads(house.ada.ask("GET", f"/v1/tasks/{task}/receipt"))
            else:
                receipt = json.loads(house.ada.ask("POST", f"/v1/grants/{answer['grant']['id']}/revoke"))
            house.settled(task, receipt)
            (along_an_axis if number % 2 else one).append(time.perf_counter() - began)
            if beyond.has_login(answer["credential"]["data"]["username"]):
                raise SystemExit("a login is there that was confirmed dead")
        left = _owed(broker)
    finally:
        broker.close()
    if not left:
        raise SystemExit(f"{debts} debts were paid before the last revocation: it had nothing before it")
    return UrgentOnes(one=one, along_an_axis=along_an_axis, before=first, left=left)


def _owe(broker: Broker, count: int) -> None:
    """Debts like those of tokens that expired: OpenBao is asked about each, and knows none of them."""
    now = system_clock()
    owed = [
        Lease(
            id=new_id("lea", now),
            grant_id=None,
            provider="vault",
            settings=dict(_TABLE),
            state=LeaseState.REVOKING,
            revocation_class=str(RevocationClass.HARD),
            handle=secrets.token_hex(12),
            reference=_PREFIX + secrets.token_hex(12),
            created_at=now,
            issue_by=now,
            expires_at=now,
            urgency=int(Urgency.EXPIRED),
            next_attempt_at=now,
        )
        for _ in range(count)
    ]
    with broker.database.begin() as db:
        leases.insert_leases(db, owed)


def _owed(broker: Broker) -> int:
    return sum(broker.leases.measure().counts.values())


def _with_own_tokens(beyond: Outside, **how_many: Any) -> load.Figures:
    making, then = [beyond.make_token()], beyond.read_with_what_was_made
    return load.run(beyond.bao.port, making, connections=CLIENTS, then=then, **how_many)


def _asking(task: str) -> bytes:
    return json.dumps({"task_id": task, "resource": RESOURCE, "scopes": ["select"], "ttl_s": _LIFE_S}).encode()


def _token(bao: openbao.OpenBao, policy: str) -> str:
    body = {"policies": [policy], "no_default_policy": True, "ttl": "24h"}
    return str(bao.root("POST", "auth/token/create", body)["auth"]["client_token"])
