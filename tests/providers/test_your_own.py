"""A provider that an installed package offers, as its page shows one: configured, used, its secrets dead in the end."""

import re
import sys
from pathlib import Path

import pytest

from broker.cli.dev import make_directory
from broker.config import load
from broker.domain.errors import ConfigurationError, Invalid
from broker.domain.lifecycle import TaskState
from broker.providers.dev_issuer import DevIssuer
from broker.store import leases
from broker.store.migration import migrate
from broker.wiring import build
from tests.house import House, TestClock

PAGE = (Path(__file__).parents[2] / "docs" / "providers" / "your-own.md").read_text()
[ENTRY_POINT], [CONFIGURATION], [MODULE] = (
    re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for kind in ("text", "toml", "python")
)
REPORTS = "urn:acme:reports"
POLICY = """
@id("reports")
permit (principal, action == Action::"read", resource == Resource::"urn:acme:reports");
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's module and entry point, as `pip install` leaves them."""
    site = tmp_path / "site-packages"
    info = site / "acme_secrets-1.dist-info"
    info.mkdir(parents=True)
    (site / "acme_secrets.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-secrets\nVersion: 1\n")
    table, line = ENTRY_POINT.splitlines()
    group = re.fullmatch(r'\[project\.entry-points\."(.+)"\]', table)[1]
    (info / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(site))
    # Another test may have imported one of this name.
    sys.modules.pop("acme_secrets", None)
    yield
    sys.modules.pop("acme_secrets", None)


@pytest.fixture
def directory(tmp_path):
    made = tmp_path / "broker"
    make_directory(made)
    with (made / "broker.toml").open("a") as file:
        file.write(CONFIGURATION)
    (made / "policies" / "reports.cedar").write_text(POLICY)
    return made


@pytest.fixture
def house(installed, directory, store_url):
    clock = TestClock()
    broker = build(load(directory / "broker.toml", {"BROKER__STORE__URL": store_url}), clock=clock)
    migrate(broker.database)
    broker.apply(by="tests")
    broker.reconciliation.run()
    yield House(broker=broker, clock=clock, issuer=DevIssuer.create_or_load(directory))
    broker.close()


def ask(house, task, **more):
    return house.issue(task, resource=REPORTS, scope="read", takes_secrets=True, **more)


def test_its_secret_is_handed_out_and_dies_with_its_task(house):
    import acme_secrets

    task = house.open_task(by="crm-pipeline")
    issued = ask(house, task)
    assert issued.credential.data.reveal() == {"key": "acme-1"}
    assert (issued.credential.type, list(acme_secrets.ALIVE)) == ("acme", [issued.grant.id])
    house.broker.tasks.end(house.caller("crm-pipeline"), task.id, TaskState.COMPLETED)
    assert acme_secrets.ALIVE == {}


def test_what_it_foresees_is_refused_and_nothing_is_begun(house):
    with pytest.raises(Invalid, match="no parameters"):
        ask(house, house.open_task(by="crm-pipeline"), parameters={"role": "admin"})
    with house.broker.database.read() as db:
        assert leases.count_by_state(db) == {}


def test_a_secret_of_it_that_nobody_owns_is_found_and_killed(house):
    import acme_secrets

    acme_secrets.ALIVE["grt_00000000000000000000000000"] = house.clock()
    house.clock.forward(hours=1)
    house.broker.reconciliation.run()
    house.broker.debts.pay()
    assert acme_secrets.ALIVE == {}


def test_without_the_package_the_broker_says_what_is_missing_and_does_not_start(directory, store_url):
    with pytest.raises(ConfigurationError, match=r"0 installed packages offer a provider 'acme'.*Offered are: none"):
        build(load(directory / "broker.toml", {"BROKER__STORE__URL": store_url}))
