"""The verbs, once: what each sends and how its answer is read. Both clients offer exactly these.

What is left out is not sent, so that the broker's own default counts.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from broker.sdk.dpop import DpopKey
from broker.sdk.errors import invalid, not_the_broker
from broker.sdk.exchange import Answer, Call, require_id, require_idempotency_key
from broker.sdk.secret import Secret
from broker.sdk.values import (
    Credential,
    Decision,
    Grant,
    Introspection,
    Lease,
    Members,
    Page,
    Task,
)

if TYPE_CHECKING:
    from broker.sdk.activities import Activity, Told
    from broker.sdk.oversight import (
        Approval,
        Drift,
        Event,
        Explanation,
        Lockdown,
        PolicyChange,
        PolicyVersion,
        Replay,
        Review,
        Revocation,
        Signal,
        TimelineLine,
    )
    from broker.sdk.receipts import Receipt

T = TypeVar("T")

AXES = ("task", "agent", "user", "orchestrator", "resource", "provider", "policy", "key", "all")


@dataclass(frozen=True, kw_only=True)
class Listing(Generic[T]):
    """A list that comes in pages; `after(cursor)` is the call for the next one."""

    first: Call[Page[T]]

    def after(self, cursor: str) -> Call[Page[T]]:
        return replace(self.first, query={**self.first.query, "cursor": cursor})


def open_task(
    purpose: str,
    agents: Iterable[str],
    deadline_s: int,
    heartbeat_s: int | None = None,
    resources: Mapping[str, Iterable[str]] | None = None,
    labels: Mapping[str, str] | None = None,
    *,
    on_behalf_of: str | None = None,
    parent_task_id: str | None = None,
    idempotency_key: str | None = None,
) -> Call[Task]:
    """Open a task. `resources` maps each resource to the scopes that may be asked for under it."""
    body = _given(
        purpose=purpose,
        agents=_listed(agents, "agents"),
        deadline_s=deadline_s,
        heartbeat_s=heartbeat_s,
        resources=None
        if resources is None
        else [{"resource": name, "scopes": _listed(scopes, "resources")} for name, scopes in resources.items()],
        labels=None if labels is None else dict(labels),
        on_behalf_of=on_behalf_of,
        parent_task_id=parent_task_id,
    )
    return Call(
        method="POST",
        path="/v1/tasks",
        body=body,
        secrets=_secrets(on_behalf_of),
        read=_reads(Task.of),
        **_once(idempotency_key),
    )


def task(task_id: str) -> Call[Task]:
    """One task as it is now."""
    return Call(method="GET", path=_task(task_id), read=_reads(Task.of), repeatable=True)


def tasks(
    *, state: str | None = None, agent: str | None = None, user: str | None = None, page_size: int | None = None
) -> Listing[Task]:
    """Tasks that the caller may see, newest first."""
    return _listing("/v1/tasks", Task.of, page_size, state=state, agent=agent, user=user)


def heartbeat(task_id: str) -> Call[Task]:
    """Keep a task alive."""
    return Call(method="POST", path=f"{_task(task_id)}/heartbeat", read=_reads(Task.of), repeatable=True)


def complete_task(task_id: str, reason: str | None = None) -> Call[Receipt]:
    """End a task as completed, and everything issued for it. Again gives the same receipt."""
    return _end(_task(task_id), "complete", reason)


def fail_task(task_id: str, reason: str | None = None) -> Call[Receipt]:
    """End a task as failed, and everything issued for it. Again gives the same receipt."""
    return _end(_task(task_id), "fail", reason)


def cancel_task(task_id: str, reason: str | None = None) -> Call[Receipt]:
    """End a task as cancelled, and everything issued for it. Again gives the same receipt."""
    return _end(_task(task_id), "cancel", reason)


def receipt(task_id: str) -> Call[Receipt]:
    """What of a task is dead and what is still exposed, as it stands now."""
    return Call(
        method="GET", path=f"{_task(task_id)}/receipt", read=_reads(_of("Receipt", within="receipts")), repeatable=True
    )


def timeline(
    task_id: str, *, source: str | None = None, grant: str | None = None, page_size: int | None = None
) -> Listing[TimelineLine]:
    """Issue, use and end of everything of a task, oldest first. `source`: "broker" or "report" alone."""
    return _listing(f"{_task(task_id)}/timeline", _of("TimelineLine"), page_size, source=source, grant=grant)


def drift(task_id: str) -> Call[Drift]:
    """What was granted and never used, and what was used outside of what was granted."""
    return Call(method="GET", path=f"{_task(task_id)}/drift", read=_reads(_of("Drift")), repeatable=True)


def tell(activities: Iterable[Activity]) -> Call[Told]:
    """Tell what was done with grants, at most 100 at once; for their agents, and for verifiers of their resources.

    `report` of a client does it in the background.
    """
    body = {"activities": [activity.as_body() for activity in activities]}
    # Told again, each is the same activity.
    return Call(
        method="POST", path="/v1/activities", body=body, read=_reads(_of("Told", within="activities")), repeatable=True
    )


def request_grant(
    task_id: str | None,
    resource: str,
    scopes: Iterable[str],
    ttl_s: int | None = None,
    intent: str | None = None,
    context: Mapping[str, Any] | None = None,
    dpop: DpopKey | None = None,
    *,
    parameters: Mapping[str, str] | None = None,
    on_behalf_of: str | None = None,
    parent_grant_id: str | None = None,
    hand_to: Iterable[str] | None = None,
    break_glass: str | None = None,
    idempotency_key: str | None = None,
) -> Call[tuple[Grant, Credential]]:
    """Ask for a credential. Raises Refused with the decision, or ApprovalPending where people are asked first.

    `task_id` may be None for a principal that is allowed implicit tasks. With `dpop` it is bound to that key.
    `parameters` are for the system that makes a secret: a certificate's `csr`, an SSH key's `public_key`.
    `break_glass` says what the emergency is, where a policy declared one: two people decide, everybody is told.
    """
    body = _given(
        task_id=task_id,
        resource=resource,
        scopes=_listed(scopes, "scopes"),
        ttl_s=ttl_s,
        intent=intent,
        context=None if context is None else dict(context),
        parameters=None if parameters is None else dict(parameters),
        on_behalf_of=on_behalf_of,
        parent_grant_id=parent_grant_id,
        hand_to=None if hand_to is None else _listed(hand_to, "hand_to") or None,
        break_glass=None if break_glass is None else {"reason": break_glass},
    )
    return Call(
        method="POST",
        path="/v1/grants",
        body=body,
        secrets=_secrets(on_behalf_of),
        dpop=dpop,
        read=_issued(dpop),
        **_once(idempotency_key),
    )


def collect_grant(
    grant_id: str, dpop: DpopKey | None = None, *, parameters: Mapping[str, str] | None = None
) -> Call[tuple[Grant, Credential]]:
    """The credential of a grant that people have approved. Handed out once, so a lost answer is not asked again.

    `parameters` are those of the request, where it had some: the broker kept their hash alone.
    """
    body = None if parameters is None else {"parameters": dict(parameters)}
    return Call(method="POST", path=f"{_grant(grant_id)}/credential", body=body, dpop=dpop, read=_issued(dpop))


def grant(grant_id: str, wait_s: int | None = None) -> Call[Grant]:
    """One grant as it is now, never its credential. With `wait_s`, of one that waits for people, when they decided.

    The broker waits 20 s at most, and not at all where too many wait already.
    """
    return Call(method="GET", path=_grant(grant_id), wait_s=wait_s, read=_reads(Grant.of), repeatable=True)


def approval(approval_id: str) -> Call[Approval]:
    """One approval as it is now: for its approvers, and for whoever asked."""
    return Call(method="GET", path=_approval(approval_id), read=_reads(_of("Approval")), repeatable=True)


def approvals(
    *,
    state: str | None = None,
    task: str | None = None,
    agent: str | None = None,
    resource: str | None = None,
    page_size: int | None = None,
) -> Listing[Approval]:
    """Approvals that the caller may see, newest first."""
    return _listing("/v1/approvals", _of("Approval"), page_size, state=state, task=task, agent=agent, resource=resource)


def approve(
    approval_id: str, scopes: Iterable[str] | None = None, ttl_s: int | None = None, reason: str | None = None
) -> Call[Approval]:
    """Say yes, to all of it or to less: `scopes` and `ttl_s` are what is left, and never more than was asked for."""
    left = None if scopes is None else _listed(scopes, "scopes")
    return _said(approval_id, "approve", _given(scopes=left, ttl_s=ttl_s, reason=reason))


def deny(approval_id: str, reason: str | None = None) -> Call[Approval]:
    """Say no, which ends it."""
    return _said(approval_id, "deny", _given(reason=reason))


def withdraw(approval_id: str, reason: str | None = None) -> Call[Approval]:
    """Take one's own request back."""
    return _said(approval_id, "withdraw", _given(reason=reason))


def review(review_id: str) -> Call[Review]:
    """One review as it is now; for admins, auditors, and the approvers of the group that was asked."""
    return Call(method="GET", path=_review(review_id), read=_reads(_of("Review")), repeatable=True)


def reviews(*, state: str | None = None, agent: str | None = None, page_size: int | None = None) -> Listing[Review]:
    """Reviews that the caller may see, newest first."""
    return _listing("/v1/reviews", _of("Review"), page_size, state=state, agent=agent)


def complete_review(review_id: str, note: str) -> Call[Review]:
    """Say what was found, which ends it. Said again, the same is the same."""
    path = f"{_review(review_id)}/complete"
    return Call(method="POST", path=path, body={"note": note}, read=_reads(_of("Review")), repeatable=True)


def explain_grant(grant_id: str) -> Call[Explanation]:
    """Why a grant was decided as it was: policies, ceilings, facts, and for a no what would be allowed."""
    return Call(method="GET", path=f"{_grant(grant_id)}/decision", read=_reads(_of("Explanation")), repeatable=True)


def grants(
    *,
    state: str | None = None,
    task: str | None = None,
    agent: str | None = None,
    user: str | None = None,
    resource: str | None = None,
    break_glass: bool | None = None,
    page_size: int | None = None,
) -> Listing[Grant]:
    """Grants that the caller may see, newest first. `break_glass` is only those asked for as one, or none of them."""
    only = None if break_glass is None else "true" if break_glass else "false"
    filters = {"state": state, "task": task, "agent": agent, "user": user, "resource": resource, "break_glass": only}
    return _listing("/v1/grants", Grant.of, page_size, **filters)


def renew_grant(grant_id: str, ttl_s: int | None = None, dpop: DpopKey | None = None) -> Call[tuple[Grant, Credential]]:
    """A new credential for the same grant, decided again. A bound grant needs the key it is bound to."""
    # Repeating it makes no second grant, only a second token of this one, which ends with it.
    return Call(
        method="POST",
        path=f"{_grant(grant_id)}/renew",
        body=_given(ttl_s=ttl_s),
        dpop=dpop,
        read=_issued(dpop),
        repeatable=True,
    )


def revoke_grant(grant_id: str, reason: str | None = None) -> Call[Receipt]:
    """End one grant, and every grant delegated from it."""
    return _end(_grant(grant_id), "revoke", reason)


def lease(lease_id: str) -> Call[Lease]:
    """One lease as it is now; for admins and auditors."""
    return Call(method="GET", path=_lease(lease_id), read=_reads(Lease.of), repeatable=True)


def leases(
    *, state: str | None = None, provider: str | None = None, grant: str | None = None, page_size: int | None = None
) -> Listing[Lease]:
    """What is held and owed outside, newest first; for admins and auditors."""
    return _listing("/v1/leases", Lease.of, page_size, state=state, provider=provider, grant=grant)


def abandon_lease(lease_id: str, reason: str) -> Call[Lease]:
    """Say that a stuck lease is given up. It stays open: nobody confirmed that its secret is dead."""
    body = {"reason": reason}
    return Call(method="POST", path=f"{_lease(lease_id)}/abandon", body=body, read=_reads(Lease.of), repeatable=True)


def revoke(axis: str, value: str, reason: str, dry_run: bool = True, lockdown: bool = False) -> Call[Revocation]:
    """Revoke along one axis. By default a dry run, which shows the blast radius and ends nothing."""
    # Sent even where it is the default: what ends everything must not hang on somebody else's default.
    body = {**_selector(axis, value), "reason": reason, "dry_run": dry_run, "lockdown": lockdown}
    return Call(method="POST", path="/v1/revocations", body=body, read=_reads(_of("Revocation")), repeatable=True)


def lockdowns(*, lifted: bool = False) -> Listing[Lockdown]:
    """Lockdowns that stand; with `lifted`, those that stood as well."""
    return _listing("/v1/lockdowns", _of("Lockdown"), None, lifted="true" if lifted else None)


def set_lockdown(axis: str, value: str, reason: str, *, idempotency_key: str | None = None) -> Call[Lockdown]:
    """Refuse what comes next along one axis, and revoke what is out."""
    body = {**_selector(axis, value), "reason": reason}
    return Call(method="POST", path="/v1/lockdowns", body=body, read=_reads(_of("Lockdown")), **_once(idempotency_key))


def lift_lockdown(lockdown_id: str) -> Call[Lockdown]:
    """Lift a lockdown. What it revoked stays revoked."""
    # Not repeated: after a lost answer the second try would say that there is no such lockdown.
    path = f"/v1/lockdowns/{require_id(lockdown_id, 'lockdown_id')}"
    return Call(method="DELETE", path=path, read=_reads(_of("Lockdown")))


def send_signal(
    axis: str,
    value: str,
    level: str,
    reason: str,
    source: str,
    expires_s: int | None = None,
    *,
    idempotency_key: str | None = None,
) -> Call[Signal]:
    """Say that an agent or a user (`axis`) is at risk for so long. Policies see it; live grants are decided again."""
    if axis not in ("agent", "user"):
        raise invalid(f"{axis!r} is nobody who can be at risk: name agent or user", member="axis")
    body = _given(**{axis: value}, level=level, reason=reason, source=source, expires_s=expires_s)
    return Call(method="POST", path="/v1/signals", body=body, read=_reads(_of("Signal")), **_once(idempotency_key))


def signals(*, over: bool = False, page_size: int | None = None) -> Listing[Signal]:
    """Signals of risk, newest first; with `over`, those that are over as well."""
    return _listing("/v1/signals", _of("Signal"), page_size, over="true" if over else None)


def audit(
    *,
    type: str | None = None,
    actor: str | None = None,
    task: str | None = None,
    grant: str | None = None,
    agent: str | None = None,
    user: str | None = None,
    resource: str | None = None,
    outcome: str | None = None,
    trace_id: str | None = None,
    page_size: int | None = None,
) -> Listing[Event]:
    """Audit events, newest first."""
    return _listing(
        "/v1/audit",
        _of("Event"),
        page_size,
        type=type,
        actor=actor,
        task=task,
        grant=grant,
        agent=agent,
        user=user,
        resource=resource,
        outcome=outcome,
        trace_id=trace_id,
    )


def policies() -> Listing[PolicyVersion]:
    """Configuration versions, newest first."""
    return _listing("/v1/policies", _of("PolicyVersion"), None)


def evaluate_policy(
    agent: str,
    resource: str,
    scopes: Iterable[str],
    ttl_s: int | None = None,
    purpose: str | None = None,
    labels: Mapping[str, str] | None = None,
    intent: str | None = None,
    sender_bound: bool | None = None,
    context: Mapping[str, Any] | None = None,
    break_glass: bool | None = None,
) -> Call[Decision]:
    """What policy would say to such a request; nothing is issued."""
    body = _given(
        agent=agent,
        resource=resource,
        scopes=_listed(scopes, "scopes"),
        ttl_s=ttl_s,
        purpose=purpose,
        labels=None if labels is None else dict(labels),
        intent=intent,
        sender_bound=sender_bound,
        context=None if context is None else dict(context),
        break_glass=break_glass,
    )
    return Call(method="POST", path="/v1/policies/evaluate", body=body, read=_reads(Decision.of), repeatable=True)


def replay_policies(
    policies: Mapping[str, str], schema: str | None = None, period_s: int | None = None, limit: int | None = None
) -> Call[Replay]:
    """What a draft, file names to Cedar text, would have said to recorded requests; nothing is done."""
    body = _given(policies=dict(policies), schema=schema, period_s=period_s, limit=limit)
    return Call(method="POST", path="/v1/policies/replay", body=body, read=_reads(_of("Replay")), repeatable=True)


def replace_policies(
    policies: Mapping[str, str], schema: str | None = None, dry_run: bool = True
) -> Call[PolicyChange]:
    """Put these policies in force. By default a dry run, which shows what of the live grants would end."""
    return Call(
        method="PUT",
        path="/v1/policies",
        body=_given(policies=dict(policies), schema=schema),
        # Sent even where it is the default: what may end grants must not hang on somebody else's default.
        query={"dry_run": "true" if dry_run else "false"},
        read=_reads(_of("PolicyChange")),
        repeatable=True,
    )


def introspect(token: str) -> Call[Introspection]:
    """What the broker says of a token now (RFC 7662); for verifiers of its audience."""
    return Call(
        method="POST",
        path="/oauth2/introspect",
        form={"token": token},
        secrets=_secrets(token),
        asserted=True,
        read=_reads(Introspection.of),
        repeatable=True,
    )


def token(
    resource: str, scope: str | Iterable[str], task_id: str | None = None, dpop: DpopKey | None = None
) -> Call[Credential]:
    """A token from `/oauth2/token` by client credentials. Never repeated: a second grant could come of it."""
    scopes = scope if isinstance(scope, str) else " ".join(scope)
    form = _given(grant_type="client_credentials", resource=resource, scope=scopes, task_id=task_id)

    def read(answer: Answer) -> Credential:
        members = Members("token response", answer.json())
        issued = Credential(
            type="jwt",
            token=Secret(members.text("access_token")),
            token_type=members.text("token_type"),
            expires_at=answer.at() + timedelta(seconds=members.integer("expires_in")),
            life_s=members.integer("expires_in"),
        )
        return _bound(issued, dpop)

    return Call(method="POST", path="/oauth2/token", form=form, asserted=True, dpop=dpop, read=read)


def _end(path: str, verb: str, reason: str | None) -> Call[Receipt]:
    body = _given(reason=reason)
    return Call(
        method="POST", path=f"{path}/{verb}", body=body, read=_reads(_of("Receipt", within="receipts")), repeatable=True
    )


def _said(approval_id: str, verb: str, body: dict[str, Any]) -> Call[Approval]:
    # Said again, the same is the same vote.
    path = f"{_approval(approval_id)}/{verb}"
    return Call(method="POST", path=path, body=body, read=_reads(_of("Approval")), repeatable=True)


def _approval(approval_id: str) -> str:
    return f"/v1/approvals/{require_id(approval_id, 'approval_id')}"


def _review(review_id: str) -> str:
    return f"/v1/reviews/{require_id(review_id, 'review_id')}"


def _task(task_id: str) -> str:
    return f"/v1/tasks/{require_id(task_id, 'task_id')}"


def _grant(grant_id: str) -> str:
    return f"/v1/grants/{require_id(grant_id, 'grant_id')}"


def _lease(lease_id: str) -> str:
    return f"/v1/leases/{require_id(lease_id, 'lease_id')}"


def _given(**members: Any) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _secrets(*tokens: str | None) -> tuple[Secret, ...]:
    return tuple(Secret(token) for token in tokens if token)


def _listed(names: Iterable[str], member: str) -> list[str]:
    # A string is an iterable of strings, and "read" would become four scopes.
    if isinstance(names, str):
        raise invalid(f"{member} is one string: give a list of them", member=member)
    return list(names)


def _once(idempotency_key: str | None) -> dict[str, Any]:
    key = new_idempotency_key() if idempotency_key is None else require_idempotency_key(idempotency_key)
    return {"idempotency_key": key, "repeatable": True}


def new_idempotency_key() -> str:
    return secrets.token_urlsafe(24)


def _selector(axis: str, value: str) -> dict[str, str]:
    if axis not in AXES:
        raise invalid(f"{axis!r} is not an axis: name one of {', '.join(AXES)}", member="axis")
    return {axis: value}


def _listing(path: str, of: Callable[[object], T], page_size: int | None, **filters: str | None) -> Listing[T]:
    query = _given(**filters, limit=None if page_size is None else str(page_size))

    def read(answer: Answer) -> Page[T]:
        members = Members("list", answer.json())
        items: Sequence[Any] = members.items("items")
        return Page(items=tuple(of(item) for item in items), next_cursor=members.maybe_text("next_cursor"))

    return Listing(first=Call(method="GET", path=path, query=query, read=read, repeatable=True))


def _of(name: str, *, within: str = "oversight") -> Callable[[object], Any]:
    """How a value of another module of the SDK is read, which is loaded with the first of them."""

    def of(value: object) -> Any:
        return getattr(importlib.import_module(f"broker.sdk.{within}"), name).of(value)

    return of


_of_receipt = _of("Receipt", within="receipts")


def _reads(of: Callable[[object], T]) -> Callable[[Answer], T]:
    return lambda answer: of(answer.json())


def _issued(dpop: DpopKey | None) -> Callable[[Answer], tuple[Grant, Credential]]:
    def read(answer: Answer) -> tuple[Grant, Credential]:
        members = Members("issued grant", answer.json())
        issued = Credential.of(members.raw.get("credential"), answered_at=answer.at())
        return Grant.of(members.raw.get("grant")), _bound(issued, dpop)

    return read


def _bound(issued: Credential, dpop: DpopKey | None) -> Credential:
    # INV-21: who asked for a bound token must not go on with one that anybody could use.
    if dpop is not None and issued.token is not None and (issued.token_type or "").lower() != "dpop":
        raise not_the_broker("a token bound to a key was asked for, and one came that is not bound")
    return issued
