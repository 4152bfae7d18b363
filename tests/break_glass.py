"""A house with one pre-declared break-glass, and the people who give it and who review it."""

from __future__ import annotations

from dataclasses import replace

from broker.domain.approval import Case
from broker.domain.grant import Issued
from broker.domain.task import Task
from tests.approvals import PEOPLE, apply, approve, ask, asking, collect
from tests.house import House

EMERGENCY = """
@id("crm-emergency")
@break_glass("true") @approval("security") @quorum("2")
permit (principal == Agent::"summarizer", action == Action::"contacts:write", resource == Resource::"https://crm.example/api");
"""
GLASS = f"""{EMERGENCY}
@id("read-is-free")
permit (principal, action == Action::"contacts:read", resource == Resource::"https://crm.example/api");
"""
WRITE = frozenset({"contacts:write"})
REASON = "the CRM sends every lead to the wrong region"


def glass_house(house: House, policies: str = GLASS) -> House:
    apply(house, asking(house, policies=policies, people=PEOPLE))
    return house


def break_glass(house: House, task: Task | None = None, *, reason: str = REASON, **more: object) -> Case:
    wanted: dict[str, object] = {"scopes": WRITE, "break_glass": reason} | more
    return ask(house, task or house.open_task(), **wanted)


def broken(house: House, task: Task | None = None, **more: object) -> tuple[Case, Issued]:
    """A break-glass that two people gave and that was collected."""
    case = break_glass(house, task, **more)
    approve(house, case, by="sam")
    approve(house, case, by="sue")
    return case, collect(house, case)


def review_of(house: House, case: Case) -> str:
    [review_id] = [
        found.review.id for found in house.broker.reviews.page(house.caller("ada")) if found.grant.id == case.grant.id
    ]
    return review_id


def with_limits(house: House, **limits: object) -> None:
    changed = replace(house.broker.settings.limits, **limits)  # type: ignore[arg-type]
    house.broker.issuance._limits = house.broker.collection._limits = changed
