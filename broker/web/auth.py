"""Who calls: the workload token of a request, and the DPoP proof that comes with it."""

from __future__ import annotations

from broker.domain.errors import Unauthenticated
from broker.domain.identity import Caller
from broker.services.standing import current_caller
from broker.web.context import broker, current

_SCHEME = "Bearer "


def caller(*, looks_again: bool = False) -> Caller:
    """The authenticated caller of a `/v1` request, by `Authorization: Bearer <workload token>`.

    A verb that `looks_again`, in its own transaction, saves the look here.
    """
    header = current().header("Authorization")
    if header is None:
        raise Unauthenticated("no Authorization header")
    if header[: len(_SCHEME)].lower() != _SCHEME.lower():
        raise Unauthenticated("Authorization is not of the scheme Bearer")
    found = authenticate(header[len(_SCHEME) :])
    return found if looks_again else known_now(found)


def authenticate(token: str) -> Caller:
    """The caller that a workload token proves, under the configuration this process saw last: garbage costs no look."""
    call, house = current(), broker()
    found: Caller = house.authenticator.authenticate(
        token, house.standing.last_known().catalogue, now=house.clock(), trace_id=call.trace_id
    )
    call.caller = found.name
    return found


def known_now(caller: Caller) -> Caller:
    """The same under the newest configuration: who was taken out of it may do nothing more, at any broker."""
    return current_caller(caller, broker().standing.now())


def proven_key() -> str | None:
    """The thumbprint of the key a `DPoP` header proves (RFC 9449), None without one; the proof is used up by it."""
    call, house = current(), broker()
    proof = call.header("DPoP")
    if proof is None:
        return None
    jkt: str = house.proofs.verify_dpop(
        proof, method=call.method, url=house.settings.issuer + call.path, now=house.clock()
    )
    return jkt
