"""The verifier among processes and event loops: forks, threads, and what importing it brings along."""

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from broker.sdk.verifier import Refused
from tests.processes import until
from tests.verifier.conftest import URL, bearer, why

IMPORT = """
import sys

class Server:
    refused = ("flask", "werkzeug", "sqlalchemy", "alembic", "jwt", "pydantic", "click", "redis", "hvac", "psycopg",
               "apscheduler", "prometheus_client", "cedarpy", "starlette", "fastapi", "grpc", "mcp", "granian")

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Server())
import broker.sdk.verifier
import broker.sdk.verifier.wsgi, broker.sdk.verifier.asgi
ours = {name.split(".")[1] for name in sys.modules if name.startswith("broker.")}
assert ours == {"sdk"}, ours
"""


def test_it_needs_neither_the_server_nor_a_framework():
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def forked(work):
    """What a child process finds; its exceptions are no answers."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        found = "failed"
        try:
            found = work()
        finally:
            os.write(writing, str(found).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_the_child_proves_everything_anew_and_forgets_no_refusal(broker, verifier_of):
    verifier = verifier_of(bound_s=4)
    revoked, later, good = broker.issue(), broker.issue(), broker.issue()
    for each in (revoked, later, good):
        assert why(verifier, each) is None
    until(lambda: verifier.state().channel == "stream", what="the stream")
    broker.revoke("grant", grant_id=revoked.grant_id)
    until(lambda: why(verifier, revoked) == "revoked" and verifier.state().seq == 1, what="the proof")

    def in_the_child():
        found = [verifier.state().channel]
        found.append(why(verifier, revoked))
        until(lambda: why(verifier, good) is None, what="a yes")
        until(lambda: verifier.state().channel == "stream", what="the stream")
        broker_says = why(verifier, later)
        return [*found, broker_says]

    with verifier._lock:  # whoever holds it in the parent is not there in the child
        found = forked(in_the_child)
    assert found in ("['lists', 'revoked', None]", "['none', 'revoked', None]")
    assert why(verifier, good) is None


def test_in_an_event_loop_a_check_waits_elsewhere(broker, verifier_of):
    verifier = verifier_of()
    tokens = [broker.issue() for _ in range(50)]
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0)

    async def main():
        ticking = asyncio.ensure_future(tick())
        found = await asyncio.gather(*(verifier.check_async(bearer(each), "GET", URL) for each in tokens))
        with pytest.raises(Refused) as refused:
            await verifier.check_async("Bearer a.b.c", "GET", URL)
        with pytest.raises(Refused):
            await verifier.check_async(None, "GET", URL)
        state = await verifier.ready()
        ticking.cancel()
        return found, refused.value, state

    found, refused, state = asyncio.run(main())
    assert [each.grant_id for each in found] == [each.grant_id for each in tokens]
    assert (refused.code, refused.__context__) == ("malformed_token", None)
    assert state.ready
    assert len(ticks) > 5


def test_many_threads_share_one_verifier_while_things_are_revoked(broker, verifier_of):
    verifier = verifier_of()
    tokens = [broker.issue() for _ in range(40)]
    assert why(verifier, tokens[0]) is None
    until(lambda: verifier.state().channel == "stream", what="the stream")
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(lambda each=each: [why(verifier, each) for _ in range(40)]) for each in tokens]
        for each in tokens[::2]:
            broker.revoke("grant", grant_id=each.grant_id)
        seen = [each.result() for each in running]
    for number, answers in enumerate(seen):
        assert set(answers) <= ({None, "revoked"} if number % 2 == 0 else {None})
        first = answers.index("revoked") if "revoked" in answers else len(answers)
        assert set(answers[first:]) <= {"revoked"}
    until(lambda: all(why(verifier, each) == "revoked" for each in tokens[::2]), what="all refusals")
