"""Whether a verifier in any language keeps the rules: it is asked with good and bad tokens of a fake broker."""

from __future__ import annotations

import time

import click
import httpx

from broker.cli import output
from broker.conformance.cases import CASES, Outcome, Stage, Target, run
from broker.conformance.fake_broker import AUDIENCE, SCOPE, FakeBroker


@click.group()
def conformance() -> None:
    """Try programs of others against the rules of the broker."""


@conformance.command()
@click.argument("url")
@click.option(
    "--listen", default="127.0.0.1:9400", show_default=True, metavar="HOST:PORT", help="Where the fake broker is."
)
@click.option("--audience", default=AUDIENCE, show_default=True, help="The resource that the verifier protects.")
@click.option("--scope", default=SCOPE, show_default=True, help="The scope that URL needs.")
@click.option("--method", default="GET", show_default=True, help="How URL is asked.")
@click.option("--proof-url", metavar="URL", help="What DPoP proofs are made for, where that is not URL.")
@click.option(
    "--bound", "bound_s", type=click.IntRange(4, 15), default=15, show_default=True, help="The verifier's, in seconds."
)
@click.option("--no-dpop", is_flag=True, help="It takes no bound tokens: it only has to refuse them.")
@click.option("--only", metavar="TEXT", help="Only cases whose name holds this.")
@click.option("--wait", "wait_s", type=click.IntRange(0, 600), default=30, show_default=True, help="For it to be up.")
@output.json_option
def verifier(
    url: str,
    listen: str,
    audience: str,
    scope: str,
    method: str,
    proof_url: str | None,
    bound_s: int,
    no_dpop: bool,
    only: str | None,
    wait_s: int,
) -> None:
    """Ask a protected URL with good and bad tokens, while its broker misbehaves.

    The verifier behind URL has the fake broker as its issuer, http://HOST:PORT of --listen, and any text as its own
    workload token. Whoever reaches that address may read what is there; nothing of it opens anything else.

    \b
    broker conformance verifier http://127.0.0.1:8090/contacts
    broker conformance verifier http://127.0.0.1:8090/contacts --bound 5 --only "status list" --json
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 65_536:
        raise click.UsageError(f"{listen!r} is no HOST:PORT, like 127.0.0.1:9400")
    cases = [case for case in CASES if only is None or only in case.name]
    if not cases:
        raise click.UsageError(f"no case has a name with {only!r} in it")
    try:
        broker = FakeBroker(host=host, port=int(port))
    except OSError as problem:
        raise output.fail(f"nobody can listen on {listen}: {problem.strerror}") from None
    target = Target(
        url=url, method=method, audience=audience, scope=scope, bound_s=bound_s, dpop=not no_dpop, proof_url=proof_url
    )
    stage = Stage(broker, target)
    try:
        output.say(f"the fake broker is {broker.url}")
        _wait_for(url, wait_s)
        outcomes = []
        for outcome in run(stage, cases):
            output.say(f"{'pass' if outcome.passed else 'FAIL'}  {outcome.name}")
            outcomes.append(outcome)
    finally:
        stage.close()
        broker.close()
    _report(outcomes)


def _wait_for(url: str, wait_s: int) -> None:
    """Until somebody answers at all, whatever it is."""
    ends_at = time.monotonic() + wait_s
    while True:
        try:
            httpx.get(url, trust_env=False, timeout=5)
            return
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise click.UsageError(f"{url!r} is no address") from None
        except httpx.HTTPError:
            if time.monotonic() >= ends_at:
                raise output.fail(f"nobody answers at {url}", code=output.UNREACHABLE) from None
        time.sleep(0.1)


def _report(outcomes: list[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if not outcome.passed]
    rows = [
        ("pass" if each.passed else "FAIL", each.name, each.expected, each.observed, f"{each.seconds:.1f}")
        for each in outcomes
    ]
    output.show(
        {
            "passed": len(outcomes) - len(failed),
            "failed": len(failed),
            "cases": [outcome.as_json() for outcome in outcomes],
        },
        output.table(("", "case", "expected", "observed", "seconds"), rows, empty="no case was run"),
    )
    if failed:
        raise output.fail(f"{len(failed)} of {len(outcomes)} cases failed")
