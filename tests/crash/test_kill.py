"""A broker that is killed, or whose database connections are, in the middle of what many clients ask of it."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import sqlalchemy as sa

from tests.conftest import postgres_database
from tests.crash.stream import Remembered, Stream, check, retry_what_was_not_answered
from tests.processes import Deployment, until

CYCLES = 3
ANSWERS_A_CYCLE = 60


@pytest.fixture(params=["sqlite", "postgresql"])
def deployment(request, tmp_path):
    if request.param == "sqlite":
        (tmp_path / "killed").mkdir()
        shutil.copyfile(request.getfixturevalue("migrated_file"), tmp_path / "killed" / "broker.db")
        yield Deployment.create(tmp_path / "killed", f"sqlite:///{tmp_path / 'killed' / 'broker.db'}")
        return
    template = request.getfixturevalue("migrated_template")
    with postgres_database(request.getfixturevalue("postgres"), template=template) as url:
        yield Deployment.create(tmp_path / "killed", url)


def test_killed_in_the_middle_it_forgets_nothing_it_answered_and_half_does_nothing(deployment):
    """INV-01, INV-06, INV-12, INV-23, INV-32: kill -9 under load, start again, compare, several times over."""
    remembered = Remembered()
    with deployment.broker() as broker:
        for cycle in range(CYCLES):
            stream = Stream(broker, remembered, seed=cycle)
            before = remembered.answers
            stream.start()
            until(lambda before=before: remembered.answers >= before + ANSWERS_A_CYCLE, what="a stream of answers")
            broker.kill()
            stream.stop()
            broker.start()
            broker.until_ready()
            retry_what_was_not_answered(broker, remembered)
            check(broker, remembered)
        assert remembered.completed
        assert remembered.revoked
        assert broker.stop() == 0


def test_killed_between_two_writes_of_one_change_it_has_made_none_of_them(postgres, migrated_template, tmp_path):
    """INV-12, INV-32: the task was written as ended, its grants were not yet; after the kill it is as it was before."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with postgres_database(postgres, template=migrated_template) as url:
        looking = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        holding = sa.create_engine(url)
        with Deployment.create(tmp_path / "between", url).broker() as broker, looking.connect() as db:
            task_id = broker.open_task()
            grant = broker.grant(task_id)
            with ThreadPoolExecutor(1) as pool, holding.connect() as held:
                held.execute(sa.text("SELECT id FROM grants FOR UPDATE"))
                completing = pool.submit(broker.complete, task_id)
                until(lambda: db.execute(sa.text(waiting)).first(), what="an end that waits for its grants")
                broker.kill()
                assert isinstance(completing.exception(), httpx.TransportError)
                held.rollback()
            broker.start()
            broker.until_ready()
            until(lambda: not db.execute(sa.text(waiting)).first(), what="the end of the killed one's transaction")
            assert broker.get(f"/v1/tasks/{task_id}", "pipeline").json()["state"] == "active"
            assert broker.is_active(grant.token)
            events = broker.get(f"/v1/audit?task={task_id}", "audrey").json()["items"]
            assert [event["type"] for event in events] == ["grant.issued", "task.opened"]
            assert broker.complete(task_id)["totals"]["ended"] == 1
            assert not broker.is_active(grant.token)
        looking.dispose()
        holding.dispose()


def test_with_its_connections_cut_it_says_unavailable_and_half_does_nothing(postgres, migrated_template, tmp_path):
    """INV-05: what became of the commit is unknown, so nothing is handed out; asked again, there is one grant."""
    remembered = Remembered()
    with postgres_database(postgres, template=migrated_template) as url:
        cutter = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with Deployment.create(tmp_path / "cut", url).broker() as broker, cutter.connect() as db:
            stream = Stream(broker, remembered, seed=0)
            stream.start()
            gone = 0
            for cut in range(10):
                until(lambda cut=cut: remembered.answers >= 10 * (cut + 1), what="a stream of answers")
                others = "datname = current_database() AND pid <> pg_backend_pid()"
                cutting = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
                gone += len(db.execute(sa.text(cutting)).all())
            assert gone >= 10
            until(lambda: remembered.answers >= 120, what="a stream of answers")
            stream.stop()
            retry_what_was_not_answered(broker, remembered)
            check(broker, remembered)
            assert broker.get("/readyz").status_code == 200
            assert not [line for line in broker.log_lines() if line["event"] == "internal error"]
        cutter.dispose()
