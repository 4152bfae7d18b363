"""Every way a call can go wrong, one tree, each with the broker's stable code.

::

    BrokerError
    ├── Invalid             the request cannot be understood
    ├── NotAuthenticated    who calls was not proven, or there is no workload token to prove it with
    ├── Refused             the broker said no; carries the decision
    ├── NotFound            absent, or not to be seen by this caller
    ├── Conflict            the state does not allow it
    ├── Limited             a limit; carries how long to wait
    ├── ApprovalPending     people are asked first; carries the grant and the approval
    └── Unreachable         no usable answer; whether the request had an effect may be unknown
        └── NotTheBroker        an answer, but not one the protocol knows: a redirect, a proxy's page

A message holds the broker's own sentence. It never holds a token (INV-30) or a control character (INV-31).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class BrokerError(Exception):
    """`status` is None where no answer came; `problem` is the whole problem document, or empty."""

    def __init__(
        self,
        code: str,
        title: str,
        detail: str,
        status: int | None = None,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        # All of them into `args`: that is what pickling hands back to __init__.
        super().__init__(code, title, detail, status, problem)
        self.code = code
        self.title = title
        self.detail = detail
        self.status = status
        self.problem: Mapping[str, Any] = problem or {}

    def __str__(self) -> str:
        sentence = ": ".join(part for part in (self.title, self.detail) if part)
        remedy = self.problem.get("remedy")
        return f"{sentence} ({printable(remedy)})" if isinstance(remedy, str) else sentence

    @property
    def member(self) -> str | None:
        """The member of the request that was wrong, where one was."""
        return _text(self.problem.get("member"))

    @property
    def trace_id(self) -> str | None:
        """What to search the broker's log for."""
        return _text(self.problem.get("trace_id"))


class Invalid(BrokerError):
    pass


class NotAuthenticated(BrokerError):
    pass


class Refused(BrokerError):
    @property
    def decision(self) -> Mapping[str, Any] | None:
        """Which policies said no, in which version, and what would be allowed; None where no policy was asked."""
        found = self.problem.get("decision")
        return found if isinstance(found, Mapping) else None


class NotFound(BrokerError):
    pass


class Conflict(BrokerError):
    pass


class _Waiting(BrokerError):
    """Whatever says how long to wait before asking again; None where it did not say."""

    def __init__(
        self,
        code: str,
        title: str,
        detail: str,
        status: int | None = None,
        problem: Mapping[str, Any] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(code, title, detail, status, problem)
        self.args = (*self.args, retry_after_s)
        self.retry_after_s = retry_after_s


class Limited(_Waiting):
    pass


class ApprovalPending(_Waiting):
    """Collect the credential with `collect_grant(error.grant_id)` once people have said yes, or with `await_grant`."""

    @property
    def grant_id(self) -> str | None:
        grant = self.problem.get("grant")
        return _text(grant.get("id")) if isinstance(grant, Mapping) else None

    @property
    def approval(self) -> Mapping[str, Any]:
        found = self.problem.get("approval")
        return found if isinstance(found, Mapping) else {}


class Unreachable(BrokerError):
    pass


class NotTheBroker(Unreachable):
    pass


def printable(text: str) -> str:
    """Somebody else's text as it may stand in a message or on a terminal.

    >>> printable("no\\x1b[31m such task")
    'no?[31m such task'
    """
    return _CONTROL.sub("?", text.encode(errors="replace").decode())[:2000]


def invalid(detail: str, *, member: str) -> Invalid:
    """What we refuse to send in the first place."""
    return Invalid("invalid_request", "The request cannot be sent", detail, None, {"member": member})


def no_token(detail: str) -> NotAuthenticated:
    return NotAuthenticated("no_token", "No workload token", detail)


def not_the_broker(detail: str, status: int | None = None) -> NotTheBroker:
    return NotTheBroker("not_the_broker", "Not an answer of a broker", detail, status)


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) else None
