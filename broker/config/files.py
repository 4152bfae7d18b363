"""The files a configuration names. What is checked is the file that was opened, and that is the one that is read."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.x509 import load_pem_x509_certificates

from broker.config.wording import Wrong, shown
from broker.domain import strict_json
from broker.domain.catalogue import TrustedIssuer
from broker.domain.errors import ConfigurationError, Invalid
from broker.domain.secret import Secret
from broker.providers.key_sets import usable_algorithms

MASTER_KEY_BYTES = 32
MAX_POLICY_BYTES = 256 * 1024
SCHEMA_FILE = "schema.cedarschema"
_MAX_KEY_SET_BYTES = 256 * 1024
_MAX_SECRET_BYTES = 64 * 1024
_MAX_CA_BYTES = 1024 * 1024


def read_master_key(path: Path) -> bytes:
    """The 32 bytes of the master key file; refused when missing, of another size, or open to anyone but its owner."""
    try:
        return master_key(path)
    except Wrong as wrong:
        raise ConfigurationError([f"master key file {shown(str(path))}: {wrong}"]) from wrong


def _open(path: Path, missing: str) -> BinaryIO:
    try:
        # Not blocking: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Wrong(f"there is no file {path}; {missing}") from None
    except OSError as error:
        raise Wrong(
            f"{path} cannot be opened ({error.strerror}); give the broker's user the right to read it"
        ) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise Wrong(f"{path} is not a regular file; {missing}")


def read_file(path: Path, limit: int) -> bytes:
    with _open(path, "make it, or correct the path") as file:
        # Whoever may write it decides who is believed and what is allowed; of the open file, as below.
        status = os.fstat(file.fileno())
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o002 or (mode & 0o020 and not _is_private_group(status)):
            raise Wrong(f"{path} has mode {mode:04o}, so that others may write it; chmod go-w {shlex.quote(str(path))}")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Wrong(f"{path} has more than the {limit} bytes it may have; make it smaller")
    return content


def _is_private_group(status: os.stat_result) -> bool:
    """Whether the file's group is its owner alone, as many systems make one for each user (and a umask of 002)."""
    try:
        group, owner = grp.getgrgid(status.st_gid), pwd.getpwuid(status.st_uid)
    except KeyError:
        return False
    return group.gr_name == owner.pw_name and group.gr_gid == owner.pw_gid and set(group.gr_mem) <= {owner.pw_name}


def master_key(path: Path) -> bytes:
    make = f"make it with (umask 077; head -c {MASTER_KEY_BYTES} /dev/urandom > {shlex.quote(str(path))})"
    with _open(path, make) as file:
        # Of the open file, not of the path: what was checked is what is read (INV-22).
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise Wrong(f"{path} has mode {mode:04o}, open to others; chmod 0600 {shlex.quote(str(path))}")
        content = file.read(MASTER_KEY_BYTES + 1)
    if len(content) != MASTER_KEY_BYTES:
        size = len(content) if len(content) < MASTER_KEY_BYTES else f"more than {MASTER_KEY_BYTES}"
        raise Wrong(f"{path} has {size} bytes and must have {MASTER_KEY_BYTES}; {make}")
    return content


def require_secret(path: Path, what: str) -> Secret:
    """What is in it; refuse a file that holds no secret of one word, or that is open to anyone but its owner."""
    with _open(path, f"write {what} there, or correct the path") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise Wrong(f"{path} has mode {mode:04o}, open to others; chmod 0600 {shlex.quote(str(path))}")
        content = file.read(_MAX_SECRET_BYTES + 1)
        _require_word(content, path, what)
    return Secret(content.strip().decode())


def require_attestation(path: Path, what: str) -> None:
    """The same of a token that the platform writes, with a mode that the platform decides; others may not write it."""
    _require_word(read_file(path, _MAX_SECRET_BYTES), path, what)


def _require_word(content: bytes, path: Path, what: str) -> None:
    # What is in it is not shown, be it ever so wrong (INV-30).
    if len(content) > _MAX_SECRET_BYTES or not re.fullmatch(rb"[\x21-\x7e]+", content.strip()):
        raise Wrong(f"{path} does not hold one word of printable ASCII; write {what} there, and nothing else")


def require_certificates(path: Path) -> None:
    """Refuse a file without a certificate in PEM: everything at the other end would be refused."""
    content = read_file(path, _MAX_CA_BYTES)
    try:
        load_pem_x509_certificates(content)
    except ValueError:
        raise Wrong(f"{path} has no certificate in PEM; write the certificates of the authority there") from None


def require_key_set(path: Path, source: str, values: Mapping[str, Any]) -> None:
    """Refuse a file that is no JWK set (RFC 7517) or SPIFFE bundle, or in which no key can check a token."""
    raw = read_file(path, _MAX_KEY_SET_BYTES)
    try:
        document = strict_json.loads(raw, max_bytes=_MAX_KEY_SET_BYTES)
    except Invalid:
        # Without what is wrong in it: a private key may stand where a public one belongs.
        raise Wrong(f"{path} is not JSON; write the issuer's JWK set there (RFC 7517)") from None
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list) or not keys:
        raise Wrong(f'{path} has no "keys"; write the issuer\'s JWK set there (RFC 7517)')
    name, issuer, algorithms = values.get("name"), values.get("issuer"), values.get("algorithms")
    if name is None or issuer is None or not algorithms:
        return
    declared = TrustedIssuer(name=name, issuer=issuer, key_source=source, algorithms=tuple(algorithms))
    try:
        usable = usable_algorithms(raw, declared)
    except Invalid as problem:
        raise Wrong(f"{path} cannot be used: {problem.detail}; write the issuer's JWK set there (RFC 7517)") from None
    if usable.isdisjoint(algorithms):
        wanted = 'public keys with a kid and use "jwt-svid"' if declared.trust_domain else "public keys, RSA, EC or OKP"
        raise Wrong(f"{path} has no key that can check {' or '.join(algorithms)}; write {wanted} there")
