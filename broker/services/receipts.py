"""Receipts under the broker's key. What has ended has ended, whether or not there is a key to say so with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime

from broker.domain.clock import epoch
from broker.domain.errors import BrokerError
from broker.domain.receipt import Receipt
from broker.services.standing import StandingReader

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SignedReceipt:
    """`jws` is None where no key could sign: revoking needs none (INV-27), and a later look may find one."""

    receipt: Receipt
    jws: str | None


def signed_receipt(receipt: Receipt, standing: StandingReader, issuer: str, now: datetime) -> SignedReceipt:
    claims = {"iss": issuer, "iat": epoch(now), "sub": receipt.task_id, "receipt": receipt.as_json()}
    try:
        jws = standing.now().keys.attesting("ES256").sign(claims, typ="receipt+jwt")
    except BrokerError as problem:
        _log.error("a receipt was not signed", extra={"fields": {"detail": problem.detail}})
        return SignedReceipt(receipt=receipt, jws=None)
    return SignedReceipt(receipt=receipt, jws=jws)
