"""`python -m tests.model` prints what each protocol breaks; with the name of one, a shortest way to each flaw."""

from __future__ import annotations

import click

from tests.model.broken import BROKEN
from tests.model.checker import explore
from tests.model.invariants import INVARIANTS
from tests.model.protocols import E_DYING, E_DYING_EXPIRY, E_DYING_TARGET, WEAKER, E, Protocol

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (*WEAKER, E, E_DYING, E_DYING_TARGET, E_DYING_EXPIRY, *(protocol for protocol, _ in BROKEN))
}


def table() -> str:
    """A line for each protocol: its worlds, those at rest, and for each invariant how many worlds break it."""
    ids = [invariant.id for invariant in INVARIANTS]
    lines = [" ".join([f"{'protocol':<28}", f"{'worlds':>7}", f"{'at rest':>8}", *(f"{id:>10}" for id in ids)])]
    for protocol in PROTOCOLS.values():
        found = explore(protocol)
        broken = [f"{found.violations[id].worlds if id in found.violations else '·':>10}" for id in ids]
        lines.append(" ".join([f"{protocol.name:<28}", f"{found.worlds:>7}", f"{len(found.at_rest):>8}", *broken]))
    return "\n".join(lines)


def flaws(protocol: Protocol) -> str:
    found = explore(protocol).violations.values()
    return "\n\n".join(str(violation) for violation in found) or f"{protocol.name} breaks nothing."


@click.command(help=__doc__)
@click.argument("protocol", required=False, type=click.Choice(list(PROTOCOLS)))
def main(protocol: str | None) -> None:
    click.echo(flaws(PROTOCOLS[protocol]) if protocol else table())


if __name__ == "__main__":
    main()
