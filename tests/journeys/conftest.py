"""Brokers that many tests talk to: each opens tasks of its own, so they do not get in each other's way."""

import shutil

import pytest

from tests.conftest import postgres_database
from tests.processes import Deployment


@pytest.fixture(scope="session")
def solo(migrated_file, tmp_path_factory):
    """One broker on SQLite."""
    directory = tmp_path_factory.mktemp("solo")
    shutil.copyfile(migrated_file, directory / "broker.db")
    with Deployment.create(directory, f"sqlite:///{directory / 'broker.db'}").broker() as broker:
        yield broker


@pytest.fixture(scope="session")
def pair(postgres, migrated_template, tmp_path_factory):
    """Two brokers on one PostgreSQL database."""
    with postgres_database(postgres, template=migrated_template) as url:
        deployment = Deployment.create(tmp_path_factory.mktemp("pair"), url)
        with deployment.starting() as one, deployment.starting() as other:
            one.until_ready()
            other.until_ready()
            yield one, other


@pytest.fixture(params=["sqlite", "postgresql"])
def brokers(request):
    """The broker a task is opened at and the one its verifier asks: two processes, where the database allows two."""
    if request.param == "sqlite":
        solo = request.getfixturevalue("solo")
        return solo, solo
    return request.getfixturevalue("pair")


@pytest.fixture
def deployment(store_url, tmp_path):
    """A configuration on a database of each kind, for tests that stop and start brokers."""
    return Deployment.create(tmp_path / "deployment", store_url)


@pytest.fixture
def postgres_deployment(postgres, migrated_template, tmp_path):
    """A configuration on a PostgreSQL database of its own."""
    with postgres_database(postgres, template=migrated_template) as url:
        yield Deployment.create(tmp_path / "deployment", url)
