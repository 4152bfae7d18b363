"""The feed between real processes: brokers that end things, a server that is killed while it tells of them."""

import contextlib
import os
import signal
import subprocess
import threading

import httpx
import pytest

from tests.conftest import postgres_database
from tests.feeds import Follower, Parser
from tests.processes import BROKER, PATIENCE_S, Deployment, _end_group, free_port, until

STREAM, POLL = "/v1/revocations/feed", "/v1/revocations"
TASKS = 40


@pytest.fixture
def deployment(tmp_path, postgres, migrated_template):
    with postgres_database(postgres, template=migrated_template) as url:
        yield Deployment.create(tmp_path / "broker", url)


class FeedProcess:
    """A `broker feed`."""

    def __init__(self, deployment, name="feed"):
        self.deployment = deployment
        self.port = free_port()
        self.log = deployment.directory / f"{name}.log"
        self.start()
        until(self._is_ready, what="broker feed")

    def start(self):
        environment = {**os.environ, "BROKER__FEED__LISTEN": f"127.0.0.1:{self.port}"}
        command = [BROKER, "feed", "--config", self.deployment.configuration]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _is_ready(self):
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz", trust_env=False).status_code == 200

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def feeding(deployment, **more):
    made = FeedProcess(deployment, **more)
    try:
        yield made
    finally:
        _end_group(made.process)


class Verifier:
    """Follows the feed wherever it is, and comes again when its stream breaks."""

    def __init__(self, deployment, ports):
        self.deployment = deployment
        self.ports = list(ports)
        self.streams = 0
        self.problem = None
        self._over = threading.Event()
        jwks = httpx.get(f"{deployment.issuer}/oauth2/jwks", trust_env=False).json()
        self.heard = Follower(jwks, deployment.issuer)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self):
        last_id = None
        while not self._over.is_set():
            port, parser = self.ports[self.streams % len(self.ports)], Parser()
            headers = {"Authorization": f"Bearer {self.deployment.token('crm-api')}"}
            headers |= {"Last-Event-ID": last_id} if last_id else {}
            url = f"http://127.0.0.1:{port}{STREAM}"
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.Client(trust_env=False, timeout=5) as client,
                client.stream("GET", url, headers=headers) as answer,
            ):
                for piece in answer.iter_bytes():
                    try:
                        for name, data in parser.feed(piece):
                            self.heard.hear(name, data)
                    except AssertionError as problem:
                        self.problem = problem
                        return
                    last_id = parser.last_id or last_id
                    if self._over.is_set():
                        return
            self.streams += 1
            self._over.wait(0.05)

    def until(self, done):
        def settled():
            if self.problem is not None:
                raise self.problem
            return done()

        until(settled, within_s=PATIENCE_S)

    def close(self):
        self._over.set()
        self._thread.join(PATIENCE_S)


def test_a_server_of_the_feed_that_is_killed_again_and_again_loses_nothing_and_repeats_nothing(deployment):
    """Both servers number what is committed: whichever dies in the middle of it, the chain goes on."""
    with (
        deployment.broker() as broker,
        feeding(deployment, name="one") as one,
        feeding(deployment, name="two") as two,
    ):
        verifier = Verifier(deployment, [one.port, two.port])
        try:
            verifier.until(lambda: verifier.heard.statements)
            tasks = [broker.open_task() for _ in range(TASKS)]
            for number, task in enumerate(tasks):
                broker.complete(task)
                if number % 10 == 5:
                    victim = (one, two)[number // 10 % 2]
                    victim.kill()
                    victim.start()
            verifier.until(lambda: len(verifier.heard.events) >= TASKS)
            assert [event["task_id"] for event in verifier.heard.events] == tasks
            assert verifier.heard.resets == 1
            statements = verifier.heard.statements
            verifier.until(lambda: verifier.heard.statements > statements)
            assert verifier.heard.statement["seq"] == TASKS
        finally:
            verifier.close()
        until(lambda: one._is_ready() and two._is_ready())
        assert one.stop() == 0


def test_on_sqlite_serve_listens_for_the_feed_itself(migrated_file, tmp_path):
    deployment = Deployment.create(tmp_path / "broker", f"sqlite:///{tmp_path}/broker.db")
    port = free_port()
    with deployment.broker(feed__listen=f"127.0.0.1:{port}") as broker:
        verifiers = [Verifier(deployment, [port]), Verifier(deployment, [broker.port])]
        try:
            for verifier in verifiers:
                verifier.until(lambda verifier=verifier: verifier.heard.statements)
            task = broker.open_task()
            broker.complete(task)
            for verifier in verifiers:
                verifier.until(lambda verifier=verifier: verifier.heard.events)
                assert verifier.heard.events[0]["task_id"] == task
        finally:
            for verifier in verifiers:
                verifier.close()
        refused = subprocess.run(
            [BROKER, "feed", "--config", deployment.configuration],
            env={**os.environ, "BROKER__FEED__LISTEN": f"127.0.0.1:{free_port()}"},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert refused.returncode == 1
        assert "one process writes" in refused.stderr
        assert broker.stop() == 0


def test_a_feed_that_is_told_nowhere_to_listen_says_so(deployment):
    told = deployment.run("feed")
    assert told.returncode == 1
    assert "[feed]" in told.stderr


def test_an_administrator_begins_the_feed_anew(deployment):
    with deployment.broker() as broker:
        before = broker.get(POLL, "crm-api").json()["next_after"]
        told = deployment.run("feed", "renew", "--reason", "restored from backup")
        assert told.returncode == 0, told.stderr
        answer = broker.client.get(POLL, headers=broker.as_("crm-api"), params={"after": before}).json()
        assert answer["reset"]["feed"] != before.partition(":")[0]
        [event] = broker.get("/v1/audit?type=feed.renewed", "audrey").json()["items"]
        assert event["reason"] == "restored from backup"
