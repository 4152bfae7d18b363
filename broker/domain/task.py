"""A task: a bounded piece of work from which every authority hangs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from broker.domain.lifecycle import TaskState


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """As it was when it was read; only the row can say what it is now."""

    id: str
    state: TaskState
    purpose: str
    orchestrator: str
    agents: tuple[str, ...]
    created_at: datetime
    deadline_at: datetime
    on_behalf_of: str | None = None
    user_attributes: Mapping[str, list[str]] | None = None  # what that user's token said of them, as it is configured
    parent_task_id: str | None = None
    ceiling: Mapping[str, list[str]] | None = None  # resource -> scopes; None is "whatever policy allows"
    labels: Mapping[str, str] = field(default_factory=dict)
    heartbeat_s: int | None = None
    heartbeat_due_at: datetime | None = None
    upheld_until: datetime | None = None  # when the heartbeat of a task above it is lost, if nobody sends it
    tasks_above: tuple[str, ...] = ()  # of which it is a part, the root first
    orchestrators_above: tuple[str, ...] = ()  # who opened those
    implicit: bool = False
    ended_at: datetime | None = None
    reason: str | None = None

    @property
    def ends_at(self) -> datetime:
        """When time alone ends it: its deadline, or sooner when nobody sends its heartbeat or one above it."""
        return min(at for at in (self.deadline_at, self.heartbeat_due_at, self.upheld_until) if at is not None)

    def is_open(self, now: datetime) -> bool:
        """Whether anything may still be issued for it; it does not wait for the sweeper to say so."""
        return self.state is TaskState.ACTIVE and now < self.ends_at
