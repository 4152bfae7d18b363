"""What a single value must be. Each check raises `Wrong` with what is the matter and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from urllib.parse import SplitResult, urlsplit

from broker.config.wording import Wrong, quoted, shown
from broker.domain.catalogue import unknown_zone
from broker.domain.errors import Invalid, InvalidScope
from broker.domain.scope import scope_set
from broker.domain.shared_signals import HEARD, REVOKING
from broker.providers.vault.settings import COMPONENT, MOST_COMPONENTS, component_of, path_of

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


_MAX_TEXT = 1000  # the narrowest column that keeps one of these values
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}")
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
ATTRIBUTE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
PARAMETER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_TRUST_DOMAIN = re.compile(r"spiffe://[a-z0-9._-]{1,255}")
_SPIFFE_ID = re.compile(r"(spiffe://[a-z0-9._-]{1,255})((?:/[A-Za-z0-9._-]+)+)")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+)):([0-9]{1,5})")
_MAIL_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
# Names of schemes that a browser runs or opens: an identifier is shown in the console.
_ACTIVE_SCHEMES = ("about", "blob", "data", "file", "javascript", "vbscript")


def plain_text(value: str) -> None:
    if not value:
        raise Wrong("is empty; write a value or take the key out")
    # A control character or a reversed direction changes what a log line or a terminal seems to say (INV-31), and
    # a NUL is an exception in every system call.
    if not value.isprintable():
        raise Wrong("has a character that cannot be seen (control, direction or surrogate); take it out")
    if value != value.strip():
        raise Wrong("begins or ends with a blank; take it out")
    if len(value) > _MAX_TEXT:
        raise Wrong(f"has {len(value)} characters; {_MAX_TEXT} are the most")


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[str], None]:
    def check(value: str) -> None:
        if not pattern.fullmatch(value):
            raise Wrong(f"is not {what}")

    return check


name = _matching(_NAME, 'a name; use up to 100 letters, digits and ". _ @ + -", beginning with a letter or digit')
word = _matching(_WORD, 'a word; use up to 63 lower-case letters, digits and ". _ -"')


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


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def web_url(value: str, *, may_be_plain: bool = False) -> SplitResult:
    """An absolute https URL without userinfo and fragment; http too on loopback."""
    parts = _split(value)
    if parts is None or parts.scheme not in ("http", "https") or not _is_host(parts.hostname or ""):
        raise Wrong("is not an absolute https URL; write https://host/path")
    if "@" in parts.netloc:
        raise Wrong("has a user or a password before the host; URLs are logged, take it out")
    if "#" in value:
        raise Wrong('has a fragment, which is never sent; take out "#" and what follows')
    if parts.scheme == "http" and not may_be_plain and not is_loopback(parts.hostname or ""):
        raise Wrong("is plain http off loopback, where anyone on the way can rewrite it; use https")
    return parts


def fetched_url(value: str) -> None:
    web_url(value)


def broker_issuer(value: str) -> None:
    parts = web_url(value)
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
    raise Wrong(f"{what}, and tokens are compared with the issuer character by character; write {shown(origin)}")


def trusted_issuer(value: str) -> None:
    if value.startswith("spiffe:"):
        if not _TRUST_DOMAIN.fullmatch(value):
            raise Wrong("is not a SPIFFE trust domain alone, without a path; write spiffe://<trust domain>")
        return
    if "?" in value:
        raise Wrong("has a query, which an issuer never has (OpenID Connect Discovery); take it out")
    # Where keys do not come from this address it is only a name, and a name may say http.
    web_url(value, may_be_plain=True)


def algorithm(value: str) -> None:
    allowed = f"use one of {quoted(WORKLOAD_ALGORITHMS)}"
    if value.lower() == "none":
        raise Wrong(f"accepts tokens that nobody signed; {allowed}")
    if value.upper().startswith("HS"):
        raise Wrong(f"is an HMAC algorithm: with it, whoever can check a token can make one; {allowed}")
    if value not in WORKLOAD_ALGORITHMS:
        raise Wrong(f"is not an algorithm this broker checks; {allowed}")


def _no_wildcard(value: str) -> None:
    if not re.search(r"[^*?%_.:/\s]", value):
        raise Wrong("is a subject that would match everything; write the subject of one workload, or a subject_prefix")
    if "*" in value:
        raise Wrong('has a "*", but subjects are compared character by character; write it out, or a subject_prefix')


def _spiffe_id(value: str) -> str:
    """The trust domain of a SPIFFE ID that has a path, as `spiffe://<trust domain>`."""
    if _TRUST_DOMAIN.fullmatch(value.rstrip("/")):
        raise Wrong(
            "has nothing after the trust domain, and would match everything in it; write spiffe://<trust domain>/<path>"
        )
    found = _SPIFFE_ID.fullmatch(value)
    if found is None or {".", ".."} & set(found[2].split("/")):
        raise Wrong(
            "is not a SPIFFE ID; write spiffe://<trust domain>/<path> with a lower-case trust domain and segments of "
            'letters, digits and ". _ -"'
        )
    return found[1]


def subject(value: str) -> None:
    _no_wildcard(value)
    if value.lower().startswith("spiffe:"):
        _spiffe_id(value)


def subject_prefix(value: str) -> None:
    _no_wildcard(value)
    if not value.endswith(("/", ":")):
        raise Wrong('does not end with "/" or ":", so that …/agents would match …/agents-evil; end it with one')
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
        raise Wrong(
            "is a prefix that matches everything of its kind; name at least one level more, like repo:org/, "
            "system:serviceaccount:namespace: or spiffe://<trust domain>/<path>/"
        )


def identifier(value: str) -> None:
    if _split(value) is None:
        raise Wrong("is not an absolute URI (RFC 8707); write https://host/path or urn:namespace:name")
    if "#" in value:
        raise Wrong('has a fragment, which RFC 8707 forbids; take out "#" and what follows')
    scheme = value.partition(":")[0]
    if scheme != scheme.lower():
        raise Wrong("has a scheme in upper case, and audiences are compared character by character; use lower case")
    if scheme in _ACTIVE_SCHEMES:
        raise Wrong(
            "names something a browser would open, not an audience; write https://host/path or urn:namespace:name"
        )
    if scheme in ("http", "https"):
        web_url(value)


def scope(value: str) -> None:
    try:
        scope_set([value])
    except InvalidScope as refused:
        raise Wrong(
            "is not a scope (RFC 6749): one to 200 printable ASCII characters, no blank; rename it"
        ) from refused


def store_url(value: str) -> None:
    scheme, _, rest = value.partition("://")
    if scheme == "sqlite":
        if rest in ("", "/") or rest.startswith((":memory:", "/:memory:", "/file:")) or "mode=memory" in rest:
            raise Wrong("is SQLite in memory, which forgets its grants; name a file: sqlite:///var/broker.db")
        if not rest.startswith("/") or "?" in rest or rest.endswith("/"):
            raise Wrong(
                "is not sqlite:/// and the path of a file, without host and query; write sqlite:///var/broker.db"
            )
        return
    if scheme != "postgresql+psycopg":
        raise Wrong("is neither sqlite:///path nor postgresql+psycopg://user@host/database; write one of the two")
    parts = _split(value)
    if parts is None or not re.fullmatch(r"/[^/]+", parts.path) or "#" in value:
        raise Wrong(
            "is not a URL with a database name; write postgresql+psycopg://user@host/database, odd characters of a "
            "password percent-encoded"
        )


def redis_url(value: str) -> None:
    parts = _split(value)
    if parts is None or not (
        (parts.scheme in ("redis", "rediss") and parts.hostname) or (parts.scheme == "unix" and parts.path)
    ):
        raise Wrong("is not a Redis URL; write redis://host:6379/0, rediss://host:6379/0 or unix:///path")


def address(value: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(value)
    if found is None or not _is_host(found[1] or found[2]) or not 1 <= int(found[3]) <= 65535:
        raise Wrong(
            "is not host:port with a port from 1 to 65535; write 127.0.0.1:8080, or 0.0.0.0:8080 for every interface"
        )
    return found[1] or found[2], int(found[3])


def time_zone(value: str) -> None:
    for wrong in unknown_zone(value):
        raise Wrong(f"is no time zone that is known here; {wrong.partition(': ')[2]}")


def mail_host(value: str) -> None:
    if not _is_host(value):
        raise Wrong("is not the name of a host; write one like mail.example")


def mail_address(value: str) -> None:
    # The plain form alone: what else an address may be is another header to some reader (INV-31).
    if not _MAIL_ADDRESS.fullmatch(value):
        raise Wrong("is not an address; write one like security@example.org, without a name and brackets")


def listen(value: str) -> None:
    if not value.startswith("unix:"):
        address(value)
    elif len(value) <= len("unix:"):
        raise Wrong("names no path; write unix:/run/broker.sock")


def metrics_listen(value: str) -> None:
    address(value)


def vault_address(value: str) -> None:
    parts = web_url(value)
    if parts.path not in ("", "/") or "?" in value:
        raise Wrong("has more than a scheme, a host and a port; write https://vault.example:8200")


def vault_name(value: str) -> None:
    try:
        component_of(value, "")
    except Invalid as refused:
        raise Wrong(
            'is not a name in Vault; use up to 128 letters, digits and "_ . -", beginning with a letter or digit'
        ) from refused


def vault_path(value: str) -> None:
    try:
        path_of(value, "")
    except Invalid as refused:
        raise Wrong(
            f'is not a path in Vault; write 1 to {MOST_COMPONENTS} parts of letters, digits and "_ . -" with "/" '
            "between them, and none at the ends"
        ) from refused


def namespace(value: str) -> None:
    vault_path(value.strip("/"))


def transit_key(value: str) -> None:
    mount, found, key = value.rpartition("/keys/")
    if not found or not COMPONENT.fullmatch(key):
        raise Wrong("is not a key of the transit engine; write transit/keys/<name>")
    vault_path(mount)


def network(value: str) -> None:
    try:
        ip_network(value)
    except ValueError as problem:
        raise Wrong("is not a network; write one like 10.20.0.0/16, without bits set behind its length") from problem


def heard_event(value: str) -> None:
    if value not in HEARD:
        raise Wrong(f"is not an event the broker acts on; use {quoted(tuple(HEARD))}")


def revoking_event(value: str) -> None:
    if value not in REVOKING:
        raise Wrong(f"is not an event that revokes; use {quoted(REVOKING)}")
