"""The wheel, built from the sources as they stand and installed where no checkout is near."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "*.pyc", "*.egg-info", "build", "dist", "var")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir")
# What running from a checkout, and a build before a revision was deleted, leave behind.
LEFTOVERS = ("migrations/__pycache__/env.pyc", "build/lib/broker/migrations/versions/0000_deleted.py")

USE = """
from pathlib import Path
import broker
from broker import samples
from broker.store.database import Database
from broker.store.migration import is_current, migrate, scripts

package = Path(broker.__file__).parent
print(package)
print(scripts())
print(samples.directory())
database = Database("sqlite:///fresh.db")
before = is_current(database)
migrate(database)
print(before, is_current(database))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    sources = tmp_path_factory.mktemp("wheel") / "sources"
    shutil.copytree(ROOT, sources, ignore=NOT_SOURCES)
    for leftover in LEFTOVERS:
        (sources / leftover).parent.mkdir(parents=True)
        (sources / leftover).touch()
    dist = sources.parent / "dist"
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, ".", cwd=sources)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def run(*command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped(wheel, directory):
    """Every file of a directory in the sources the wheel was built from."""
    sources = wheel.parents[1] / "sources"
    found = (path for path in (sources / directory).rglob("*") if path.is_file())
    return {path.relative_to(sources).as_posix() for path in found} - set(LEFTOVERS)


def test_every_file_of_the_package_is_in_the_wheel(wheel, names):
    files = shipped(wheel, "broker")
    assert {"broker/__init__.py", "broker/py.typed", "broker/domain/scope.py"} <= files
    assert files - names == set()  # what is missing is a kind of file that package-data does not name


def test_migrations_and_samples_are_inside_the_package(wheel, names):
    migrations = {f"broker/{name}" for name in shipped(wheel, "migrations")}
    samples = {name.replace("config/", "broker/_samples/", 1) for name in shipped(wheel, "config")}
    assert "broker/migrations/versions/0001_tables.py" in migrations
    assert "broker/_samples/development.toml" in samples
    assert (migrations | samples) - names == set()


def test_nothing_but_the_package_and_its_metadata_is_in_the_wheel(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"broker"}
    assert [name for name in names if "tests" in name.split("/")] == []


def test_what_earlier_runs_and_builds_left_behind_is_not_in_the_wheel(names):
    assert [name for name in names if name.endswith((".pyc", "0000_deleted.py"))] == []


def test_the_wheel_brings_the_broker_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "broker = broker.cli:main" in archive.read(name).decode().splitlines()


def test_an_installed_broker_migrates_a_fresh_database_far_from_any_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(*PIP, "install", "--no-index", "--no-deps", "--no-compile", "--target", target, wheel, cwd=tmp_path)
    package, scripts, samples, revisions = run(
        sys.executable, "-c", USE, cwd=elsewhere, PYTHONPATH=str(target), PYTHONDONTWRITEBYTECODE="1"
    ).splitlines()
    assert package == str(target / "broker")
    assert scripts == str(target / "broker" / "migrations")
    assert samples == str(target / "broker" / "_samples")
    assert revisions == "False True"
