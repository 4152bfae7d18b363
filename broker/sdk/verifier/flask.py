"""For Flask: a decorator for views, or a guard before all of them.

::

    @app.get("/contacts")
    @requires(verifier, "contacts:read")
    def contacts():
        return {"for": verified().agent}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, ParamSpec, TypeVar

from flask import Flask, Response, current_app, g, jsonify, request

from broker.sdk.verifier.refused import Refused
from broker.sdk.verifier.verifier import Verified, Verifier
from broker.sdk.verifier.wsgi import verified_of

P = ParamSpec("P")
T = TypeVar("T")


def requires(verifier: Verifier, *scopes: str) -> Callable[[Callable[P, T]], Callable[P, T | Response]]:
    """A view that is called for verified requests with these scopes. Put it below the route."""

    def around(view: Callable[P, T]) -> Callable[P, T | Response]:
        @functools.wraps(view)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T | Response:
            refusal = _check(verifier, scopes)
            if refusal is not None:
                return refusal
            answer: T = current_app.ensure_sync(view)(*args, **kwargs)
            return answer

        return checked

    return around


def guard(app: Flask, verifier: Verifier, *, scopes: str | Iterable[str] = (), public: Collection[str] = ()) -> None:
    """Refuse every request that is not verified, but for the endpoints in `public`, by their names in Flask."""
    needed, open_to_all = tuple(scopes.split() if isinstance(scopes, str) else scopes), frozenset(public)

    def before() -> Response | None:
        return None if request.endpoint in open_to_all else _check(verifier, needed)

    app.before_request(before)


def verified() -> Verified:
    """Who the current request is verified for; RuntimeError where nobody checked."""
    found: Any = g.get("_broker_verified")
    if not isinstance(found, Verified):
        raise RuntimeError("this request was not verified: use requires() or guard()")
    return found


def _check(verifier: Verifier, scopes: Iterable[str]) -> Response | None:
    try:
        g._broker_verified = verified_of(request.environ, verifier, scopes)
    except Refused as refused:
        answer = jsonify(refused.body)
        answer.status_code = refused.status
        answer.headers.extend(refused.headers)
        return answer
    return None
