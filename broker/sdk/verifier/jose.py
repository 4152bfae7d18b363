"""What the broker signed, read strictly: compact JWS (RFC 7515), JWK (RFC 7517), JSON that can mean one thing only.

A key says which one algorithm it verifies; a token only repeats it (INV-18). The bytes that were verified are the
bytes that are used (INV-22). Needs `cryptography` and nothing else, because it runs in other people's programs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

MAX_TOKEN_BYTES = 8192
_MAX_DEPTH = 32
_LAST_SECOND = 253402300799  # 9999-12-31T23:59:59Z, the last one a datetime can hold
# Each of these would let a token bring or name its own key, or change what the signature covers.
_REFUSED_HEADERS = frozenset({"jku", "x5u", "x5c", "crit", "b64", "jwk"})
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_SMALLEST_RSA, _LARGEST_RSA = 2048, 8192
_HIGHEST_EXPONENT = 2**31  # an enormous one makes each verification as dear as a signature
_HASHES: Mapping[str, hashes.HashAlgorithm] = {
    "256": hashes.SHA256(),
    "384": hashes.SHA384(),
    "512": hashes.SHA512(),
}
_RSA_NAMES = frozenset(f"{kind}{bits}" for kind in ("RS", "PS") for bits in _HASHES)
_CURVES: Mapping[str, tuple[ec.EllipticCurve, str]] = {
    "P-256": (ec.SECP256R1(), "ES256"),
    "P-384": (ec.SECP384R1(), "ES384"),
    "P-521": (ec.SECP521R1(), "ES512"),
}
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?+', re.DOTALL)

Verify = Callable[[bytes, bytes], None]


class NotReadable(Exception):
    """Not what it should be. The message holds nothing out of it."""


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A public key and the one algorithm it verifies. `verify` takes signature and message, as `cryptography` does."""

    algorithm: str
    thumbprint: str
    _verify: Verify = field(repr=False)

    def verifies(self, signature: bytes, signed: bytes) -> bool:
        try:
            self._verify(signature, signed)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Jws:
    """The parts of a token that is well formed; nothing in them is proven."""

    algorithm: str
    kid: str | None
    typ: str
    header: Mapping[str, Any] = field(repr=False)
    payload: bytes = field(repr=False)
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def require(self, key: Key) -> None:
        """Refuse unless `key` made this signature, with the algorithm that is the key's."""
        if self.algorithm != key.algorithm:
            raise NotReadable("the algorithm is not that of the key")
        if not key.verifies(self.signature, self.signed):
            raise NotReadable("the signature is wrong")


def parse(token: str, *, brings_key: bool = False, max_bytes: int = MAX_TOKEN_BYTES) -> Jws:
    """Take a compact JWS apart. `brings_key` is for DPoP proofs alone, where the `jwk` header is the point."""
    if len(token) > max_bytes:
        raise NotReadable(f"it has more than {max_bytes} bytes")
    try:
        raw = token.encode("ascii")
    except UnicodeEncodeError:
        raise NotReadable("it is not ASCII") from None
    segments = raw.split(b".")
    if len(segments) != 3:
        raise NotReadable("it does not have three segments")
    header = members(_decoded(segments[0]), max_bytes=max_bytes)
    refused = _REFUSED_HEADERS & header.keys()
    if refused - ({"jwk"} if brings_key else set()):
        raise NotReadable("it has a header that would choose how it is checked")
    algorithm, kid, typ = header.get("alg"), header.get("kid"), header.get("typ", "")
    if not isinstance(algorithm, str) or not isinstance(typ, str) or not isinstance(kid, str | None):
        raise NotReadable("its header is not made of strings")
    return Jws(
        algorithm=algorithm,
        kid=kid,
        typ=typ.lower().removeprefix("application/"),
        header=header,
        payload=_decoded(segments[1]),
        signed=segments[0] + b"." + segments[1],
        signature=_decoded(segments[2]),
    )


def key_of(jwk: Mapping[str, Any]) -> Key:
    """The key of a JWK, pinned to one algorithm; NotReadable for a private, weak, symmetric or unknown one."""
    if not _PRIVATE_MEMBERS.isdisjoint(jwk):
        raise NotReadable("the key has private members")
    operations = jwk.get("key_ops", ["verify"])
    if jwk.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise NotReadable("the key is not for signatures")
    kind, said = jwk.get("kty"), jwk.get("alg")
    try:
        if kind == "EC":
            algorithm, verify, canonical = _ec(jwk)
        elif kind == "OKP" and jwk.get("crv") == "Ed25519":
            algorithm, verify, canonical = _ed25519(jwk)
        elif kind == "RSA":
            algorithm, verify, canonical = _rsa(jwk, "RS256" if said is None else said)
        else:
            raise NotReadable("the key is of a kind that is not taken")
    except (ValueError, TypeError, KeyError):
        raise NotReadable("the key has no valid parameters") from None
    if said is not None and said != algorithm and not (algorithm == "EdDSA" and said == "Ed25519"):
        raise NotReadable("the key says another algorithm than it can verify")
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    # RFC 7638: computed of the key, and not of how somebody spelled it.
    return Key(algorithm, base64url(hashlib.sha256(text.encode()).digest()), verify)


def _ec(jwk: Mapping[str, Any]) -> tuple[str, Verify, dict[str, str]]:
    curve, algorithm = _CURVES[jwk["crv"]]
    size = (curve.key_size + 7) // 8
    x, y = _number(jwk["x"]), _number(jwk["y"])
    key = ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    scheme = ec.ECDSA(_HASHES["512" if algorithm == "ES512" else algorithm[2:]])

    def verify(signature: bytes, signed: bytes) -> None:
        # RFC 7518 section 3.4: r and s at full length, and nothing else.
        if len(signature) != 2 * size:
            raise InvalidSignature
        r, s = int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big")
        key.verify(encode_dss_signature(r, s), signed, scheme)

    spelled = {"crv": jwk["crv"], "kty": "EC"}
    return algorithm, verify, spelled | {n: base64url(v.to_bytes(size, "big")) for n, v in (("x", x), ("y", y))}


def _ed25519(jwk: Mapping[str, Any]) -> tuple[str, Verify, dict[str, str]]:
    raw = decoded(jwk["x"])
    key = ed25519.Ed25519PublicKey.from_public_bytes(raw)
    return "EdDSA", key.verify, {"crv": "Ed25519", "kty": "OKP", "x": base64url(raw)}


def _rsa(jwk: Mapping[str, Any], algorithm: str) -> tuple[str, Verify, dict[str, str]]:
    if algorithm not in _RSA_NAMES:
        raise NotReadable("the key is for an algorithm that is not taken")
    n, e = _number(jwk["n"]), _number(jwk["e"])
    if not _SMALLEST_RSA <= n.bit_length() <= _LARGEST_RSA or e >= _HIGHEST_EXPONENT:
        raise NotReadable("the RSA key is too weak, or too dear to verify with")
    key = rsa.RSAPublicNumbers(e, n).public_key()
    digest = _HASHES[algorithm[2:]]
    scheme: padding.AsymmetricPadding = padding.PKCS1v15()
    if algorithm.startswith("PS"):
        scheme = padding.PSS(mgf=padding.MGF1(digest), salt_length=padding.PSS.DIGEST_LENGTH)

    def verify(signature: bytes, signed: bytes) -> None:
        key.verify(signature, signed, scheme, digest)

    spelled = {name: base64url(v.to_bytes((v.bit_length() + 7) // 8, "big")) for name, v in (("e", e), ("n", n))}
    return algorithm, verify, spelled | {"kty": "RSA"}


def members(raw: bytes, *, max_bytes: int = MAX_TOKEN_BYTES) -> dict[str, Any]:
    """The JSON object these bytes can only mean: no duplicate members, no NaN, no NUL, no half of a surrogate pair.

    >>> members(b'{"a": [1, null]}')
    {'a': [1, None]}
    """
    if len(raw) > max_bytes:
        raise NotReadable(f"it has more than {max_bytes} bytes")
    if raw.count(b"[") + raw.count(b"{") > _MAX_DEPTH and _depth(raw) > _MAX_DEPTH:
        raise NotReadable("its JSON is nested too deeply")
    try:
        value = _decoder.decode(raw.decode("utf-8"))
        if b"\\u" in raw:  # in valid UTF-8 only an escape can spell them
            _require_text(value)
    except (ValueError, RecursionError):  # UnicodeError is one too; "from None": it holds the whole document (INV-30)
        raise NotReadable("it is not JSON that every reader understands alike") from None
    if not isinstance(value, dict):
        raise NotReadable("it is not a JSON object")
    return value


def _depth(raw: bytes) -> int:
    deepest = depth = 0
    for byte in _STRING.sub(b"", raw):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member appears twice")
    return found


def _integer(digits: str) -> int:
    # The length first: converting many digits takes quadratic time.
    if len(digits) > 20:
        raise ValueError("an integer beyond 64 bits")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise ValueError("not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)


def _require_text(value: Any) -> None:
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError for half a pair
        if "\0" in value:
            raise ValueError("a NUL")
    elif isinstance(value, dict):
        for name, item in value.items():
            _require_text(name)
            _require_text(item)
    elif isinstance(value, list):
        for item in value:
            _require_text(item)


def seconds(claims: Mapping[str, Any], name: str) -> int:
    """A time among the claims: whole seconds since 1970."""
    value = claims.get(name)
    if type(value) is not int or not 0 <= value <= _LAST_SECOND:  # `type`: True is an int to isinstance
        raise NotReadable(f"{name} is not a whole number of seconds")
    return value


def text(claims: Mapping[str, Any], name: str, *, longest: int = 1000) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise NotReadable(f"{name} is not a string of 1 to {longest} characters")
    return value


def base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decoded(value: object, *, longest: int = MAX_TOKEN_BYTES) -> bytes:
    """The bytes of a base64url string without padding, in its one canonical spelling."""
    if not isinstance(value, str) or len(value) > longest:
        raise NotReadable("it is not a base64url string")
    try:
        return _decoded(value.encode("ascii"))
    except UnicodeEncodeError:
        raise NotReadable("it is not a base64url string") from None


def _decoded(segment: bytes) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(segment + b"==")
    except binascii.Error:
        raw = b""
    # Python's decoder skips what it does not know. Only one spelling per value: a second one would be another token
    # to every cache and replay check, and the same to every verifier.
    if not segment or base64.urlsafe_b64encode(raw).rstrip(b"=") != segment:
        raise NotReadable("it is not canonical base64url")
    return raw


def _number(value: object) -> int:
    return int.from_bytes(decoded(value), "big")


def keys_of(document: bytes, *, max_bytes: int, most: int, known: Collection[Key] = ()) -> dict[str, Key]:
    """The keys of a JWK set by `kid`; one that cannot be used is left out. A key that is `known` stays the same object.

    A set in which two keys have one name is refused as a whole: which of the two was meant is not ours to guess.
    """
    listed = members(document, max_bytes=max_bytes).get("keys")
    if not isinstance(listed, list) or len(listed) > most:
        raise NotReadable(f"it is not a list of at most {most} keys")
    before = {(key.algorithm, key.thumbprint): key for key in known}
    found: dict[str, Key] = {}
    for jwk in listed:
        kid = jwk.get("kid") if isinstance(jwk, dict) else None
        if not isinstance(kid, str) or not 0 < len(kid) <= 256:
            continue
        if kid in found:
            raise NotReadable("two keys have one kid")
        try:
            key = key_of(jwk)
        except NotReadable:
            continue
        found[kid] = before.get((key.algorithm, key.thumbprint), key)
    return found
