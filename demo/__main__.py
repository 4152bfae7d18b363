"""The main job, played before your eyes over real HTTP: a task opens, obtains, and dies with everything under it."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from datetime import UTC
from typing import Any

import jwt

from broker.sdk import Credential, Decision, Receipt, Task
from demo.expect import DemoFailed, answer, expect, refusal
from demo.sample_api import RESOURCE as CRM
from demo.screen import Screen
from demo.stage import Stage, Stopped, stage
from demo.wire import Exchange

MAIL = "https://mail.example/api"
RECEIPT_TYP = "receipt+jwt"

_WORKLOAD_CLAIMS = {
    "iss": "who attests it; here the development issuer",
    "sub": "what was attested",
    "aud": "for this broker and nobody else",
    "exp": "short-lived: there is no shared secret anywhere",
}
_CREDENTIAL_CLAIMS = {
    "iss": "this broker",
    "aud": "opens this one resource",
    "client_id": "in the hand of this one agent",
    "scope": "can do only this",
    "exp": "and only until then",
    "task_id": "dies with this task",
    "grant_id": "is in every log on both sides",
    "status": "where offline verifiers look",
}


def main() -> int:
    screen = Screen()
    played = False
    try:
        with contextlib.ExitStack() as end:
            with screen.waiting("starting a broker and a sample API, each a process of its own"):
                on = end.enter_context(stage())
            introduce(on, screen)
            task = play(on, screen)
            played = True
            if screen.stays:
                what_next(on, screen, task)
                while True:
                    on.require_running()
                    time.sleep(1)
    except DemoFailed as problem:
        screen.failure(problem)
        return 1
    except Stopped as stopped:
        screen.done("Both processes are ended and their directory is removed.")
        # Ctrl-C is how one leaves after the last step. Before it, the demo did not show what it promised.
        return 0 if played and stopped.number == signal.SIGINT else 128 + stopped.number
    screen.done("All seven steps went as they should. Both processes are ended and their directory is removed.")
    return 0


def introduce(on: Stage, screen: Screen) -> None:
    screen.opening(
        "One task, one credential, minutes.",
        "An agent gets a credential that can do only what its task needs, and that dies with it.",
        {
            "the broker": f"{on.broker.url}   process {on.broker.pid}, on SQLite",
            "the CRM": f"{on.crm.url}   process {on.crm.pid}, a sample API that takes the broker's credentials",
        },
    )


def play(on: Stage, screen: Screen) -> Task:
    task = an_orchestrator_opens_a_task(on, screen)
    credential = an_agent_gets_a_credential(on, screen, task)
    the_api_accepts_a_call(on, screen, credential)
    a_request_beyond_policy_is_refused(on, screen, task)
    the_task_ends_and_the_same_call_is_refused(on, screen, task, credential)
    the_receipt_and_the_trail(on, screen, task)
    return task


def an_orchestrator_opens_a_task(on: Stage, screen: Screen) -> Task:
    screen.step("An orchestrator opens a task", actor="crm-pipeline")
    screen.say("It says what the work is, who does it, and when it is over at the latest.")
    pipeline = on.client("crm-pipeline")
    task = answer(
        "an open task",
        lambda: pipeline.open_task(
            "summarise the leads of May", agents=["summarizer"], deadline_s=600, labels={"team": "crm"}
        ),
    )
    screen.exchange(
        on.wire.last,
        sent_by="the workload token of crm-pipeline",
        show=("id", "state", "orchestrator", "deadline_at"),
        bright=("id", "state"),
    )
    expect("an active task for the summarizer", task.state == "active" and task.agents == ("summarizer",), on.wire.last)
    screen.outcome("The task is open. Every credential for this work will hang from it.")
    return task


def an_agent_gets_a_credential(on: Stage, screen: Screen, task: Task) -> Credential:
    screen.step("An agent proves what it is, and gets a credential", actor="summarizer")
    screen.say("Its platform attests it with a signed token: Kubernetes, a CI job, SPIFFE, an OIDC provider.")
    proof = decoded(on.token("summarizer"))
    screen.claims("The workload token of the agent, decoded:", proof, _WORKLOAD_CLAIMS)
    summarizer = on.client("summarizer")
    grant, credential = answer(
        "a credential to read contacts", lambda: summarizer.request_grant(task.id, CRM, ["contacts:read"])
    )
    screen.exchange(
        on.wire.last,
        sent_by="the workload token of summarizer",
        show=("grant.id", "grant.ttl_s", "grant.decision.outcome", "grant.decision.policies", "credential.token"),
        bright=("grant.decision.outcome", "grant.decision.policies"),
    )
    claims = decoded(credential.reveal())
    entry = claims["status"]["status_list"]
    shown = claims | {"status": f"index {entry['idx']} in {entry['uri']}"}
    screen.claims("The credential, decoded:", shown, _CREDENTIAL_CLAIMS)
    expect(
        "a grant that is live, by the policy crm-read", grant.live and _policies(grant.decision) == ("crm-read",), grant
    )
    bound = (claims.get("aud"), claims.get("scope"), claims.get("task_id"))
    expect("a token for the CRM, to read, for this task", bound == (CRM, "contacts:read", task.id), bound)

    screen.aside("For the same task it gets another one, for another resource, to draft a mail:")
    answer("a credential to draft mails", lambda: summarizer.request_grant(task.id, MAIL, ["mail:draft"]))
    screen.exchange(
        on.wire.last, sent_by="the workload token of summarizer", show=("grant.id", "grant.scopes", "credential.token")
    )
    screen.outcome(f"Two credentials, for {grant.ttl_s} s at most, and each for one resource only.")
    return credential


def the_api_accepts_a_call(on: Stage, screen: Screen, credential: Credential) -> None:
    screen.step("The API accepts a call", actor="summarizer → the CRM")
    screen.say("It trusts nobody's word: it checks the signature, the status list, and asks the broker.")
    accepted = answer("contacts", lambda: call_the_crm(on, credential))
    screen.exchange(accepted, sent_by="the credential", show=("contacts", "checked"), bright=("checked.introspection",))
    expect("200 and contacts", accepted.status == 200 and bool(_member(accepted, "contacts")), accepted)
    screen.outcome("The call was answered.")


def a_request_beyond_policy_is_refused(on: Stage, screen: Screen, task: Task) -> None:
    screen.step("A request beyond policy is refused, and told why", actor="summarizer")
    screen.say("The agent tries more: to change contacts, with a credential that works for whoever finds it.")
    summarizer = on.client("summarizer")
    refused = refusal(
        "a refusal by policy", lambda: summarizer.request_grant(task.id, CRM, ["contacts:read", "contacts:write"])
    )
    screen.exchange(
        on.wire.last,
        sent_by="the workload token of summarizer",
        show=("title", "status", "code", "decision.outcome", "decision.policy_version", "decision.reasons"),
        bright=("decision.outcome", "decision.reasons"),
    )
    reasons = " ".join((refused.decision or {}).get("reasons", ()))
    expect("403 policy_denied", (refused.status, refused.code) == (403, "policy_denied"), on.wire.last)
    expect("a reason that names the policy crm-write-bound", "crm-write-bound" in reasons, on.wire.last)
    screen.outcome(
        "Denied. The answer names the policy, and what it would allow: a credential bound to the agent's key."
    )


def the_task_ends_and_the_same_call_is_refused(on: Stage, screen: Screen, task: Task, credential: Credential) -> None:
    screen.step("The orchestrator completes the task", actor="crm-pipeline")
    screen.say("The task, and all that was issued for it, ends in one transaction. The answer is a receipt.")
    pipeline = on.client("crm-pipeline")
    receipt = answer("a receipt", lambda: pipeline.complete_task(task.id, "the summary is written"))
    completed = on.wire.last
    # At once, before anything is drawn: the time between the two is a figure to show.
    refused = answer("a refusal by the CRM", lambda: call_the_crm(on, credential))
    between_ms = (refused.answered_at - completed.answered_at) * 1000
    screen.exchange(
        completed,
        sent_by="the workload token of crm-pipeline",
        show=("outcome", "ended_at", "totals"),
        bright=("outcome", "totals"),
    )
    expect(
        "a completed task that ended two grants", (receipt.outcome, receipt.totals.ended) == ("completed", 2), completed
    )
    screen.outcome("Both credentials lost their authority when this was answered.")

    screen.step("The same call is now refused", actor="summarizer → the CRM")
    until = credential.expires_at.astimezone(UTC).strftime("%H:%M:%SZ")
    screen.say(f"The same credential. By its own expiry it would have been good until {until}.")
    screen.exchange(
        refused,
        sent_by="the same credential",
        show=("error", "error_description", "checked"),
        bright=("error", "error_description", "checked.introspection"),
    )
    expect("401 invalid_token", (refused.status, _member(refused, "error")) == (401, "invalid_token"), refused)
    screen.outcome(f"Refused {between_ms:.0f} ms after the task was completed.")
    screen.say(
        "An API that asks nobody and only reads the signed status list learns of it within 15 s: "
        "that is what the receipt calls exposed."
    )


def the_receipt_and_the_trail(on: Stage, screen: Screen, task: Task) -> None:
    screen.step("The receipt, and what the auditor sees", actor="crm-pipeline, ada")
    pipeline, ada = on.client("crm-pipeline"), on.client("ada")
    receipt = answer("the receipt", lambda: pipeline.receipt(task.id))
    screen.say(f"GET {on.wire.last.path}: each credential, when its authority ended, until when it is exposed.")
    screen.receipt(receipt)
    expect("a receipt over two grants, both ended", len(receipt.grants) == receipt.totals.ended == 2, on.wire.last)
    expect("the same receipt under the broker's signature", signed_receipt(on, receipt) == _unsigned(receipt), receipt)
    screen.outcome("The same receipt is signed by the broker; the signature was checked with its public key.")

    events = list(answer("the audit trail", lambda: list(ada.audit(task=task.id))))[::-1]
    screen.aside("GET /v1/audit?task=…, as ada, the auditor: the whole story of this task.")
    screen.trail(events)
    told = [event.type for event in events]
    for kind, times in {"task.opened": 1, "grant.issued": 2, "grant.denied": 1, "grant.revoked": 2}.items():
        expect(f"{kind} {times} times in the trail", told.count(kind) == times, told)
    expect("that the trail ends what it began", told[0] == "task.opened" and "task.completed" in told, told)
    screen.outcome("Who asked, what was decided under which policy, and when it died: written with each change.")


def what_next(on: Stage, screen: Screen, task: Task) -> None:
    port = on.broker.url.rpartition(":")[2]
    call = f'curl -H "Authorization: Bearer $CREDENTIAL" {on.crm.url}/contacts'
    screen.next_steps(
        "What to try next, in another terminal, in this directory",
        {
            "First where the broker is, and a way to act as somebody:": f"""\
export BROKER_URL={on.broker.url}
as() {{ who=$1; shift; BROKER_TOKEN=$(.venv/bin/broker dev \\
  --directory {on.directory} --port {port} \\
  token "$who") .venv/bin/broker "$@"; }}""",
            "A task of your own, a credential for it, and a call with it:": f"""\
TASK=$(as crm-pipeline task open --purpose "call the leads of June" \\
  --agent summarizer --deadline 10m --id-only)
CREDENTIAL=$(as summarizer grant request --task "$TASK" --token-only \\
  --resource {CRM} --scope contacts:read)
{call}""",
            "An incident. First what would end, then the end of it; then the same call again:": f"""\
as ada revoke --agent summarizer --reason "prompt injection"
as ada revoke --agent summarizer --reason "prompt injection" --yes
{call}""",
            "The receipt of the task you saw: 15 s after its end, all of it is confirmed dead.": f"""\
as crm-pipeline task receipt {task.id}""",
        },
    )
    screen.staying("The broker and the CRM stay up until you press Ctrl-C.")


def call_the_crm(on: Stage, credential: Credential) -> Exchange:
    on.wire.get(f"{on.crm.url}/contacts", headers={"Authorization": f"Bearer {credential.reveal()}"})
    return on.wire.last


def decoded(token: str) -> dict[str, Any]:
    """What a token says, for showing it only: nothing is decided by claims that were not verified."""
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def signed_receipt(on: Stage, receipt: Receipt) -> object:
    """What the broker put its signature under."""
    keys = jwt.PyJWKSet.from_dict(on.wire.get(f"{on.broker.url}/oauth2/jwks").json())
    try:
        key = keys[jwt.get_unverified_header(receipt.jws or "")["kid"]]
        signed = jwt.decode_complete(receipt.jws or "", key, algorithms=["ES256"], issuer=on.broker.url)
    except (jwt.PyJWTError, KeyError) as problem:
        raise DemoFailed("a signed receipt", problem) from None
    expect(f"the type {RECEIPT_TYP}", signed["header"].get("typ") == RECEIPT_TYP, signed["header"])
    return signed["payload"].get("receipt")


def _unsigned(receipt: Receipt) -> dict[str, Any]:
    return {name: value for name, value in receipt.raw.items() if name != "jws"}


def _policies(decision: Decision | None) -> tuple[str, ...]:
    return () if decision is None else decision.policies


def _member(exchange: Exchange, name: str) -> Any:
    return exchange.came.get(name) if isinstance(exchange.came, dict) else None


if __name__ == "__main__":
    sys.exit(main())
