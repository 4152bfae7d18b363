"""What is generated is current, and what is listed is complete."""

import ast
import importlib.util
import re

import pytest

from broker.domain.lifecycle import ApprovalState, TaskState
from tests.docs.documents import ROOT

REFERENCE = ROOT / "docs" / "reference"
_EVENT_TYPE = re.compile(r"[a-z_]+\.[a-z_]+")


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["api.md", "errors.md"])
def test_a_generated_reference_is_current(name):
    made = generator().GENERATED[name]()
    assert made == (REFERENCE / name).read_text(), "write it anew: .venv/bin/python docs/generate.py"


def test_who_may_call_is_said_for_every_route_and_for_no_other():
    from broker.web.app import API

    routes = {f"{operation.method} {operation.path}" for operations in API for operation in operations.declared}
    assert set(generator().WHO) == routes


def test_every_type_of_event_the_code_writes_is_listed_and_no_other():
    written = set()
    for path in (ROOT / "broker" / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _EVENT_TYPE.fullmatch(node.value):
                written.add(node.value)
            elif isinstance(node, ast.JoinedStr) and ast.unparse(node) == "f'task.{state}'":
                written |= {f"task.{state}" for state in TaskState if state is not TaskState.ACTIVE}
            elif isinstance(node, ast.JoinedStr) and ast.unparse(node) == "f'approval.{to}'":
                written |= {f"approval.{state}" for state in ApprovalState if state is not ApprovalState.OPEN}
    listed = re.findall(r"^\| `([a-z_]+\.[a-z_]+)`", (REFERENCE / "audit-events.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(written)


def test_every_metric_is_listed():
    from broker import telemetry

    operations = (ROOT / "docs" / "how-to" / "operations.md").read_text()
    text = telemetry.exposition()[0].decode()
    ours = {name for name in re.findall(r"^# TYPE (broker_\w+) ", text, re.MULTILINE) if not name.endswith("_created")}
    assert ours
    assert not [name for name in ours if f"`{name}`" not in operations]
