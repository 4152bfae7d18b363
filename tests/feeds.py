"""The feed as a verifier has it: its events, the chain over them, and which tokens they refuse."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field, replace

import jwt


def head_after(head: bytes, text: str) -> bytes:
    return hashlib.sha256(head + text.encode()).digest()


def written(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def decoded(head: str) -> bytes:
    return base64.urlsafe_b64decode(head + "==")


def told(house, after: int = 0) -> list[dict]:
    """Every event after that number, numbered now."""
    seen = house.broker.feed.look().seen
    found = []
    while after < seen.seq:
        for seq, text in house.broker.feed.replay(replace(seen.position, seq=after), seen.seq):
            assert seq == after + 1
            after = seq
            found.append(json.loads(text))
            assert found[-1]["seq"] == seq
    return found


def kinds(events: list[dict]) -> list[str]:
    return [event["kind"] for event in events]


def refuses(event: dict, claims: dict, kid: str) -> bool | None:
    """Whether a verifier refuses this token by this event; None where only a status list or the broker can tell."""
    kind = event["kind"]
    if kind == "grant":
        return claims["grant_id"] == event["grant_id"]
    if kind == "task":
        return claims["task_id"] == event["task_id"]
    if kind != "tokens":
        return None
    if not _concerns(event, claims, kid) or claims["iat"] > event["issued_before"]:
        return False
    return None if claims["iat"] > event.get("unsure_after", event["issued_before"]) else True


def _concerns(event: dict, claims: dict, kid: str) -> bool:
    if "all" in event:
        return event["all"] is True
    if "agent" in event:
        named, act = [claims["client_id"], claims["sub"]], claims.get("act")
        while act:
            named.append(act["sub"])
            act = act.get("act")
        return event["agent"] in named
    if "user" in event:
        return claims["sub"] == event["user"]
    if "resource" in event:
        return claims["aud"] == event["resource"]
    return kid == event["key"]


def read(token: str) -> tuple[dict, str]:
    """The claims of a token and who signed it, unverified."""
    claims = jwt.decode(token, options={"verify_signature": False})
    return claims, jwt.get_unverified_header(token)["kid"]


@dataclass
class Follower:
    """What one verifier has heard: every event in order, its place in the chain, and the newest statement that fits."""

    jwks: dict
    issuer: str
    feed: str | None = None
    seq: int = 0
    head: bytes = b""
    events: list[dict] = field(default_factory=list)
    resets: int = 0
    statement: dict | None = None
    statements: int = 0
    heads: dict[int, bytes] = field(default_factory=dict)

    def hear(self, name: str, data: str) -> None:
        if name == "reset":
            said = json.loads(data)
            self.feed, self.seq, self.head = said["feed"], said["seq"], decoded(said["head"])
            self.heads = {self.seq: self.head}
            self.resets += 1
        elif name == "revocation":
            event = json.loads(data)
            assert event["seq"] == self.seq + 1, (event, self.seq)
            self.seq, self.head = event["seq"], head_after(self.head, data)
            self.heads[self.seq] = self.head
            self.events.append(event)
        elif name == "statement":
            self.state(json.loads(data)["statement"])

    def state(self, token: str) -> dict:
        header = jwt.get_unverified_header(token)
        assert header["typ"] == "feed-statement+jwt"
        key = jwt.PyJWKSet.from_dict(self.jwks)[header["kid"]]
        options = {"verify_exp": False, "verify_iat": False, "require": ["iss", "iat", "exp"]}
        said = jwt.decode(token, key, algorithms=["ES256"], issuer=self.issuer, options=options)
        assert said["exp"] - said["iat"] == 12
        assert said["feed"] == self.feed
        assert written(self.heads[said["seq"]]) == said["head"]
        self.statement, self.statements = said, self.statements + 1
        return said

    @property
    def position(self) -> str:
        return f"{self.feed}:{self.seq}"


class Parser:
    """Server-sent events (WHATWG HTML, 9.2), as they come in pieces."""

    def __init__(self) -> None:
        self._rest = ""
        self.last_id: str | None = None

    def feed(self, piece: bytes) -> list[tuple[str, str]]:
        self._rest += piece.decode()
        *blocks, self._rest = self._rest.split("\n\n")
        found = []
        for block in blocks:
            name, data = "message", None
            for line in block.split("\n"):
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    assert data is None
                    data = line[6:]
                elif line.startswith("id: "):
                    self.last_id = line[4:]
            if data is not None:
                found.append((name, data))
        return found
