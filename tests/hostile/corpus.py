"""What somebody hostile writes into a request, and one good request of each kind to write it into."""

from broker.web import activity_shapes, shapes
from tests.house import CRM, POLICIES

# No text that people and logs will see may hold any of these, wherever it comes in.
MALFORMED = (
    "a\0b",
    "a\ud800b",  # half a surrogate pair
    "a\udc00b",  # the other half
    "a\r\nSet-Cookie: b=c",
    "a\nb",
    "a\x1b[2Jb",  # clears a terminal
    "a\x85b",  # a next line
    "a\u2028b",  # a line separator
    "x" * 1001,
    "x" * 60_000,
)
# Well-formed text that means something to some interpreter, and nothing to us.
TRICKS = (
    "../../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/",
    "//evil.test/x",
    "{{7*7}}",
    "${7*7}",
    "#{7*7}",
    "%{7*7}",
    "{0.__class__}",
    "%s%s%n",
    "'; DROP TABLE grants; --",
    '" OR ""="',
    "x') OR 1=1 --",
    "<script>alert(7)</script>",
    "$(id)",
    "`id`",
    "|id",
    "=cmd|'/c calc'!A1",
    '") when { true }; permit (principal, action, resource); //',
    "\u202eoverride",
    "ﬁ\u0301",
    "𝟙𝟚",
    "😀",
)
NOT_A_STRING = (1, 1.5, True, {}, [], ["a"], {"a": "b"})
# As they are written, because JSON libraries will not write most of them.
NOT_A_NUMBER_OF_SECONDS = (
    "NaN", "Infinity", "-Infinity", "-1", "0", "-0", "0.5", "60.0", "6e1", "1e400", "1e5", "true", "false", '"60"',
    '"1h"', '"PT1M"', "31536001", "9223372036854775807", "9223372036854775808", "9" * 400, "[60]",
    '{"s": 60}', "060", "0x3c", "+60", "6_0", '""',
)  # fmt: skip
NOT_A_BOOLEAN = ("1", "0", '"true"', '"yes"', "NaN", "[]")

# One good body for each shape, with every member it may have.
BODIES = {
    shapes.OpenTask: {
        "purpose": "summarise the leads of May",
        "agents": ["summarizer"],
        "deadline_s": 3600,
        "heartbeat_s": 60,
        "resources": [{"resource": CRM, "scopes": ["contacts:read"]}],
        "labels": {"team": "crm"},
        "on_behalf_of": None,
        "parent_task_id": None,
    },
    shapes.WithReason: {"reason": "done"},
    shapes.RequestGrant: {
        "task_id": "task_00000000000000000000000000",
        "resource": CRM,
        "scopes": ["contacts:read"],
        "ttl_s": 60,
        "intent": "read the leads",
        "context": {"batch": "seven"},
        "parameters": {},
        "on_behalf_of": None,
        "parent_grant_id": None,
        "hand_to": ["scribe"],
        "break_glass": {"reason": "the CRM is down"},
    },
    shapes.RenewGrant: {"ttl_s": 60},
    shapes.CollectGrant: {"parameters": {}},
    shapes.Approve: {"scopes": ["contacts:read"], "ttl_s": 60, "reason": "looks right"},
    shapes.CompleteReview: {"note": "used as it was said"},
    shapes.Abandon: {"reason": "drill"},
    shapes.Revoke: {"agent": "nobody", "reason": "drill", "dry_run": False, "lockdown": False},
    shapes.SetLockdown: {"agent": "nobody", "reason": "drill"},
    shapes.PutPolicies: {"policies": dict(POLICIES), "schema": None},
    shapes.Replay: {"policies": dict(POLICIES), "schema": None, "period_s": 3600, "limit": 100},
    shapes.SendSignal: {
        "agent": "summarizer",
        "level": "medium",
        "reason": "drill",
        "source": "the tests",
        "expires_s": 60,
    },
    activity_shapes.TellActivities: {
        "activities": [
            {
                "id": "call-1",
                "kind": "tool",
                "action": "search_contacts",
                "at": "2026-03-01T12:00:00Z",
                "grant_id": "grt_00000000000000000000000000",
                "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                "scope": "contacts:read",
                "resource": CRM,
                "outcome": "ok",
                "attributes": {"batch": "seven"},
            }
        ]
    },
    shapes.Evaluate: {
        "agent": "summarizer",
        "resource": CRM,
        "scopes": ["contacts:read"],
        "ttl_s": 60,
        "purpose": "evaluation",
        "labels": {"team": "crm"},
        "intent": "read the leads",
        "sender_bound": False,
        "break_glass": False,
        "context": {"batch": "seven"},
    },
}
AXES = ("task", "agent", "user", "orchestrator", "resource", "provider", "policy", "key")


def leaves(value, path=()):
    """Each member that holds no others, as (path, value); the name of a free member counts as one too."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from leaves(below, (*path, name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from leaves(below, (*path, index))
    else:
        yield path, value


def objects(value, path=()):
    """The path of each object whose members are fixed."""
    if isinstance(value, dict):
        if path[-1:] not in (("labels",), ("context",), ("parameters",), ("policies",), ("attributes",)):
            yield path
        for name, below in value.items():
            yield from objects(below, (*path, name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from objects(below, (*path, index))


def replaced(value, path, new):
    """A copy with something else at this path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]] if not isinstance(value, dict) or path[0] in value else None, path[1:], new)
    return copy


def at(value, path):
    for step in path:
        value = value[step]
    return value
