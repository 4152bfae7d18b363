"""Why a request opens nothing: one type, a stable code, and what to answer (RFC 6750 section 3, RFC 9449 section 7).

`code` is for your log and your metrics; `error` and `www_authenticate` are for the caller. A refusal with status 503
says that nothing could be proven, and that asking again soon may help; all others are the caller's to solve. No
message holds a token, or text out of one (INV-30, INV-31).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

PROOF_ALGORITHMS = ("ES256", "ES384", "EdDSA", "RS256", "PS256")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """What a code means: the HTTP status, the OAuth error (None where RFC 6750 wants none), and a sentence."""

    status: int
    error: str | None
    sentence: str


_TOKEN, _PROOF, _LATER = "invalid_token", "invalid_dpop_proof", "temporarily_unavailable"

REASONS = MappingProxyType(
    {
        "missing_token": Reason(status=401, error=None, sentence="no access token was presented"),
        "malformed_request": Reason(
            status=400, error="invalid_request", sentence="the credentials are not one scheme and one token"
        ),
        "malformed_token": Reason(status=401, error=_TOKEN, sentence="the access token is not well formed"),
        "wrong_type": Reason(status=401, error=_TOKEN, sentence="the token is not an access token"),
        "wrong_algorithm": Reason(
            status=401, error=_TOKEN, sentence="the token is signed with another algorithm than its key has"
        ),
        "unknown_key": Reason(status=401, error=_TOKEN, sentence="the token is signed by no key of the issuer"),
        "bad_signature": Reason(status=401, error=_TOKEN, sentence="the signature of the token is wrong"),
        "wrong_issuer": Reason(status=401, error=_TOKEN, sentence="the token is of another issuer"),
        "wrong_audience": Reason(status=401, error=_TOKEN, sentence="the token is not for this resource alone"),
        "expired": Reason(status=401, error=_TOKEN, sentence="the access token expired"),
        "not_yet_valid": Reason(status=401, error=_TOKEN, sentence="the access token is not valid yet"),
        "revoked": Reason(status=401, error=_TOKEN, sentence="the access token was revoked"),
        "suspended": Reason(status=401, error=_TOKEN, sentence="the access token is suspended"),
        "no_such_place": Reason(status=401, error=_TOKEN, sentence="the token points beyond its status list"),
        "bound_token": Reason(
            status=401, error=_TOKEN, sentence="the token is bound to a key and needs the DPoP scheme and a proof"
        ),
        "unbound_token": Reason(status=401, error=_TOKEN, sentence="a token that is bound to a key is needed"),
        "bad_proof": Reason(status=401, error=_PROOF, sentence="the DPoP proof does not fit the request"),
        "replayed_proof": Reason(status=401, error=_PROOF, sentence="the DPoP proof was used before"),
        "insufficient_scope": Reason(
            status=403, error="insufficient_scope", sentence="the token does not have the scope that is needed"
        ),
        "no_keys": Reason(status=503, error=_LATER, sentence="the issuer's keys are not known"),
        "not_fresh": Reason(
            status=503, error=_LATER, sentence="it cannot be proven now that the token was not revoked"
        ),
        "clock": Reason(status=503, error=_LATER, sentence="this machine's clock and the issuer's do not agree"),
        "too_many_proofs": Reason(status=503, error=_LATER, sentence="too many DPoP proofs are remembered"),
    }
)


class Refused(Exception):
    """`detail` says more where the code leaves something open. It is for the operator and not for the caller."""

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        scopes: Iterable[str] = (),
        scheme: str = "Bearer",
        resource_metadata: str | None = None,
    ) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.scopes = tuple(scopes)
        self.scheme = scheme
        self.resource_metadata = resource_metadata
        self._reason = REASONS[code]

    @property
    def status(self) -> int:
        return self._reason.status

    @property
    def error(self) -> str | None:
        """The OAuth error code; None where no credentials came, which RFC 6750 wants answered without one."""
        return self._reason.error

    @property
    def description(self) -> str:
        return self._reason.sentence

    @property
    def retry_after_s(self) -> int | None:
        return 1 if self.status == 503 else None

    @property
    def www_authenticate(self) -> str | None:
        """The value of `WWW-Authenticate`; None for a 503, which no other credential would cure."""
        if self.status == 503:
            return None
        scheme = "DPoP" if self.error == _PROOF else self.scheme
        parameters = [] if self.error is None else [("error", self.error), ("error_description", self.description)]
        if self.scopes and self.status in (401, 403):
            parameters.append(("scope", " ".join(self.scopes)))
        if self.resource_metadata is not None:
            parameters.append(("resource_metadata", self.resource_metadata))
        if scheme == "DPoP":
            parameters.append(("algs", " ".join(PROOF_ALGORITHMS)))
        written = ", ".join(f'{name}="{value}"' for name, value in parameters)
        return f"{scheme} {written}" if written else scheme

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The response headers that go with it."""
        found = [("Cache-Control", "no-store")]
        if self.www_authenticate is not None:
            found.append(("WWW-Authenticate", self.www_authenticate))
        if self.retry_after_s is not None:
            found.append(("Retry-After", str(self.retry_after_s)))
        return found

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error or "unauthorized", "error_description": self.description}

    def __str__(self) -> str:
        return f"{self.code}: {self.description}" + (f" ({self.detail})" if self.detail else "")

    def __reduce__(self) -> Any:
        return _again, (self.code, self.detail, self.scopes, self.scheme, self.resource_metadata)


def _again(code: str, detail: str, scopes: tuple[str, ...], scheme: str, resource_metadata: str | None) -> Refused:
    return Refused(code, detail, scopes=scopes, scheme=scheme, resource_metadata=resource_metadata)
