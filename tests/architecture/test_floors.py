"""The floors of the house: a room imports only from beneath it; a failure names the arrow that breaks it."""

import ast
from pathlib import Path

import pytest

BROKER = Path(__file__).parents[2] / "broker"

# What each room may import of this package. A room that is not listed is a room nobody decided on.
MAY_IMPORT = {
    "domain": set(),
    "store": {"domain"},
    "providers": {"domain"},
    "services": {"domain", "store", "providers", "telemetry"},
    "config": {"domain", "providers"},
    "telemetry": {"domain"},
    "wiring": {"domain", "store", "providers", "services", "config", "telemetry"},
    "web": {"domain", "services", "wiring", "telemetry", "config"},
    "scheduler": {"wiring", "services", "telemetry", "domain"},
    "samples": set(),
    "conformance": {"sdk"},
    "cli": {
        "samples",
        "wiring",
        "services",
        "sdk",
        "conformance",
        "gateway",
        "scheduler",
        "config",
        "web",
        "domain",
        "telemetry",
    },
    "gateway": {"sdk"},
    "sdk": set(),
}
FILES = sorted(BROKER.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(BROKER).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(BROKER)))
def test_a_room_imports_only_from_floors_beneath_it(path):
    room = room_of(path)
    if room == "__init__":
        return
    used = {name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("broker.")}
    # Which version it is, every room may know.
    arrows = [f"{room} -> {other}" for other in used - {room, "__version__"} - MAY_IMPORT[room]]
    assert not arrows


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(BROKER)))
def test_time_is_asked_for_only_in_the_clock(path):
    # The SDK runs in other people's programs and imports nothing of ours, so it has a clock of its own.
    if path in (BROKER / "domain" / "clock.py", BROKER / "sdk" / "clock.py"):
        return
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not calls & {"datetime.now", "datetime.utcnow", "time.time", "date.today"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(BROKER)))
def test_the_environment_is_read_only_by_config(path):
    if path == BROKER / "config" / "loading.py":
        return
    assert "os.environ" not in path.read_text()
    assert "getenv" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(BROKER)))
def test_a_state_is_set_only_by_the_one_door(path):
    if path == BROKER / "store" / "transitions.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign):
            assert not any(isinstance(target, ast.Attribute) and target.attr == "state" for target in node.targets)
