"""What the broker says about tokens under its signature: statements of the feed, and status lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from broker.sdk.verifier import jose
from broker.sdk.verifier.jose import NotReadable
from broker.sdk.verifier.keys import Keys

_ALGORITHM = "ES256"


class UnknownKey(NotReadable):
    """Signed with a key that is not in the set as we have it."""


# Whether nothing that this key signed at this time is believed.
RefusesKey = Callable[[str, int], bool]


def claims_of(
    token: str, keys: Keys, *, typ: str, issuer: str, max_bytes: int, refuses_key: RefusesKey
) -> Mapping[str, Any]:
    """The claims of something of this type that the broker signed; its times are for the caller to judge."""
    parsed = jose.parse(token, max_bytes=max_bytes)
    if parsed.typ != typ:
        raise NotReadable(f"it is not of type {typ}")
    key = keys.find(parsed.kid)
    if key is None:
        raise UnknownKey("it is signed by no key of the issuer")
    if key.algorithm != _ALGORITHM:
        raise NotReadable(f"it is not signed with {_ALGORITHM}")
    parsed.require(key)
    claims = jose.members(parsed.payload, max_bytes=max_bytes)
    if claims.get("iss") != issuer:
        raise NotReadable("it is of another issuer")
    if refuses_key(parsed.kid or "", jose.seconds(claims, "iat")):
        # Whoever has a key that leaked could say with it that nothing leaked, until the key set is read again.
        raise NotReadable("it is signed by a key that was revoked")
    return claims
