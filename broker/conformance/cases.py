"""What a verifier of the broker's tokens is asked, and what it has to answer: a token, a broker and a verdict each.

The verifier stands behind a protected address and is configured with the fake broker as its issuer. Accepted is a 2xx;
refused is 400, 401, 403 or 503. Anything else is a failure, also where a refusal was expected: a verifier that falls
over is no verifier. A case begins with an honest broker and a good token that is accepted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx

from broker.conformance.fake_broker import AUDIENCE, SCOPE, FakeBroker, Frame, Issued, SigningKey, base64url
from broker.sdk import DpopKey
from broker.sdk.clock import Timing, system_clock

_ACCEPTED, _REFUSED, _NO_SCOPE = "accepted", "refused", "refused with 403"
_REFUSALS = frozenset({400, 401, 403, 503})
_AGAIN_S = 0.2
_SLACK_S = 2.0
_PATIENCE_S = 15.0
_ANSWERS_WITHIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """The verifier, as it is reached. `proof_url` is what proofs are made for, where that is not the URL itself."""

    url: str
    method: str = "GET"
    audience: str = AUDIENCE
    scope: str = SCOPE
    bound_s: int = 15
    dpop: bool = True
    proof_url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    name: str
    expected: str
    observed: str
    passed: bool
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "expected": self.expected,
            "observed": self.observed,
            "seconds": round(self.seconds, 2),
        }


class Failed(Exception):
    """What was observed instead."""


class Stage:
    """One broker, one verifier, and what cases are made of."""

    def __init__(self, broker: FakeBroker, target: Target, timing: Timing | None = None) -> None:
        self.broker, self.target = broker, target
        self.timing = timing or Timing()
        self._http = httpx.Client(trust_env=False, follow_redirects=False, timeout=_ANSWERS_WITHIN_S)
        self._lists_alone_since: float | None = None
        self._names = 0

    def close(self) -> None:
        self._http.close()

    def issue(self, **claims: Any) -> Issued:
        return self.broker.issue(**{"aud": self.target.audience, "scope": self.target.scope} | claims)

    def accepted(self, **claims: Any) -> Issued:
        """A token with these claims that is accepted. What was issued within the second of a bulk revocation is not."""
        ends_at = self.timing.monotonic() + _SLACK_S
        while True:
            issued = self.issue(**claims)
            verdict, words = self.ask(issued.token)
            if verdict == _ACCEPTED:
                return issued
            if self.timing.monotonic() >= ends_at:
                raise Failed(words)
            self.timing.sleep(_AGAIN_S)

    def ask(self, token: str, *, scheme: str = "Bearer", proof: str | None = None) -> tuple[str, str]:
        """The verdict, and the answer in words."""
        headers = {"Authorization": f"{scheme} {token}"} if token else {}
        if proof is not None:
            headers["DPoP"] = proof
        try:
            answer = self._http.request(self.target.method, self.target.url, headers=headers)
        except httpx.HTTPError as problem:
            return "broken", f"no answer ({type(problem).__name__})"
        words = f"{answer.status_code}"
        if answer.status_code in _REFUSALS:
            challenge = answer.headers.get("www-authenticate", "")
            return _REFUSED, f"refused with {words}" + (f" ({challenge[:120]})" if challenge else "")
        return (_ACCEPTED, f"accepted with {words}") if answer.is_success else ("broken", f"answered {words}")

    def accepts(self, issued: Issued | str, **presented: Any) -> None:
        self._expect(_ACCEPTED, issued, presented)

    def refuses(self, issued: Issued | str, **presented: Any) -> None:
        self._expect(_REFUSED, issued, presented)

    def lacks_scope(self, issued: Issued) -> None:
        _, words = self.ask(issued.token)
        if not words.startswith(_NO_SCOPE):
            raise Failed(words)

    def _expect(self, wanted: str, issued: Issued | str, presented: Mapping[str, Any]) -> None:
        verdict, words = self.ask(issued if isinstance(issued, str) else issued.token, **presented)
        if verdict != wanted:
            raise Failed(words)

    def refuses_within(self, within_s: float, *tokens: Issued) -> None:
        """Each is refused at the latest so many seconds from now, and stays refused."""
        ends_at = self.timing.monotonic() + within_s
        for each in tokens:
            while self.ask(each.token)[0] == _ACCEPTED:
                if self.timing.monotonic() >= ends_at:
                    raise Failed(f"still accepted after {within_s:.0f} s")
                self.timing.sleep(_AGAIN_S)
        for each in tokens:
            self.refuses(each)

    def stays_refused(self, issued: Issued, for_s: float) -> None:
        ends_at = self.timing.monotonic() + for_s
        while self.timing.monotonic() < ends_at:
            self.refuses(issued)
            self.timing.sleep(_AGAIN_S)

    def recovers(self) -> None:
        """A fresh good token is accepted before long."""
        ends_at = self.timing.monotonic() + self.target.bound_s + _PATIENCE_S
        while True:
            verdict, words = self.ask(self.issue().token)
            if verdict == _ACCEPTED:
                return
            if self.timing.monotonic() >= ends_at:
                raise Failed(f"a good token is not accepted any more: {words}")
            self.timing.sleep(_AGAIN_S)

    def heal(self) -> None:
        self._lists_alone_since = None
        self.broker.heal()
        self.broker.cut()

    def wait(self, seconds: float) -> None:
        self.timing.sleep(seconds)

    def only_lists(self) -> str:
        """Let status lists be all there is, and whatever the feed proved be too old; the name of a new list."""
        if self._lists_alone_since is None:
            self.broker.serves = {"jwks", "lists"}
            self.broker.cut()
            self._lists_alone_since = self.timing.monotonic()
            self.wait(self.target.bound_s + _SLACK_S)
        self._names += 1
        return f"only-{self._names}"

    @property
    def bound_s(self) -> float:
        return self.target.bound_s + _SLACK_S

    def proof(self, key: DpopKey, issued: Issued, **other: str) -> str:
        url = other.get("url", self.target.proof_url or self.target.url)
        return key.proof(other.get("method", self.target.method), url, access_token=other.get("token", issued.token))


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    expected: str
    run: Callable[[Stage], None]
    group: str = "honest"  # or "lists": with nothing but status lists


CASES: list[Case] = []


def _case(name: str, expected: str, group: str = "honest") -> Callable[[Callable[[Stage], None]], None]:
    return lambda run: CASES.append(Case(name=name, expected=expected, run=run, group=group))


def run(stage: Stage, cases: Iterable[Case] = CASES) -> Iterator[Outcome]:
    """Each case as it ends. Those that need the feed to be off come together, because that takes a whole bound."""
    broken = "honest"
    for case in sorted(cases, key=lambda case: case.group):
        if not stage.target.dpop and case.name.startswith("dpop") and case.name != "dpop: as bearer":
            continue
        started = stage.timing.monotonic()
        observed, passed = case.expected, True
        try:
            if case.group != "lists" or broken != "lists":
                stage.heal()
                stage.recovers()
            broken = case.group
            case.run(stage)
        except Failed as problem:
            observed, passed = str(problem), False
        yield Outcome(
            name=case.name,
            expected=case.expected,
            observed=observed,
            passed=passed,
            seconds=stage.timing.monotonic() - started,
        )
    stage.heal()


# -- the token itself --------------------------------------------------------------------------------------------------


@_case("token: good", _ACCEPTED)
def _(stage: Stage) -> None:
    stage.accepts(stage.issue())


@_case("token: none", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses("")


@_case("token: expired", _REFUSED)
def _(stage: Stage) -> None:
    now = stage.broker.now()
    stage.refuses(stage.issue(iat=now - 310, nbf=now - 310, exp=now - 10))


@_case("token: not valid yet", _REFUSED)
def _(stage: Stage) -> None:
    now = stage.broker.now()
    stage.refuses(stage.issue(iat=now + 120, nbf=now + 120, exp=now + 240))


@_case("token: for another audience", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(aud="https://mail.example/api"))


@_case("token: for more than this audience", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(aud=[stage.target.audience, "https://mail.example/api"]))


@_case("token: of another issuer", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(iss="https://broker.example.evil.test"))


@_case("token: of another type", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(typ="statuslist+jwt"))


@_case("token: alg none", _REFUSED)
def _(stage: Stage) -> None:
    head, claims, _ = stage.issue(header={"alg": "none"}).token.split(".")
    stage.refuses(f"{head}.{claims}.")


@_case("token: a public key as an HMAC secret", _REFUSED)
def _(stage: Stage) -> None:
    head, claims, _ = stage.issue(header={"alg": "HS256"}).token.split(".")
    for secret in (json.dumps(stage.broker.keys[0].published).encode(), b""):
        mac = hmac.new(secret, f"{head}.{claims}".encode(), hashlib.sha256).digest()
        stage.refuses(f"{head}.{claims}.{base64url(mac)}")


@_case("token: signed by an unknown key", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(key=SigningKey()))


@_case("token: an unknown key under a known name", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(key=SigningKey(), header={"kid": stage.broker.keys[0].kid}))


@_case("token: brings its own key", _REFUSED)
def _(stage: Stage) -> None:
    own = SigningKey()
    for header in ({"jwk": own.published}, {"jwk": own.published, "kid": stage.broker.keys[0].kid}):
        stage.refuses(stage.issue(key=own, header=header))


@_case("token: names where its key is", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(header={"jku": f"{stage.broker.url}/oauth2/jwks"}))


@_case("token: a critical header nobody knows", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(header={"crit": ["b64"], "b64": True}))


@_case("token: changed after it was signed", _REFUSED)
def _(stage: Stage) -> None:
    issued = stage.issue()
    head, _, signature = issued.token.split(".")
    more = base64url(json.dumps({**issued.claims, "exp": issued.claims["exp"] + 600}).encode())
    stage.refuses(f"{head}.{more}.{signature}")


@_case("token: too large", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(padding="x" * 9000))


@_case("token: without the scope", _NO_SCOPE)
def _(stage: Stage) -> None:
    stage.lacks_scope(stage.issue(scope="nothing:at-all"))


@_case("token: points to a status list elsewhere", _REFUSED)
def _(stage: Stage) -> None:
    place = {"status_list": {"idx": 0, "uri": "https://lists.example.evil.test/status-lists/1"}}
    stage.refuses(stage.issue(status=place))


@_case("token: points beyond its status list", _REFUSED)
def _(stage: Stage) -> None:
    place = {"status_list": {"idx": 2**30, "uri": f"{stage.broker.url}/status-lists/1"}}
    stage.refuses(stage.issue(status=place))


@_case("keys: a rotation", "every good token accepted, also those of the key before")
def _(stage: Stage) -> None:
    before = stage.issue()
    stage.broker.rotate()
    stage.accepts(stage.issue())
    stage.accepts(before)


# -- revocation --------------------------------------------------------------------------------------------------------


def _revoked(name: str, claims: Mapping[str, Any], event: Callable[[Issued], Mapping[str, Any]]) -> None:
    def run(stage: Stage) -> None:
        victim, other = stage.accepted(**claims), stage.accepted(client_id="scribe", sub="scribe")
        members = dict(event(victim))
        members = {n: stage.target.audience if v is AUDIENCE else v for n, v in members.items()}
        stage.broker.revoke(**members, only=[victim])
        stage.refuses_within(stage.bound_s, victim)
        if "all" not in members and "resource" not in members and "key" not in members:
            stage.recovers()
            stage.accepts(other)

    CASES.append(Case(name=f"revoked: {name}", expected="refused within the bound, and nobody else's", run=run))


_ACT = {"sub": "ada", "act": {"sub": "summarizer", "act": {"sub": "planner"}}}
_revoked("a grant", {}, lambda it: {"kind": "grant", "grant_id": it.grant_id})
_revoked("a task", {}, lambda it: {"kind": "task", "task_id": it.task_id})
_revoked("an agent", {}, lambda it: {"kind": "tokens", "agent": "summarizer", "issued_before": it.claims["iat"]})
_revoked(
    "an agent further up the chain",
    _ACT,
    lambda it: {"kind": "tokens", "agent": "planner", "issued_before": it.claims["iat"]},
)
_revoked("a user", _ACT, lambda it: {"kind": "tokens", "user": "ada", "issued_before": it.claims["iat"]})
_revoked("a resource", {}, lambda it: {"kind": "tokens", "resource": AUDIENCE, "issued_before": it.claims["iat"]})
_revoked("a key", {}, lambda it: {"kind": "tokens", "key": it.kid, "issued_before": it.claims["iat"]})
_revoked("everything", {}, lambda it: {"kind": "tokens", "all": True, "issued_before": it.claims["iat"]})
_revoked("by status lists alone", {}, lambda it: {"kind": "lists"})
_revoked("by an event of an unknown kind", {}, lambda it: {"kind": "galaxy"})


# -- a feed that cannot be believed ------------------------------------------------------------------------------------


@_case("feed: an event is missing", "refused within the bound, and good tokens accepted again")
def _(stage: Stage) -> None:
    victim = stage.issue()
    stage.accepts(victim)
    stage.broker.hidden = {stage.broker.newest + 1}
    stage.broker.revoke("grant", grant_id=victim.grant_id)
    stage.refuses_within(stage.bound_s, victim)
    stage.heal()
    stage.recovers()
    stage.refuses(victim)


@_case("feed: an event was changed", "refused within the bound, and good tokens accepted again")
def _(stage: Stage) -> None:
    victim, instead = stage.issue(), stage.issue()
    stage.accepts(victim)
    stage.broker.tamper_data = lambda _, data: data.replace(victim.grant_id, instead.grant_id)
    stage.broker.revoke("grant", grant_id=victim.grant_id)
    stage.refuses_within(stage.bound_s, victim)
    stage.heal()
    stage.recovers()
    stage.refuses(victim)


@_case("feed: statements signed by somebody else", "refused within the bound")
def _(stage: Stage) -> None:
    good = stage.issue()
    stage.accepts(good)
    stage.broker.serves = {"jwks", "stream", "poll"}
    stage.broker.statement_signed_by = SigningKey()
    stage.refuses_within(stage.bound_s, good)


@_case("feed: the same old statement", "refused within the bound")
def _(stage: Stage) -> None:
    good = stage.issue()
    stage.accepts(good)
    kept = Frame("statement", json.dumps({"statement": stage.broker.statement()}))
    stage.broker.serves = {"jwks", "stream"}
    stage.broker.mangle = lambda frame: [bytes(kept if frame.event == "statement" else frame)]
    stage.refuses_within(stage.bound_s, good)


@_case("feed: silent for longer than the bound", "refused within the bound, and accepted again afterwards")
def _(stage: Stage) -> None:
    good = stage.issue()
    stage.accepts(good)
    stage.broker.serves = {"jwks", "stream"}
    stage.broker.silent = True
    stage.refuses_within(stage.bound_s, good)
    stage.heal()
    stage.recovers()
    stage.accepts(good)


@_case("feed: begun anew", "good tokens accepted, revoked ones refused")
def _(stage: Stage) -> None:
    victim = stage.issue()
    stage.broker.revoke("grant", grant_id=victim.grant_id)
    stage.refuses_within(stage.bound_s, victim)
    stage.broker.begin_feed()
    stage.recovers()
    stage.refuses(victim)


@_case("broker: not there for longer than the bound", "refused within the bound, and accepted again afterwards")
def _(stage: Stage) -> None:
    good = stage.issue()
    stage.accepts(good)
    stage.broker.stop()
    try:
        stage.refuses_within(stage.bound_s, good)
    finally:
        stage.broker.start()
    stage.recovers()
    stage.accepts(good)


# -- status lists that cannot be believed ------------------------------------------------------------------------------


@_case("status list: good, and all there is", _ACCEPTED, "lists")
def _(stage: Stage) -> None:
    stage.accepts(stage.issue(status_list=stage.only_lists()))


@_case("status list: rolled back", "refused, and still refused by an older list", "lists")
def _(stage: Stage) -> None:
    name = stage.only_lists()
    victim = stage.issue(status_list=name)
    stage.accepts(victim)
    older = stage.broker.signed_list(stage.broker.list_claims(name))
    stage.wait(1.5)  # a list says whole seconds, and an older one has to say an earlier one
    stage.broker.revoke_quietly(victim)
    stage.refuses_within(stage.bound_s, victim)
    stage.broker.tamper_list = lambda claims: (
        older if claims["sub"].endswith(f"/{name}") else stage.broker.signed_list(claims)
    )
    stage.stays_refused(victim, 3)
    stage.broker.tamper_list = stage.broker.signed_list


def _bad_list(name: str, tampered: Callable[[FakeBroker, dict[str, Any]], str]) -> None:
    def run(stage: Stage) -> None:
        issued = stage.issue(status_list=stage.only_lists())
        stage.broker.tamper_list = lambda claims: tampered(stage.broker, claims)
        try:
            stage.refuses(issued)
        finally:
            stage.broker.tamper_list = stage.broker.signed_list
        stage.recovers()

    CASES.append(Case(name=f"status list: {name}", expected=_REFUSED, run=run, group="lists"))


def _lst(raw: bytes) -> dict[str, Any]:
    return {"status_list": {"bits": 2, "lst": base64url(raw)}}


def _bomb() -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([packer.compress(bytes(1 << 20)) for _ in range(96)]) + packer.flush()


_bad_list("signed by somebody else", lambda _, claims: SigningKey().sign(claims, typ="statuslist+jwt"))
_bad_list(
    "another one", lambda broker, claims: broker.signed_list({**claims, "sub": f"{broker.url}/status-lists/other"})
)
_bad_list(
    "of another issuer",
    lambda broker, claims: broker.signed_list({**claims, "iss": "https://broker.example.evil.test"}),
)
_bad_list("of another type", lambda broker, claims: broker.keys[0].sign(claims, typ="at+jwt"))
_bad_list(
    "stale",
    lambda broker, claims: broker.signed_list({**claims, "iat": claims["iat"] - 600, "exp": claims["exp"] - 600}),
)
_bad_list(
    "old, and said to be good for a year",
    lambda broker, claims: broker.signed_list(
        {**claims, "iat": claims["iat"] - 600, "exp": claims["exp"] + 31_536_000, "ttl": 31_536_000}
    ),
)
_bad_list("a decompression bomb", lambda broker, claims: broker.signed_list({**claims, **_lst(_bomb())}))
_bad_list(
    "cut short", lambda broker, claims: broker.signed_list({**claims, **_lst(zlib.compress(bytes(2048), 9)[:-6])})
)
_bad_list("shorter than the place", lambda broker, claims: broker.signed_list({**claims, **_lst(zlib.compress(b""))}))


# -- tokens that are bound to a key ------------------------------------------------------------------------------------


@_case("dpop: good", _ACCEPTED)
def _(stage: Stage) -> None:
    key = DpopKey.generate()
    issued = stage.issue(bound_to=key)
    stage.accepts(issued, scheme="DPoP", proof=stage.proof(key, issued))


@_case("dpop: as bearer", _REFUSED)
def _(stage: Stage) -> None:
    key = DpopKey.generate()
    issued = stage.issue(bound_to=key)
    stage.refuses(issued)
    stage.refuses(issued, proof=stage.proof(key, issued))


@_case("dpop: without a proof", _REFUSED)
def _(stage: Stage) -> None:
    stage.refuses(stage.issue(bound_to=DpopKey.generate()), scheme="DPoP")


@_case("dpop: replayed", "accepted once, then refused")
def _(stage: Stage) -> None:
    key = DpopKey.generate()
    issued = stage.issue(bound_to=key)
    proof = stage.proof(key, issued)
    stage.accepts(issued, scheme="DPoP", proof=proof)
    stage.refuses(issued, scheme="DPoP", proof=proof)


@_case("dpop: made with another key", _REFUSED)
def _(stage: Stage) -> None:
    issued = stage.issue(bound_to=DpopKey.generate())
    stage.refuses(issued, scheme="DPoP", proof=stage.proof(DpopKey.generate(), issued))


def _bad_proof(name: str, **other: str) -> None:
    def run(stage: Stage) -> None:
        key = DpopKey.generate()
        issued = stage.issue(bound_to=key)
        stage.refuses(issued, scheme="DPoP", proof=stage.proof(key, issued, **other))

    CASES.append(Case(name=f"dpop: {name}", expected=_REFUSED, run=run))


_bad_proof("made for another URL", url="https://mail.example/api")
_bad_proof("made for another method", method="DELETE")
_bad_proof("made for another token", token="another")  # noqa: S106 - no secret


@_case("dpop: made too long ago", _REFUSED)
def _(stage: Stage) -> None:
    key = DpopKey.generate(now=lambda: system_clock() - timedelta(minutes=10))
    issued = stage.issue(bound_to=key)
    stage.refuses(issued, scheme="DPoP", proof=stage.proof(key, issued))


@_case("dpop: a bearer token under its scheme", _REFUSED)
def _(stage: Stage) -> None:
    key = DpopKey.generate()
    issued = stage.issue()
    stage.refuses(issued, scheme="DPoP", proof=stage.proof(key, issued))
