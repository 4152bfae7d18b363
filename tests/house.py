"""A whole broker for tests: real stores, a development issuer, a clock that stands until it is moved."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from broker.config import ServerSettings, Settings
from broker.domain.catalogue import Catalogue, Limits, PrincipalRule, Resource
from broker.domain.grant import GrantRequest, Issued
from broker.domain.identity import Caller
from broker.domain.task import Task
from broker.providers.dev_issuer import DevIssuer
from broker.services.tasks import TaskRequest
from broker.wiring import Broker, build
from tests.conftest import NOW

ISSUER = "http://127.0.0.1:8080"
CRM = "https://crm.example/api"
LEDGER = "https://ledger.example/api"
POLICIES = {
    "crm.cedar": """
@id("crm-read")
permit (principal == Agent::"summarizer", action == Action::"contacts:read", resource == Resource::"https://crm.example/api")
when { context.ttl_s <= 600 };

@id("crm-write")
@max_ttl("60")
permit (principal == Agent::"summarizer", action == Action::"contacts:write", resource == Resource::"https://crm.example/api")
when { context.sender_bound };

@id("scribe-read")
permit (principal == Agent::"scribe", action == Action::"contacts:read", resource);
""",
}


# For who sends thousands of requests within a second of a clock that stands, and is refused most of them on purpose.
UNLIMITED = {
    "max_live_per_agent": 100_000,
    "requests_per_agent": 1_000_000,
    "requests_per_task": 1_000_000,
    "mints_per_task": 1_000_000,
    "denials_throttle": 1_000_000,
    "denials_lockdown": 1_000_001,
}


@dataclass
class TestClock:
    """Stands at a named moment until somebody moves it."""

    __test__ = False
    at: datetime = NOW

    def __call__(self) -> datetime:
        return self.at

    def forward(self, **by: int) -> datetime:
        self.at += timedelta(**by)
        return self.at


@dataclass
class House:
    broker: Broker
    clock: TestClock
    issuer: DevIssuer
    callers: dict[str, Caller] = field(default_factory=dict)

    def token(self, name: str, **options: timedelta) -> str:
        return self.issuer.token(f"dev:{name}", ISSUER, self.clock(), **options)

    def caller(self, name: str) -> Caller:
        """An authenticated caller, by a real token through the real authenticator."""
        catalogue = self.broker.standing.now().catalogue
        return self.broker.authenticator.authenticate(self.token(name), catalogue, now=self.clock())

    def open_task(self, *agents: str, deadline_s: int = 3600, by: str = "pipeline", **more: object) -> Task:
        request = TaskRequest(
            caller=self.caller(by),
            agents=agents or ("summarizer",),
            deadline=timedelta(seconds=deadline_s),
            **{"purpose": "summarise the leads of May"} | more,  # type: ignore[arg-type]
        )
        return self.broker.tasks.open(request)

    def issue(
        self, task: Task | None, *, by: str = "summarizer", scope: str = "contacts:read", **more: object
    ) -> Issued:
        request = GrantRequest(
            caller=self.caller(by),
            task_id=None if task is None else task.id,
            resource=CRM,
            scopes=frozenset(scope.split()),
        )
        return self.broker.issuance.issue(replace(request, **more))  # type: ignore[arg-type]

    def is_active(self, issued: Issued, *, by: str = "crm-api") -> bool:
        answer = self.broker.verification.introspect(self.caller(by), issued.credential.token.reveal())
        return bool(answer["active"])


def catalogue_for(issuer: DevIssuer, **more: object) -> Catalogue:
    def principal(name: str, kind: str, *roles: str, **also: object) -> PrincipalRule:
        return PrincipalRule(name=name, kind=kind, issuer="dev", subject=f"dev:{name}", roles=roles, **also)  # type: ignore[arg-type]

    catalogue = Catalogue(
        issuers=(issuer.trusted(), replace(issuer.of_people().trusted("people"), users=True)),
        principals=(
            principal("pipeline", "orchestrator", "orchestrator", owner="crm-team"),
            principal("other-pipeline", "orchestrator", "orchestrator"),
            principal("summarizer", "agent", "agent", owner="crm-team"),
            principal("scribe", "agent", "agent", implicit_tasks=True),
            principal("crm-api", "service", "verifier"),
            principal("ledger-api", "service", "verifier"),
            principal("ada", "person", "admin"),
            principal("gus", "person", "approver", groups=("board",)),
            principal("gina", "person", "approver", groups=("board",)),
            principal("greta", "person", "approver", groups=("board",)),
            principal("audrey", "person", "auditor"),
        ),
        resources=(
            Resource(identifier=CRM, scopes=("contacts:read", "contacts:write"), verifiers=("crm-api",)),
            Resource(identifier=LEDGER, scopes=("entries:read",), verifiers=("ledger-api",), sensitivity="restricted"),
        ),
        policies=POLICIES,
    )
    return replace(catalogue, **more)  # type: ignore[arg-type]


def settings_for(
    store_url: str, directory: Path, catalogue: Catalogue, *, redis_url: str | None = None, **limits: int
) -> Settings:
    key_file = directory / "master.key"
    if not key_file.exists():
        key_file.touch(mode=0o600)
        key_file.write_bytes(secrets.token_bytes(32))
    return Settings(
        issuer=ISSUER,
        server=ServerSettings(listen="127.0.0.1:8080", host="127.0.0.1", port=8080),
        store_url=store_url,
        redis_url=redis_url,
        master_key_file=key_file,
        rotate_every=timedelta(days=1),
        limits=Limits(**limits),  # type: ignore[arg-type]
        catalogue=catalogue,
        source=directory / "broker.toml",
    )


def build_house(
    store_url: str, directory: Path, *, clock: TestClock | None = None, redis_url: str | None = None, **limits: int
) -> House:
    """A broker on a migrated store, with its configuration applied. Two houses on one store are two brokers."""
    clock = clock or TestClock()
    issuer = DevIssuer.create_or_load(directory)
    settings = settings_for(store_url, directory, catalogue_for(issuer), redis_url=redis_url, **limits)
    broker = build(settings, clock=clock)
    broker.apply(by="tests")
    return House(broker=broker, clock=clock, issuer=issuer)
