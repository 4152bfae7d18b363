"""A house whose policies ask people, and the people who are asked."""

from __future__ import annotations

from dataclasses import replace

from broker.domain.approval import Case, Narrowing
from broker.domain.catalogue import Catalogue, PrincipalRule
from broker.domain.grant import GrantRequest, Issued
from broker.domain.task import Task
from tests.house import CRM, LEDGER, House, catalogue_for

ASKING = """
@id("write-asks-one")
@approval("security")
permit (principal == Agent::"summarizer", action == Action::"contacts:write", resource == Resource::"https://crm.example/api");

@id("read-is-free")
permit (principal, action == Action::"contacts:read", resource == Resource::"https://crm.example/api");

@id("ledger-asks-two")
@approval("security") @quorum("2")
permit (principal, action == Action::"entries:read", resource == Resource::"https://ledger.example/api");
"""
BOTH = frozenset({"contacts:read", "contacts:write"})


def person(name: str, *groups: str, owner: str | None = None, roles: tuple[str, ...] = ("approver",)) -> PrincipalRule:
    return PrincipalRule(
        name=name, kind="person", issuer="dev", subject=f"dev:{name}", roles=roles, groups=groups, owner=owner
    )


# `olga` and who asks have one owner, `dana` decides about databases, `summarizer`'s owner is a team.
PEOPLE = (
    person("sam", "security", owner="security-team"),
    person("sue", "security", owner="security-team"),
    person("sid", "security"),
    person("olga", "security", owner="crm-team"),
    person("dana", "databases"),
)


def asking(house: House, *, policies: str = ASKING, people: tuple[PrincipalRule, ...] = PEOPLE) -> Catalogue:
    """The configuration of such a house."""
    plain = catalogue_for(house.issuer, policies={"asking.cedar": policies})
    return replace(plain, principals=(*plain.principals, *people))


def apply(house: House, catalogue: Catalogue) -> int:
    return house.broker.administration.apply(catalogue, by="tests")


def ask(house: House, task: Task | None, *, by: str = "summarizer", resource: str = CRM, **more: object) -> Case:
    """What waits for people, of a request that does."""
    request = GrantRequest(
        caller=house.caller(by),
        task_id=None if task is None else task.id,
        resource=resource,
        scopes=frozenset({"entries:read"}) if resource == LEDGER else BOTH,
        may_wait=True,
    )
    made = house.broker.issuance.request(replace(request, **more))  # type: ignore[arg-type]
    assert isinstance(made, Case), made
    return made


def approve(house: House, case: Case, *, by: str = "sam", **narrowing: object) -> Case:
    return house.broker.approvals.approve(house.caller(by), case.approval.id, Narrowing(**narrowing))  # type: ignore[arg-type]


def deny(house: House, case: Case, *, by: str = "sam", **more: str) -> Case:
    return house.broker.approvals.deny(house.caller(by), case.approval.id, **more)


def withdraw(house: House, case: Case, *, by: str = "summarizer", **more: str) -> Case:
    return house.broker.approvals.withdraw(house.caller(by), case.approval.id, **more)


def collect(house: House, case: Case, *, by: str = "summarizer", **more: object) -> Issued:
    return house.broker.collection.collect(house.caller(by), case.grant.id, **more)  # type: ignore[arg-type]


def again(house: House, case: Case) -> Case:
    """The same as an admin sees it now."""
    return house.broker.approvals.find(house.caller("ada"), case.approval.id)


def states(house: House, case: Case) -> tuple[str, str]:
    now = again(house, case)
    return str(now.approval.state), str(now.grant.state)
