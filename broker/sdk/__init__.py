"""What other programs import: a client for orchestrators, agents, admins and verifiers. Never imports the server.

::

    with Client("https://broker.example", token_file=Path("/var/run/secrets/broker/token")) as broker:
        with broker.credential(task_id, "https://crm.example/api", ["contacts:read"]) as source:
            httpx.get("https://crm.example/api/contacts", auth=source.auth())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from broker.sdk.activities import Activity, Drift, RefusedActivity, TimelineLine, Told
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

if TYPE_CHECKING:
    from broker.sdk.aio import AsyncClient
    from broker.sdk.async_credential import AsyncCredentialSource
    from broker.sdk.async_run import AsyncRunningTask

# Loaded when first named: an event loop is a third of what the rest costs to load.
_FOR_ASYNCIO = {
    "AsyncClient": "broker.sdk.aio",
    "AsyncCredentialSource": "broker.sdk.async_credential",
    "AsyncRunningTask": "broker.sdk.async_run",
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
    module = _FOR_ASYNCIO.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
