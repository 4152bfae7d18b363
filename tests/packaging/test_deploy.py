"""What `deploy/` promises: containers and a unit that can do little, and a configuration that starts."""

import re
from pathlib import Path

import pytest
import yaml

from broker.config import load

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


@pytest.fixture
def master_key(tmp_path):
    path = tmp_path / "master.key"
    path.touch(mode=0o600)
    path.write_bytes(bytes(range(32)))
    return str(path)


def unit(name="broker"):
    """Each directive of the unit with its values, in order."""
    found = {}
    for line in (DEPLOY / f"{name}.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_can_write_nowhere_gain_nothing_and_says_how_it_is(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "build" not in service])
def test_an_image_from_elsewhere_is_pinned_by_tag(name):
    assert re.fullmatch(r"[a-z/]+:\d+(\.\d+)*-[a-z]+", SERVICES[name]["image"])


def test_only_the_broker_can_be_reached_and_only_from_this_machine():
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"broker"}
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["broker"]["ports"])
    assert COMPOSE["networks"]["back"] == {"internal": True}
    assert all(service["networks"] == ["back"] for name, service in SERVICES.items() if name != "broker")


def test_secrets_are_files_that_someone_reads():
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", ())}
    assert set(COMPOSE["secrets"]) == used
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    environments = [service.get("environment", {}) for service in SERVICES.values()]
    named = {name: value for environment in environments for name, value in environment.items()}
    assert [name for name in named if "PASSWORD" in name] == ["POSTGRES_PASSWORD_FILE"]
    assert not any(re.search(r"//[^/@]*:[^/@]*@", value) for value in named.values())


def test_the_configuration_starts_under_the_environment_of_its_container(master_key):
    environ = SERVICES["broker"]["environment"] | {"BROKER__KEYS__MASTER_KEY_FILE": master_key}
    settings = load(DEPLOY / "etc" / "broker.toml", environ=environ)
    assert settings.server.listen == "0.0.0.0:8080"
    assert settings.catalogue.policies


def test_the_configuration_starts_as_it_is_once_its_directories_are_there(master_key, tmp_path):
    environ = {"BROKER__KEYS__MASTER_KEY_FILE": master_key, "BROKER__STORE__URL": f"sqlite:///{tmp_path}/broker.db"}
    assert load(DEPLOY / "etc" / "broker.toml", environ=environ).catalogue.policies


def test_the_unit_checks_the_configuration_before_it_serves():
    found = unit()
    assert found["ExecStartPre"][-1].endswith("broker check --config /etc/broker/broker.toml")
    assert found["ExecStart"] == ["/opt/broker/bin/broker serve --config /etc/broker/broker.toml"]


@pytest.mark.parametrize(
    ("directive", "value"),
    [
        ("DynamicUser", "yes"),
        ("ProtectSystem", "strict"),
        ("NoNewPrivileges", "yes"),
        ("StateDirectory", "broker"),
        ("CapabilityBoundingSet", ""),
        ("MemoryDenyWriteExecute", "yes"),
        ("LoadCredential", "master.key:/etc/broker/master.key"),
    ],
)
def test_the_unit_is_confined(directive, value):
    assert unit()[directive] == [value]


def test_the_unit_of_the_feed_is_confined_alike_and_keeps_its_own_copy_of_the_key():
    """One runtime directory for both would be cleared away under the one when the other stops."""
    served, feeding = unit(), unit("broker-feed")
    differ = {name for name in served | feeding if served.get(name) != feeding.get(name)}
    assert differ == {
        "Description", "After", "ExecStartPre", "ExecStart", "ExecReload", "RuntimeDirectory", "Environment",
    }  # fmt: skip
    assert feeding["ExecStart"] == ["/opt/broker/bin/broker feed --config /etc/broker/broker.toml"]
    [directory] = feeding["RuntimeDirectory"]
    [environment] = feeding["Environment"]
    assert f"BROKER__KEYS__MASTER_KEY_FILE=%t/{directory}/master.key" in environment.split()
    assert feeding["ExecStartPre"][0].endswith(f"%t/{directory}/master.key")


def test_the_unit_allows_the_system_calls_of_a_service_and_no_more():
    assert unit()["SystemCallFilter"] == ["@system-service", "~@privileged @resources"]
