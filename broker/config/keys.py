"""Which keys there are: name, type, bounds, default and meaning, once, for reading and for the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from broker.config import values
from broker.config.files import SCHEMA_FILE
from broker.config.values import WORKLOAD_ALGORITHMS
from broker.config.wording import quoted
from broker.domain.catalogue import (
    SENSITIVITIES,
    SIGNING_ALGORITHMS,
    Limits,
    PrincipalRule,
    Resource,
    TrustedIssuer,
)
from broker.domain.identity import Role

PROVIDERS = ("jwt",)
KINDS = ("agent", "orchestrator", "person", "service")
TOKEN_TYPES = ("at+jwt", "JWT")
REQUIRED: Any = object()


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key. `check` sees a string, or each string of an array; `secret` keeps the value out of every message."""

    name: str
    kind: str
    meaning: str
    default: Any = REQUIRED
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
        return f"one of {quoted(self.choices)}" if self.choices else "a string"


def _string(name: str, meaning: str, **more: Any) -> Key:
    return Key(name=name, kind="string", meaning=meaning, **more)


def _integer(name: str, meaning: str, low: int, high: int, **more: Any) -> Key:
    return Key(name=name, kind="integer", meaning=meaning, low=low, high=high, **more)


def _boolean(name: str, meaning: str, *, default: bool) -> Key:
    return Key(name=name, kind="boolean", meaning=meaning, default=default)


def _array(name: str, meaning: str, **more: Any) -> Key:
    return Key(name=name, kind="array", meaning=meaning, **more)


def _facts(name: str, meaning: str, reserved: tuple[str, ...] = ()) -> Key:
    return Key(name=name, kind="facts", meaning=meaning, default={}, reserved=reserved)


def _seconds(duration: timedelta) -> int:
    return duration // timedelta(seconds=1)


TOP = (
    _string(
        "issuer",
        "The broker's own name and address: `https://host`, no path; http on loopback only.",
        check=values.broker_issuer,
    ),
)


SECTIONS: Mapping[str, tuple[Key, ...]] = {
    "server": (
        _string(
            "listen",
            "`host:port` or `unix:/path`. Loopback only while `issuer` is http.",
            default="127.0.0.1:8080",
            check=values.listen,
        ),
        _integer("workers", "Processes that answer requests. Always 1 on SQLite.", 1, 64, default=1),
        _string(
            "metrics_listen",
            "`host:port` of the metrics, of the first worker; each further one takes the next port. Without it, none.",
            default=None,
            check=values.metrics_listen,
        ),
    ),
    "store": (
        _string(
            "url", "`sqlite:///path` or `postgresql+psycopg://user@host/database`.", check=values.store_url, secret=True
        ),
    ),
    "redis": (
        _string(
            "url",
            "Limits and wake-ups across brokers; never truth. `redis://`, `rediss://` or `unix://`.",
            default=None,
            check=values.redis_url,
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


ARRAYS: Mapping[str, tuple[Key, ...]] = {
    "issuers": (
        _string("name", "What principals call it.", check=values.name),
        _string(
            "issuer",
            "The `iss` of its tokens; `spiffe://<trust domain>` with a SPIFFE bundle.",
            check=values.trusted_issuer,
        ),
        _boolean("discovery", "Keys come from its OpenID Connect discovery document.", default=False),
        _string("jwks_uri", "Keys come from this JWK set.", default=None, check=values.fetched_url),
        _string("jwks_file", "Keys come from this JWK set on disk.", default=None),
        _string("spiffe_bundle_file", "Keys come from this SPIFFE bundle on disk.", default=None),
        _string(
            "spiffe_bundle_url", "Keys come from this SPIFFE bundle endpoint.", default=None, check=values.fetched_url
        ),
        _array(
            "algorithms",
            f"Signature algorithms believed: {', '.join(WORKLOAD_ALGORITHMS)}.",
            default=list(TrustedIssuer.algorithms),
            check=values.algorithm,
        ),
        _integer(
            "max_lifetime_s", "The longest life of a token believed.", 1, 86_400, default=TrustedIssuer.max_lifetime_s
        ),
        _boolean("single_use", "Each token is accepted once, by its `jti`.", default=TrustedIssuer.single_use),
        _boolean("users", "Its subjects are people on whose behalf agents may act.", default=TrustedIssuer.users),
    ),
    "principals": (
        _string("name", "What policies, logs and other sections call it.", check=values.name),
        _string("kind", "What it is.", choices=KINDS),
        _string("issuer", "Name of the issuer that attests it.", check=values.name),
        _string(
            "subject",
            "Its exact subject. Exactly one of this and `subject_prefix`.",
            default=None,
            check=values.subject,
        ),
        _string(
            "subject_prefix",
            'Beginning of its subjects, ending with "/" or ":", and never everything of the issuer.',
            default=None,
            check=values.subject_prefix,
        ),
        _facts("claims", "Claims its token must have, exactly: a dotted path, quoted, to a value."),
        _array("roles", f"What it may do: {', '.join(Role)}."),
        _string("owner", "The person or team who answers for it.", default=None),
        _array(
            "groups",
            'For approvers: the groups that `@approval("…")` names.',
            default=list(PrincipalRule.groups),
            check=values.name,
        ),
        _facts("attributes", "Facts for policies.", ("owner", "issuer", "subject", "kind")),
        _boolean(
            "implicit_tasks",
            "A request without a task opens one, as long as the token.",
            default=PrincipalRule.implicit_tasks,
        ),
    ),
    "resources": (
        _string("identifier", "The audience of its tokens: an absolute URI without fragment.", check=values.identifier),
        _string("provider", f"What issues its credentials: {', '.join(PROVIDERS)}.", default=Resource.provider),
        _array("scopes", "What may be asked of it (RFC 6749).", check=values.scope),
        _string("sensitivity", "For policies.", choices=SENSITIVITIES, default=Resource.sensitivity),
        _string("environment", "For policies; a free word.", default=Resource.environment, check=values.word),
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
            check=values.name,
        ),
        _facts("attributes", "Facts for policies.", ("sensitivity", "environment", "provider")),
    ),
}


# Keys that the design names and this version cannot serve: they deserve a better answer than "unknown".
NOT_HERE = {
    "vault": f"is not available in this version, whose providers are: {', '.join(PROVIDERS)}; take the section out",
    "keys.vault_transit": "is not available in this version; use master_key_file",
    "resources.vault": f"is not available in this version, whose providers are: {', '.join(PROVIDERS)}; take it out",
}
