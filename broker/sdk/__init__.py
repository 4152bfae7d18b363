"""What other programs import: a client for orchestrators, agents, admins and verifiers. Never imports the server.

::

    with Client("https://broker.example", token_file=Path("/var/run/secrets/broker/token")) as broker:
        with broker.credential(task_id, "https://crm.example/api", ["contacts:read"]) as source:
            httpx.get("https://crm.example/api/contacts", auth=source.auth())
"""

from broker.sdk.activities import Activity, Drift, RefusedActivity, TimelineLine, Told
from broker.sdk.aio import AsyncClient
from broker.sdk.client import Client
from broker.sdk.clock import Timing
from broker.sdk.credential import AsyncCredentialSource, CredentialSource
from broker.sdk.dpop import DpopKey
from broker.sdk.errors import (
    ApprovalPending,
    BrokerError,
    Conflict,
    Invalid,
    Limited,
    NotAuthenticated,
    NotFound,
    NotTheBroker,
    Refused,
    Unreachable,
)
from broker.sdk.run import RunningTask
from broker.sdk.secret import Secret
from broker.sdk.values import (
    Approval,
    Credential,
    Decision,
    Event,
    Explanation,
    Foreseen,
    Grant,
    Introspection,
    Lease,
    Lockdown,
    Page,
    PolicyChange,
    PolicyVersion,
    Receipt,
    ReceiptLine,
    Replay,
    Review,
    Revocation,
    Signal,
    Task,
    Totals,
)

__all__ = [
    "Activity",
    "Approval",
    "ApprovalPending",
    "AsyncClient",
    "AsyncCredentialSource",
    "BrokerError",
    "Client",
    "Conflict",
    "Credential",
    "CredentialSource",
    "Decision",
    "DpopKey",
    "Drift",
    "Event",
    "Explanation",
    "Foreseen",
    "Grant",
    "Introspection",
    "Invalid",
    "Lease",
    "Limited",
    "Lockdown",
    "NotAuthenticated",
    "NotFound",
    "NotTheBroker",
    "Page",
    "PolicyChange",
    "PolicyVersion",
    "Receipt",
    "ReceiptLine",
    "Refused",
    "RefusedActivity",
    "Replay",
    "Review",
    "Revocation",
    "RunningTask",
    "Secret",
    "Signal",
    "Task",
    "TimelineLine",
    "Timing",
    "Told",
    "Totals",
    "Unreachable",
]
