"""What stands beside a proxy and says whether a request may pass, and with which credential of the upstream's own.

nginx (`auth_request`), Traefik (`forwardAuth`) and Envoy (`ext_authz` over HTTP) ask before they forward. The agent
shows the broker's token; the proxy takes it off and puts on what the gateway answered, so that an agent never holds a
credential that outlives its task. Whatever is not proven is refused: 401 where the token proves nothing, 403 where it
is not enough, 503 where nobody can say (INV-13, INV-24). No answer is kept: each request is a new question (INV-25).

Talks to the broker by the SDK, as a verifier of each upstream's audience. Never sees a request's body.
"""
