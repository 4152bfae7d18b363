"""For APIs that receive the broker's tokens: checks them offline, and knows within the bound what was revoked.

::

    verifier = Verifier("https://broker.example", "https://crm.example/api", token_source=Path("/run/crm-api.token"))
    verified = verifier.check(request.headers.get("Authorization"), "GET", request.url, scopes=["contacts:read"])

Needs `cryptography` and `httpx`. The doors for frameworks are modules of their own, which import theirs: `flask`,
`wsgi`, `asgi`, `starlette` (and FastAPI), `grpc`, `mcp`.
"""

from broker.sdk.verifier.proofs import Memory, Once
from broker.sdk.verifier.refused import REASONS, Reason, Refused
from broker.sdk.verifier.verifier import State, Verified, Verifier

__all__ = ["REASONS", "Memory", "Once", "Reason", "Refused", "State", "Verified", "Verifier"]
