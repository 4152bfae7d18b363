"""Grants: the agent's hand, and the admin's. A credential is printed once, to stdout, and nowhere else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from broker.cli import output
from broker.cli.activity import report
from broker.cli.client import client_options, idempotency_option, page_of, page_options
from broker.cli.parameters import Duration, facts_option, user_token_option
from broker.domain.clock import rfc3339
from broker.domain.lifecycle import GrantState
from broker.sdk import Client, Credential, DpopKey, Grant, calls

LONGEST_TTL_S = 86_400
LONGEST_WAIT_S = 86_400
_LONGEST_PARAMETER = 16_384


@click.group()
def grant() -> None:
    """Ask for credentials, renew them, hand them back."""


def _issuing(command: Callable[..., Any]) -> Callable[..., Any]:
    ttl = click.option("--ttl", "ttl_s", type=Duration(1, LONGEST_TTL_S), help="How long it is needed, like 5m.")
    return ttl(_handing_out(command))


def _handing_out(command: Callable[..., Any]) -> Callable[..., Any]:
    dpop = click.option(
        "--dpop-key",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A private key (P-256, PEM): the credential is bound to it (DPoP, RFC 9449).",
    )
    only = click.option(
        "--token-only", is_flag=True, help="Print the token and nothing else; of another secret its data, as JSON."
    )
    return dpop(only(command))


@grant.command()
@click.option("--task", "task_id", help="Whose task it is for; without it one of its own, where that is allowed.")
@click.option("--resource", required=True, help="What it shall open: a registered identifier.")
@click.option("--scope", "scopes", required=True, multiple=True, help="What it shall allow. May be repeated.")
@click.option("--hand-to", multiple=True, help="An agent that may have a part of it. May be repeated.")
@click.option("--parent", "parent_grant_id", help="The grant that is handed down to you, or a part of it.")
@user_token_option
@click.option(
    "--break-glass", metavar="REASON", help="An emergency, and which: for what a policy with @break_glass has declared."
)
@click.option("--intent", help="What you are about to do, in a sentence.")
@facts_option("--context", "context", "A fact you claim, for policies. May be repeated.")
@facts_option(
    "--param", "parameters", "For the system that makes the secret: csr=@request.pem, public_key=@id_ed25519.pub."
)
@_issuing
@idempotency_option
@client_options
def request(
    broker: Client,
    /,
    *,
    dpop_key: Path | None,
    token_only: bool,
    parameters: Mapping[str, str] | None,
    **asked: Any,
) -> None:
    """Ask for a credential: a token, or a secret that another system makes.

    A parameter that begins with @ is the name of a file with its value. Where policy asks people first there is no
    credential yet: it says whom, and `broker grant collect` gets it when they have said yes.

    \b
    broker grant request --task task_0198… --resource https://crm.example/api --scope contacts:read
    TOKEN=$(broker grant request --task "$TASK" --resource https://crm.example/api \\
        --scope contacts:read --ttl 5m --token-only)
    broker grant request --task "$TASK" --resource urn:mtls:agents --scope connect --param csr=@request.pem
    broker grant request --task "$TASK" --parent grt_0198… --resource https://crm.example/api --scope contacts:read
    """
    sent = values_of(parameters)
    _show_issued(*broker.request_grant(dpop=_dpop_key(dpop_key), parameters=sent, **asked), token_only=token_only)


@grant.command()
@click.argument("grant_id")
@click.option("--wait", "wait_s", type=Duration(1, LONGEST_WAIT_S), help="Wait so long for people to decide, like 15m.")
@facts_option("--param", "parameters", "Those of the request once more, where it had some.")
@_handing_out
@client_options
def collect(
    broker: Client,
    /,
    *,
    grant_id: str,
    wait_s: int | None,
    dpop_key: Path | None,
    token_only: bool,
    parameters: Mapping[str, str] | None,
) -> None:
    """The credential of a grant that people have approved. It is handed out once.

    A grant that is bound to a key is collected with the same --dpop-key.

    \b
    broker grant collect grt_0198…
    TOKEN=$(broker grant collect grt_0198… --wait 15m --token-only)
    """
    key, sent = _dpop_key(dpop_key), values_of(parameters)
    if wait_s is None:
        collected = broker.collect_grant(grant_id, key, parameters=sent)
    else:
        collected = broker.await_grant(grant_id, wait_s, key, parameters=sent)
    _show_issued(*collected, token_only=token_only)


@grant.command()
@click.argument("grant_id")
@_issuing
@client_options
def renew(broker: Client, /, *, grant_id: str, dpop_key: Path | None, token_only: bool, ttl_s: int | None) -> None:
    """A new credential for the same grant, decided again.

    \b
    broker grant renew grt_0198…
    TOKEN=$(broker grant renew grt_0198… --token-only)
    """
    _show_issued(*broker.renew_grant(grant_id, ttl_s, _dpop_key(dpop_key)), token_only=token_only)


@grant.command("list")
@click.option("--state", type=click.Choice([str(state) for state in GrantState]), help="In this state.")
@click.option("--task", help="Of this task.")
@click.option("--agent", help="Held by this agent.")
@click.option("--user", help="On behalf of this person.")
@click.option("--resource", help="For this resource.")
@page_options
@client_options
def list_grants(broker: Client, /, *, limit: int, cursor: str | None, **filters: Any) -> None:
    """Grants you may see, newest first; never their credentials. Break-glass that is out comes before all others.

    \b
    broker grant list --state active --agent summarizer
    """
    found = page_of(broker, calls.grants(page_size=limit, **filters), cursor)
    if cursor is None:
        found = _loud_first(broker, found, filters)
    output.page(found, COLUMNS, row, empty="no grant is to be seen")


COLUMNS = ("id", "state", "live", "agent", "resource", "scopes", "expires", "kind")


def _loud_first(broker: Client, found: Mapping[str, Any], filters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first page with every break-glass that is out before the others, however old it is."""
    broken = page_of(broker, calls.grants(**{**filters, "break_glass": True}), None)["items"]
    out = [item for item in broken if item["live"]]
    if out:
        output.say(f"BREAK-GLASS: {len(out)} out, listed first")
    first = {item["id"] for item in out}
    return {**found, "items": [*out, *(item for item in found["items"] if item["id"] not in first)]}


def row(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """A grant as a line of a list."""
    shown = tuple(item[name] for name in ("id", "state", "live", "agent", "resource", "scopes", "expires_at"))
    return (*shown, None if item.get("break_glass") is None else "BREAK-GLASS")


@grant.command()
@click.argument("grant_id")
@client_options
def show(broker: Client, /, *, grant_id: str) -> None:
    """One grant as it is now, and why it was decided so; never its credential.

    \b
    broker grant show grt_0198…
    """
    found = broker.grant(grant_id)
    output.show(found.raw, output.facts(_facts(found)))


@grant.command()
@click.argument("grant_id")
@client_options
def explain(broker: Client, /, *, grant_id: str) -> None:
    """Why it was decided so: which policies, which ceiling cut its life, on which facts, and what would be allowed.

    \b
    broker grant explain grt_0198…
    """
    found = broker.explain_grant(grant_id).raw
    output.show(found, _explanation(found))


@grant.command()
@click.argument("grant_id")
@click.option("--reason", help="Why; it goes into the audit trail.")
@client_options
def revoke(broker: Client, /, *, grant_id: str, reason: str | None) -> None:
    """End a grant now. Its credential is refused from here on.

    \b
    broker grant revoke grt_0198… --reason "done early"
    """
    output.show_receipt(broker.revoke_grant(grant_id, reason).raw)


def _explanation(found: Mapping[str, Any]) -> output.Drawing:
    """The sentences, then what it was decided on, a fact a line; what the agent wrote is marked as its words."""
    facts = found["facts"]
    context = {name: value for name, value in facts["context"].items() if value is not None}
    drawn = [
        output.sentences(found["in_words"]),
        output.facts(
            {
                "decided at": found["decided_at"],
                **{
                    f"{thing} {name}": value
                    for thing in ("agent", "task", "resource")
                    for name, value in facts[thing].items()
                },
                **{f"context.{name}": value for name, value in context.items()},
                **{f"the agent says: {name}": value for name, value in facts["agents_words"].items() if value},
            }
        ),
    ]
    if found["looked_at"]:
        drawn.append(output.facts({"the policies look at": found["looked_at"]}))
    if found["missing"]:
        drawn.append(output.sentences(found["missing"]))
    return output.both(*drawn)


def values_of(parameters: Mapping[str, str] | None) -> dict[str, str] | None:
    """Parameters with the contents of the files that those beginning with @ name."""
    if parameters is None:
        return None
    return {name: _in_file(name, value[1:]) if value[:1] == "@" else value for name, value in parameters.items()}


def _in_file(name: str, path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            found = file.read(_LONGEST_PARAMETER + 1)
    except OSError as problem:
        wrong = f"{path} cannot be read ({problem.strerror})"
    except UnicodeDecodeError:
        wrong = f"{path} is not text"
    else:
        if len(found) <= _LONGEST_PARAMETER:
            return found
        wrong = f"{path} has more than {_LONGEST_PARAMETER} characters"
    # Outside of the handler: its error may hold what the file does.
    raise click.BadParameter(f"{name}: {wrong}", param_hint="--param")


def _facts(found: Grant) -> dict[str, Any]:
    shown = {name: value for name, value in found.raw.items() if value not in (None, {}, []) and name != "decision"}
    if found.break_glass is not None:
        del shown["break_glass"]
        shown = {"BREAK-GLASS": f"the agent says: “{found.break_glass.get('reason')}”", **shown}
    if found.ttl_decided_by is not None:
        shown |= {"ttl_s": f"{found.ttl_s}, decided by {found.ttl_decided_by}"}
        del shown["ttl_decided_by"]
    if found.decision is not None:
        shown["decision"] = found.decision.outcome
        shown["policies"] = f"{', '.join(found.decision.policies) or '–'}, version {found.decision.policy_version}"
        if found.decision.reasons:
            shown["reasons"] = "; ".join(found.decision.reasons)
    if found.raw.get("lease"):
        shown["lease"] = output.lease(found.raw["lease"])
    return shown


def _show_issued(issued: Grant, credential: Credential, *, token_only: bool) -> None:
    expires_at = rfc3339(credential.expires_at)
    if output.wants_json():
        secret: dict[str, Any] = (
            {"data": credential.reveal_data()}
            if credential.token is None
            else {"token": credential.reveal(), "token_type": credential.token_type}
        )
        shown = {"type": credential.type, **secret, "expires_at": expires_at}
        output.show({"grant": issued.raw, "credential": shown}, output.facts({}))
        return
    if not token_only:
        output.facts(_facts(issued))(output.out())
    if sys.stdout.isatty():
        kind = f"{credential.type} secret" if credential.token is None else f"{credential.token_type} token"
        output.say(
            f"this {kind} opens {issued.resource} ({' '.join(issued.scopes)}) until "
            f"{expires_at}. It is shown once: keep it out of logs, files and shell history"
        )
    if credential.token is not None:
        click.echo(credential.reveal())
    elif token_only:
        click.echo(json.dumps(credential.reveal_data()))
    else:
        click.echo()
        output.secret(credential.reveal_data())


def _dpop_key(path: Path | None) -> DpopKey | None:
    if path is None:
        return None
    remedy = f"make one with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {path}"
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as problem:
        raise click.BadParameter(
            f"{path} cannot be read ({problem.strerror}); {remedy}", param_hint="--dpop-key"
        ) from None
    except (TypeError, ValueError):
        # Not what the library says: it may quote the key.
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise click.BadParameter(
            f"{path} is not a P-256 private key in PEM without password; {remedy}", param_hint="--dpop-key"
        )
    return DpopKey(key)


grant.add_command(report)
