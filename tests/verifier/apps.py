"""Small APIs behind the verifier, each on a real server: `python -m tests.verifier.apps flask ISSUER PORT`."""

from __future__ import annotations

import sys
from typing import Any

from broker.conformance.fake_broker import AUDIENCE, SCOPE
from broker.sdk.verifier import Verifier


def flask_app(verifier: Verifier) -> Any:
    from flask import Flask

    from broker.sdk.verifier.flask import requires, verified

    app = Flask("tests.verifier")

    @app.get("/contacts")
    @requires(verifier, SCOPE)
    def contacts() -> dict[str, str]:
        return {"for": verified().agent}

    return app


def asgi_app(verifier: Verifier) -> Any:
    from broker.sdk.verifier.asgi import VERIFIED, VerifierMiddleware

    async def contacts(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        body = scope[VERIFIED].agent.encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body})

    return VerifierMiddleware(contacts, verifier, scopes=[SCOPE])


def main() -> None:
    kind, issuer, port, bound_s = sys.argv[1:]
    verifier = Verifier(issuer, AUDIENCE, token_source="a-workload-token", bound_s=int(bound_s))
    if kind == "flask":
        from werkzeug.serving import make_server

        make_server("127.0.0.1", int(port), flask_app(verifier), threaded=True).serve_forever()
    else:
        import uvicorn

        uvicorn.run(asgi_app(verifier), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
