"""What other programs import: a client for orchestrators, agents, admins and verifiers. Never imports the server.

::

    with Client("https://broker.example", token_file=Path("/var/run/secrets/broker/token")) as broker:
        with broker.credential(task_id, "https://crm.example/api", ["contacts:read"]) as source:
            httpx.get("https://crm.example/api/contacts", auth=source.auth())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from broker.sdk.client import Client
from broker.sdk.clock import Timing
from broker.sdk.credential import CredentialSource
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
    Credential,
    Decision,
    Grant,
    Introspection,
    Lease,
    Page,
    Task,
)

if TYPE_CHECKING:
    from broker.sdk.activities import Activity, RefusedActivity, Told
    from broker.sdk.aio import AsyncClient
    from broker.sdk.async_credential import AsyncCredentialSource
    from broker.sdk.async_run import AsyncRunningTask
    from broker.sdk.oversight import (
        Approval,
        Drift,
        Event,
        Explanation,
        Foreseen,
        Lockdown,
        PolicyChange,
        PolicyVersion,
        Replay,
        Review,
        Revocation,
        Signal,
        TimelineLine,
    )
    from broker.sdk.receipts import Receipt, ReceiptLine, Totals

# Loaded when first named. An event loop is half of what the rest costs to load; an agent oversees nothing, and what
# is told and answered at the end is not waited for at the beginning.
_LATER = {
    "AsyncClient": "broker.sdk.aio",
    "AsyncCredentialSource": "broker.sdk.async_credential",
    "AsyncRunningTask": "broker.sdk.async_run",
    "Activity": "broker.sdk.activities",
    "RefusedActivity": "broker.sdk.activities",
    "Told": "broker.sdk.activities",
    "Receipt": "broker.sdk.receipts",
    "ReceiptLine": "broker.sdk.receipts",
    "Totals": "broker.sdk.receipts",
    "Approval": "broker.sdk.oversight",
    "Drift": "broker.sdk.oversight",
    "Event": "broker.sdk.oversight",
    "Explanation": "broker.sdk.oversight",
    "Foreseen": "broker.sdk.oversight",
    "Lockdown": "broker.sdk.oversight",
    "PolicyChange": "broker.sdk.oversight",
    "PolicyVersion": "broker.sdk.oversight",
    "Replay": "broker.sdk.oversight",
    "Review": "broker.sdk.oversight",
    "Revocation": "broker.sdk.oversight",
    "Signal": "broker.sdk.oversight",
    "TimelineLine": "broker.sdk.oversight",
}

__all__ = [
    "Activity",
    "Approval",
    "ApprovalPending",
    "AsyncClient",
    "AsyncCredentialSource",
    "AsyncRunningTask",
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


def __getattr__(name: str) -> Any:
    module = _LATER.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
