"""Idempotency keys: one key and one request make one thing, however often they are sent (INV-06)."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import Connection

from broker.domain.errors import IdempotencyConflict
from broker.domain.grant import IdempotencyClaim
from broker.domain.identity import Actor
from broker.store.standing import claim_key

REMEMBERED_FOR = timedelta(days=1)


def claimed(db: Connection, caller: Actor, claim: IdempotencyClaim, made_id: str, now: datetime) -> str:
    """The id this key stands for: `made_id` if the key is new, what was made under it otherwise."""
    stands_for, request_sha256 = claim_key(
        db,
        principal=caller.name,
        key_sha256=claim.key_sha256,
        request_sha256=claim.request_sha256,
        made_id=made_id,
        forget_at=now + REMEMBERED_FOR,
    )
    if request_sha256 != claim.request_sha256:
        raise IdempotencyConflict("this Idempotency-Key was used with another body: use a new key for a new request")
    return stands_for
