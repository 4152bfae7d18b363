"""The invariants of leases and grants as queries: what must hold whatever happened before; and one debt."""

from datetime import datetime

import sqlalchemy as sa

from broker.domain.identity import new_id
from broker.domain.lease import Lease, RevocationClass, Urgency
from broker.domain.lifecycle import LeaseState

_NEVER = {
    "a task has ended and a grant under it has not": """
        SELECT grants.id FROM grants JOIN tasks ON tasks.id = grants.task_id
        WHERE tasks.state <> 'active' AND grants.state IN ('pending', 'approved', 'active')""",
    "a grant of an outside provider is active without a lease that is held": """
        SELECT grants.id FROM grants WHERE provider <> 'jwt' AND state = 'active'
        AND NOT EXISTS (SELECT 1 FROM leases WHERE grant_id = grants.id AND leases.state = 'held')""",
    "a grant that ended has a lease that nobody pays": """
        SELECT leases.id FROM leases JOIN grants ON grants.id = leases.grant_id
        WHERE grants.state NOT IN ('approved', 'active') AND leases.state IN ('intended', 'held')""",
    "a lease is intended and its grant is not approved": """
        SELECT leases.id FROM leases JOIN grants ON grants.id = leases.grant_id
        WHERE leases.state = 'intended' AND grants.state <> 'approved'""",
    "a lease is released and nobody says when its credential died": """
        SELECT id FROM leases WHERE state = 'released' AND dead_at IS NULL""",
    "a debt is never tried": """
        SELECT id FROM leases WHERE state IN ('revoking', 'stuck') AND next_attempt_at IS NULL""",
    "an approved grant of an outside provider has no lease, and is not one that people approved": """
        SELECT id FROM grants WHERE provider <> 'jwt' AND state = 'approved'
        AND NOT EXISTS (SELECT 1 FROM leases WHERE grant_id = grants.id)
        AND NOT EXISTS (SELECT 1 FROM approvals WHERE grant_id = grants.id AND collected_at IS NULL)""",
    "a grant is active that people did not approve": """
        SELECT grants.id FROM grants JOIN approvals ON approvals.grant_id = grants.id
        WHERE grants.state = 'active' AND (approvals.state <> 'approved' OR collected_at IS NULL)""",
    "an approval is open and its grant is not pending": """
        SELECT approvals.id FROM approvals JOIN grants ON grants.id = approvals.grant_id
        WHERE approvals.state = 'open' AND grants.state <> 'pending'""",
    "a grant is pending and nobody is asked": """
        SELECT grants.id FROM grants LEFT JOIN approvals ON approvals.grant_id = grants.id
        WHERE grants.state = 'pending' AND (approvals.state IS NULL OR approvals.state <> 'open')""",
    "a grant is active and was never issued": """
        SELECT id FROM grants WHERE state = 'active' AND issued_at IS NULL""",
    "a lease moved without an event": """
        SELECT leases.id FROM leases WHERE leases.state = 'released' AND NOT EXISTS (
            SELECT 1 FROM events WHERE events.type = 'lease.released'
            AND CAST(events.data AS TEXT) LIKE '%' || leases.id || '%')""",
}


def require_consistent(database):
    with database.read() as db:
        for what, query in _NEVER.items():
            assert db.execute(sa.text(query)).fetchall() == [], what


def states(database):
    """(grant state, lease state) of every lease, in the order in which they were made."""
    query = "SELECT grants.state, leases.state FROM leases LEFT JOIN grants ON grants.id = grant_id ORDER BY leases.id"
    with database.read() as db:
        return [tuple(row) for row in db.execute(sa.text(query))]


def a_debt(now: datetime, *, handle: str) -> Lease:
    """Of a secret that time ended, to the provider `vault`; due now."""
    return Lease(
        id=new_id("lea", now),
        grant_id=None,
        provider="vault",
        settings={},
        state=LeaseState.REVOKING,
        revocation_class=str(RevocationClass.HARD),
        handle=handle,
        created_at=now,
        issue_by=now,
        expires_at=now,
        urgency=int(Urgency.EXPIRED),
        next_attempt_at=now,
    )
