"""For MCP servers of the `mcp` SDK: a `TokenVerifier`.

::

    server = MCPServer("crm", auth=settings, token_verifier=McpTokenVerifier(verifier))

The SDK hands over a bearer token and nothing of its request, so a token that is bound to a key is refused here
(INV-21): for those put `broker.sdk.verifier.asgi.VerifierMiddleware` around `server.streamable_http_app()`. It also has
one way to say no, so that what cannot be proven is a 401 here where the others say 503.
"""

from __future__ import annotations

import logging

from mcp.server.auth.provider import AccessToken

from broker.sdk.verifier.refused import Refused
from broker.sdk.verifier.verifier import Verifier

_log = logging.getLogger("broker.sdk.verifier")


class McpTokenVerifier:
    """`mcp.server.auth.provider.TokenVerifier`. Scopes are those of `AuthSettings.required_scopes`."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    async def verify_token(self, token: str) -> AccessToken | None:
        try:
            found = await self._verifier.check_async(f"Bearer {token}", "POST", self._verifier.audience)
        except Refused as refused:
            _log.info("a token was refused: %s", refused.code)
            return None
        return AccessToken(
            token=token,
            client_id=found.agent,
            scopes=sorted(found.scopes),
            expires_at=int(found.expires_at.timestamp()),
            resource=self._verifier.audience,
            subject=found.subject,
            claims=found.claims,
        )
