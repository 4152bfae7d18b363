"""Drift: what was granted and never used, and what was used outside of what was granted.

As far as was told: that nobody tells of a use proves nothing, so what no report speaks of is called unreported, and a
report that names no scope is counted beside those that do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from broker.domain.activity import Beyond, Granted, covers
from broker.domain.policy.schema import quoted


class GivenTo(Granted, Protocol):
    """A grant that got a credential, and who holds it."""

    @property
    def id(self) -> str: ...
    @property
    def task_id(self) -> str: ...
    @property
    def agent(self) -> str: ...


class Use(Protocol):
    """How often a grant was used with one scope on one resource, as one role tells it; or was not let, if `denied`."""

    @property
    def grant_id(self) -> str: ...
    @property
    def scope(self) -> str | None: ...
    @property
    def resource(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def denied(self) -> bool: ...
    @property
    def before_issue(self) -> int: ...
    @property
    def after_end(self) -> int: ...
    @property
    def first_at(self) -> datetime: ...
    @property
    def last_at(self) -> datetime: ...


@dataclass(frozen=True, kw_only=True)
class GrantUse:
    """One grant. `unused` are granted scopes that no report names; `unsaid` counts the reports that name none."""

    grant_id: str
    task_id: str
    agent: str
    resource: str
    granted: tuple[str, ...]
    used: tuple[str, ...]
    unused: tuple[str, ...]
    reports: int
    unsaid: int
    first_at: datetime | None
    last_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Unused:
    """What one agent was granted on one resource, and uses with none of the grants together."""

    agent: str
    resource: str
    grants: int
    unreported: int
    used: tuple[str, ...]
    unused: tuple[str, ...]
    unsaid: int


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What was done with a grant outside of it, or only tried, if it was `denied` by whoever was asked."""

    grant_id: str
    agent: str
    why: Beyond
    resource: str
    scope: str | None
    told_by: str
    denied: bool
    count: int
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True, kw_only=True)
class Narrower:
    """What would have been enough: in a sentence, and as a policy."""

    agent: str
    resource: str
    scopes: tuple[str, ...]
    in_words: str
    policy: str


@dataclass(frozen=True, kw_only=True)
class Drift:
    """`complete` is False where there is more than was looked at, or more was told than is kept."""

    task_id: str
    grants: tuple[GrantUse, ...]
    unused: tuple[Unused, ...]
    outside: tuple[Outside, ...]
    narrower: tuple[Narrower, ...]
    dropped: int
    complete: bool

    @property
    def drifted(self) -> bool:
        return bool(self.unused or self.outside)


def drift_of(
    task_id: str, grants: Sequence[GivenTo], uses: Sequence[Use], *, dropped: int = 0, complete: bool = True
) -> Drift:
    """What these grants and what was told of them come to."""
    told: dict[str, list[Use]] = {grant.id: [] for grant in grants}
    for use in uses:
        told[use.grant_id].append(use)
    lines = tuple(_grant_use(grant, told[grant.id]) for grant in grants)
    summed = tuple(_summed(lines))
    return Drift(
        task_id=task_id,
        grants=lines,
        unused=tuple(each for each in summed if each.unused),
        outside=tuple(found for grant in grants for use in told[grant.id] for found in _outside(grant, use)),
        narrower=tuple(map(_narrower, (each for each in summed if each.unused and each.used and not each.unsaid))),
        dropped=dropped,
        complete=complete and not dropped,
    )


def _grant_use(grant: GivenTo, uses: Sequence[Use]) -> GrantUse:
    # What was refused to it was not used, and says nothing for having it.
    used = {use.scope for use in uses if not use.denied and covers(grant.resource, use.resource)}
    return GrantUse(
        grant_id=grant.id,
        task_id=grant.task_id,
        agent=grant.agent,
        resource=grant.resource,
        granted=tuple(sorted(grant.scopes)),
        used=tuple(scope for scope in sorted(grant.scopes) if scope in used),
        unused=tuple(scope for scope in sorted(grant.scopes) if scope not in used),
        reports=sum(use.count for use in uses),
        unsaid=sum(use.count for use in uses if use.scope is None),
        first_at=min((use.first_at for use in uses), default=None),
        last_at=max((use.last_at for use in uses), default=None),
    )


def _summed(lines: Iterable[GrantUse]) -> Iterator[Unused]:
    together: dict[tuple[str, str], list[GrantUse]] = {}
    for line in lines:
        together.setdefault((line.agent, line.resource), []).append(line)
    for (agent, resource), grants in sorted(together.items()):
        granted = {scope for grant in grants for scope in grant.granted}
        used = {scope for grant in grants for scope in grant.used}
        yield Unused(
            agent=agent,
            resource=resource,
            grants=len(grants),
            unreported=sum(not grant.reports for grant in grants),
            used=tuple(sorted(used)),
            unused=tuple(sorted(granted - used)),
            unsaid=sum(grant.unsaid for grant in grants),
        )


def _outside(grant: GivenTo, use: Use) -> Iterator[Outside]:
    counts: Mapping[Beyond, int] = {
        Beyond.RESOURCE: 0 if covers(grant.resource, use.resource) else use.count,
        Beyond.SCOPE: 0 if use.scope is None or use.scope in grant.scopes else use.count,
        Beyond.BEFORE_ISSUE: use.before_issue,
        Beyond.AFTER_END: use.after_end,
    }
    for why, count in counts.items():
        if count:
            yield Outside(
                grant_id=grant.id,
                agent=grant.agent,
                why=why,
                resource=use.resource,
                scope=use.scope,
                told_by=use.role,
                denied=use.denied,
                count=count,
                first_at=use.first_at,
                last_at=use.last_at,
            )


def _narrower(found: Unused) -> Narrower:
    actions = ", ".join(f"Action::{quoted(scope)}" for scope in found.used)
    return Narrower(
        agent=found.agent,
        resource=found.resource,
        scopes=found.used,
        in_words=(
            f"{found.agent} uses {', '.join(found.used)} on {found.resource} and was granted "
            f"{', '.join(found.unused)} besides: ask for less, or allow no more"
        ),
        policy=(
            f"permit (principal == Agent::{quoted(found.agent)}, action in [{actions}], "
            f"resource == Resource::{quoted(found.resource)});"
        ),
    )
