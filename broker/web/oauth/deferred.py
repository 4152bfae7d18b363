"""Deferred token responses (draft-ietf-oauth-deferred-token-response): a token that people have to allow first.

A client that sends `completion_mode=deferred` gets a deferral code instead of a refusal, and polls with it. The code
names the grant and opens nothing: whoever polls proves again to be its agent. All that the draft says is in this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta

from broker.domain.approval import Case
from broker.domain.clock import epoch
from broker.domain.errors import Invalid, NotFound
from broker.domain.grant import Issued
from broker.domain.identity import Caller
from broker.domain.lifecycle import GrantState
from broker.web.answers import Answer
from broker.web.auth import proven_key
from broker.web.context import broker
from broker.web.problems import OAuthError

DEFERRED = "urn:ietf:params:oauth:grant-type:deferred"
COMPLETION_MODE = "deferred"
INTERVAL = timedelta(seconds=5)


def opted_in(given: Mapping[str, str]) -> bool:
    """Whether this client can wait for a token."""
    mode = given.get("completion_mode")
    if mode not in (None, COMPLETION_MODE):
        raise Invalid(
            f"completion_mode is not one this broker knows: send {COMPLETION_MODE}, or leave it out",
            member="completion_mode",
        )
    return mode is not None


def pending(case: Case) -> Answer:
    """Not yet: how to ask again, and how long that makes sense."""
    approval = case.approval
    answer = {
        "error": "authorization_pending",
        "error_description": f"people have to approve this: {approval.id} waits for {_who(case)}",
        "deferral_code": approval.grant_id,
        "expires_in": max(0, epoch(case.grant.expires_at) - epoch(broker().clock())),
        "interval": int(INTERVAL.total_seconds()),
    }
    return Answer(json.dumps(answer), 400)


def _who(case: Case) -> str:
    return ", ".join(f"{need.quorum} of {need.group}" for need in case.approval.needs)


def poll(caller: Caller, given: Mapping[str, str]) -> Issued | Answer:
    """The token, when people have said yes; until then the same answer again."""
    code = given.get("deferral_code")
    if code is None:
        raise Invalid("deferral_code is missing", member="deferral_code")
    try:
        case = broker().approvals.of_grant(caller, code)
    except NotFound:
        raise OAuthError("invalid_grant", "deferral_code is not one that this client got") from None
    if case.grant.provider != "jwt":
        # Before it is used up: what is no token has no place in a token response.
        raise OAuthError("invalid_grant", f"a credential of {case.grant.resource} is no token: collect it under /v1")
    expired = case.grant.expires_at <= broker().clock()
    if case.grant.state is GrantState.PENDING and not expired:
        if not broker().approvals.polled(case.grant.id, every=INTERVAL):
            raise OAuthError("slow_down", f"poll every {int(INTERVAL.total_seconds())} s at most")
        return pending(case)
    if case.approval.collected_at is not None:
        raise OAuthError("invalid_grant", "the token of this deferral_code was collected already")
    if case.grant.state is GrantState.EXPIRED or (expired and case.is_to_be_waited_for):
        raise OAuthError("expired_token", "nobody decided, or collected it, in time: ask again")
    if not case.may_be_collected:
        why = case.grant.reason or f"it is {case.grant.state}"
        raise OAuthError("access_denied", f"this was not approved: {why}")
    broker().issuance.require_open(caller)
    return broker().collection.collect(caller, code, jkt=proven_key())
