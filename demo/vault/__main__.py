"""The main job with a secret that another system makes: a database login that dies with its task, open session and all.

Real processes on loopback: OpenBao, PostgreSQL and a broker, which is killed in the middle of its work at the end.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection

import psycopg
from psycopg import sql

from broker.sdk import Client, Grant, Receipt, Task
from demo.expect import DemoFailed, answer, expect, refusal
from demo.screen import Screen
from demo.stage import Stopped
from demo.vault.stage import (
    AGENTS_USERS,
    CONFIGURATION,
    ORDERS,
    POLICY,
    ROLE,
    VaultStage,
    cut_off,
    login,
    query,
    stage,
)

_REQUESTS, _ANSWERS = 20, 5
_GONE_WITHIN_S = 60.0
# In a user's name the _ of an id is a -.
_GRANT_ID = re.compile(r"grt-[0-9a-z]{26}")
_STATES = {
    ("active", "held"): "handed out, or about to be",
    ("approved", "intended"): "cut off: a login may exist that nobody heard of",
}


def main() -> int:
    screen = Screen()
    played = False
    try:
        with contextlib.ExitStack() as end:
            with screen.waiting("starting OpenBao and PostgreSQL, each a process of its own"):
                on = end.enter_context(stage())
            introduce(on, screen)
            play(on, screen)
            played = True
            if screen.stays:
                what_next(on, screen)
                while True:
                    on.require_running()
                    time.sleep(1)
    except DemoFailed as problem:
        screen.failure(problem)
        return 1
    except Stopped as stopped:
        screen.done("All three processes are ended and their directory is removed.")
        return 0 if played and stopped.number == signal.SIGINT else 128 + stopped.number
    screen.done("All nine steps went as they should. All three processes are ended and their directory is removed.")
    return 0


def introduce(on: VaultStage, screen: Screen) -> None:
    screen.opening(
        "One task, one database login, minutes.",
        "An agent gets a login that OpenBao makes for it, and that dies with its task: no new session, no open one.",
        {
            "OpenBao": f"{on.bao.url}   process {on.bao.process.pid}, initialised, unsealed, and empty",
            "PostgreSQL": f"127.0.0.1:{on.postgres.port}   process {on.postgres.process.pid}, a table of orders",
        },
    )


def play(on: VaultStage, screen: Screen) -> None:
    an_administrator_sets_vault_up(on, screen)
    the_set_up_is_proven(on, screen)
    task, grant, opened = an_agent_gets_a_database_login(on, screen)
    with contextlib.closing(it_works(screen, opened)) as session:
        a_request_beyond_policy_is_refused(on, screen, task)
        what_is_alive(on, screen, grant, opened)
        receipt = the_task_ends_and_the_login_with_it(on, screen, task, opened, session)
    the_receipt_and_the_trail(on, screen, task, receipt)
    the_broker_is_killed_in_the_middle(on, screen)


class Opened:
    """The login that the agent was given, and how it uses it."""

    def __init__(self, on: VaultStage, username: str, password: str) -> None:
        self.username = username
        self._connect: Callable[[], psycopg.Connection] = lambda: on.postgres.connect(username, password)
        self.log_in = lambda: login(on.postgres, username, password)

    def session(self) -> psycopg.Connection:
        try:
            return self._connect()
        except psycopg.Error as problem:
            raise DemoFailed("a login that works", problem) from None


def an_administrator_sets_vault_up(on: VaultStage, screen: Screen) -> None:
    screen.step("An administrator sets up OpenBao and the database", actor="the administrator")
    screen.say("Once. The broker's configuration says what is to be handed out, and a policy who may have it.")
    screen.lines("broker.toml:", CONFIGURATION.format(address=on.bao.url))
    screen.lines("policies/orders.cedar:", POLICY)
    setup = ("broker", "vault", "setup", "--config", "broker.toml", "--database-url", on.database_url)
    typed = "broker vault setup --config broker.toml \\\n    --database-url " + on.database_url
    prepared = on.run(*setup, "--sql")
    screen.command(f"{typed} \\\n    --sql | psql orders", prepared)
    password = secrets.token_urlsafe(24)
    with on.postgres.superuser() as db:
        db.execute(prepared)
        db.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO jit_orders_ro")
        # What \password does: the server sees only what it keeps of it.
        kept = db.pgconn.encrypt_password(password.encode(), b"vault_admin", b"scram-sha-256").decode()
        db.execute(sql.SQL("ALTER ROLE vault_admin PASSWORD {}").format(sql.Literal(kept)))
    screen.aside("Vault's own user is no superuser. Privileges belong to a group; it may read, and nothing else.")
    administrator = {"VAULT_TOKEN": on.bao.root_token, "DATABASE_PASSWORD": password}
    screen.command(f"{typed} \\\n    --apply", on.run(*setup, "--apply", secrets=administrator))
    rotated = on.run("bao", "write", "-force", f"database/rotate-root/{ROLE}", secrets=administrator)
    screen.command(f"bao write -force database/rotate-root/{ROLE}", rotated)
    screen.outcome("Done, and from now on only OpenBao knows the password of its user.")


def the_set_up_is_proven(on: VaultStage, screen: Screen) -> None:
    screen.step("The set-up is proven, with the broker's own token", actor="the operator")
    screen.say("It must be able to do its work, and must not be able to read a secret, or to give itself more.")
    said = on.run("broker", "vault", "check", "--config", "broker.toml")
    screen.command("broker vault check --config broker.toml", said, at_most=16, columns=2)
    findings = said.splitlines()[1:]
    good = bool(findings) and all(line.startswith("ok\t") for line in findings)
    expect("that all of it is as it must be", good, said)
    with screen.waiting("starting the broker, on SQLite"):
        on.start_broker()
    screen.outcome(
        f"All {len(findings)} are as they must be. The broker is started: process {on.broker.pid}, on SQLite."
    )


def an_agent_gets_a_database_login(on: VaultStage, screen: Screen) -> tuple[Task, Grant, Opened]:
    screen.step("A task opens, and an agent gets a database login", actor="crm-pipeline, summarizer")
    pipeline, summarizer = on.client("crm-pipeline"), on.client("summarizer")
    task = answer(
        "an open task",
        lambda: pipeline.open_task("summarise the orders of May", agents=["summarizer"], deadline_s=600),
    )
    screen.exchange(
        on.wire.last,
        sent_by="the workload token of crm-pipeline",
        show=("id", "state", "deadline_at"),
        bright=("id", "state"),
    )
    grant, credential = answer(
        "a database login", lambda: summarizer.request_grant(task.id, ORDERS, ["select"], ttl_s=300)
    )
    screen.exchange(
        on.wire.last,
        sent_by="the workload token of summarizer",
        show=(
            "grant.id",
            "grant.revocation_class",
            "grant.ttl_s",
            "grant.decision.outcome",
            "grant.decision.policies",
            "grant.lease.state",
            "credential",
        ),
        bright=("grant.id", "grant.decision.outcome", "credential.data.username"),
    )
    data = answer("user name and password", credential.reveal_data)
    lease = "none" if grant.lease is None else grant.lease.state
    expect("a live grant with a lease that is held", (grant.live, lease) == (True, "held"), on.wire.last)
    expect("a user name with the grant's id in it", _grant_of(data["username"]) == grant.id, data["username"])
    screen.say(
        "Before OpenBao was asked for it, the broker had committed what revokes it. "
        "The password is in this answer and nowhere else: not in the broker's database, not in a log."
    )
    screen.outcome("A user of the database that did not exist a moment ago, and that carries its grant in its name.")
    return task, grant, Opened(on, data["username"], data["password"])


def it_works(screen: Screen, opened: Opened) -> psycopg.Connection:
    """The session stays open."""
    screen.step("The agent queries the database", actor="summarizer → PostgreSQL")
    session = opened.session()
    read = query(session, "SELECT id, customer, item, paid FROM orders")
    screen.query(read, sent_by=opened.username)
    expect("the orders", read.error is None and len(read.rows) == 3, read)
    written = query(session, "UPDATE orders SET paid = true")
    screen.query(written, sent_by=opened.username)
    expect("that it may read only", written.error is not None and "permission denied" in written.error, written)
    screen.outcome("It may read, and nothing else. Its session stays open.")
    return session


def a_request_beyond_policy_is_refused(on: VaultStage, screen: Screen, task: Task) -> None:
    screen.step("A request beyond policy is refused, and told why", actor="summarizer")
    screen.say("The agent wants a login for longer than the policy allows.")
    summarizer = on.client("summarizer")
    refused = refusal("a refusal by policy", lambda: summarizer.request_grant(task.id, ORDERS, ["select"], ttl_s=600))
    screen.exchange(
        on.wire.last,
        sent_by="the workload token of summarizer",
        show=("title", "status", "code", "decision.outcome", "decision.reasons"),
        bright=("decision.outcome", "decision.reasons"),
    )
    reasons = " ".join((refused.decision or {}).get("reasons", ()))
    expect("403 policy_denied", (refused.status, refused.code) == (403, "policy_denied"), on.wire.last)
    expect("a reason that names the policy orders-read", "orders-read" in reasons, on.wire.last)
    screen.outcome("Denied before OpenBao was asked for anything. The answer says what to change.")


def what_is_alive(on: VaultStage, screen: Screen, grant: Grant, opened: Opened) -> None:
    screen.step("What OpenBao and PostgreSQL say is alive", actor="their administrators")
    listed, leases = on.leases()
    screen.exchange(listed, sent_by="the administrator of OpenBao", show=("data",), bright=("data.keys",))
    expect("one lease", len(leases) == 1, listed)
    roles = on.as_superuser(
        "SELECT rolname, rolvaliduntil::timestamptz(0) AS until, "
        "(SELECT count(*) FROM pg_stat_activity WHERE usename = rolname) AS sessions "
        "FROM pg_roles WHERE rolname LIKE 'jit-%'"
    )
    screen.query(roles, sent_by="the superuser")
    expect("one user, with one session", [row[0::2] for row in roles.rows] == [(opened.username, "1")], roles)
    expect("the grant's id in its name", _grant_of(roles.rows[0][0]) == grant.id, roles)
    screen.outcome("One lease, one user, one session: those of this grant.")


def the_task_ends_and_the_login_with_it(
    on: VaultStage, screen: Screen, task: Task, opened: Opened, session: psycopg.Connection
) -> Receipt:
    screen.step("The task ends, and the login with it", actor="crm-pipeline")
    pipeline = on.client("crm-pipeline")
    receipt = answer("a receipt", lambda: pipeline.complete_task(task.id, "the summary is written"))
    receipt = _once_dead(pipeline, task, receipt, {line.grant_id for line in receipt.grants})
    completed = on.wire.last
    # At once, before anything is drawn: the time between the two is a figure to show.
    again = query(session, "SELECT id, customer, item, paid FROM orders")
    anew = opened.log_in()
    between_ms = (anew.answered_at - completed.answered_at) * 1000
    screen.exchange(
        completed,
        sent_by="the workload token of crm-pipeline",
        show=("outcome", "ended_at", "totals"),
        bright=("totals",),
    )
    totals = (receipt.totals.ended, receipt.totals.confirmed_dead, receipt.totals.outstanding)
    expect("one grant ended, and its login confirmed dead", totals == (1, 1, 0), completed)
    screen.aside("The session that was open:")
    screen.query(again, sent_by=opened.username)
    expect("that the open session is cut", again.error is not None and session.closed, again)
    screen.aside("The same user name and password once more:")
    screen.query(anew, sent_by=opened.username)
    expect("that the login is refused", "authentication failed" in (anew.error or ""), anew)
    screen.aside("And what is alive:")
    listed, leases = on.leases()
    screen.exchange(listed, sent_by="the administrator of OpenBao", show=(), good=True, note="there is none")
    expect("no lease", leases == [], leases)
    roles = on.as_superuser(AGENTS_USERS)
    screen.query(roles, sent_by="the superuser")
    expect("no user", roles.error is None and roles.rows == (), roles)
    screen.outcome(
        f"The session cut, the login refused, no lease, no user: all of it shown {between_ms:.0f} ms after the receipt."
    )
    return receipt


def the_receipt_and_the_trail(on: VaultStage, screen: Screen, task: Task, receipt: Receipt) -> None:
    screen.step("The receipt says when it died, and the trail how it lived", actor="crm-pipeline, ada")
    screen.receipt(receipt)
    (line,) = receipt.grants
    expect("when the login was confirmed dead", line.confirmed_dead_at is not None, receipt.raw)
    expect("nothing that is still exposed", line.exposed_until is None, receipt.raw)
    screen.say("Confirmed dead: OpenBao was asked to end it at once, and afterwards whether it still knows of it.")
    ada = on.client("ada")
    told_of = {"task": task.id}, {"grant": line.grant_id}
    found = answer("the audit trail", lambda: [event for about in told_of for event in ada.audit(**about)])
    events = sorted({event.id: event for event in found}.values(), key=lambda event: (event.at, event.id))
    screen.aside("GET /v1/audit?task=… and ?grant=…, as ada, the auditor:")
    screen.trail(events)
    told = [event.type for event in events]
    for kind in ("grant.approved", "lease.held", "grant.issued", "grant.denied", "grant.revoked", "lease.released"):
        expect(f"{kind} in the trail", kind in told, told)
    screen.outcome("What was intended is written before it is made, and what is owed until it is paid.")


def the_broker_is_killed_in_the_middle(on: VaultStage, screen: Screen) -> None:
    screen.step(f"kill -9, in the middle of {_REQUESTS} requests", actor="a power cut")
    pipeline, ada = on.client("crm-pipeline"), on.client("ada")
    task = answer(
        "an open task",
        lambda: pipeline.open_task("reconcile the orders of May", agents=["summarizer"], deadline_s=600),
    )
    screen.say(f"{_REQUESTS} requests for a login at once; after {_ANSWERS} answers the broker's processes are killed.")
    killed = on.broker.pid
    with screen.waiting(f"{_REQUESTS} requests"):
        cut = cut_off(on, task.id, requests=_REQUESTS, after=_ANSWERS)
    users, (_, leases) = on.users(), on.leases()
    screen.counts(
        ("who says it", "what", "how many"),
        (
            ("the callers", "logins that were delivered", str(len(cut.delivered))),
            ("the callers", "requests that were cut off: there may be a login or not", str(cut.cut)),
            ("OpenBao", "leases that are alive", str(len(leases))),
            ("PostgreSQL", "users that may log in", str(len(users))),
        ),
        bright=("how many",),
    )
    with screen.waiting("starting the broker again"):
        on.start_broker()
    screen.aside(f"Process {killed} is gone. Process {on.broker.pid} finds these rows, committed before the cut:")
    rows = list(answer("the grants of the task", lambda: list(ada.grants(task=task.id))))
    states = Counter((row.state, "none" if row.lease is None else row.lease.state) for row in rows)
    meanings = [(*state, str(times), _STATES.get(state, "")) for state, times in sorted(states.items())]
    if len(rows) < _REQUESTS:
        meanings.append(("–", "–", str(_REQUESTS - len(rows)), "had not begun: nothing was asked for"))
    screen.counts(("grant", "lease", "requests", "what it means"), meanings, bright=("requests",))
    known = {row.id for row in rows}
    delivered = {given["grant"]["id"] for given in cut.delivered}
    held = {row.id for row in rows if row.lease is not None and row.lease.state == "held"}
    expect("a row with a held lease for each login that was delivered", delivered <= held, states)
    strangers = [name for name in {*users, *on.users()} if _grant_of(name) not in known]
    expect("a row for each user of the database", strangers == [], strangers)
    expect("no more leases than rows", len(on.leases()[1]) <= len(rows), states)
    screen.say("Each user of the database is accounted for by a row, delivered or not.")

    screen.aside("The task is completed. What was cut off ends with it, as what was delivered does:")
    receipt = answer("a receipt", lambda: pipeline.complete_task(task.id, "the rest is done by hand"))
    screen.exchange(
        on.wire.last, sent_by="the workload token of crm-pipeline", show=("outcome", "totals"), bright=("totals",)
    )
    with screen.waiting("the broker pays what is owed"):
        left = _until_gone(on)
    screen.counts(
        ("who says it", "what", "how many"),
        (("OpenBao", "leases that are alive", str(len(left[0]))), ("PostgreSQL", "users", str(len(left[1])))),
        bright=("how many",),
    )
    receipt = _once_dead(pipeline, task, receipt, delivered)
    died = {line.grant_id for line in receipt.grants if line.confirmed_dead_at is not None}
    expect("every login that was delivered is confirmed dead", delivered <= died, receipt.raw["totals"])
    expect("that what OpenBao still has is still owed", len(left[0]) <= receipt.totals.outstanding, left)
    if left[0]:
        screen.say(
            "A lease that is still there came to be while its request was cut, after its token had ended. It is owed "
            "until it is gone, which takes minutes."
        )
    if left[1]:
        screen.say(
            "A user without a lease is one that OpenBao made and forgot when the request was cut. Nobody ever heard "
            "its password, and PostgreSQL lets nobody in with it after its time."
        )
    dead, owed = receipt.totals.confirmed_dead, receipt.totals.outstanding
    told = "" if left[0] else "OpenBao knows of nothing that is alive. "
    told += "" if left[1] else "PostgreSQL knows of no user. "
    told += f"Confirmed dead: {dead}."
    if owed:
        told += (
            f" Still owed: {owed}, cut off where nobody can know what was made. Not called dead before it is certain."
        )
    screen.outcome(told)


def _grant_of(username: str) -> str | None:
    found = _GRANT_ID.search(username)
    return found and found[0].replace("-", "_")


def _once_dead(client: Client, task: Task, receipt: Receipt, grants: Collection[str]) -> Receipt:
    """The receipt once these grants are confirmed dead, or when time is over.

    Whoever ends a task is answered within seconds, and on a busy machine something may still be owed by then.
    """
    deadline = time.monotonic() + _GONE_WITHIN_S
    while time.monotonic() < deadline:
        if all(line.confirmed_dead_at is not None for line in receipt.grants if line.grant_id in grants):
            break
        time.sleep(0.1)
        receipt = answer("a receipt", lambda: client.receipt(task.id))
    return receipt


def _until_gone(on: VaultStage) -> tuple[list[str], list[str]]:
    """What OpenBao and PostgreSQL still have once there is nothing, or when time is over."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while True:
        left = on.leases()[1], on.users()
        if left == ([], []) or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def what_next(on: VaultStage, screen: Screen) -> None:
    port = on.broker.url.rpartition(":")[2]
    screen.next_steps(
        "What to try next, in another terminal, in this directory",
        {
            "First where the broker is, and a way to act as somebody:": f"""\
export BROKER_URL={on.broker.url}
as() {{ who=$1; shift; BROKER_TOKEN=$(.venv/bin/broker dev \\
  --directory {on.directory} --port {port} \\
  token "$who") .venv/bin/broker "$@"; }}""",
            "A task of your own, and a login for it:": f"""\
TASK=$(as crm-pipeline task open --purpose "count the orders of June" \\
  --agent summarizer --deadline 10m --id-only)
as summarizer grant request --task "$TASK" --ttl 5m \\
  --resource {ORDERS} --scope select""",
            f"Use it with any client, at 127.0.0.1:{on.postgres.port}, database orders. Then:": """\
as crm-pipeline task complete "$TASK\"""",
            "What is held and owed; what was cut off in the last step is paid within minutes:": """\
as ada lease list""",
        },
    )
    screen.staying("OpenBao, PostgreSQL and the broker stay up until you press Ctrl-C.")


if __name__ == "__main__":
    sys.exit(main())
