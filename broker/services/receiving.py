"""Hearing what other transmitters say (SSF, CAEP, RISC): a SET is verified, acted on by the existing verbs, recorded.

A transmitter speaks of what configuration lets it, about subjects of the issuers configuration lets it, and of nothing
else. Acting comes first and is idempotent by the `jti`; only then is the SET used up, in the transaction that records
it. So one that was received and not acted on comes again, and one that comes again does nothing (INV-20).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from broker.domain import strict_json
from broker.domain.audit import Event
from broker.domain.catalogue import Catalogue, TrustedIssuer
from broker.domain.clock import LEEWAY, Clock, epoch, from_epoch
from broker.domain.errors import BrokerError, Invalid, ProviderUnavailable, Unauthenticated, Unavailable
from broker.domain.grant import IdempotencyClaim
from broker.domain.identity import Caller, Principal, Role, new_id
from broker.domain.lifecycle import TaskState
from broker.domain.refusal import Refusal
from broker.domain.secret import Secret
from broker.domain.shared_signals import (
    HEARD,
    LEVELS,
    REVOKING,
    SET_TYPE,
    Claims,
    Subject,
    Transmitter,
    identifiers_in,
    subject_of,
)
from broker.providers import jose
from broker.providers.key_sets import KeySets
from broker.providers.posting import Poster
from broker.services.proofs import MARGIN, consume, joined
from broker.services.revocation import Revocation
from broker.services.signals import Signals
from broker.services.standing import StandingReader
from broker.services.tasks import TaskService
from broker.store import grants, locks, tasks
from broker.store.database import Database
from broker.store.standing import is_consumed
from broker.store.transitions import record

MAX_SET_BYTES = jose.MAX_TOKEN_BYTES
POLL_DEADLINE = timedelta(seconds=10)
MOST_POLLED = 50
_SET = "set"
_MOST_EVENTS = 10
_MOST_ANSWERED = 1024 * 1024
_LONGEST_NAME = 255
_POLLS_A_RUN = 20
_NAMES = {uri: name for name, uri in HEARD.items()}
_WORD = re.compile(r"[A-Za-z0-9_. :-]{1,200}")

_log = logging.getLogger(__name__)


class SetRefused(Exception):
    """`code` is of RFC 8935 section 2.4; `detail` says no more than the sender may know, `reason` is for our log."""

    def __init__(self, code: str, detail: str, reason: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.reason = reason


class Receiving:
    """`counted` is told what became of each SET: accepted, repeated, refused."""

    def __init__(
        self,
        *,
        database: Database,
        standing: StandingReader,
        key_sets: KeySets,
        revocation: Revocation,
        signals: Signals,
        tasks: TaskService,
        transmitters: Sequence[Transmitter],
        token_of: Callable[[Transmitter], Secret | None],
        clock: Clock,
        counted: Callable[[str, int], None] = lambda _outcome, _count: None,
    ) -> None:
        self._database = database
        self._standing = standing
        self._key_sets = key_sets
        self._revocation = revocation
        self._signals = signals
        self._tasks = tasks
        self._transmitters = {one.issuer: one for one in transmitters}
        self._token_of = token_of
        self._clock = clock
        self._counted = counted
        self._posters = {one.name: Poster(deadline=POLL_DEADLINE) for one in transmitters if one.poll_url is not None}

    def receive(self, token: str) -> None:
        """Verify a SET and do what it says, once. SetRefused for what is none; Unavailable where it may come again."""
        try:
            outcome = self._received(token)
        except SetRefused:
            self._counted("refused", 1)
            raise
        self._counted(outcome, 1)

    def _received(self, token: str) -> str:
        now = self._clock()
        transmitter, claims = self._verified(token, now)
        key = joined(transmitter.issuer, claims["jti"])
        with self._database.read() as db:
            if is_consumed(db, _SET, hashlib.sha256(key.encode()).hexdigest()):
                return "repeated"
        done = self._acted(transmitter, claims, key)
        forget_at = max(now, from_epoch(claims["iat"])) + transmitter.max_age + LEEWAY + MARGIN
        with self._database.begin() as db:
            if not consume(db, _SET, key, forget_at=forget_at, now=now):
                return "repeated"
            record(db, [_event(transmitter, claims, done, self._clock())])  # INV-32
        return "accepted"

    # --- who says it -------------------------------------------------------------------------------------------------

    def _verified(self, token: str, now: datetime) -> tuple[Transmitter, Claims]:
        try:
            parsed = jose.unverified(token)
        except Unauthenticated as problem:
            raise SetRefused("invalid_request", "this is no security event token", problem.reason) from None
        unverified_issuer = parsed.claims.get("iss")
        transmitter = self._transmitters.get(unverified_issuer) if isinstance(unverified_issuer, str) else None
        if transmitter is None:
            raise SetRefused(
                "invalid_issuer", "this issuer is not believed here", f"iss {ascii(unverified_issuer)[:200]}"
            )
        keys = transmitter.keys
        # Before the key is looked for: garbage must not cause a fetch (INV-35).
        if parsed.algorithm not in keys.algorithms:
            raise SetRefused("invalid_key", "this algorithm is not believed here", f"algorithm {parsed.algorithm}")
        try:
            key = self._key_sets.key_for(keys, parsed.key_id, parsed.algorithm, now)
        except Unauthenticated as problem:
            if not self._key_sets.generation(keys, now):
                # It is not the SET that is wrong, and it must not be lost.
                raise Unavailable(f"the keys of {transmitter.name} are not known yet: send it again") from problem
            raise SetRefused("invalid_key", "this key is not known", problem.reason) from None
        try:
            jose.check_signature(parsed, key=key.key, algorithms=keys.algorithms)
        except Unauthenticated as problem:
            raise SetRefused("invalid_key", "the signature is not of this key", problem.reason) from None
        # INV-19: for us alone, and of no other type of what this issuer signs.
        if parsed.typ != SET_TYPE:
            raise SetRefused("invalid_request", f"typ is not {SET_TYPE}", f"typ {ascii(parsed.typ)[:80]}")
        if parsed.claims.get("aud") not in (transmitter.audience, [transmitter.audience]):
            raise SetRefused("invalid_audience", "this is not for us", f"aud {ascii(parsed.claims.get('aud'))[:200]}")
        try:
            claims = jose.event_claims(parsed)
        except Unauthenticated as problem:
            raise SetRefused("invalid_request", problem.reason, problem.reason) from None
        _require_fresh(claims, now, transmitter.max_age)
        _require_events(claims)
        return transmitter, claims

    # --- what it says ------------------------------------------------------------------------------------------------

    def _acted(self, transmitter: Transmitter, claims: Claims, key: str) -> list[str]:
        """What was done, in words for the record."""
        heard = [
            (_NAMES[type_], event)
            for type_, event in claims["events"].items()
            if type_ in _NAMES and _NAMES[type_] in transmitter.events
        ]
        if not heard:
            return []
        try:
            subject = subject_of(claims.get("sub_id"))
        except Invalid as problem:
            raise SetRefused("invalid_request", "sub_id is not a subject", problem.detail) from None
        catalogue = self._standing.now().catalogue
        concerned = sorted(set(_concerned(subject, transmitter, catalogue)))
        return [
            self._done(transmitter, name, event, axis, value, key) for name, event in heard for axis, value in concerned
        ]

    def _done(
        self, transmitter: Transmitter, name: str, event: Mapping[str, Any], axis: str, value: str, key: str
    ) -> str:
        once = hashlib.sha256(joined(key, name, axis, value).encode()).hexdigest()
        claim = IdempotencyClaim(key_sha256=once, request_sha256=once)
        said = f"{transmitter.name} says {name}"
        if name not in REVOKING:
            if axis not in ("agent", "user"):
                return f"no signal is about an {axis}"
            level = LEVELS.get(str(event.get("current_level")))
            if level is None:
                raise SetRefused("invalid_request", "current_level is LOW, MEDIUM or HIGH", "no current_level")
            why = event.get("risk_reason")
            reason = f"{said}: {why}" if isinstance(why, str) and _WORD.fullmatch(why) else said
            self._signals.send(
                _acting(transmitter, Role.SENTINEL),
                axis,
                value,
                level=level,
                reason=reason,
                source=transmitter.name,
                expires_in=transmitter.risk_lasts,
                idempotency=claim,
            )
            return f"risk of {axis} {value} is {level}"
        lockdown = name in transmitter.lockdown_on
        if not lockdown and not self._has_live(axis, value):
            # Every sign-out of an identity provider is one of these, and each revocation makes every broker look again.
            return f"{axis} {value} has nothing live"
        acting = _acting(transmitter, Role.ADMIN)
        outcome = self._revocation.revoke_along(acting, axis, value, reason=said, lockdown=lockdown, idempotency=claim)
        if axis == "user" and outcome.ordered_at is not None:
            # Else their agents ask again at once, with no token of the user. Afterwards, so that whatever was opened
            # before the order is committed; up to then, so that a SET that is acted on again ends nothing newer. The
            # time of another broker's clock may be ahead.
            until = outcome.ordered_at + LEEWAY
            self._tasks.cancel_opened_for(acting, value, opened_by=until, reason=said)
        return f"revoked {axis} {value}" + (", locked down" if lockdown else "")

    def _has_live(self, axis: str, value: str) -> bool:
        """Whether anything lives along it: grants, or a task under which a user's agents would ask for more."""
        if self._finds_live(axis, value):
            return True
        with self._database.begin() as db:
            # Who is issuing right now has committed after this, and is seen by the second look (INV-11).
            locks.hold_gate_alone(db)
        return self._finds_live(axis, value)

    def _finds_live(self, axis: str, value: str) -> bool:
        covered = grants.covered_by(Refusal(id="", axis=axis, value=value, reason=""))
        with self._database.read() as db:
            if grants.unended_ids(db, covered, limit=1):
                return True
            opened = tasks.matching(state=TaskState.ACTIVE, user=value)
            return axis == "user" and bool(tasks.page_of_tasks(db, where=opened, before=None, limit=1))

    # --- by poll -----------------------------------------------------------------------------------------------------

    def poll(self) -> int:
        """Ask every transmitter that is polled (RFC 8936); answers how many SETs came."""
        total = 0
        for transmitter in self._transmitters.values():
            if transmitter.poll_url is None:
                continue
            try:
                total += self._polled(transmitter, transmitter.poll_url)
            except BrokerError as problem:
                reason = getattr(problem, "reason", None) or problem.detail
                _log.warning("not polled", extra={"fields": {"transmitter": transmitter.name, "reason": reason}})
        return total

    def _polled(self, transmitter: Transmitter, url: str) -> int:
        token = self._token_of(transmitter)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token.reveal()}"
        total = 0
        taken: list[str] = []
        refused: dict[str, Any] = {}
        for _ in range(_POLLS_A_RUN):
            asked = {"maxEvents": MOST_POLLED, "returnImmediately": True, "ack": taken, "setErrs": refused}
            answer = self._posters[transmitter.name].post(url, json.dumps(asked).encode(), headers, read=_MOST_ANSWERED)
            if answer.status != 200:
                raise ProviderUnavailable("it was not polled", reason=f"it answered {answer.status}")
            sets = _sets_in(answer.body)
            taken, refused = self._heard(sets)
            total += len(sets)
            # What is acknowledged is so by the next question; what is not yet comes again.
            if not taken and not refused:
                break
        return total

    def _heard(self, sets: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
        """Which of them are done with, and which are refused. What may come again is neither."""
        taken: list[str] = []
        refused: dict[str, Any] = {}
        for jti, token in sets.items():
            try:
                if jti != _jti_in(token):
                    raise SetRefused("invalid_request", "the SET has another jti", "another jti")
                self.receive(token)
            except SetRefused as problem:
                _log.warning("a SET was refused", extra={"fields": {"reason": problem.reason, "code": problem.code}})
                refused[jti] = {"err": problem.code, "description": problem.detail}
            except BrokerError as problem:
                # Ours to mend, whatever it is: it comes again, and those after it are heard.
                _log.warning("a SET was not heard", extra={"fields": {"detail": problem.detail}})
            else:
                taken.append(jti)
        return taken, refused


def _require_fresh(claims: Claims, now: datetime, max_age: timedelta) -> None:
    age_s = epoch(now) - claims["iat"]
    if age_s < -LEEWAY.total_seconds():
        raise SetRefused("invalid_request", "iat is in the future", f"iat is {-age_s} s in the future")
    # INV-20: how long it may be accepted is how long it has to be remembered.
    if age_s > (max_age + LEEWAY).total_seconds():
        raise SetRefused("invalid_request", "this is too old", f"it is {age_s} s old")


def _require_events(claims: Claims) -> None:
    events = claims.get("events")
    well_formed = isinstance(events, Mapping) and all(isinstance(event, Mapping) for event in events.values())
    if not well_formed or not 0 < len(events or ()) <= _MOST_EVENTS:
        raise SetRefused("invalid_request", "events is an object of events", "events cannot be read")


def _concerned(subject: Subject, transmitter: Transmitter, catalogue: Catalogue) -> Iterator[tuple[str, str]]:
    """Whom of ours a subject is: an issuer this transmitter may speak of, and a subject of it (INV-17)."""
    issuers = [one for one in catalogue.issuers if one.name in transmitter.speaks_of]
    for identifier in identifiers_in(subject):
        match identifier:
            case {"format": "iss_sub", "iss": str(iss), "sub": str(sub)}:
                for issuer in issuers:
                    if issuer.issuer == iss:
                        yield from _called(issuer, sub, catalogue)
            case {"format": "opaque", "id": str(sub)} if len(issuers) == 1:
                yield from _called(issuers[0], sub, catalogue)


def _called(issuer: TrustedIssuer, subject: str, catalogue: Catalogue) -> Iterator[tuple[str, str]]:
    if issuer.users:
        name = f"{issuer.name}:{subject}"
        if len(name) <= _LONGEST_NAME and name.isprintable():
            yield "user", name
        return
    for rule in catalogue.principals:
        prefix = rule.subject_prefix
        named = rule.subject == subject if prefix is None else subject.startswith(prefix)
        if named and rule.issuer == issuer.name:
            yield from ((role, rule.name) for role in ("agent", "orchestrator") if role in rule.roles)


def _acting(transmitter: Transmitter, role: Role) -> Caller:
    """Whoever the verbs act for: nobody who can call, with the one role that this needs."""
    principal = Principal(
        name=transmitter.actor,
        kind="service",
        issuer=transmitter.name,
        subject=transmitter.issuer,
        roles=frozenset({role}),
    )
    return Caller(principal=principal, proof_expires_at=from_epoch(0))


def _event(transmitter: Transmitter, claims: Claims, done: Sequence[str], now: datetime) -> Event:
    types = sorted(_NAMES.get(name, "other") for name in claims["events"])
    return Event(
        id=new_id("evt", now),
        at=now,
        type="set.received",
        actor=transmitter.actor,
        reason="; ".join(done)[:1000] or "nothing of this concerns anybody here",
        data={"jti": claims["jti"][:200], "events": types, "issued_at": claims["iat"]},
    )


def _sets_in(body: bytes) -> Mapping[str, str]:
    found = strict_json.loads(body, max_bytes=_MOST_ANSWERED)
    sets = found.get("sets") if isinstance(found, dict) else None
    if not isinstance(sets, dict) or not all(isinstance(one, str) for one in sets.values()):
        raise Invalid("the answer holds no sets")
    return sets


def _jti_in(token: str) -> Any:
    try:
        return jose.unverified(token).claims.get("jti")
    except Unauthenticated as problem:
        raise SetRefused("invalid_request", "this is no security event token", problem.reason) from None
