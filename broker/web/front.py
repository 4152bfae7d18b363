"""The front door: the operations that are asked thousands of times a second are answered before Flask.

What an operation reads, does and answers is written once; Flask has a route to each of them too, and this is a shorter
way to the same functions. What is not exactly one of these paths goes on to Flask as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from flask import Flask

from broker.web import envelope
from broker.web.answers import Answer
from broker.web.bodies import Bodies
from broker.web.context import Call, answering
from broker.wiring import Broker


class Front:
    """A WSGI application before that of `app`; `endpoints` name routes of POST that use nothing of Flask."""

    def __init__(self, app: Flask, endpoints: Collection[str], broker: Broker, bodies: Bodies) -> None:
        self._flask = app.wsgi_app
        self._broker = broker
        self._bodies = bodies
        self._routes: dict[str, Any] = {
            rule.rule: app.view_functions[rule.endpoint]
            for rule in app.url_map.iter_rules()
            if rule.endpoint in endpoints
        }

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        route = self._routes.get(path) if environ["REQUEST_METHOD"] == "POST" else None
        if route is None:
            return self._flask(environ, start_response)
        call = Call(environ, self._broker, self._bodies)
        with answering(call):
            try:
                envelope.begin(call)
                answer: Answer = route()
            except Exception as problem:
                answer = envelope.refusal(problem)
        answer.headers += envelope.last_headers(call, [name for name, _ in answer.headers])
        envelope.answered(call, path, answer.status)
        return answer(environ, start_response)
