"""A draft of policies run over what was asked before, and over what is live: what would differ, and nothing is done.

The requests are the grants of a period, denied ones too, as they are on record (`broker.services.reasking`). Each is
compared with what it came to then.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row

from broker.domain.catalogue import Catalogue
from broker.domain.clock import Clock, rfc3339
from broker.domain.errors import Unavailable
from broker.domain.identity import Caller
from broker.domain.policy import ALLOW, DENY, NEEDS_APPROVAL, PolicySet
from broker.services.administration import require_reader
from broker.services.asked import Versions
from broker.services.drafts import Draft, drafted
from broker.services.reasking import Reasking, decided_at_of, unhurried, why_not
from broker.services.redeciding import Foreseen, Redeciding
from broker.services.refusals import recorded
from broker.services.standing import StandingReader
from broker.store import redecisions
from broker.store.database import Database

_ROWS_AT_ONCE = 2000
_SAMPLES = 20
UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One request that would come to something else. `recorded` and `draft` are outcomes, or how long it would live."""

    grant_id: str
    decided_at: datetime
    agent: str
    resource: str
    scopes: tuple[str, ...]
    recorded: str
    draft: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a draft would have said. The counts are of recorded requests; `complete` is False where there were more.

    `by_policy` names the draft's policies that decide what differs, or those that allowed what none of them does.
    """

    since: datetime
    requests: int
    complete: bool
    same: int
    newly_allowed: int
    newly_denied: int
    newly_asking: int
    shortened: int
    undecided: int
    by_agent: Mapping[str, int]
    by_policy: Mapping[str, int]
    samples: Sequence[Difference]
    live: Foreseen


class Replaying:
    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        versions: Versions,
        redeciding: Redeciding,
        clock: Clock,
    ) -> None:
        self._database = database
        self._standing = standing
        self._versions = versions
        self._redeciding = redeciding
        self._clock = clock
        # It takes a core for seconds, and whoever issues needs it too.
        self._one = threading.Lock()

    def replay(self, caller: Caller, draft: Draft, *, period: timedelta, at_most: int) -> Replayed:
        """Over the newest requests of a period, and the live grants; at most so many of each."""
        with recorded(self._database, self._clock, caller, "policies.refused", "replay"):
            require_reader(caller)
        catalogue, policies = drafted(self._standing.now().catalogue, draft)
        if not self._one.acquire(blocking=False):
            raise Unavailable("a draft is being replayed already: try again when that is done")
        try:
            return self.replayed(catalogue, policies, period=period, at_most=at_most)
        finally:
            self._one.release()

    def replayed(self, catalogue: Catalogue, policies: PolicySet, *, period: timedelta, at_most: int) -> Replayed:
        """The same for a whole configuration, and for whoever holds it."""
        reasking = Reasking(catalogue=catalogue, policies=policies, versions=self._versions)
        since = self._clock() - period
        tally = _Tally()
        before: str | None = None
        complete = False
        while tally.requests < at_most and not complete:
            wanted = min(_ROWS_AT_ONCE, at_most - tally.requests)
            with self._database.read() as db:
                page = redecisions.asked_since(db, since, before=before, limit=wanted)
            for row in unhurried(page):
                tally.add(row, reasking)
            complete = len(page) < wanted
            before = page[-1].id if page else None
        return Replayed(
            since=since,
            requests=tally.requests,
            complete=complete,
            same=tally.counts["same"],
            newly_allowed=tally.counts[ALLOW],
            newly_denied=tally.counts[DENY],
            newly_asking=tally.counts[NEEDS_APPROVAL],
            shortened=tally.counts["shortened"],
            undecided=tally.counts[UNDECIDED],
            by_agent=dict(tally.by_agent.most_common()),
            by_policy=dict(tally.by_policy.most_common()),
            samples=tally.samples,
            live=self._redeciding.foresee(catalogue, at_most=at_most),
        )


class _Tally:
    def __init__(self) -> None:
        self.requests = 0
        self.counts: Counter[str] = Counter()
        self.by_agent: Counter[str] = Counter()
        self.by_policy: Counter[str] = Counter()
        self.samples: list[Difference] = []

    def add(self, row: Row[Any], reasking: Reasking) -> None:
        self.requests += 1
        asked_ttl_s = row.asked_ttl_s or row.ttl_s
        decision = reasking.decided(row, ttl_s=asked_ttl_s)
        policies: tuple[str, ...] = ()
        if isinstance(decision, str):
            outcome, why, ttl_s = DENY, decision, None
        elif decision.failure is not None and decision.outcome != ALLOW:
            outcome, why, ttl_s = UNDECIDED, "policy could not be asked about it", None
        else:
            outcome, policies = decision.outcome, decision.policies
            why = why_not(decision) if outcome == DENY else ""
            ttl_s = min(asked_ttl_s, decision.max_ttl_s or asked_ttl_s)
        was, would = str(row.outcome), outcome
        if outcome == was and ttl_s is not None and outcome == ALLOW and ttl_s < row.ttl_s:
            outcome, was, would = "shortened", f"{row.ttl_s} s", f"{ttl_s} s"
            why = "@max_ttl of a policy"
        elif outcome == was:
            self.counts["same"] += 1
            return
        self.counts[outcome] += 1
        self.by_agent[row.agent] += 1
        self.by_policy.update(policies or row.policies.split())
        if len(self.samples) < _SAMPLES:
            self.samples.append(
                Difference(
                    grant_id=row.id,
                    decided_at=decided_at_of(row),
                    agent=row.agent,
                    resource=row.resource,
                    scopes=tuple(json.loads(row.scopes)),
                    recorded=was,
                    draft=would,
                    why=why,
                )
            )


def replayed_json(found: Replayed, live: Mapping[str, Any]) -> dict[str, Any]:
    """For the API and for programs; `live` is what of the live grants would change."""
    samples = [
        vars(sample) | {"scopes": list(sample.scopes), "decided_at": rfc3339(sample.decided_at)}
        for sample in found.samples
    ]
    return vars(found) | {"since": rfc3339(found.since), "samples": samples, "live": live}
