"""Policy as code: one question, one answer, and the reasons (Cedar).

A policy set is parsed once and never changes. Anything but an explicit allow is a deny (INV-13): an error, a fact
that is missing, a policy that cannot be evaluated. What a caller sent is data to a policy and never a part of one
(INV-31): requests go to the engine as values, not as text.
"""

from __future__ import annotations

from broker.domain.policy.decision import (
    ALLOW,
    DENY,
    NEEDS_APPROVAL,
    NOBODY,
    AccessRequest,
    Approved,
    Decision,
    TaskFacts,
    claimed_text,
)
from broker.domain.policy.engine import PolicySet
from broker.domain.policy.expectations import PolicyTest, PolicyTestResult, read_tests, run_tests
from broker.domain.policy.schema import BASE_SCHEMA, agent_facts, complete_schema, resource_facts

__all__ = [
    "ALLOW",
    "BASE_SCHEMA",
    "DENY",
    "NEEDS_APPROVAL",
    "NOBODY",
    "AccessRequest",
    "Approved",
    "Decision",
    "PolicySet",
    "PolicyTest",
    "PolicyTestResult",
    "TaskFacts",
    "agent_facts",
    "claimed_text",
    "complete_schema",
    "read_tests",
    "resource_facts",
    "run_tests",
]
