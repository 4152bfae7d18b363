"""Small values: secrets, ids, canonical bytes."""

import copy
import pickle
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.audit import Event, canonical_json
from broker.domain.identity import is_id, new_id
from broker.domain.secret import Secret

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_a_secret_shows_itself_to_nothing_but_reveal():
    """INV-30."""
    secret = Secret("hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {secret:>20} {[secret]}"
    assert secret.reveal() == "hunter2"
    for leak in (
        lambda: pickle.dumps(secret),
        lambda: copy.copy(secret),
        lambda: secret == secret,
        lambda: {secret},
    ):
        with pytest.raises(TypeError):
            leak()


@given(st.text())
def test_only_what_we_could_have_made_is_an_id(text):
    """INV-31."""
    assert not is_id(text, "task") or len(text) == 31


@pytest.mark.parametrize(
    "text", ["task_", "grt_" + "0" * 26, "task_" + "0" * 26 + "\n", "task_" + "u" * 26, "task_" + "8" * 26]
)
def test_a_near_miss_is_not_an_id(text):
    assert not is_id(text, "task")


def test_ids_are_unique_and_accepted():
    made = {new_id("task", NOW) for _ in range(1000)}
    assert len(made) == 1000
    assert all(is_id(made_id, "task") for made_id in made)


def test_equal_events_give_equal_bytes_whatever_the_order_of_their_data():
    one = Event(id="evt_1", at=NOW, type="task.open", actor="a", data={"x": 1, "y": 2})
    other = Event(id="evt_1", at=NOW, type="task.open", actor="a", data={"y": 2, "x": 1})
    assert one.canonical() == other.canonical()


@pytest.mark.parametrize("value", [1.5, float("nan"), {"a": [1.0]}])
def test_a_float_has_no_canonical_form(value):
    with pytest.raises(TypeError):
        canonical_json(value)
