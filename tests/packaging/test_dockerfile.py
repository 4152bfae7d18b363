"""What can be said of the image without an engine to build it."""

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions():
    """(word, rest) of each instruction, continuation lines joined, comments gone."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages():
    found = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def only(stage, word):
    (rest,) = (rest for name, rest in stage if name == word)
    return rest


def pip_installs(stage):
    steps = [step for word, rest in stage if word == "RUN" for step in rest.split("&&")]
    return [step for step in steps if "pip" in step and " install " in step]


def copied():
    """Every path that is copied from the sources."""
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest:
            yield from rest.split()[:-1]


def test_what_builds_is_not_what_is_shipped():
    build, shipped = stages()
    assert [rest for word, rest in build + shipped if word == "FROM"] == [
        "python:${PYTHON} AS build",
        "python:${PYTHON}",
    ]
    assert pip_installs(shipped) == []
    assert [rest for word, rest in shipped if word == "COPY"] == ["--from=build /opt/broker /opt/broker"]


def test_the_base_is_pinned_by_a_tag_that_the_package_supports():
    (argument,) = (rest for word, rest in instructions() if word == "ARG")
    found = re.fullmatch(r"PYTHON=(\d+)\.(\d+)(\.\d+)?-slim-bookworm", argument)
    assert found is not None
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert (int(found[1]), int(found[2])) >= tuple(map(int, wanted.removeprefix(">=").split(".")))


def test_whatever_comes_from_an_index_comes_by_hash_and_runs_no_code():
    installs = pip_installs(stages()[0])
    from_index = [step for step in installs if "--no-index" not in step]
    assert len(from_index) == 2
    for step in from_index:
        assert "--require-hashes" in step
        assert "--only-binary :all:" in step
    assert any("--requirement requirements.lock" in step for step in from_index)


def test_the_build_backend_is_cut_out_of_the_lock_with_its_hashes():
    (script,) = re.findall(r"sed -n '/(\S+)/,/(\S+)/p' requirements-dev.lock", (ROOT / "Dockerfile").read_text())
    first, last = map(re.compile, script)
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if first.search(line))
    end = next(number for number in range(start + 1, len(lines)) if last.search(lines[number]))
    assert re.fullmatch(r"setuptools==[0-9.]+ \\", lines[start])
    assert all(line.lstrip().startswith("--hash=sha256:") for line in lines[start + 1 : end + 1])


def test_the_broker_runs_as_a_number_that_is_not_root():
    _, shipped = stages()
    user, group = only(shipped, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0


def test_signals_reach_the_broker_and_not_a_shell():
    _, shipped = stages()
    assert json.loads(only(shipped, "ENTRYPOINT")) == ["broker"]
    assert json.loads(only(shipped, "CMD")) == ["serve", "--config", "/etc/broker/broker.toml"]


def test_the_health_check_is_a_program_and_asks_the_port_that_is_exposed():
    _, shipped = stages()
    _, _, command = only(shipped, "HEALTHCHECK").partition("CMD ")
    *program, source = json.loads(command)
    assert program == ["python", "-I", "-c"]
    compile(source, "HEALTHCHECK", "exec")
    assert "/healthz" in source
    assert only(shipped, "EXPOSE") == "8080"
    assert " 8080," in source


def test_temporary_files_go_where_writing_is_allowed():
    _, shipped = stages()
    assert only(shipped, "VOLUME") == only(shipped, "WORKDIR") == "/var/lib/broker"
    assert "TMPDIR=/var/lib/broker" in only(shipped, "ENV").split()


@pytest.mark.parametrize("source", sorted(set(copied())))
def test_what_is_copied_exists_and_is_let_into_the_build(source):
    assert (ROOT / source).exists()
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert any(fnmatch(source, pattern) for pattern in let_in)


def test_nothing_is_let_into_the_build_that_is_not_copied():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied())
