"""What a resource's `vault` table says: which role of which engine, what an agent may send, what it receives.

Judged once, when the configuration is read. A path is made of what is written there and of nothing else; what an agent
sends is checked here, under names from a closed set, and only ever becomes a member of a JSON body (INV-31).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    load_ssh_public_identity,
    load_ssh_public_key,
)

from broker.domain.errors import Invalid
from broker.providers.base import RevocationClass
from broker.providers.vault.settings import component_of, path_of

MAX_PARAMETER = 16 * 1024
MAKING = timedelta(seconds=5)  # of a grant's life may have gone by when its secret is read
RSA_BITS = 2048

_PEM_REQUEST = re.compile(
    r"-----BEGIN (?:NEW )?CERTIFICATE REQUEST-----\s[A-Za-z0-9+/=\s]+-----END (?:NEW )?CERTIFICATE REQUEST-----\s*"
)
_SSH_LINE = re.compile(r"(ssh-ed25519|ecdsa-sha2-nistp(?:256|384|521)|ssh-rsa) ([A-Za-z0-9+/]+={0,2})(?: [^\n\r]*)?\s*")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
_COMMON_NAME = re.compile(r"[A-Za-z0-9.*@_-]{1,200}")
_GRANT = "{grant_id}"


@dataclass(frozen=True, kw_only=True)
class Received:
    """What an engine gave, once it is known to be what was asked for. `ends_at` is what the secret says of itself."""

    data: Mapping[str, Any]
    facts: Mapping[str, str] = field(default_factory=dict)
    ends_at: datetime | None = None


class Wrong(Exception):
    """What Vault gave is not what was asked for; the sentence says why, without showing it."""


class _Shape(Protocol):
    def __call__(self, source: SecretSource, sent: Mapping[str, Any], data: Mapping[str, Any]) -> Received: ...


@dataclass(frozen=True, kw_only=True)
class SecretSource:
    """One role of one secret engine. Only `parse` makes one."""

    engine: str
    mount: str
    role_path: str  # below the mount: creds/<role>, sign/<role>
    revocation: RevocationClass
    token_role: str | None = None
    target: str | None = None  # where the broker looks at the users themselves
    bound: timedelta | None = None
    least_ttl: timedelta | None = None
    reads: bool = False
    leases: bool = True
    ttl_parameter: str | None = None
    fixed: Mapping[str, str | int | bool] = field(default_factory=dict)
    accepts: Mapping[str, Callable[[str], str]] = field(default_factory=dict, repr=False)
    shape: _Shape = field(repr=False)

    @property
    def least_to_ask(self) -> timedelta | None:
        """What a grant has to last, so that enough of it is left once the secret is made."""
        return None if self.least_ttl is None else self.least_ttl + MAKING

    @property
    def path(self) -> str:
        return f"{self.mount}/{self.role_path}"

    @property
    def lease_prefix(self) -> str | None:
        """What the references of all its secrets begin with; None where they have none."""
        return f"{self.path}/" if self.leases else None

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> SecretSource:
        """The `vault` table of a resource; `Invalid` names the key that is wrong."""
        engine = table.get("engine")
        read = _ENGINES.get(engine) if isinstance(engine, str) else None
        if read is None:
            raise Invalid(f"engine must be one of {', '.join(_ENGINES)}; it is {engine!a}", member="engine")
        keys = _Keys(table)
        keys.take("engine")
        source = read(keys)
        keys.require_empty()
        return source

    def checked(self, parameters: Mapping[str, str]) -> dict[str, str]:
        """What an agent sent, as it may be passed on; `Invalid` for what is missing, unknown or wrong."""
        for name in parameters:
            if name not in self.accepts:
                known = ", ".join(self.accepts) or "none"
                raise Invalid(
                    f"this resource takes no parameter {ascii(name)[:60]}; it takes: {known}", member="parameters"
                )
        checked = {}
        for name, check in self.accepts.items():
            text = parameters.get(name)
            if not isinstance(text, str) or not text:
                raise Invalid(f"the parameter {name} is missing", member=f"parameters.{name}")
            if len(text) > MAX_PARAMETER:
                raise Invalid(
                    f"the parameter {name} has more than {MAX_PARAMETER} characters", member=f"parameters.{name}"
                )
            checked[name] = check(text)
        return checked

    def body(self, grant_id: str, parameters: Mapping[str, str], ttl: timedelta) -> dict[str, Any]:
        """What is sent: what the configuration fixes, what was checked, and how long."""
        spelled = grant_id.replace("_", "-")
        fixed = {
            name: value.replace(_GRANT, spelled) if isinstance(value, str) else value
            for name, value in self.fixed.items()
        }
        life = {self.ttl_parameter: f"{int(ttl.total_seconds())}s"} if self.ttl_parameter else {}
        return {**fixed, **self.checked(parameters), **life}


class _Keys:
    """A table whose keys are taken one by one, so that what is left over is unknown."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._left = dict(table)

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def seconds(self, name: str) -> timedelta | None:
        found = self.take(name)
        if found is None:
            return None
        if type(found) is not int or not 1 <= found <= 86400:
            raise Invalid(f"{name} must be a whole number of seconds between 1 and 86400", member=name)
        return timedelta(seconds=found)

    def token_role(self) -> str | None:
        return self.name("token_role")

    def name(self, name: str) -> str | None:
        found = self.take(name)
        return None if found is None else component_of(found, name)

    def require_empty(self) -> None:
        for name in self._left:
            raise Invalid(f"{name} has no meaning here", member=name)


def _database(keys: _Keys) -> SecretSource:
    role = component_of(keys.take("role"), "role")
    return SecretSource(
        engine="database",
        mount=path_of(keys.take("mount", "database"), "mount"),
        role_path=f"creds/{role}",
        token_role=keys.token_role(),
        target=keys.name("target"),
        revocation=RevocationClass.HARD,
        reads=True,
        shape=_login_of,
    )


def _pki(keys: _Keys) -> SecretSource:
    role = component_of(keys.take("role"), "role")
    operation = keys.take("operation", "sign")
    if operation not in ("sign", "issue"):
        raise Invalid("operation must be sign or issue", member="operation")
    common_name = keys.take("common_name")
    if common_name is None and operation == "issue":
        raise Invalid("operation issue needs a common_name", member="common_name")
    fixed = {} if common_name is None else {"common_name": _common_name(common_name)}
    bound = keys.seconds("bound_s")
    signs = operation == "sign"
    return SecretSource(
        engine="pki",
        mount=path_of(keys.take("mount", "pki"), "mount"),
        role_path=f"{operation}/{role}",
        token_role=keys.token_role(),
        # A certificate is dead for those who look at the revocation list, and for nobody else.
        revocation=RevocationClass.TTL_ONLY if bound is None else RevocationClass.BOUNDED,
        bound=bound,
        ttl_parameter="ttl",
        fixed=MappingProxyType(fixed),
        accepts=MappingProxyType({"csr": _certificate_request} if signs else {}),
        shape=_certificate_for_request if signs else _certificate_with_key,
    )


def _ssh(keys: _Keys) -> SecretSource:
    role = component_of(keys.take("role"), "role")
    principals = keys.take("principals")
    names = principals.split(",") if isinstance(principals, str) else []
    if not names or not all(_NAME.fullmatch(name) for name in names):
        raise Invalid(
            "principals must be the user names of the certificate, with commas between them", member="principals"
        )
    return SecretSource(
        engine="ssh",
        mount=path_of(keys.take("mount", "ssh"), "mount"),
        role_path=f"sign/{role}",
        token_role=keys.token_role(),
        revocation=RevocationClass.TTL_ONLY,
        leases=False,
        ttl_parameter="ttl",
        fixed=MappingProxyType({"cert_type": "user", "valid_principals": ",".join(names)}),
        accepts=MappingProxyType({"public_key": _ssh_public_key}),
        shape=_ssh_certificate,
    )


def _generic(keys: _Keys) -> SecretSource:
    revocation = keys.take("revocation")
    if revocation not in tuple(RevocationClass):
        raise Invalid(f"revocation must be one of {', '.join(RevocationClass)}", member="revocation")
    bound = keys.seconds("bound_s")
    if (bound is not None) != (revocation == RevocationClass.BOUNDED):
        raise Invalid("bound_s goes with revocation bounded, and only with it", member="bound_s")
    method = keys.take("method", "read")
    if method not in ("read", "write"):
        raise Invalid("method must be read or write", member="method")
    ttl_parameter = keys.take("ttl_parameter")
    if ttl_parameter is not None and not (isinstance(ttl_parameter, str) and _NAME.fullmatch(ttl_parameter)):
        raise Invalid("ttl_parameter must be the name of a parameter", member="ttl_parameter")
    fixed = keys.take("parameters", {})
    if not isinstance(fixed, Mapping) or not all(
        isinstance(name, str) and _NAME.fullmatch(name) and type(value) in (str, int, bool)
        for name, value in fixed.items()
    ):
        raise Invalid("parameters must be a table of strings, integers and booleans", member="parameters")
    if method == "read" and (fixed or ttl_parameter):
        raise Invalid('a path that is read takes no parameters: say method = "write"', member="method")
    return SecretSource(
        engine="generic",
        mount=path_of(keys.take("mount"), "mount"),
        role_path=path_of(keys.take("path"), "path"),
        token_role=keys.token_role(),
        revocation=RevocationClass(revocation),
        bound=bound,
        least_ttl=keys.seconds("least_ttl_s"),
        reads=method == "read",
        ttl_parameter=ttl_parameter,
        fixed=MappingProxyType(dict(fixed)),
        shape=_as_it_is,
    )


_ENGINES: Mapping[str, Callable[[_Keys], SecretSource]] = MappingProxyType(
    {"database": _database, "pki": _pki, "ssh": _ssh, "generic": _generic}
)


# --- what an agent may send ------------------------------------------------------------------------------------------


def _certificate_request(text: str) -> str:
    """A PKCS #10 request (RFC 2986) whose key its sender holds, written anew so that nothing rides along."""
    if not _PEM_REQUEST.fullmatch(text.strip() + "\n"):
        raise Invalid("csr must be one certificate request in PEM", member="parameters.csr")
    try:
        request = x509.load_pem_x509_csr(text.strip().encode())
        signed = request.is_signature_valid
        strong = _is_strong(request.public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        raise Invalid("csr cannot be read", member="parameters.csr") from None
    if not signed:
        raise Invalid("csr is not signed by the key it is for", member="parameters.csr")
    if not strong:
        raise Invalid(_STRONG, member="parameters.csr")
    return request.public_bytes(Encoding.PEM).decode()


def _ssh_public_key(text: str) -> str:
    """One public key as OpenSSH writes it, without options and without its comment."""
    found = _SSH_LINE.fullmatch(text.strip())
    if found is None:
        raise Invalid("public_key must be one line: type and key, as in id_ed25519.pub", member="parameters.public_key")
    line = f"{found[1]} {found[2]}"
    try:
        strong = _is_strong(load_ssh_public_key(line.encode()))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Invalid("public_key cannot be read", member="parameters.public_key") from None
    if not strong:
        raise Invalid(_STRONG, member="parameters.public_key")
    return line


_STRONG = f"the key must be Ed25519, on a NIST curve of 256 bits or more, or RSA from {RSA_BITS} bits"


def _is_strong(key: object) -> bool:
    if isinstance(key, rsa.RSAPublicKey):
        return RSA_BITS <= key.key_size <= 8192
    if isinstance(key, ec.EllipticCurvePublicKey):
        return isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1)
    return isinstance(key, ed25519.Ed25519PublicKey)


def _common_name(text: object) -> str:
    if not isinstance(text, str) or not _COMMON_NAME.fullmatch(text.replace(_GRANT, "x")):
        raise Invalid(f"common_name must be a name; {_GRANT} in it stands for the grant's id", member="common_name")
    return text


# --- what an agent receives ------------------------------------------------------------------------------------------


def _string(data: Mapping[str, Any], name: str) -> str:
    found = data.get(name)
    if not isinstance(found, str) or not found:
        raise Wrong(f"it has no {name}")
    return found


def _login_of(source: SecretSource, sent: Mapping[str, Any], data: Mapping[str, Any]) -> Received:
    username = _string(data, "username")
    return Received(
        data={"username": username, "password": _string(data, "password")}, facts={"username": username[:128]}
    )


def _certificate(data: Mapping[str, Any]) -> tuple[x509.Certificate, Received]:
    text = _string(data, "certificate")
    try:
        certificate = x509.load_pem_x509_certificate(text.encode())
    except ValueError:
        raise Wrong("its certificate cannot be read") from None
    chain = data.get("ca_chain") or []
    if not isinstance(chain, list) or not all(isinstance(link, str) for link in chain):
        raise Wrong("its ca_chain is no list of certificates")
    serial = _string(data, "serial_number")
    received = {
        "certificate": text,
        "issuing_ca": _string(data, "issuing_ca"),
        "ca_chain": chain,
        "serial_number": serial,
    }
    return certificate, Received(
        data=received, facts={"serial_number": serial[:128]}, ends_at=certificate.not_valid_after_utc
    )


def _certificate_for_request(source: SecretSource, sent: Mapping[str, Any], data: Mapping[str, Any]) -> Received:
    certificate, received = _certificate(data)
    request = x509.load_pem_x509_csr(sent["csr"].encode())
    if _public_bytes(certificate.public_key()) != _public_bytes(request.public_key()):
        raise Wrong("its certificate is for another key")
    return received


def _certificate_with_key(source: SecretSource, sent: Mapping[str, Any], data: Mapping[str, Any]) -> Received:
    _, received = _certificate(data)
    return Received(
        data={**received.data, "private_key": _string(data, "private_key")},
        facts=received.facts,
        ends_at=received.ends_at,
    )


def _public_bytes(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _ssh_certificate(source: SecretSource, sent: Mapping[str, Any], data: Mapping[str, Any]) -> Received:
    text = _string(data, "signed_key")
    try:
        certificate = load_ssh_public_identity(text.encode())
        asked_for = load_ssh_public_key(sent["public_key"].encode())
        if not isinstance(certificate, SSHCertificate):
            raise Wrong("its signed_key is no certificate")
        certified = certificate.public_key()
        principals = {principal.decode() for principal in certificate.valid_principals}
        ends_at = datetime.fromtimestamp(certificate.valid_before, UTC)
    except (ValueError, OverflowError, OSError, UnsupportedAlgorithm):
        raise Wrong("its certificate cannot be read, or has no end") from None
    if _public_bytes(certified) != _public_bytes(asked_for):
        raise Wrong("its certificate is for another key")
    if principals != set(sent["valid_principals"].split(",")):
        # None at all would be everybody.
        raise Wrong("its certificate is for other users")
    serial = _string(data, "serial_number")
    return Received(
        data={"signed_key": text, "serial_number": serial}, facts={"serial_number": serial[:128]}, ends_at=ends_at
    )


def _as_it_is(source: SecretSource, sent: Mapping[str, Any], data: Mapping[str, Any]) -> Received:
    if not data:
        raise Wrong("it is empty")
    return Received(data=dict(data))
