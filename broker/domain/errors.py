"""Every refusal the broker can make, one tree, each with a stable code.

::

    BrokerError
    ├── Invalid                 the request cannot be understood
    │   ├── InvalidTarget           the resource is not one we know
    │   ├── InvalidScope            a scope the resource does not offer
    │   └── InvalidTaskDetails      authorization_details we cannot read
    ├── Unauthenticated         who calls was not proven
    │   ├── InvalidProof            a DPoP proof that proves nothing
    │   └── NonceRequired           a DPoP proof without our nonce
    ├── Forbidden               who calls is known and may not
    │   ├── RoleMissing
    │   ├── PolicyDenied            carries the decision
    │   └── LockedDown
    ├── NotFound                absent, or not to be seen by this caller (INV-28)
    ├── Conflict                the state does not allow it
    │   ├── TaskNotActive
    │   └── IdempotencyConflict     the same key, another body
    ├── LimitExceeded           a limit; carries which, and how long to wait
    └── Unavailable             we cannot answer now; never a yes
        ├── ProviderRefused         a system outside said no: it made no secret
        ├── ProviderUnavailable     a system outside did not say: a secret may exist
        └── ConfigurationError      refused at start

No HTTP status lives here: `broker.web.problems` maps codes to statuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar


class BrokerError(Exception):
    """A refusal with a sentence for the person who can fix it."""

    code: ClassVar[str] = "error"

    def __init__(self, detail: str, *, member: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.member = member


class Invalid(BrokerError):
    code = "invalid_request"


class InvalidTarget(Invalid):
    code = "invalid_target"


class InvalidScope(Invalid):
    code = "invalid_scope"


class InvalidTaskDetails(Invalid):
    code = "invalid_authorization_details"


class Unauthenticated(BrokerError):
    """`reason` is for our own log and audit trail; outside, every refused token looks the same."""

    code = "unauthenticated"

    def __init__(self, reason: str) -> None:
        super().__init__("the workload token was not accepted")
        self.reason = reason


class InvalidProof(BrokerError):
    code = "invalid_dpop_proof"


class NonceRequired(BrokerError):
    code = "use_dpop_nonce"


class Forbidden(BrokerError):
    code = "forbidden"


class RoleMissing(Forbidden):
    code = "role_missing"


class PolicyDenied(Forbidden):
    """`decision` is the decision as it is stored on the denied grant; `hint` finds what would have been allowed."""

    code = "policy_denied"

    def __init__(
        self,
        detail: str,
        *,
        decision: Mapping[str, Any],
        grant_id: str | None = None,
        hint: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        super().__init__(detail)
        self.decision = decision
        self.grant_id = grant_id
        self.hint = hint

    def explained(self) -> PolicyDenied:
        """The same with what would have been allowed. It takes a search, so it is called where nobody waits for it."""
        more = [sentence for sentence in self.hint() if sentence not in self.decision["reasons"]]
        decision = {**self.decision, "reasons": [*self.decision["reasons"], *more]}
        return PolicyDenied(" ".join([self.detail, *more]), decision=decision, grant_id=self.grant_id)


class LockedDown(Forbidden):
    code = "locked_down"


class NotFound(BrokerError):
    code = "not_found"


class Conflict(BrokerError):
    code = "conflict"


class TaskNotActive(Conflict):
    code = "task_not_active"


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class LimitExceeded(BrokerError):
    """`limit` is the name of the limit as the configuration has it, `value` its bound; `window_s` where it has one."""

    code = "limit_exceeded"

    def __init__(self, detail: str, *, limit: str, value: int, retry_after_s: int, window_s: int | None = None) -> None:
        super().__init__(detail)
        self.limit = limit
        self.value = value
        self.window_s = window_s
        self.retry_after_s = retry_after_s


class Unavailable(BrokerError):
    code = "unavailable"


class ProviderRefused(Unavailable):
    """`reason` is what the outside said, for our own log and audit trail; it speaks of our set-up, not to agents."""

    code = "provider_refused"

    def __init__(self, detail: str, *, reason: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason


class ProviderUnavailable(Unavailable):
    """Unknown means created. `reference` and `expires_at` are what is known of a secret that must not be used."""

    code = "provider_unavailable"

    def __init__(
        self,
        detail: str,
        *,
        reason: str | None = None,
        reference: str | None = None,
        expires_at: datetime | None = None,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.reference = reference
        self.expires_at = expires_at


class ConfigurationError(Unavailable):
    """Everything wrong with a configuration at once; `problems` has one sentence for each."""

    code = "configuration"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
