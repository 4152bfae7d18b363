"""A broker that is told to stop ends, whatever is owed or only begun: what is owed is in rows, for who comes after."""

import contextlib
import secrets
import time
from collections import Counter

import pytest

from broker.domain.clock import system_clock
from broker.store.database import Database
from broker.store.leases import count_by_state, insert_leases
from tests.leases import a_debt
from tests.processes import until
from tests.vault_house import fake_vault

OWED = 5_000
KILLED_AFTER_S = 20  # by the server, its workers

_VAULT = """
[vault]
address = "{address}"
lease_prefix_exclusive = true
auth = {{ method = "approle", role_id_file = "{directory}/role-id", secret_id_file = "{directory}/secret-id" }}
"""


@pytest.fixture
def owing(deployment, tmp_path):
    """Thousands of debts that are due, to a Vault that answers."""
    with fake_vault() as fake:
        for name in ("role-id", "secret-id"):
            (tmp_path / name).touch(mode=0o600)
            (tmp_path / name).write_text("a-word")
        with deployment.configuration.open("a") as file:
            file.write(_VAULT.format(address=fake.address, directory=tmp_path))
        yield deployment


@contextlib.contextmanager
def store_of(deployment):
    database = Database(deployment.store_url)
    yield database
    database.close()


def owe(database, count):
    """What Vault does not know any more, and has to be asked about."""
    owed = [a_debt(system_clock(), handle=secrets.token_hex(12)) for _ in range(count)]
    with database.begin() as db:
        insert_leases(db, owed)


def counted(database):
    with database.read() as db:
        counts = Counter()
        for (_, state), number in count_by_state(db).items():
            counts[state] += number
        return counts


def test_told_to_stop_in_the_middle_of_a_backlog_it_ends_and_leaves_the_rest_to_who_comes_after(owing):
    with store_of(owing) as database, owing.broker() as broker:
        owe(database, OWED)
        until(lambda: counted(database)["revoking"] < OWED, what="the first debts to be paid")
        told_at = time.monotonic()
        assert broker.stop() == 0
        assert time.monotonic() - told_at < KILLED_AFTER_S, "it was killed, and did not end"
        left = counted(database)["revoking"]
        assert 0 < left < OWED, "with nothing left it would have ended anyway"
        broker.start()
        broker.until_ready()
        until(lambda: counted(database)["revoking"] < left, what="more of them to be paid")
        assert broker.stop() == 0


def test_told_to_stop_while_its_worker_starts_it_ends_at_once(deployment, tmp_path):
    """The worker has no handler of its own yet, and its parent's would note it for somebody else."""
    socket = tmp_path / "broker.sock"
    with deployment.starting(server__listen=f"unix:{socket}") as broker:
        until(socket.is_socket, what="the socket")
        told_at = time.monotonic()
        assert broker.stop() == 0
        assert time.monotonic() - told_at < KILLED_AFTER_S, "it was killed, and did not end"
