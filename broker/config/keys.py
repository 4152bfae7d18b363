"""Which keys there are: name, type, bounds, default and meaning, once, for reading and for the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from broker.config import values
from broker.config.files import SCHEMA_FILE
from broker.config.settings import FeedSettings
from broker.config.values import WORKLOAD_ALGORITHMS
from broker.config.wording import quoted
from broker.domain.catalogue import (
    SENSITIVITIES,
    SIGNING_ALGORITHMS,
    UTC,
    Limits,
    PrincipalRule,
    Resource,
    TrustedIssuer,
)
from broker.domain.identity import Role
from broker.domain.shared_signals import HEARD, StreamBounds, Transmitter
from broker.providers.base import RevocationClass
from broker.providers.notices import TLS

PROVIDERS = ("jwt", "vault")
KINDS = ("agent", "orchestrator", "person", "service")
TOKEN_TYPES = ("at+jwt", "JWT")
REQUIRED: Any = object()


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key. `check` sees a string, or each string of an array; `secret` keeps the value out of every message.

    A table has `variants`: the value of its own key `selector` says which further keys it has.
    """

    name: str
    kind: str
    meaning: str
    default: Any = REQUIRED
    low: int = 1
    high: int = 1
    choices: tuple[str, ...] = ()
    check: Callable[[str], None] | None = None
    secret: bool = False
    may_be_empty: bool = False
    names: str = ""  # of what: the names in a table of facts
    reserved: tuple[str, ...] = ()
    selector: str = ""
    variants: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)

    @property
    def selecting(self) -> Key:
        """The key of a table that decides about its others."""
        return Key(name=self.selector, kind="string", meaning="", choices=tuple(self.variants))

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
            case "table":
                return f'a table such as {{ {self.selector} = "{next(iter(self.variants))}", … }}'
        return f"one of {quoted(self.choices)}" if self.choices else "a string"


def _string(name: str, meaning: str, **more: Any) -> Key:
    return Key(name=name, kind="string", meaning=meaning, **more)


def _integer(name: str, meaning: str, low: int, high: int, **more: Any) -> Key:
    return Key(name=name, kind="integer", meaning=meaning, low=low, high=high, **more)


def _boolean(name: str, meaning: str, *, default: bool) -> Key:
    return Key(name=name, kind="boolean", meaning=meaning, default=default)


def _array(name: str, meaning: str, **more: Any) -> Key:
    return Key(name=name, kind="array", meaning=meaning, **more)


def _facts(name: str, meaning: str, names: str, reserved: tuple[str, ...] = ()) -> Key:
    return Key(name=name, kind="facts", meaning=meaning, default={}, names=names, reserved=reserved)


def _table(name: str, meaning: str, selector: str, variants: Mapping[str, tuple[Key, ...]], **more: Any) -> Key:
    return Key(name=name, kind="table", meaning=meaning, selector=selector, variants=variants, **more)


def _seconds(duration: timedelta) -> int:
    return duration // timedelta(seconds=1)


def _login_mount(method: str) -> Key:
    return _string("mount", "Where the auth method is mounted.", default=method, check=values.vault_path)


def _login_role(method: str) -> Key:
    return _string("role", f"The role of the {method} auth method that the broker logs in as.", check=values.vault_name)


# How the broker may log in to Vault, and what each way needs. Files are read again at each login.
AUTH_METHODS: Mapping[str, tuple[Key, ...]] = {
    "approle": (
        _string("role_id_file", "File of the role id, mode 0600."),
        _string("secret_id_file", "File of the secret id, mode 0600."),
        _login_mount("approle"),
    ),
    "kubernetes": (
        _login_role("Kubernetes"),
        _string("token_file", "File of the service account's token; the usual place of a pod.", default=None),
        _login_mount("kubernetes"),
    ),
    "jwt": (
        _login_role("JWT"),
        _string("token_file", "File of the JWT that whoever attests the broker keeps fresh."),
        _login_mount("jwt"),
    ),
    "token_file": (_string("token_file", "File of a token of Vault, mode 0600, that is renewable or kept fresh."),),
}


def _mount(engine: str) -> Key:
    return _string("mount", "Where the engine is mounted.", default=engine, check=values.vault_path)


_ENGINE_ROLE = _string("role", "The role of the engine; the broker's own.", check=values.vault_name)
_TOKEN_ROLE = _string("token_role", "Another token role than that of `[vault]`.", default=None, check=values.vault_name)
_BOUND = "How long it may take until everybody refuses what was revoked."

# What `vault` of a resource says for each secret engine; `broker.providers.vault.sources` gives it meaning.
ENGINES: Mapping[str, tuple[Key, ...]] = {
    "database": (
        _ENGINE_ROLE,
        _mount("database"),
        _TOKEN_ROLE,
        _string(
            "target",
            "Name of one of `[[targets]]`: the PostgreSQL whose users it makes, to be looked at itself.",
            default=None,
            check=values.name,
        ),
    ),
    "pki": (
        _ENGINE_ROLE,
        _mount("pki"),
        _string(
            "operation",
            "`sign` the agent's own request, or `issue` a key too.",
            choices=("sign", "issue"),
            default="sign",
        ),
        _string(
            "common_name",
            "The subject, whatever the request says; `{grant_id}` stands for the grant's id. Needed for `issue`.",
            default=None,
        ),
        _integer("bound_s", f"{_BOUND} Without it the class is `ttl_only`.", 1, 86_400, default=None),
        _TOKEN_ROLE,
    ),
    "ssh": (
        _ENGINE_ROLE,
        _mount("ssh"),
        _string("principals", "The user names of the certificate, with commas between them."),
        _TOKEN_ROLE,
    ),
    "generic": (
        _string("mount", "Where the engine is mounted.", check=values.vault_path),
        _string("path", "What is read or written, below the mount.", check=values.vault_path),
        _string("revocation", "What revoking the lease means.", choices=tuple(map(str, RevocationClass))),
        _integer("bound_s", f"{_BOUND} With `bounded`, and only with it.", 1, 86_400, default=None),
        _string("method", "How the secret is asked for.", choices=("read", "write"), default="read"),
        _facts("parameters", "What is written; the agent adds nothing.", "parameter"),
        _string("ttl_parameter", "The parameter that says how long, if the engine has one.", default=None),
        _integer("least_ttl_s", "The shortest life the engine can give.", 1, 86_400, default=None),
        _TOKEN_ROLE,
    ),
}


_URL_FILE = _string(
    "url_file",
    "File with the URL of the hook: https, or http on loopback. Mode 0600: whoever knows it may write there.",
)

# How people are told that they are asked, and what each way needs.
NOTICES: Mapping[str, tuple[Key, ...]] = {
    "json": (
        _URL_FILE,
        _string("secret_file", "File with the secret that signs them (Standard Webhooks), mode 0600.", default=None),
    ),
    "slack": (_URL_FILE,),
    "teams": (_URL_FILE,),
    "email": (
        _string("host", "The mail server (SMTP).", check=values.mail_host),
        _integer("port", "Its port.", 1, 65_535, default=587),
        _string("tls", "`none` on loopback only.", choices=TLS, default="starttls"),
        _string("sender", "Who writes.", check=values.mail_address),
        _array("recipients", "Who is written to.", check=values.mail_address),
        _string("user", "Who logs in there, if somebody does.", default=None),
        _string("password_file", "File with that password, mode 0600.", default=None),
    ),
}


_MOST = 1_000_000_000
_REQUESTS = "Requests for a credential, renewals and collections among them, for"
_TURNS = "Without it, none; with it, brokers that issue there take turns."


def _own_limits(of: str, live: str) -> tuple[Key, Key]:
    return (
        _integer("max_requests", f"Instead of `limits.requests_per_{of}`.", 1, _MOST, default=None),
        _integer("max_live", f"Instead of `{live}`.", 1, 100_000, default=None),
    )


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
            "Wake-ups across brokers; never truth. `redis://`, `rediss://` or `unix://`.",
            default=None,
            check=values.redis_url,
            secret=True,
        ),
    ),
    "keys": (
        _string(
            "master_key_file",
            "File of 32 random bytes, mode 0600, that seals signing keys at rest. Exactly one of this and "
            "`vault_transit`.",
            default=None,
        ),
        _string(
            "vault_transit",
            "A key of Vault's transit engine instead, `<mount>/keys/<name>`; needs `[vault]`.",
            default=None,
            check=values.transit_key,
        ),
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
    "limits": (
        _integer("window_s", "How long a window is. At its end counting begins anew.", 10, 3600, default=60),
        _integer(
            "requests_per_agent",
            f"{_REQUESTS} one agent in a window; `max_requests` of a principal stands instead.",
            1,
            _MOST,
            default=Limits.requests_per_agent,
        ),
        _integer("requests_per_task", f"{_REQUESTS} a task in a window.", 1, _MOST, default=Limits.requests_per_task),
        _integer(
            "requests_per_resource",
            f"{_REQUESTS} one resource in a window; `max_requests` of the resource stands instead.",
            1,
            _MOST,
            default=Limits.requests_per_resource,
        ),
        _integer(
            "requests_per_issuer",
            f"{_REQUESTS} all whom one issuer attests in a window; `max_requests` of the issuer stands instead.",
            1,
            _MOST,
            default=Limits.requests_per_issuer,
        ),
        _integer(
            "resources_per_agent",
            "Different resources that one agent may ask for in a window.",
            1,
            _MOST,
            default=Limits.resources_per_agent,
        ),
        _integer(
            "resources_per_task",
            "Different resources that may be asked for under one task in a window.",
            1,
            _MOST,
            default=Limits.resources_per_task,
        ),
        _integer(
            "mints_per_task",
            "Credentials that one task gets as long as it lasts, renewals among them.",
            1,
            _MOST,
            default=Limits.mints_per_task,
        ),
        _integer("live_per_task", f"Live grants one task may have. {_TURNS}", 1, 100_000, default=None),
        _integer(
            "live_per_resource",
            f"Live grants there may be on one resource; `max_live` of the resource stands instead. {_TURNS}",
            1,
            100_000,
            default=None,
        ),
        _integer(
            "live_per_issuer",
            "Live grants that all whom one issuer attests may have; `max_live` of the issuer stands instead. " + _TURNS,
            1,
            100_000,
            default=None,
        ),
        _integer("denials_window_s", "How far back denials of an agent count.", 10, 86_400, default=600),
        _integer(
            "denials_throttle",
            "Denials after which an agent has to pause after each further one.",
            1,
            _MOST,
            default=Limits.denials_throttle,
        ),
        _integer("throttle_pause_s", "How long it pauses.", 1, 3600, default=_seconds(Limits.throttle_pause)),
        _integer(
            "denials_lockdown",
            "Denials after which an agent is locked down, with an alert, until an admin lifts it.",
            2,
            _MOST,
            default=Limits.denials_lockdown,
        ),
    ),
    "approvals": (
        _integer(
            "within_s",
            "How long a request may wait for people, at most until its task ends. `@approve_within` of a policy "
            "shortens it.",
            60,
            604_800,
            default=_seconds(Limits.approve_within),
        ),
        _integer(
            "collect_within_s",
            "How long after the last yes its agent may collect the credential.",
            60,
            86_400,
            default=_seconds(Limits.collect_within),
        ),
        _integer(
            "max_open_per_agent",
            "Requests of one agent that may wait at once.",
            1,
            1_000,
            default=Limits.max_open_approvals_per_agent,
        ),
        _integer(
            "max_open_per_group",
            "Requests that may wait for one group at once.",
            1,
            10_000,
            default=Limits.max_open_approvals_per_group,
        ),
        _integer(
            "review_within_s",
            "How long after a break-glass was collected its review may be owed before it is overdue.",
            60,
            604_800,
            default=_seconds(Limits.review_within),
        ),
    ),
    "feed": (
        _string(
            "listen",
            "`host:port` of `broker feed`, which answers the streams of many verifiers; on SQLite `broker serve` does. "
            "Loopback only while `issuer` is http.",
            default=None,
            check=values.metrics_listen,
        ),
        _string("metrics_listen", "`host:port` of its metrics.", default=None, check=values.metrics_listen),
        _integer(
            "streams",
            "Streams and polls it holds at once, two thirds of them for one caller at most.",
            1,
            100_000,
            default=FeedSettings.streams,
        ),
        _integer(
            "streams_of_serve",
            "Streams that each worker of `broker serve` answers itself; each takes a thread.",
            0,
            32,
            default=FeedSettings.streams_of_serve,
        ),
        _integer(
            "longest_stream_s",
            "How long one stream may last; none lasts longer than its caller's token.",
            10,
            86_400,
            default=_seconds(FeedSettings.longest_stream),
        ),
        _integer(
            "kept_for_s",
            "How long events are kept for those who missed them; longer than any grant lasts.",
            7_200,
            2_592_000,
            default=_seconds(FeedSettings.kept_for),
        ),
    ),
    "activities": (
        _integer(
            "keep_s",
            "How long what was done with grants is kept, from when it was told.",
            86_400,
            31_536_000,
            default=_seconds(Limits.keep_activities),
        ),
        _integer(
            "max_per_grant",
            "Activities of one grant that are kept; the rest is counted.",
            100,
            1_000_000,
            default=Limits.max_activities_per_grant,
        ),
        _integer(
            "max_per_minute",
            "Activities that one reporter may tell of in a minute.",
            2_048,
            1_000_000,
            default=Limits.max_activities_per_minute,
        ),
    ),
    "ssf": (
        _array(
            "push_networks",
            "Networks that are not of the Internet, like `10.20.0.0/16`, to which security events are pushed all the "
            "same.",
            default=[],
            check=values.network,
        ),
        _integer(
            "most_waiting",
            "Security events that may wait on one stream; with that many, of which none is taken for a minute, it is "
            "paused.",
            10,
            100_000,
            default=StreamBounds.most_waiting,
        ),
        _integer(
            "min_verification_interval_s",
            "How long a receiver waits between two verifications of its stream.",
            1,
            3600,
            default=_seconds(StreamBounds.min_verification_interval),
        ),
        _integer(
            "inactivity_timeout_s",
            "A stream that is polled, and was not for so long, is paused.",
            60,
            31_536_000,
            default=_seconds(StreamBounds.inactivity_timeout),
        ),
    ),
    "policies": (
        _string(
            "directory", f"Directory of the `*.cedar` files and, if there is one, `{SCHEMA_FILE}`.", default="policies"
        ),
        _string(
            "time_zone",
            "Of `context.local`: a name of the IANA database, like `Europe/Berlin`.",
            default=UTC,
            check=values.time_zone,
        ),
    ),
    "alerts": (
        _string(
            "webhook_url_file",
            "File with the URL that alerts are posted to: https, or http on loopback. Mode 0600, because whoever knows "
            "it may write there. Without it alerts are lines in the log.",
            default=None,
        ),
        _string(
            "secret_file",
            "File with the secret that signs them, mode 0600, so that the receiver can tell they are ours.",
            default=None,
        ),
    ),
    "vault": (
        _string(
            "address",
            "`https://host:port` of the active node or of a load balancer: no redirect is followed; http on loopback "
            "only.",
            check=values.vault_address,
        ),
        _string("namespace", "The namespace all of it is in.", default="", may_be_empty=True, check=values.namespace),
        _string("ca_file", "PEM file of its certificate authority, where that is not a public one.", default=None),
        _table("auth", "How the broker logs in.", "method", AUTH_METHODS),
        _string("token_role", "The token role of the tokens made for grants.", default="jit", check=values.vault_name),
        _integer("deadline_s", "The longest one call may take.", 1, 60, default=10),
        _boolean(
            "lease_prefix_exclusive",
            "Must be `true`: nobody else takes secrets from the roles of the resources. What is found there and "
            "belongs to no grant is killed.",
            default=False,
        ),
    ),
}

# Sections that are either not there, or whole.
OPTIONAL = ("vault",)


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
        *_own_limits("issuer", "limits.live_per_issuer"),
        _facts(
            "user_attributes",
            "With `users = true`: what policies may know of its subjects, each a name and the claim that says it, as a "
            "dotted path: text, a number, a boolean, or a list of them.",
            "attribute",
        ),
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
        _facts("claims", "Claims its token must have, exactly: a dotted path, quoted, to a value.", "claim"),
        _array("roles", f"What it may do: {', '.join(Role)}."),
        _string("owner", "The person or team who answers for it.", default=None),
        _array(
            "groups",
            'For approvers: the groups that `@approval("…")` names.',
            default=list(PrincipalRule.groups),
            check=values.name,
        ),
        _facts("attributes", "Facts for policies.", "attribute", ("owner", "issuer", "subject", "kind")),
        _boolean(
            "implicit_tasks",
            "A request without a task opens one, as long as the token.",
            default=PrincipalRule.implicit_tasks,
        ),
        *_own_limits("agent", "grants.max_live_per_agent"),
    ),
    "notify": (
        _string("name", "What it is called in the log.", check=values.name),
        _array("groups", "The groups whose approvals it is for. Without them, all.", default=[], check=values.name),
        _table("via", "How they are told.", "format", NOTICES),
    ),
    "transmitters": (
        _string("name", "What the audit trail calls it.", check=values.name),
        _string("issuer", "The `iss` of its security event tokens.", check=values.fetched_url),
        _boolean("discovery", "Keys come from its `/.well-known/ssf-configuration`.", default=False),
        _string("jwks_uri", "Keys come from this JWK set.", default=None, check=values.fetched_url),
        _string("jwks_file", "Keys come from this JWK set on disk.", default=None),
        _array(
            "algorithms",
            f"Signature algorithms believed: {', '.join(WORKLOAD_ALGORITHMS)}.",
            default=["RS256"],
            check=values.algorithm,
        ),
        _string("audience", "The `aud` it calls us by. Without it, the broker's issuer.", default=None),
        _array("speaks_of", "Names of the issuers about whose subjects it is believed.", check=values.name),
        _array(
            "events",
            f"Which of its events are acted on: {', '.join(HEARD)}.",
            default=list(HEARD),
            check=values.heard_event,
        ),
        _array(
            "lockdown_on",
            "Events that also lock down whom they are about, until an admin lifts it.",
            default=[],
            check=values.revoking_event,
        ),
        _integer(
            "max_age_s",
            "The oldest token believed; each is acted on once.",
            60,
            604_800,
            default=_seconds(Transmitter.max_age),
        ),
        _integer(
            "risk_lasts_s",
            "How long a risk it tells of lasts.",
            60,
            2_592_000,
            default=_seconds(Transmitter.risk_lasts),
        ),
        _string(
            "poll_url", "Ask here for events (RFC 8936), every few seconds.", default=None, check=values.fetched_url
        ),
        _string(
            "poll_token_file", "File with the bearer token for that, mode 0600; read anew each time.", default=None
        ),
    ),
    "targets": (
        _string("name", "What resources call it.", check=values.name),
        _string(
            "url_file",
            "File with the `postgresql://` URL of a connection that sees and ends the users Vault makes, mode 0600.",
        ),
        _string("heir", "The role that gets what a user leaves behind, as in `broker vault setup`."),
    ),
    "providers": (
        _string("name", "The entry point a package offers it by, and what resources call it.", check=values.name),
        _facts("settings", "What it is given: it says what. Paths are absolute, and a secret is in a file.", "setting"),
    ),
    "resources": (
        _string("identifier", "The audience of its tokens: an absolute URI without fragment.", check=values.identifier),
        _string(
            "provider",
            f"What issues its credentials: {', '.join(PROVIDERS)}, or one of `[[providers]]`.",
            default=Resource.provider,
        ),
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
        _facts(
            "attributes", "Facts for policies.", "attribute", ("sensitivity", "environment", "provider", "destination")
        ),
        _facts("destination", "Where its credentials lead, for policies: a host, a region, a network.", "attribute"),
        _table(
            "vault",
            "Which role of which secret engine gives its credentials; with provider `vault`, and only with it.",
            "engine",
            ENGINES,
            default=None,
        ),
        _facts("settings", "With one of `[[providers]]`, and only with it: what that is told to make.", "setting"),
        *_own_limits("resource", "limits.live_per_resource"),
    ),
}


# Keys that somebody will try, and that deserve a better answer than "unknown".
_IN_THE_CLEAR = "is not read from here, where it would lie in the clear; put it into a file of mode 0600, and write"
NOT_HERE = {
    "vault.token": f'{_IN_THE_CLEAR} auth = {{ method = "token_file", token_file = "…" }}',
    "vault.auth.token": f"{_IN_THE_CLEAR} token_file",
    "vault.auth.role_id": f"{_IN_THE_CLEAR} role_id_file",
    "vault.auth.secret_id": f"{_IN_THE_CLEAR} secret_id_file",
}
