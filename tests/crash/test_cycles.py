"""Every failpoint once, with everything that can happen there: nothing is lost, nothing is called dead that lives."""

import functools
from collections import Counter
from pathlib import Path

import pytest

import broker
from tests.crash.conftest import LANES
from tests.crash.cycles import run_through
from tests.crash.failpoints import CELLS


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_whatever_happens_at_any_point_what_was_made_outside_dies_and_no_row_says_so_before(store, side_by_side, world):
    """INV-01 to INV-06, INV-12, INV-23, INV-32, on a real OpenBao with a real PostgreSQL behind it."""
    shares = [CELLS[number::LANES] for number in range(LANES)]
    calls = [functools.partial(_through, store, cells) for cells in shares]
    verdicts = side_by_side(calls)
    assert not [verdict for verdict in verdicts if verdict.wrong], "\n".join(map(str, verdicts))
    assert not world.unheard_of()
    met = {cell for verdict in verdicts for cell in verdict.met}
    assert met >= set(CELLS), "a fault nobody met says nothing"
    figures = sum((verdict.figures for verdict in verdicts), Counter())
    assert figures["kills"] == sum(action.startswith("kill") for _, action in CELLS)
    # What opens nothing from the beginning would prove nothing by its end.
    assert figures["logins that worked"] >= len(CELLS) // 4
    assert figures["orphans found"] >= 1


def _through(store, cells, lane):
    return run_through(lane, store, cells)


def test_the_product_holds_nothing_that_a_crash_could_be_switched_on_with():
    for path in Path(broker.__file__).parent.rglob("*.py"):
        text = path.read_text().lower()
        if path.name == "child.py":
            # What a program that `broker exec` runs gets when we are gone.
            text = text.replace("signal.sigkill", "")
        for word in ("failpoint", "sigkill", "killpg", "tests.crash"):
            assert word not in text, f"{path} speaks of {word}"
