"""For Starlette and FastAPI: a dependency.

::

    @app.get("/contacts")
    async def contacts(caller: Annotated[Verified, Depends(requires(verifier, "contacts:read"))]):
        return {"for": caller.agent}

In Starlette without FastAPI, call it: `caller = await requires(verifier, "contacts:read")(request)`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from broker.sdk.verifier.asgi import verified_of
from broker.sdk.verifier.refused import Refused
from broker.sdk.verifier.verifier import Verified, Verifier


def requires(verifier: Verifier, *scopes: str) -> Callable[[HTTPConnection], Awaitable[Verified]]:
    """A dependency that is a `Verified` with these scopes, or refuses with an `HTTPException`."""

    async def verified(connection: HTTPConnection) -> Verified:
        try:
            return await verified_of(connection.scope, verifier, scopes)
        except Refused as refused:
            detail, headers = refused.description, dict(refused.headers)
            raise HTTPException(refused.status, detail, headers) from None

    return verified
