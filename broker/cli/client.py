"""How client commands reach the broker: its address, the caller's workload token, and what its refusals look like.

The token comes from a file that is read for each request, or from BROKER_TOKEN; never from the command line, which
everybody on the machine can read. It is never printed: of a token that was refused only its claims are shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import jwt
from click.core import ParameterSource

from broker.cli import output
from broker.domain.clock import from_epoch, rfc3339
from broker.sdk import ApprovalPending, BrokerError, Client, Invalid, Limited, NotAuthenticated, Refused, Unreachable
from broker.sdk.calls import Listing
from broker.sdk.errors import printable

# A person waits for it, and a loop in a script asks again: longer than a restart of the broker takes is too long.
_PATIENCE_S = 5.0


def client_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a client command. It is called with the `Client` as its first argument."""

    @click.option(
        "--url",
        envvar="BROKER_URL",
        show_envvar=True,
        metavar="URL",
        help="The broker's address, which is its issuer.",
    )
    @click.option(
        "--token-file",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="BROKER_TOKEN_FILE",
        show_envvar=True,
        help="The file with your workload token, read for each request. Or set BROKER_TOKEN.",
    )
    @click.option("--token", envvar="BROKER_TOKEN", hidden=True)
    @output.json_option
    @functools.wraps(command)
    def run(*args: Any, url: str | None, token_file: Path | None, token: str | None, **kwargs: Any) -> Any:
        with reach(url, token_file, token) as broker:
            return command(broker, *args, **kwargs)

    return run


def idempotency_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--idempotency-key", help="Said again with the same request, it makes no second one: for scripts that retry."
    )(command)


def page_options(command: Callable[..., Any]) -> Callable[..., Any]:
    limit = click.option(
        "--limit",
        type=click.IntRange(1, 1000),
        metavar="NUMBER",
        default=100,
        show_default=True,
        help="At most so many.",
    )
    cursor = click.option("--cursor", help="Go on where an earlier page ended.")
    return limit(cursor(command))


def page_of(broker: Client, listing: Listing[Any], cursor: str | None) -> Mapping[str, Any]:
    """One page, as the API answers it."""
    found = broker.send(listing.first if cursor is None else listing.after(cursor))
    return {"items": [item.raw for item in found.items], "next_cursor": found.next_cursor}


def reach(url: str | None, token_file: Path | None, token: str | None) -> Client:
    """The client of these options, or wrong usage."""
    context = click.get_current_context()
    if context.get_parameter_source("token") is ParameterSource.COMMANDLINE:
        raise click.UsageError("a token on the command line can be read by others: use BROKER_TOKEN_FILE", context)
    if not url:
        raise click.UsageError(
            "where is the broker? Set BROKER_URL or give --url, like https://broker.example", context
        )
    if token_file is None and not token:
        raise click.UsageError(
            "who are you? Set BROKER_TOKEN_FILE to the file with your workload token, or BROKER_TOKEN to the token",
            context,
        )
    # What is said on the command line wins over both variables, and the file wins over BROKER_TOKEN: it is renewed.
    proof: dict[str, Any] = {"token": token} if token_file is None else {"token_file": token_file}
    context.meta[_PROOF] = (url, proof)
    try:
        return Client(url, retry_deadline_s=_PATIENCE_S, **proof)
    except BrokerError as problem:
        raise click.UsageError(str(problem), context) from None


_PROOF = "broker.proof"


def refused(problem: BrokerError) -> click.exceptions.Exit:
    """Report what the broker said, or that it said nothing, and answer the exception to raise."""
    lines = [str(problem)]
    if isinstance(problem, NotAuthenticated):
        lines += _what_to_check()
    elif isinstance(problem, Refused) and problem.decision is not None:
        lines = _why(problem, problem.decision)  # the detail is the reasons once more, in one line
    elif isinstance(problem, ApprovalPending):
        lines += _how_to_wait(problem)
    elif isinstance(problem, Limited) and problem.retry_after_s is not None:
        lines.append(f"ask again in {problem.retry_after_s} s")
    elif isinstance(problem, Unreachable) and not _outside_failed(problem):
        lines.append("is BROKER_URL right, and the broker running?")
    if problem.trace_id is not None and problem.status is not None and problem.status >= 500:
        lines.append(f"trace id: {problem.trace_id}")
    reached = not isinstance(problem, Unreachable) or _outside_failed(problem)
    code = output.REFUSED if reached else output.UNREACHABLE
    if isinstance(problem, Invalid) and problem.status is None:
        code = output.USAGE  # our own client would not send it
    return output.fail("\n".join(lines), code=code, problem=dict(problem.problem))


def _how_to_wait(problem: ApprovalPending) -> list[str]:
    """Who is asked, until when, and what to do then."""
    approval = problem.approval
    needs = approval.get("needs")
    asked = [f"{need.get('quorum')} of {need.get('group')}" for need in needs] if isinstance(needs, list) else []
    grant_id = problem.grant_id or "GRANT"
    if approval.get("state") == "approved":
        return [f"collect it until {approval.get('collect_by')}: broker grant collect {grant_id}"]
    lines = [f"grant {grant_id} waits for people" + (f": {', '.join(asked)}" if asked else "")]
    if approval.get("id"):
        lines.append(f"they decide until {approval.get('expires_at')}: broker approval show {approval['id']}")
    return [*lines, f"wait for them and collect it: broker grant collect {grant_id} --wait 15m"]


def _outside_failed(problem: BrokerError) -> bool:
    """Whether the broker answered, and what it had to ask did not."""
    return problem.code in ("provider_refused", "provider_unavailable")


def _why(problem: Refused, decision: Mapping[str, Any]) -> list[str]:
    """The decision of policy, a reason a line: which policy said no, and what to change."""
    reasons = [f"- {reason}" for reason in decision.get("reasons") or ()]
    policies = ", ".join(map(str, decision.get("policies") or ()))
    by = f"forbidden by {policies}" if policies else "no policy allows it as it was asked"
    denied = problem.problem.get("grant_id")
    kept = f"; kept as {denied}" if denied else ""
    return [problem.title, *reasons, f"{by} (configuration version {decision.get('policy_version')}){kept}"]


def _what_to_check() -> list[str]:
    """What a token that was refused says of itself, unverified, and where it came from."""
    lines = [
        "check that the token is in BROKER_TOKEN_FILE or BROKER_TOKEN, that its only audience is the broker's address, "
        "that it has not expired, and that its issuer and subject are in the broker's configuration"
    ]
    url, proof = click.get_current_context().meta.get(_PROOF, (None, {}))
    claims = _unverified_claims(proof)
    if claims is None:
        return lines
    audience = claims.get("aud")
    wrong = "" if audience in (url, [url]) else f", and the broker is {url}"
    lines.append(f"its audience is {_shown(audience)}{wrong}")
    lines.append(f"its issuer is {_shown(claims.get('iss'))}, its subject {_shown(claims.get('sub'))}")
    expires = claims.get("exp")
    if isinstance(expires, int) and 0 <= expires < 2**36:
        lines.append(f"it expires at {rfc3339(from_epoch(expires))}")
    return lines


def _unverified_claims(proof: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The claims of the caller's own token, for its own eyes: nothing is decided by them."""
    try:
        token = proof["token_file"].read_text() if "token_file" in proof else proof["token"]
        found: Mapping[str, Any] = jwt.decode(token.strip(), options={"verify_signature": False})
    except (KeyError, OSError, ValueError, jwt.PyJWTError):
        return None
    return found


def _shown(value: object) -> str:
    return printable(str(value))[:200] if value else "not there"
