"""Settings: one TOML file and `BROKER__SECTION__KEY`, read once and strictly into something frozen.

Everything wrong is said at once, each with file, key, value and remedy; an unsafe value is refused and not warned
about, so that whoever holds `Settings` holds checked ones. The only room that reads the environment. It never shows
a password: not the value of a key that may hold one, nor that of a key it does not know (INV-30).
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shlex
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, urlsplit

from broker.domain import strict_json
from broker.domain.catalogue import (
    KEY_SOURCES,
    SENSITIVITIES,
    SIGNING_ALGORITHMS,
    Catalogue,
    Limits,
    PrincipalRule,
    Resource,
    TrustedIssuer,
)
from broker.domain.errors import ConfigurationError, Invalid, InvalidScope
from broker.domain.identity import Role
from broker.domain.scope import scope_set
from broker.providers.key_sets import usable_algorithms

PROVIDERS = ("jwt",)
WORKLOAD_ALGORITHMS = (
    "ES256",
    "ES384",
    "ES512",
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "EdDSA",
    "Ed25519",
)
KINDS = ("agent", "orchestrator", "person", "service")
TOKEN_TYPES = ("at+jwt", "JWT")
MASTER_KEY_BYTES = 32
MAX_POLICY_BYTES = 256 * 1024
SCHEMA_FILE = "schema.cedarschema"

_MAX_FILE_BYTES = 4 * 1024 * 1024
_MAX_KEY_SET_BYTES = 256 * 1024
_MAX_TEXT = 1000  # the narrowest column that keeps one of these values
_INT64 = range(-(2**63), 2**63)
_PREFIX = "BROKER__"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the broker listens: `host` and `port`, or `unix_path`. `listen` is the same as text."""

    listen: str
    host: str | None = None
    port: int | None = None
    unix_path: Path | None = None
    workers: int = 1
    metrics_listen: str | None = None
    metrics_host: str | None = None
    metrics_port: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A checked configuration; every path in it is absolute, and its catalogue has no version yet."""

    issuer: str
    server: ServerSettings
    store_url: str = field(repr=False)  # may hold a password (INV-30)
    redis_url: str | None = field(default=None, repr=False)
    master_key_file: Path
    rotate_every: timedelta
    limits: Limits
    catalogue: Catalogue
    source: Path
    policies_directory: Path | None = None


class _Wrong(ValueError):
    """What is wrong with one value and what to do; the reader adds where it stands."""


# --- Which keys there are -------------------------------------------------------------------------------------------

_REQUIRED: Any = object()


@dataclass(frozen=True, kw_only=True)
class _Key:
    """One key. `check` sees a string, or each string of an array; `secret` keeps the value out of every message."""

    name: str
    kind: str
    meaning: str
    default: Any = _REQUIRED
    low: int = 1
    high: int = 1
    choices: tuple[str, ...] = ()
    check: Callable[[str], None] | None = None
    secret: bool = False
    reserved: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What belongs there, for a sentence."""
        match self.kind:
            case "integer":
                return f"an integer from {self.low} to {self.high}"
            case "boolean":
                return "true or false"
            case "array":
                return "an array of strings"
            case "facts":
                return "a table of strings, integers and booleans"
        return f"one of {_quoted(self.choices)}" if self.choices else "a string"


def _string(name: str, meaning: str, **more: Any) -> _Key:
    return _Key(name=name, kind="string", meaning=meaning, **more)


def _integer(name: str, meaning: str, low: int, high: int, **more: Any) -> _Key:
    return _Key(name=name, kind="integer", meaning=meaning, low=low, high=high, **more)


def _boolean(name: str, meaning: str, *, default: bool) -> _Key:
    return _Key(name=name, kind="boolean", meaning=meaning, default=default)


def _array(name: str, meaning: str, **more: Any) -> _Key:
    return _Key(name=name, kind="array", meaning=meaning, **more)


def _facts(name: str, meaning: str, reserved: tuple[str, ...] = ()) -> _Key:
    return _Key(name=name, kind="facts", meaning=meaning, default={}, reserved=reserved)


def _quoted(values: Sequence[str]) -> str:
    return ", ".join(map(_shown, values))


def _seconds(duration: timedelta) -> int:
    return duration // timedelta(seconds=1)


# --- What a single value must be ------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}")
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_ATTRIBUTE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_TRUST_DOMAIN = re.compile(r"spiffe://[a-z0-9._-]{1,255}")
_SPIFFE_ID = re.compile(r"(spiffe://[a-z0-9._-]{1,255})((?:/[A-Za-z0-9._-]+)+)")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+)):([0-9]{1,5})")
# Names of schemes that a browser runs or opens: an identifier is shown in the console.
_ACTIVE_SCHEMES = ("about", "blob", "data", "file", "javascript", "vbscript")


def _text(value: str) -> None:
    if not value:
        raise _Wrong("is empty; write a value or take the key out")
    # A control character or a reversed direction changes what a log line or a terminal seems to say (INV-31), and
    # a NUL is an exception in every system call.
    if not value.isprintable():
        raise _Wrong("has a character that cannot be seen (control, direction or surrogate); take it out")
    if value != value.strip():
        raise _Wrong("begins or ends with a blank; take it out")
    if len(value) > _MAX_TEXT:
        raise _Wrong(f"has {len(value)} characters; {_MAX_TEXT} are the most")


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[str], None]:
    def check(value: str) -> None:
        if not pattern.fullmatch(value):
            raise _Wrong(f"is not {what}")

    return check


_name = _matching(_NAME, 'a name; use up to 100 letters, digits and ". _ @ + -", beginning with a letter or digit')
_word = _matching(_WORD, 'a word; use up to 63 lower-case letters, digits and ". _ -"')


def _split(value: str) -> SplitResult | None:
    # urlsplit drops tabs and keeps blanks and backslashes, on which its readers disagree; the grammar goes first.
    if not _URI.fullmatch(value):
        return None
    try:
        parts = urlsplit(value)
        _ = parts.port, parts.hostname  # both are parsed when asked for
    except ValueError:
        return None
    return parts


def _is_host(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        labels = host.split(".")
        # "127.1" and "0x7f.1" are addresses to some resolvers and names to others.
        return len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1][0].isdigit()
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _web_url(value: str, *, may_be_plain: bool = False) -> SplitResult:
    """An absolute https URL without userinfo and fragment; http too on loopback."""
    parts = _split(value)
    if parts is None or parts.scheme not in ("http", "https") or not _is_host(parts.hostname or ""):
        raise _Wrong("is not an absolute https URL; write https://host/path")
    if "@" in parts.netloc:
        raise _Wrong("has a user or a password before the host; URLs are logged, take it out")
    if "#" in value:
        raise _Wrong('has a fragment, which is never sent; take out "#" and what follows')
    if parts.scheme == "http" and not may_be_plain and not _is_loopback(parts.hostname or ""):
        raise _Wrong("is plain http off loopback, where anyone on the way can rewrite it; use https")
    return parts


def _fetched_url(value: str) -> None:
    _web_url(value)


def _broker_issuer(value: str) -> None:
    parts = _web_url(value)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    default = {"https": 443, "http": 80}[parts.scheme]
    origin = f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port not in (None, default) else "")
    if value == origin:
        return
    if parts.path == "/" and "?" not in value:
        what = "ends with a slash"
    elif "?" in value:
        what = "has a query"
    elif parts.path:
        what = "has a path"
    else:
        what = "is not in its plain form (lower case, no default port)"
    raise _Wrong(f"{what}, and tokens are compared with the issuer character by character; write {_shown(origin)}")


def _trusted_issuer(value: str) -> None:
    if value.startswith("spiffe:"):
        if not _TRUST_DOMAIN.fullmatch(value):
            raise _Wrong("is not a SPIFFE trust domain alone, without a path; write spiffe://<trust domain>")
        return
    if "?" in value:
        raise _Wrong("has a query, which an issuer never has (OpenID Connect Discovery); take it out")
    # Where keys do not come from this address it is only a name, and a name may say http.
    _web_url(value, may_be_plain=True)


def _algorithm(value: str) -> None:
    allowed = f"use one of {_quoted(WORKLOAD_ALGORITHMS)}"
    if value.lower() == "none":
        raise _Wrong(f"accepts tokens that nobody signed; {allowed}")
    if value.upper().startswith("HS"):
        raise _Wrong(f"is an HMAC algorithm: with it, whoever can check a token can make one; {allowed}")
    if value not in WORKLOAD_ALGORITHMS:
        raise _Wrong(f"is not an algorithm this broker checks; {allowed}")


def _no_wildcard(value: str) -> None:
    if not re.search(r"[^*?%_.:/\s]", value):
        raise _Wrong("is a subject that would match everything; write the subject of one workload, or a subject_prefix")
    if "*" in value:
        raise _Wrong('has a "*", but subjects are compared character by character; write it out, or a subject_prefix')


def _spiffe_id(value: str) -> str:
    """The trust domain of a SPIFFE ID that has a path, as `spiffe://<trust domain>`."""
    if _TRUST_DOMAIN.fullmatch(value.rstrip("/")):
        raise _Wrong(
            "has nothing after the trust domain, and would match everything in it; write spiffe://<trust domain>/<path>"
        )
    found = _SPIFFE_ID.fullmatch(value)
    if found is None or {".", ".."} & set(found[2].split("/")):
        raise _Wrong(
            "is not a SPIFFE ID; write spiffe://<trust domain>/<path> with a lower-case trust domain and segments of "
            'letters, digits and ". _ -"'
        )
    return found[1]


def _subject(value: str) -> None:
    _no_wildcard(value)
    if value.lower().startswith("spiffe:"):
        _spiffe_id(value)


def _subject_prefix(value: str) -> None:
    _no_wildcard(value)
    if not value.endswith(("/", ":")):
        raise _Wrong('does not end with "/" or ":", so that …/agents would match …/agents-evil; end it with one')
    if value.lower().startswith("spiffe:"):
        _spiffe_id(value.removesuffix("/"))
        return
    _, has_authority, rest = value.partition("://")
    if has_authority:
        parts, enough = rest.split("/"), 2  # a host alone is everything on it
    elif value.startswith("system:serviceaccount:"):
        parts, enough = value.split(":"), 3  # without a namespace it is every service account of the cluster
    else:
        # "repo:" is every subject of GitHub, "repo:org/" those of one organisation.
        parts, enough = re.split("[:/]", value), 2 if ":" in value else 1
    parts = [part for part in parts if part]
    if len(parts) < enough or sum(map(len, parts)) < 3:
        raise _Wrong(
            "is a prefix that matches everything of its kind; name at least one level more, like repo:org/, "
            "system:serviceaccount:namespace: or spiffe://<trust domain>/<path>/"
        )


def _identifier(value: str) -> None:
    if _split(value) is None:
        raise _Wrong("is not an absolute URI (RFC 8707); write https://host/path or urn:namespace:name")
    if "#" in value:
        raise _Wrong('has a fragment, which RFC 8707 forbids; take out "#" and what follows')
    scheme = value.partition(":")[0]
    if scheme != scheme.lower():
        raise _Wrong("has a scheme in upper case, and audiences are compared character by character; use lower case")
    if scheme in _ACTIVE_SCHEMES:
        raise _Wrong(
            "names something a browser would open, not an audience; write https://host/path or urn:namespace:name"
        )
    if scheme in ("http", "https"):
        _web_url(value)


def _scope(value: str) -> None:
    try:
        scope_set([value])
    except InvalidScope as refused:
        raise _Wrong(
            "is not a scope (RFC 6749): one to 200 printable ASCII characters, no blank; rename it"
        ) from refused


def _store_url(value: str) -> None:
    scheme, _, rest = value.partition("://")
    if scheme == "sqlite":
        if rest in ("", "/") or rest.startswith((":memory:", "/:memory:", "/file:")) or "mode=memory" in rest:
            raise _Wrong("is SQLite in memory, which forgets its grants; name a file: sqlite:///var/broker.db")
        if not rest.startswith("/") or "?" in rest or rest.endswith("/"):
            raise _Wrong(
                "is not sqlite:/// and the path of a file, without host and query; write sqlite:///var/broker.db"
            )
        return
    if scheme != "postgresql+psycopg":
        raise _Wrong("is neither sqlite:///path nor postgresql+psycopg://user@host/database; write one of the two")
    parts = _split(value)
    if parts is None or not re.fullmatch(r"/[^/]+", parts.path) or "#" in value:
        raise _Wrong(
            "is not a URL with a database name; write postgresql+psycopg://user@host/database, odd characters of a "
            "password percent-encoded"
        )


def _redis_url(value: str) -> None:
    parts = _split(value)
    if parts is None or not (
        (parts.scheme in ("redis", "rediss") and parts.hostname) or (parts.scheme == "unix" and parts.path)
    ):
        raise _Wrong("is not a Redis URL; write redis://host:6379/0, rediss://host:6379/0 or unix:///path")


def _address(value: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(value)
    if found is None or not _is_host(found[1] or found[2]) or not 1 <= int(found[3]) <= 65535:
        raise _Wrong(
            "is not host:port with a port from 1 to 65535; write 127.0.0.1:8080, or 0.0.0.0:8080 for every interface"
        )
    return found[1] or found[2], int(found[3])


def _listen(value: str) -> None:
    if not value.startswith("unix:"):
        _address(value)
    elif len(value) <= len("unix:"):
        raise _Wrong("names no path; write unix:/run/broker.sock")


def _metrics_listen(value: str) -> None:
    _address(value)


_TOP = (
    _string(
        "issuer",
        "The broker's own name and address: `https://host`, no path; http on loopback only.",
        check=_broker_issuer,
    ),
)
_SECTIONS: Mapping[str, tuple[_Key, ...]] = {
    "server": (
        _string(
            "listen",
            "`host:port` or `unix:/path`. Loopback only while `issuer` is http.",
            default="127.0.0.1:8080",
            check=_listen,
        ),
        _integer("workers", "Processes that answer requests. Always 1 on SQLite.", 1, 64, default=1),
        _string(
            "metrics_listen",
            "`host:port` of the metrics, of the first worker; each further one takes the next port. Without it, none.",
            default=None,
            check=_metrics_listen,
        ),
    ),
    "store": (
        _string("url", "`sqlite:///path` or `postgresql+psycopg://user@host/database`.", check=_store_url, secret=True),
    ),
    "redis": (
        _string(
            "url",
            "Limits and wake-ups across brokers; never truth. `redis://`, `rediss://` or `unix://`.",
            default=None,
            check=_redis_url,
            secret=True,
        ),
    ),
    "keys": (
        _string("master_key_file", "File of 32 random bytes, mode 0600, that seals signing keys at rest."),
        _integer("rotate_every_s", "Age at which a signing key is replaced.", 600, 31_536_000, default=86_400),
    ),
    "tasks": (
        _integer("max_deadline_s", "The longest a task may last.", 1, 2_592_000, default=_seconds(Limits.max_deadline)),
    ),
    "grants": (
        _integer("default_ttl_s", "Life of a grant that asks for none.", 1, 3600, default=_seconds(Limits.default_ttl)),
        _integer("max_ttl_s", "The longest life of any grant.", 1, 3600, default=_seconds(Limits.max_ttl)),
        _integer(
            "max_live_per_agent", "Live grants one agent may have.", 1, 100_000, default=Limits.max_live_per_agent
        ),
        _integer(
            "max_delegation_depth",
            "How many times a grant may be handed down; 0 is no delegation.",
            0,
            16,
            default=Limits.max_delegation_depth,
        ),
    ),
    "policies": (
        _string(
            "directory", f"Directory of the `*.cedar` files and, if there is one, `{SCHEMA_FILE}`.", default="policies"
        ),
    ),
}
_ARRAYS: Mapping[str, tuple[_Key, ...]] = {
    "issuers": (
        _string("name", "What principals call it.", check=_name),
        _string(
            "issuer",
            "The `iss` of its tokens; `spiffe://<trust domain>` with a SPIFFE bundle.",
            check=_trusted_issuer,
        ),
        _boolean("discovery", "Keys come from its OpenID Connect discovery document.", default=False),
        _string("jwks_uri", "Keys come from this JWK set.", default=None, check=_fetched_url),
        _string("jwks_file", "Keys come from this JWK set on disk.", default=None),
        _string("spiffe_bundle_file", "Keys come from this SPIFFE bundle on disk.", default=None),
        _string("spiffe_bundle_url", "Keys come from this SPIFFE bundle endpoint.", default=None, check=_fetched_url),
        _array(
            "algorithms",
            f"Signature algorithms believed: {', '.join(WORKLOAD_ALGORITHMS)}.",
            default=list(TrustedIssuer.algorithms),
            check=_algorithm,
        ),
        _integer(
            "max_lifetime_s", "The longest life of a token believed.", 1, 86_400, default=TrustedIssuer.max_lifetime_s
        ),
        _boolean("single_use", "Each token is accepted once, by its `jti`.", default=TrustedIssuer.single_use),
        _boolean("users", "Its subjects are people on whose behalf agents may act.", default=TrustedIssuer.users),
    ),
    "principals": (
        _string("name", "What policies, logs and other sections call it.", check=_name),
        _string("kind", "What it is.", choices=KINDS),
        _string("issuer", "Name of the issuer that attests it.", check=_name),
        _string(
            "subject", "Its exact subject. Exactly one of this and `subject_prefix`.", default=None, check=_subject
        ),
        _string(
            "subject_prefix",
            'Beginning of its subjects, ending with "/" or ":", and never everything of the issuer.',
            default=None,
            check=_subject_prefix,
        ),
        _facts("claims", "Claims its token must have, exactly: a dotted path, quoted, to a value."),
        _array("roles", f"What it may do: {', '.join(Role)}."),
        _string("owner", "The person or team who answers for it.", default=None),
        _array(
            "groups",
            'For approvers: the groups that `@approval("…")` names.',
            default=list(PrincipalRule.groups),
            check=_name,
        ),
        _facts("attributes", "Facts for policies.", ("owner", "issuer", "subject", "kind")),
        _boolean(
            "implicit_tasks",
            "A request without a task opens one, as long as the token.",
            default=PrincipalRule.implicit_tasks,
        ),
    ),
    "resources": (
        _string("identifier", "The audience of its tokens: an absolute URI without fragment.", check=_identifier),
        _string("provider", f"What issues its credentials: {', '.join(PROVIDERS)}.", default=Resource.provider),
        _array("scopes", "What may be asked of it (RFC 6749).", check=_scope),
        _string("sensitivity", "For policies.", choices=SENSITIVITIES, default=Resource.sensitivity),
        _string("environment", "For policies; a free word.", default=Resource.environment, check=_word),
        _integer(
            "max_ttl_s",
            "The longest life of a grant on it, at most `grants.max_ttl_s`, which also caps the default.",
            1,
            3600,
            default=Resource.max_ttl_s,
        ),
        _string(
            "signing_algorithm", "Signs its tokens.", choices=SIGNING_ALGORITHMS, default=Resource.signing_algorithm
        ),
        _string(
            "token_typ", "`JWT` for verifiers that refuse `at+jwt`.", choices=TOKEN_TYPES, default=Resource.token_typ
        ),
        _boolean("require_dpop", "Only sender-constrained tokens (RFC 9449).", default=Resource.require_dpop),
        _array(
            "verifiers",
            "Principals with role verifier that may introspect its tokens.",
            default=list(Resource.verifiers),
            check=_name,
        ),
        _facts("attributes", "Facts for policies.", ("sensitivity", "environment", "provider")),
    ),
}
# Keys that the design names and this version cannot serve: they deserve a better answer than "unknown".
_NOT_HERE = {
    "vault": f"is not available in this version, whose providers are: {', '.join(PROVIDERS)}; take the section out",
    "keys.vault_transit": "is not available in this version; use master_key_file",
    "resources.vault": f"is not available in this version, whose providers are: {', '.join(PROVIDERS)}; take it out",
}


# --- Reading --------------------------------------------------------------------------------------------------------

_UNSHOWN: Any = object()
_Row = tuple[str, Mapping[str, Any], dict[str, Any]]  # where it stands, as written, as read


def load(path: Path, environ: Mapping[str, str] | None = None, *, providers: Sequence[str] = PROVIDERS) -> Settings:
    """The settings of a TOML file under its overrides; `ConfigurationError` with every problem at once.

    Relative paths are relative to the directory of the file. `environ` is `os.environ` unless given.
    """
    reader = _Reader(path)
    document = reader.overridden(reader.document(), os.environ if environ is None else environ)
    reader.refuse_unknown(document, [*(key.name for key in _TOP), *_SECTIONS, *_ARRAYS], "")
    top = reader.table({name: document[name] for name in ("issuer",) if name in document}, _TOP, "")
    section = {name: reader.section(document, name, keys) for name, keys in _SECTIONS.items()}
    rows = {name: reader.rows(document, name, keys) for name, keys in _ARRAYS.items()}

    _check_server(reader, section["server"], top.get("issuer"))
    _check_store(reader, section["store"].get("url"), section["server"].get("workers"))
    _check_master_key(reader, section["keys"].get("master_key_file"))
    _check_issuers(reader, rows["issuers"], rows["principals"], top.get("issuer"))
    _check_principals(reader, rows["principals"], rows["issuers"])
    _check_limits(reader, section["grants"], rows["resources"])
    _check_resources(reader, rows["resources"], rows["principals"], top.get("issuer"), providers)
    policies, schema = _policies(reader, section["policies"].get("directory"))
    if reader.problems:
        raise ConfigurationError(reader.problems)

    grants = section["grants"]
    return Settings(
        issuer=top["issuer"],
        server=_server(reader, section["server"]),
        store_url=_store(reader, section["store"]["url"]),
        redis_url=section["redis"]["url"],
        master_key_file=reader.path(section["keys"]["master_key_file"]),
        rotate_every=timedelta(seconds=section["keys"]["rotate_every_s"]),
        limits=Limits(
            max_deadline=timedelta(seconds=section["tasks"]["max_deadline_s"]),
            default_ttl=timedelta(seconds=grants["default_ttl_s"]),
            max_ttl=timedelta(seconds=grants["max_ttl_s"]),
            max_live_per_agent=grants["max_live_per_agent"],
            max_delegation_depth=grants["max_delegation_depth"],
        ),
        catalogue=Catalogue(
            issuers=tuple(_issuer(reader, values) for _, _, values in rows["issuers"]),
            principals=tuple(PrincipalRule(**_tupled(values)) for _, _, values in rows["principals"]),
            resources=tuple(Resource(**_tupled(values)) for _, _, values in rows["resources"]),
            policies=policies,
            schema=schema,
        ),
        source=reader.source,
        policies_directory=reader.path(section["policies"]["directory"]),
    )


def _tupled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_master_key(path: Path) -> bytes:
    """The 32 bytes of the master key file; refused when missing, of another size, or open to anyone but its owner."""
    try:
        return _master_key(path)
    except _Wrong as wrong:
        raise ConfigurationError([f"master key file {_shown(str(path))}: {wrong}"]) from wrong


class _Reader:
    """Collects problems while it reads; a value that is wrong is left out of what it returns."""

    def __init__(self, path: Path) -> None:
        self.source = path.absolute()
        self.problems: list[str] = []
        self.unreadable: set[str] = set()  # arrays of tables with a row that cannot be named
        self._variables: dict[str, str] = {}  # key path -> the environment variable that set it

    def path(self, value: str) -> Path:
        return self.source.parent / value

    def refuse(self, at: str, why: str, value: object = _UNSHOWN) -> None:
        variable = self._variables.get(at)
        where = f"environment: {variable}" if variable else f"{self.source}: {at}"
        self.problems.append(f"{where}: {why}" if value is _UNSHOWN else f"{where} = {_shown(value)}: {why}")

    def document(self) -> dict[str, Any]:
        """The TOML as it is written. Nothing more can be said of a file that cannot be parsed."""
        try:
            return tomllib.loads(_read(self.source, _MAX_FILE_BYTES).decode())
        except _Wrong as wrong:
            why = str(wrong)
        except UnicodeDecodeError as error:
            why = f"is not UTF-8 at byte {error.start}; save it as UTF-8"
        except RecursionError:
            why = "is nested too deeply; the deepest key of this file is a table in an array of tables"
        except ValueError as error:
            # tomllib's message tells a line and a column, and at most the name of a key.
            why = f"is not TOML: {error}; correct it there"
        raise ConfigurationError([f"{self.source}: {why}"])

    def overridden(self, document: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        """The document with every `BROKER__…` variable in its place; one that overrides nothing is refused."""
        keys = {f"{_PREFIX}{key.name.upper()}": ("", key) for key in _TOP}
        for section, members in _SECTIONS.items():
            keys |= {f"{_PREFIX}{section.upper()}__{key.name.upper()}": (section, key) for key in members}
        document = {name: dict(value) if isinstance(value, dict) else value for name, value in document.items()}
        for variable in sorted(name for name in environ if name.startswith(_PREFIX)):
            if variable not in keys:
                near = _nearest(variable, keys) or f"what can be set is {', '.join(sorted(keys))}"
                self.problems.append(f"environment: {_bare(variable)} overrides no key of this version; {near}")
                continue
            section, key = keys[variable]
            table = document.setdefault(section, {}) if section else document
            if isinstance(table, dict):
                table[key.name] = _from_text(key, environ[variable])
                self._variables[f"{section}.{key.name}" if section else key.name] = variable
        return document

    def section(self, document: Mapping[str, Any], name: str, keys: Sequence[_Key]) -> dict[str, Any]:
        raw = document.get(name, {})
        if not isinstance(raw, dict):
            # Not its value: it may be a store URL with a password, one level too high.
            self.refuse(name, f"is {_a_type(raw)} and must be a table; write [{name}] and its keys below")
            return {}
        return self.table(raw, keys, name)

    def rows(self, document: Mapping[str, Any], name: str, keys: Sequence[_Key]) -> list[_Row]:
        raw = document.get(name, [])
        if not isinstance(raw, list):
            self.unreadable.add(name)
            self.refuse(name, f"is {_a_type(raw)} and must be an array of tables; write [[{name}]] above each")
            return []
        if not all(isinstance(item, dict) and isinstance(item.get(keys[0].name), str) for item in raw):
            self.unreadable.add(name)
        rows: list[_Row] = []
        for index, item in enumerate(raw):
            at = f"{name}[{index}]"
            if isinstance(item, dict):
                rows.append((at, item, self.table(item, keys, at)))
            else:
                self.refuse(at, f"is {_a_type(item)} and must be a table; write [[{name}]] above each")
        return rows

    def refuse_unknown(self, raw: Mapping[str, Any], known: Sequence[str], at: str) -> None:
        for name in raw:
            if name in known:
                continue
            where = f"{at}.{_bare(name)}" if at else _bare(name)
            why = _NOT_HERE.get(re.sub(r"\[\d+\]", "", where))
            near = _nearest(name, known) or f"the keys here are {', '.join(known)}"
            # Without its value: it may be a secret under a name we do not know.
            self.refuse(where, why or f"is not a key of this version; {near}")

    def table(self, raw: Mapping[str, Any], keys: Sequence[_Key], at: str) -> dict[str, Any]:
        """Every key that is right, and the default of every key that is absent."""
        if at:
            self.refuse_unknown(raw, [key.name for key in keys], at)
        values: dict[str, Any] = {}
        for key in keys:
            where = f"{at}.{key.name}" if at else key.name
            if key.name in raw:
                before = len(self.problems)
                self._check(key, raw[key.name], where)
                if len(self.problems) == before:
                    values[key.name] = raw[key.name]
            elif key.default is not _REQUIRED:
                values[key.name] = key.default
            else:
                self.refuse(where, f"is missing; write {key.expected} ({key.meaning.rstrip('.')})")
        return values

    def _check(self, key: _Key, value: Any, at: str) -> None:
        match key.kind, value:
            case "boolean", bool():
                pass
            # type() and not isinstance: true is an int to Python.
            case "integer", _ if type(value) is int:
                if not key.low <= value <= key.high:  # INV-09
                    self.refuse(at, f"is out of bounds; write {key.expected}", value)
            case "string", str():
                self._check_text(key, value, at)
            case "array", list():
                self._check_array(key, value, at)
            case "facts", dict():
                self._check_facts(key, value, at)
            case _:
                shown = _UNSHOWN if key.secret else value
                self.refuse(at, f"is {_a_type(value)}; write {key.expected}", shown)

    def _check_text(self, key: _Key, value: str, at: str) -> None:
        try:
            _text(value)
            if key.choices and value not in key.choices:
                raise _Wrong(f"is not known here; write {key.expected}")
            if key.check:
                key.check(value)
        except _Wrong as wrong:
            self.refuse(at, str(wrong), _without_password(value) if key.secret else value)

    def _check_array(self, key: _Key, value: list[Any], at: str) -> None:
        seen: set[str] = set()
        for index, item in enumerate(value):
            if not isinstance(item, str):
                self.refuse(f"{at}[{index}]", f"is {_a_type(item)}; write {key.expected}", item)
                continue
            self._check_text(key, item, f"{at}[{index}]")
            if item in seen:
                self.refuse(f"{at}[{index}]", "is there twice; take one out", item)
            seen.add(item)

    def _check_facts(self, key: _Key, value: dict[str, Any], at: str) -> None:
        for name, fact in value.items():
            where = f"{at}.{_bare(name)}"
            if key.reserved and not _ATTRIBUTE.fullmatch(name):
                self.refuse(where, 'is not the name of an attribute; use letters, digits and "_"')
            elif name in key.reserved:
                self.refuse(where, "is a fact the broker itself states, and may not be restated; rename it", fact)
            elif not key.reserved and (not name.isprintable() or not all(name.split("."))):
                self.refuse(where, 'is not the path of a claim; write names joined by "."')
            elif isinstance(fact, dict) and not key.reserved:
                self.refuse(where, f'is a table; a path is one quoted key: "{_bare(name)}.…" = value')
            elif isinstance(fact, str):
                self._check_text(_string(name, ""), fact, where)
            elif type(fact) is int:
                if fact not in _INT64:
                    self.refuse(
                        where, "is not a 64-bit integer, which is all a policy can hold; write it as a string", fact
                    )
            elif not isinstance(fact, bool):
                self.refuse(where, f"is {_a_type(fact)}; write a string, an integer or a boolean", fact)


def _from_text(key: _Key, text: str) -> Any:
    """The text as the key's type; text that is none stays text, and is refused where types are."""
    if key.kind == "integer" and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if key.kind == "boolean":
        return {"true": True, "false": False}.get(text, text)
    return text


def _nearest(name: str, known: Iterable[str]) -> str | None:
    near = get_close_matches(name[:100], list(known), 1, 0.6)
    return f"did you mean {_bare(near[0])}?" if near else None


def _bare(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) else _shown(name)


def _a_type(value: object) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}
    return names.get(type(value), "a date or time")


def _shown(value: object) -> str:
    """A value as TOML writes it, on one line, without what opens something (INV-30, INV-31)."""
    if isinstance(value, str):
        value = _without_credentials(value)
        cut = value[:200].replace("\\", "\\\\").replace('"', '\\"')
        seen = "".join(c if c.isprintable() else f"\\u{ord(c):04X}" for c in cut)
        return f'"{seen}"' + ("…" if len(value) > 200 else "")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        # Python refuses to write very long integers in decimal.
        return str(value) if value in _INT64 else "[an integer of more than 64 bits]"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | dict):
        return ("[…]" if value else "[]") if isinstance(value, list) else ("{…}" if value else "{}")
    return str(value)


def _without_credentials(text: str) -> str:
    """Text in which, if it is a URL, there is neither userinfo nor a query."""
    scheme, found, rest = text.partition("//")
    if not found:
        return text
    userinfo, at, host = rest.rpartition("@")
    if at:
        # A password with a "?" in it, or a query with an "@" in it: the two look alike.
        rest = "[not shown]" if {"?", "#"} & set(userinfo) else f"[not shown]@{host}"
    path, question, _ = rest.partition("?")
    return f"{scheme}//{path}" + ("?[not shown]" if question else "")


def _without_password(url: str) -> str:
    """A URL reduced to what surely is no password; a URL that is not understood is reduced to nothing."""
    if url.startswith("sqlite:"):
        return url.partition("?")[0]
    plain = re.fullmatch(
        r"([a-z][a-z0-9+.-]*://)(?:[^?#]*@)?([A-Za-z0-9._-]*(?::[0-9]{1,5})?(?:/[A-Za-z0-9._/-]*)?)", url
    )
    if plain is None:
        return "[not shown]"
    return plain[1] + ("[not shown]@" if "@" in url else "") + plain[2]


def _open(path: Path, missing: str) -> BinaryIO:
    try:
        # Not blocking: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _Wrong(f"there is no file {path}; {missing}") from None
    except OSError as error:
        raise _Wrong(
            f"{path} cannot be opened ({error.strerror}); give the broker's user the right to read it"
        ) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise _Wrong(f"{path} is not a regular file; {missing}")


def _read(path: Path, limit: int) -> bytes:
    with _open(path, "make it, or correct the path") as file:
        # Whoever may write it decides who is believed and what is allowed; of the open file, as below.
        status = os.fstat(file.fileno())
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o002 or (mode & 0o020 and not _is_private_group(status)):
            raise _Wrong(
                f"{path} has mode {mode:04o}, so that others may write it; chmod go-w {shlex.quote(str(path))}"
            )
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _Wrong(f"{path} has more than the {limit} bytes it may have; make it smaller")
    return content


def _is_private_group(status: os.stat_result) -> bool:
    """Whether the file's group is its owner alone, as many systems make one for each user (and a umask of 002)."""
    try:
        group, owner = grp.getgrgid(status.st_gid), pwd.getpwuid(status.st_uid)
    except KeyError:
        return False
    return group.gr_name == owner.pw_name and group.gr_gid == owner.pw_gid and set(group.gr_mem) <= {owner.pw_name}


def _master_key(path: Path) -> bytes:
    make = f"make it with (umask 077; head -c {MASTER_KEY_BYTES} /dev/urandom > {shlex.quote(str(path))})"
    with _open(path, make) as file:
        # Of the open file, not of the path: what was checked is what is read (INV-22).
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise _Wrong(f"{path} has mode {mode:04o}, open to others; chmod 0600 {shlex.quote(str(path))}")
        content = file.read(MASTER_KEY_BYTES + 1)
    if len(content) != MASTER_KEY_BYTES:
        size = len(content) if len(content) < MASTER_KEY_BYTES else f"more than {MASTER_KEY_BYTES}"
        raise _Wrong(f"{path} has {size} bytes and must have {MASTER_KEY_BYTES}; {make}")
    return content


# --- What values must be together -----------------------------------------------------------------------------------


def _check_server(reader: _Reader, server: Mapping[str, Any], issuer: str | None) -> None:
    listen = server.get("listen")
    if listen is None:
        return
    if listen.startswith("unix:"):
        path = reader.path(listen.removeprefix("unix:"))
        if len(os.fsencode(path)) > 107:
            reader.refuse(
                "server.listen", f"{path} is longer than the 107 bytes of a socket's path; shorten it", listen
            )
        return
    host, port = _address(listen)
    if issuer is not None and issuer.startswith("http:") and not _is_loopback(host):
        reader.refuse(
            "server.listen",
            f"is reachable from outside while issuer is {_shown(issuer)}, and credentials would travel in the clear; "
            f"listen on 127.0.0.1:{port}, or make the issuer https",
            listen,
        )
    metrics = server.get("metrics_listen")
    if metrics is None:
        return
    metrics_host, first = _address(metrics)
    workers = server.get("workers") or 1
    if first + workers - 1 > 65535:
        reader.refuse(
            "server.metrics_listen", f"leaves no {workers} ports, one for each worker; use a smaller one", metrics
        )
    elif metrics_host == host and first <= port < first + workers:
        what = "is server.listen too" if workers == 1 else f"and the {workers - 1} after it hold that of server.listen"
        reader.refuse("server.metrics_listen", f"{what}; give the metrics a port of their own", metrics)


def _check_store(reader: _Reader, url: str | None, workers: int | None) -> None:
    if url is None or not url.startswith("sqlite:"):
        return
    path = reader.path(url.removeprefix("sqlite:///"))
    if {"?", "%"} & set(str(path)):
        reader.refuse("store.url", f'{path} has a "?" or a "%", which mean something else in a URL; rename it', url)
    elif not os.path.isdir(path.parent):  # Path.is_dir raises for a name that is too long
        reader.refuse("store.url", f"there is no directory {path.parent}; make it, or correct the path", url)
    if workers is not None and workers > 1:
        reader.refuse(
            "server.workers",
            "is more than SQLite allows: two writing processes wait for each other; write 1, or use PostgreSQL",
            workers,
        )


def _check_master_key(reader: _Reader, value: str | None) -> None:
    if value is None:
        return
    if re.fullmatch(r"[0-9A-Fa-f]{64}|[A-Za-z0-9+/_-]{43}=?", value):
        why = "looks like the key itself and is not shown; put its 32 bytes into a file, and write the file's path"
        reader.refuse("keys.master_key_file", why)
        return
    try:
        _master_key(reader.path(value))
    except _Wrong as wrong:
        reader.refuse("keys.master_key_file", str(wrong), value)


def _check_limits(reader: _Reader, grants: dict[str, Any], resources: Sequence[_Row]) -> None:
    longest = grants.get("max_ttl_s")
    if longest is None:
        return
    default = grants.get("default_ttl_s", 0)
    if default > longest:
        reader.refuse("grants.default_ttl_s", f"is above grants.max_ttl_s, which is {longest}; lower it", default)
    for at, raw, values in resources:
        if "max_ttl_s" not in raw:
            values["max_ttl_s"] = min(values["max_ttl_s"], longest)
        elif values.get("max_ttl_s", 0) > longest:
            reader.refuse(
                f"{at}.max_ttl_s", f"is above grants.max_ttl_s, which is {longest}; lower it", values["max_ttl_s"]
            )


def _unique(reader: _Reader, rows: Sequence[_Row], key: str) -> None:
    first: dict[str, str] = {}
    for at, _, values in rows:
        value = values.get(key)
        if value is not None and first.setdefault(value, at) != at:
            reader.refuse(f"{at}.{key}", f"is already the {key} of {first[value]}; give each its own", value)


def _written(rows: Sequence[_Row], key: str) -> list[str]:
    """What other sections may refer to; a row refused for another reason counts, or one mistake would be two."""
    return [raw[key] for _, raw, _ in rows if isinstance(raw.get(key), str)]


def _check_issuers(reader: _Reader, rows: Sequence[_Row], principals: Sequence[_Row], own: str | None) -> None:
    _unique(reader, rows, "name")
    _unique(reader, rows, "issuer")
    used = _written(principals, "issuer")
    for at, raw, values in rows:
        name, issuer = values.get("name"), values.get("issuer")
        if issuer is not None and issuer == own:
            reader.refuse(
                f"{at}.issuer",
                "is the broker itself, whose credentials would then open it; trust another issuer",
                issuer,
            )
        if values.get("algorithms") == []:
            reader.refuse(f"{at}.algorithms", f"believes no signature; name one of {_quoted(WORKLOAD_ALGORITHMS)}", [])
        unused = values.get("users") is False and name not in used and "principals" not in reader.unreadable
        if name is not None and unused:
            reader.refuse(
                f"{at}.name",
                "is used by no principal, so that nobody it attests is anybody; add [[principals]] with this issuer "
                "and a subject, or users = true, or take the issuer out",
                name,
            )
        sources = [source for source in KEY_SOURCES if source in raw and raw[source] is not False]
        if len(sources) != 1:
            found = f"has {len(sources)} key sources ({', '.join(sources)})" if sources else "has no key source"
            reader.refuse(at, f"{found}; write exactly one of {', '.join(KEY_SOURCES)}")
        elif issuer is not None:
            _check_key_source(reader, at, values, issuer, sources[0])
        for source in ("jwks_file", "spiffe_bundle_file"):
            if values.get(source) is not None:
                try:
                    _key_set(reader.path(values[source]), source, values)
                except _Wrong as wrong:
                    reader.refuse(f"{at}.{source}", str(wrong), values[source])


def _check_key_source(reader: _Reader, at: str, values: Mapping[str, Any], issuer: str, source: str) -> None:
    if source.startswith("spiffe_bundle"):
        if not issuer.startswith("spiffe://"):
            reader.refuse(
                f"{at}.issuer",
                f"is not what {source} vouches for, a trust domain; write spiffe://<trust domain>",
                issuer,
            )
    elif issuer.startswith("spiffe://"):
        reader.refuse(
            f"{at}.issuer",
            f"is a trust domain, whose keys come as a bundle and not by {source}; write spiffe_bundle_file or "
            "spiffe_bundle_url",
            issuer,
        )
    elif source == "discovery":
        try:
            _web_url(issuer)
        except _Wrong as wrong:
            reader.refuse(f"{at}.issuer", f"{wrong} (its keys come from there by discovery)", issuer)


def _key_set(path: Path, source: str, values: Mapping[str, Any]) -> None:
    """Refuse a file that is no JWK set (RFC 7517) or SPIFFE bundle, or in which no key can check a token."""
    raw = _read(path, _MAX_KEY_SET_BYTES)
    try:
        document = strict_json.loads(raw, max_bytes=_MAX_KEY_SET_BYTES)
    except Invalid:
        # Without what is wrong in it: a private key may stand where a public one belongs.
        raise _Wrong(f"{path} is not JSON; write the issuer's JWK set there (RFC 7517)") from None
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list) or not keys:
        raise _Wrong(f'{path} has no "keys"; write the issuer\'s JWK set there (RFC 7517)')
    name, issuer, algorithms = values.get("name"), values.get("issuer"), values.get("algorithms")
    if name is None or issuer is None or not algorithms:
        return
    declared = TrustedIssuer(name=name, issuer=issuer, key_source=source, algorithms=tuple(algorithms))
    try:
        usable = usable_algorithms(raw, declared)
    except Invalid as problem:
        raise _Wrong(f"{path} cannot be used: {problem.detail}; write the issuer's JWK set there (RFC 7517)") from None
    if usable.isdisjoint(algorithms):
        wanted = 'public keys with a kid and use "jwt-svid"' if declared.trust_domain else "public keys, RSA, EC or OKP"
        raise _Wrong(f"{path} has no key that can check {' or '.join(algorithms)}; write {wanted} there")


def _check_principals(reader: _Reader, rows: Sequence[_Row], issuers: Sequence[_Row]) -> None:
    _unique(reader, rows, "name")
    declared = {values["name"]: values for _, _, values in issuers if "name" in values}
    names = _written(issuers, "name")
    same: dict[str, str] = {}
    for at, raw, values in rows:
        issuer = values.get("issuer")
        if issuer is not None and issuer not in names and "issuers" not in reader.unreadable:
            reader.refuse(f"{at}.issuer", _unknown("issuer", issuer, names, "issuers"), issuer)
        if issuer is not None and declared.get(issuer, {}).get("users"):
            reader.refuse(
                f"{at}.issuer",
                "is an issuer of people on whose behalf others act, whose tokens open nothing themselves; give its "
                "callers an issuer without users = true, or take this principal out",
                issuer,
            )
        for index, role in enumerate(values.get("roles", ())):
            if role not in set(Role):
                reader.refuse(f"{at}.roles[{index}]", f"is not a role; the roles are {', '.join(Role)}", role)
        subjects = [key for key in ("subject", "subject_prefix") if key in raw]
        if len(subjects) != 1:
            found = "has both subject and subject_prefix" if subjects else "has no subject, which would be everybody"
            reader.refuse(at, f"{found}; write exactly one of subject and subject_prefix")
            continue
        subject = values.get(subjects[0])
        if issuer is None or subject is None:
            continue
        domain = declared.get(issuer, {}).get("issuer", "")
        if domain.startswith("spiffe://") and not subject.startswith(f"{domain}/"):
            reader.refuse(
                f"{at}.{subjects[0]}", f"is outside the trust domain of its issuer; write {domain}/<path>", subject
            )
        if "claims" in values:
            # A broker that could not tell two of them apart would refuse both, at their first call.
            rule = json.dumps([issuer, subjects[0], subject, values["claims"]], sort_keys=True)
            if same.setdefault(rule, at) != at:
                reader.refuse(
                    f"{at}.{subjects[0]}",
                    f"is already {same[rule]}, with the same claims; keep one of the two",
                    subject,
                )


def _check_resources(
    reader: _Reader, rows: Sequence[_Row], principals: Sequence[_Row], own: str | None, providers: Sequence[str]
) -> None:
    _unique(reader, rows, "identifier")
    roles = {values["name"]: values.get("roles") for _, _, values in principals if "name" in values}
    names = _written(principals, "name")
    for at, _, values in rows:
        identifier = values.get("identifier")
        if identifier is not None and own is not None and identifier.rstrip("/") in (own, f"{own}/v1"):
            reader.refuse(
                f"{at}.identifier",
                "is the broker itself, which its credentials may not open; write another",
                identifier,
            )
        provider = values.get("provider")
        if provider is not None and provider not in providers:
            reader.refuse(
                f"{at}.provider",
                f"is not a provider of this version; the providers are: {', '.join(providers)}",
                provider,
            )
        if values.get("scopes") == []:
            reader.refuse(f"{at}.scopes", "offers nothing that could be asked for; name at least one scope", [])
        for index, verifier in enumerate(values.get("verifiers", ())):
            if verifier not in names:
                if "principals" in reader.unreadable:
                    continue  # it may be the one whose name cannot be read: one mistake, one problem
                reader.refuse(
                    f"{at}.verifiers[{index}]", _unknown("principal", verifier, names, "principals"), verifier
                )
            elif (held := roles.get(verifier)) is not None and Role.VERIFIER not in held:
                reader.refuse(
                    f"{at}.verifiers[{index}]",
                    'is a principal without role verifier; add "verifier" to its roles',
                    verifier,
                )


def _unknown(noun: str, name: str, known: Sequence[str], section: str) -> str:
    near = _nearest(name, known) or (
        f"there are {', '.join(map(_bare, sorted(known)[:20]))}" if known else "there are none"
    )
    return f"is the name of no {noun}; {near}; add it to [[{section}]], or correct the name"


def _policies(reader: _Reader, value: str | None) -> tuple[dict[str, str], str | None]:
    """File name to text of every `*.cedar`, and the text of the schema. A policy left out could be a forbid."""
    if value is None:
        return {}, None
    directory = reader.path(value)
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".cedar") or name == SCHEMA_FILE)
    except OSError as error:
        why = f"the directory {directory} cannot be read ({error.strerror}); make it, or correct the path"
        reader.refuse("policies.directory", why, value)
        return {}, None
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = _policy(directory / name)
        except _Wrong as wrong:
            reader.refuse("policies.directory", str(wrong), value)
    schema = found.pop(SCHEMA_FILE, None)
    return found, schema


def _policy(path: Path) -> str:
    if not path.name.isprintable():
        raise _Wrong(f"{_shown(str(path))} has a character in its name that cannot be seen; rename it")
    content = _read(path, MAX_POLICY_BYTES)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _Wrong(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if "\0" in text:  # PostgreSQL keeps no NUL in a document
        raise _Wrong(f"{path} has a NUL; take it out")
    return text


# --- Building -------------------------------------------------------------------------------------------------------


def _server(reader: _Reader, server: Mapping[str, Any]) -> ServerSettings:
    listen, metrics = server["listen"], server["metrics_listen"]
    metrics_host, metrics_port = _address(metrics) if metrics else (None, None)
    path = reader.path(listen.removeprefix("unix:")) if listen.startswith("unix:") else None
    host, port = (None, None) if path else _address(listen)
    return ServerSettings(
        listen=f"unix:{path}" if path else listen,
        host=host,
        port=port,
        unix_path=path,
        workers=server["workers"],
        metrics_listen=metrics,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
    )


def _store(reader: _Reader, url: str) -> str:
    if not url.startswith("sqlite:"):
        return url
    return f"sqlite:///{reader.path(url.removeprefix('sqlite:///'))}"


def _issuer(reader: _Reader, values: Mapping[str, Any]) -> TrustedIssuer:
    own = {name: value for name, value in _tupled(values).items() if name not in KEY_SOURCES}
    source = next(source for source in KEY_SOURCES if values[source])
    location = values[source] if source != "discovery" else None
    if source.endswith("_file"):
        location = str(reader.path(values[source]))
    return TrustedIssuer(**own, key_source=source, location=location)


# --- The reference --------------------------------------------------------------------------------------------------

_INTRODUCTION = """# Configuration

One TOML file, read once and strictly: an unknown key, a wrong type, a missing file or an unsafe value is an error that
names file, key, value and remedy, and the broker does not start. Relative paths are relative to the file's directory.

`issuer` and every key of a section in single brackets can be overridden by the environment: `BROKER__ISSUER`,
`BROKER__STORE__URL`, `BROKER__SERVER__WORKERS=2`. A `BROKER__` variable that overrides nothing is an error too.
"""


def config_reference() -> str:
    """Every key with its type, default and meaning, as Markdown; `docs/reference/configuration.md` is this text."""
    tables: list[tuple[str, tuple[_Key, ...]]] = [("Top level", _TOP)]
    tables += [(f"`[{name}]`", keys) for name, keys in _SECTIONS.items()]
    tables += [(f"`[[{name}]]`", keys) for name, keys in _ARRAYS.items()]
    return _INTRODUCTION + "".join(f"\n## {title}\n\n" + "".join(_reference_rows(keys)) for title, keys in tables)


def _reference_rows(keys: Sequence[_Key]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|\n"
    for key in keys:
        yield f"| `{key.name}` | {_reference_type(key)} | {_reference_default(key)} | {key.meaning} |\n"


def _reference_type(key: _Key) -> str:
    if key.choices:
        return ", ".join(f"`{choice}`" for choice in key.choices)
    if key.kind == "integer":
        return f"integer, {key.low} to {key.high}"
    return {"array": "array of strings", "facts": "table of strings, integers, booleans"}.get(key.kind, key.kind)


def _reference_default(key: _Key) -> str:
    if key.default is _REQUIRED:
        return "required"
    if key.default is None:
        return "–"
    if isinstance(key.default, list):
        return f"`[{_quoted(key.default)}]`"
    return f"`{_shown(key.default)}`"
