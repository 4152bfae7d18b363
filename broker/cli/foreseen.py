"""How what a configuration would change is drawn: counts, whose, by which policies, and some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from broker.cli import output


def foreseen(found: Mapping[str, Any]) -> output.Drawing:
    """What of the live grants would end, be shortened, or could not be decided."""
    more = "" if found["complete"] else ", and there are more"
    head = {
        "live grants": f"{found['grants']} looked at{more}",
        "would end": found["ended"],
        "would be shortened": found["shortened"],
        "could not be decided": found["undecided"],
    }
    drawn = [output.facts(head)]
    for title, counts in (("agent", found["by_agent"]), ("policy", found["by_policy"]), ("why", found["by_reason"])):
        if counts:
            drawn.append(output.table((title, "grants"), list(counts.items()), empty=""))
    if found["samples"]:
        columns = ("grant", "agent", "resource", "scopes", "would", "until", "why")
        rows = [
            [*(each[name] for name in ("grant_id", "agent", "resource", "scopes", "outcome", "expires_at", "why"))]
            for each in found["samples"]
        ]
        drawn.append(output.table(columns, rows, empty=""))
    return output.both(*drawn)


def replayed(found: Mapping[str, Any]) -> output.Drawing:
    """What recorded requests would have come to, and then what of the live grants would change."""
    more = "" if found["complete"] else ", the newest; there are more"
    head = {
        "recorded requests": f"{found['requests']} since {found['since']}{more}",
        "the same": found["same"],
        "newly allowed": found["newly_allowed"],
        "newly denied": found["newly_denied"],
        "people would be asked": found["newly_asking"],
        "shorter": found["shortened"],
        "could not be decided": found["undecided"],
    }
    drawn = [output.facts(head)]
    for title, counts in (("agent", found["by_agent"]), ("policy", found["by_policy"])):
        if counts:
            drawn.append(output.table((title, "requests"), list(counts.items()), empty=""))
    if found["samples"]:
        columns = ("grant", "agent", "resource", "scopes", "came to", "would come to", "why")
        rows = [
            [*(each[name] for name in ("grant_id", "agent", "resource", "scopes", "recorded", "draft", "why"))]
            for each in found["samples"]
        ]
        drawn.append(output.table(columns, rows, empty=""))
    return output.both(*drawn, foreseen(found["live"]))
