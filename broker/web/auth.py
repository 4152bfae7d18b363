"""Who calls: the workload token of a request, and the DPoP proof that comes with it."""

from __future__ import annotations

from broker.domain.errors import Invalid, Unauthenticated
from broker.domain.identity import Caller, User
from broker.services.standing import current_caller
from broker.services.users import acting_for
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


def user_behind(token: str | None, actor: Caller) -> User | None:
    """On whose behalf `actor` asks, by that person's token; None without one. A token for one use is used up by it."""
    if token is None:
        return None
    house = broker()
    return acting_for(house.authenticator, token, actor.principal, house.standing.now().catalogue, now=house.clock())


def user_in_body(token: str | None, actor: Caller) -> User | None:
    """The same for the member `on_behalf_of`; why it was not accepted is for our log, and not for who tries tokens."""
    try:
        return user_behind(token, actor)
    except Unauthenticated as refusal:
        raise Invalid(
            "on_behalf_of is not accepted: send a live token of a user, made for this broker, by which you may act",
            member="on_behalf_of",
        ) from refusal


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
