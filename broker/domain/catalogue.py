"""What configuration declares: trusted issuers, principals, resources, policies; one immutable, numbered version.

Parsing and refusing is `broker.config`'s work; whoever holds a `Catalogue` holds a checked one. Two brokers on
one database work from the same version, because the version's document is a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Protocol, TypeVar
from zoneinfo import available_timezones

from broker.domain.errors import InvalidTarget, Unauthenticated
from broker.domain.identity import Principal, Role, WorkloadIdentity

KEY_SOURCES = ("discovery", "jwks_uri", "jwks_file", "spiffe_bundle_file", "spiffe_bundle_url")
SENSITIVITIES = ("public", "internal", "confidential", "restricted")
UTC = "UTC"
SIGNING_ALGORITHMS = ("ES256", "RS256", "EdDSA")


@dataclass(frozen=True, kw_only=True)
class TrustedIssuer:
    """Whose workload tokens we believe. `location` is the path or URL of `key_source`; discovery has none.

    With a SPIFFE bundle `issuer` is `spiffe://<trust domain>`, because a JWT-SVID need not carry `iss`.
    """

    name: str
    issuer: str
    key_source: str
    location: str | None = None
    algorithms: tuple[str, ...] = ("ES256",)
    max_lifetime_s: int = 3600
    single_use: bool = False
    users: bool = False
    max_requests: int | None = None
    max_live: int | None = None
    user_attributes: Mapping[str, str] = field(default_factory=dict)  # for policies -> the claim that says it

    @property
    def trust_domain(self) -> str | None:
        if not self.key_source.startswith("spiffe_bundle"):
            return None
        return self.issuer.removeprefix("spiffe://")


@dataclass(frozen=True, kw_only=True)
class PrincipalRule:
    """Which attested identity is which principal. Exactly one of `subject` and `subject_prefix` is set.

    A prefix ends with "/", so that `…/ns/agents/` does not match `…/ns/agents-evil`.
    """

    name: str
    kind: str
    issuer: str
    subject: str | None = None
    subject_prefix: str | None = None
    claims: Mapping[str, str | int | bool] = field(default_factory=dict)
    roles: tuple[str, ...] = ()
    owner: str | None = None
    groups: tuple[str, ...] = ()
    attributes: Mapping[str, str | int | bool] = field(default_factory=dict)
    implicit_tasks: bool = False
    max_requests: int | None = None
    max_live: int | None = None

    def names(self, issuer: str, subject: str) -> bool:
        """Whether it speaks of this issuer and subject, compared exactly (INV-17), whatever else it demands."""
        if issuer != self.issuer:
            return False
        return subject == self.subject if self.subject is not None else subject.startswith(self.subject_prefix or "\0")

    def is_met_by(self, claims: Mapping[str, Any]) -> bool:
        """Whether every claim it demands is there, with this value."""
        return all(claim_at(claims, path) == (type(value), value) for path, value in self.claims.items())

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Of two rules that match, the higher counts: an exact subject, then a longer prefix, then more claims."""
        return self.subject is not None, len(self.subject_prefix or ""), len(self.claims)

    def principal(self, identity: WorkloadIdentity) -> Principal:
        return Principal(
            name=self.name,
            kind=self.kind,
            issuer=identity.issuer,
            subject=identity.subject,
            roles=frozenset(Role(role) for role in self.roles),
            owner=self.owner,
            groups=frozenset(self.groups),
            attributes=self.attributes,
            implicit_tasks=self.implicit_tasks,
        )


class Called(Protocol):
    """Whoever has a name, and perhaps a subject and somebody who answers for them: a principal or its rule."""

    @property
    def name(self) -> str: ...

    @property
    def subject(self) -> str | None: ...

    @property
    def owner(self) -> str | None: ...


C = TypeVar("C", bound=Called)


def claim_at(claims: Mapping[str, Any], path: str) -> tuple[type, Any] | None:
    """The type and value of a claim at a dotted path; None where it is not there."""
    # A member's own name may hold dots ("kubernetes.io"), so every split of the path is tried. The type is part of
    # the comparison: in Python True == 1, in a claim they are different facts.
    if path in claims:
        return type(claims[path]), claims[path]
    for name, below in claims.items():
        if isinstance(below, Mapping) and path.startswith(f"{name}."):
            found = claim_at(below, path[len(name) + 1 :])
            if found is not None:
                return found
    return None


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Something a credential opens.

    `settings` is its provider's own table, of what JSON has: where the credentials of this version came from can be
    told from the version as long as one of them may live.
    """

    identifier: str
    provider: str = "jwt"
    scopes: tuple[str, ...] = ()
    sensitivity: str = "internal"
    environment: str = "production"
    max_ttl_s: int = 900
    signing_algorithm: str = "ES256"
    token_typ: str = "at+jwt"  # noqa: S105 - a media type
    require_dpop: bool = False
    verifiers: tuple[str, ...] = ()
    attributes: Mapping[str, str | int | bool] = field(default_factory=dict)
    destination: Mapping[str, str | int | bool] = field(default_factory=dict)  # where its credentials lead
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_requests: int | None = None
    max_live: int | None = None

    @cached_property
    def offered(self) -> frozenset[str]:
        return frozenset(self.scopes)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds one broker sets on every request, whatever a policy says.

    What is `requests_per_…` and `resources_per_…` is of each `window`; `max_live_per_…` is of each moment, and None is
    no such limit. A principal, an issuer or a resource may have a bound of its own instead.
    """

    max_deadline: timedelta = timedelta(seconds=86400)
    default_ttl: timedelta = timedelta(seconds=300)
    max_ttl: timedelta = timedelta(seconds=3600)
    max_live_per_agent: int = 100
    max_delegation_depth: int = 3
    approve_within: timedelta = timedelta(seconds=3600)
    collect_within: timedelta = timedelta(seconds=900)
    max_open_approvals_per_agent: int = 10
    max_open_approvals_per_group: int = 100
    window: timedelta = timedelta(seconds=60)
    requests_per_agent: int = 600
    requests_per_task: int = 6_000
    requests_per_resource: int = 300_000
    requests_per_issuer: int = 300_000
    resources_per_agent: int = 100
    resources_per_task: int = 200
    mints_per_task: int = 10_000
    max_live_per_task: int | None = None
    max_live_per_resource: int | None = None
    max_live_per_issuer: int | None = None
    denials_window: timedelta = timedelta(seconds=600)
    denials_throttle: int = 30
    throttle_pause: timedelta = timedelta(seconds=5)
    denials_lockdown: int = 100
    review_within: timedelta = timedelta(seconds=86_400)
    keep_activities: timedelta = timedelta(days=30)
    max_activities_per_grant: int = 10_000
    max_activities_per_minute: int = 6_000


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """One version of everything configuration declares. `policies` maps file name to Cedar text."""

    version: int = 0
    issuers: tuple[TrustedIssuer, ...] = ()
    principals: tuple[PrincipalRule, ...] = ()
    resources: tuple[Resource, ...] = ()
    policies: Mapping[str, str] = field(default_factory=dict)
    schema: str | None = None
    time_zone: str = UTC  # of `context.local`

    @cached_property
    def _resources(self) -> Mapping[str, Resource]:
        return {resource.identifier: resource for resource in self.resources}

    @cached_property
    def principal_names(self) -> frozenset[str]:
        return frozenset(rule.name for rule in self.principals)

    @cached_property
    def _rules(self) -> Mapping[str, PrincipalRule]:
        return {rule.name: rule for rule in self.principals}

    @cached_property
    def _rules_by_subject(self) -> Mapping[tuple[str, str | None], Sequence[PrincipalRule]]:
        """By issuer and exact subject; those with a prefix by issuer and None."""
        found: dict[tuple[str, str | None], list[PrincipalRule]] = {}
        for rule in self.principals:
            found.setdefault((rule.issuer, rule.subject), []).append(rule)
        return found

    def rules_for(self, issuer: str, subject: str) -> Iterator[PrincipalRule]:
        """Those that speak of this issuer and subject; one of ten thousand agents is not compared with all of them."""
        yield from self._rules_by_subject.get((issuer, subject), ())
        yield from (rule for rule in self._rules_by_subject.get((issuer, None), ()) if rule.names(issuer, subject))

    def rule(self, name: str) -> PrincipalRule | None:
        """The principal of this name, as it is configured."""
        return self._rules.get(name)

    @cached_property
    def _people(self) -> Mapping[str, str]:
        """The name of each person, by everything an owner may be called."""
        people = [rule for rule in self.principals if rule.kind == "person"]
        by_subject = {rule.subject: rule.name for rule in people if rule.subject is not None}
        return by_subject | {rule.name: rule.name for rule in people}

    def _who_answers(self, owner: str | None) -> str | None:
        """The person who answers for it in the end; None where that is a team, which is nobody's name."""
        seen: set[str] = set()
        while owner is not None and owner not in seen:
            if owner in self._people:
                return self._people[owner]
            seen.add(owner)
            rule = self.rule(owner)
            owner = None if rule is None else rule.owner
        return None

    def are_one_person(self, one: Called, other: Called) -> bool:
        """Whether one person may speak as both: by a name, by a subject of any issuer, or as who answers for them.

        Two who have a team for their owner are two people. In doubt it is one (INV-15).
        """
        called, also_called = ({each.name, each.subject} - {None} for each in (one, other))
        if called & also_called or one.owner in also_called or other.owner in called:
            return True
        mine, theirs = (
            {self._people.get(each.name), self._people.get(each.subject or ""), self._who_answers(each.owner)} - {None}
            for each in (one, other)
        )
        return bool(mine & theirs)

    def different_people(self, principals: Iterable[C]) -> Iterator[C]:
        """Those of them who are surely different people: of two that may be one, who comes first."""
        found: list[C] = []
        for each in principals:
            if not any(self.are_one_person(each, other) for other in found):
                found.append(each)
                yield each

    @cached_property
    def _issuers(self) -> Mapping[str, TrustedIssuer]:
        return {issuer.name: issuer for issuer in self.issuers}

    def issuer(self, name: str) -> TrustedIssuer | None:
        """The issuer of this name, as it is configured."""
        return self._issuers.get(name)

    def find_resource(self, identifier: str) -> Resource | None:
        """The registered resource; None where there is no such one."""
        return self._resources.get(identifier)

    def resource(self, identifier: str) -> Resource:
        """The registered resource, compared as it is written: no normalising, no prefix."""
        found = self._resources.get(identifier)
        if found is None:
            raise InvalidTarget(
                f"{identifier[:200]!r} is not a resource this broker knows; ask its administrator to register it",
                member="resource",
            )
        return found

    def principal_for(self, identity: WorkloadIdentity) -> Principal:
        """Who this identity is: an exact subject wins over a prefix, a longer prefix over a shorter."""
        rules = self.rules_for(identity.issuer, identity.subject)
        found = [rule for rule in rules if rule.is_met_by(identity.claims)]
        if not found:
            raise Unauthenticated(f"no principal is configured for subject {identity.subject!r} of {identity.issuer}")
        best = max(rule.rank for rule in found)
        ranked = [rule for rule in found if rule.rank == best]
        if len(ranked) > 1:
            # Guessing would let the order of a file decide who somebody is.
            names = ", ".join(rule.name for rule in ranked)
            raise Unauthenticated(f"subject {identity.subject!r} of {identity.issuer} is several principals: {names}")
        return ranked[0].principal(identity)

    def as_document(self) -> dict[str, Any]:
        """The JSON kept as a configuration version; `from_document` is its inverse. The version is not part of it."""
        document = asdict(self)
        del document["version"]
        # Without what is not set, a configuration that has none of it is the document it always was: a broker that is
        # brought up to date applies no new version.
        for item in (*document["issuers"], *document["principals"], *document["resources"]):
            for name in ("max_requests", "max_live"):
                if item[name] is None:
                    del item[name]
            for name in ("settings", "destination", "user_attributes"):
                if item.get(name) == {}:
                    del item[name]
        if self.time_zone == UTC:
            del document["time_zone"]
        return document

    @classmethod
    def from_document(cls, version: int, document: Mapping[str, Any]) -> Catalogue:
        return cls(
            version=version,
            issuers=tuple(_read(TrustedIssuer, item) for item in document["issuers"]),
            principals=tuple(_read(PrincipalRule, item) for item in document["principals"]),
            resources=tuple(_read(Resource, item) for item in document["resources"]),
            policies=document["policies"],
            schema=document["schema"],
            time_zone=document.get("time_zone", UTC),
        )


def unknown_zone(time_zone: str) -> Iterator[str]:
    """What is wrong with a time zone that this machine does not know by this very name."""
    if time_zone != UTC and time_zone not in available_timezones():
        nearest = get_close_matches(time_zone, available_timezones(), 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "write a name of the IANA database, like Europe/Berlin"
        yield f"there is no time zone {time_zone[:100]!r} here: {hint}"


def _read(kind: Any, item: Mapping[str, Any]) -> Any:
    names = {entry.name for entry in fields(kind)}
    return kind(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in item.items() if name in names}
    )
