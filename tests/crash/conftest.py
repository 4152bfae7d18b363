"""Servers that crash cycles share: one world a test run."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.crash.outside import a_world

LANES = 7  # each with a broker: more would ask the PostgreSQL server for more connections than it has


@pytest.fixture(scope="session")
def world():
    with a_world(LANES) as world:
        yield world


@pytest.fixture
def side_by_side(world):
    """Calls each with a lane of its own, all at once; answers what each answered."""

    def run(calls):
        with ThreadPoolExecutor(LANES) as pool:
            running = [pool.submit(call, lane) for call, lane in zip(calls, world.lanes, strict=False)]
        assert len(running) == len(calls), "there are fewer lanes than calls"
        return [future.result() for future in running]

    return run
