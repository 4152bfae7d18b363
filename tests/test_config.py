"""One valid configuration, and each way to spoil it: every refusal names key, value and remedy."""

import copy
import grp
import json
import os
import pwd
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from broker.config import WORKLOAD_ALGORITHMS, config_reference, keys, load, read_master_key, vault_administrator
from broker.config.reading import from_text
from broker.domain.catalogue import Catalogue, Limits, TrustedIssuer
from broker.domain.errors import ConfigurationError, Invalid
from broker.domain.policy import PolicySet
from broker.providers import jose
from broker.providers.vault import SecretSource, VaultAuth, VaultSettings
from broker.providers.vault.settings import address_of

ROOT = Path(__file__).parents[1]
ABSENT = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()
VALID = {
    "issuer": "https://broker.example",
    "server": {"listen": "127.0.0.1:8080", "workers": 1, "metrics_listen": "127.0.0.1:9090"},
    "store": {"url": "sqlite:///broker.db"},
    "redis": {"url": "redis://127.0.0.1:6379/0"},
    "keys": {"master_key_file": "master.key", "rotate_every_s": 86400},
    "tasks": {"max_deadline_s": 86400},
    "grants": {"default_ttl_s": 300, "max_ttl_s": 1800, "max_live_per_agent": 100, "max_delegation_depth": 3},
    "policies": {"directory": "policies"},
    "vault": {
        "address": "https://vault.example:8200",
        "namespace": "",
        "ca_file": "ca.pem",
        "auth": {"method": "approle", "role_id_file": "role-id", "secret_id_file": "secret-id"},
        "token_role": "jit",
        "deadline_s": 5,
        "lease_prefix_exclusive": True,
    },
    "issuers": [
        {"name": "corp", "issuer": "https://idp.example/", "discovery": True, "algorithms": ["ES256", "RS256"]},
        {"name": "prod", "issuer": "spiffe://prod.example", "spiffe_bundle_file": "keys.json"},
        {"name": "local", "issuer": "http://dev.localhost", "jwks_file": "keys.json"},
        {"name": "people", "issuer": "https://people.example", "jwks_uri": "https://people.example/k", "users": True},
    ],
    "principals": [
        {
            "name": "summarizer",
            "kind": "agent",
            "issuer": "prod",
            "subject": "spiffe://prod.example/ns/agents/sa/summarizer",
            "roles": ["agent"],
            "owner": "crm-team@example.org",
            "groups": ["security"],
            "claims": {"kubernetes.io.namespace": "agents", "tier": 2, "signed": True},
            "attributes": {"clearance": "internal"},
        },
        {"name": "crm-api", "kind": "service", "issuer": "corp", "subject": "crm", "roles": ["verifier"]},
        {"name": "bots", "kind": "agent", "issuer": "local", "subject_prefix": "repo:org/", "roles": ["agent"]},
    ],
    "resources": [
        {
            "identifier": "https://crm.example/api",
            "provider": "jwt",
            "scopes": ["contacts:read", "contacts:write"],
            "sensitivity": "internal",
            "environment": "production",
            "max_ttl_s": 900,
            "signing_algorithm": "ES256",
            "token_typ": "at+jwt",
            "require_dpop": False,
            "verifiers": ["crm-api"],
            "attributes": {"region": "eu"},
        },
        {"identifier": "urn:db:orders", "scopes": ["select"]},
        {
            "identifier": "urn:db:orders:readonly",
            "provider": "vault",
            "scopes": ["select"],
            "sensitivity": "confidential",
            "max_ttl_s": 600,
            "vault": {"engine": "database", "role": "jit-orders-ro"},
        },
        {
            "identifier": "urn:queue:orders",
            "provider": "vault",
            "scopes": ["publish"],
            "vault": {
                "engine": "generic",
                "mount": "rabbitmq",
                "path": "creds/jit-queue",
                "method": "write",
                "revocation": "bounded",
                "bound_s": 30,
                "parameters": {"vhost": "orders", "heartbeat": 5},
            },
        },
    ],
}


def toml(value):
    """A value as TOML. A document is tables within tables, all written inline."""
    if isinstance(value, str):
        return '"' + "".join(c if " " <= c < "\x7f" and c not in '"\\' else f"\\U{ord(c):08X}" for c in value) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(name))} = {toml(member)}" for name, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value) if value >= 2**63 else str(value)
    return str(value).lower()


def spoiled(document, path, value):
    """A copy of the document with one value replaced, added or taken out; `path` is as messages write it."""
    document = copy.deepcopy(document)
    *above, last = [int(step) if step.isdigit() else step for step in re.findall(r"[A-Za-z0-9_-]+", path)]
    target = document
    for step in above:
        target = target.setdefault(step, {}) if isinstance(step, str) else target[step]
    if value is ABSENT:
        del target[last]
    elif isinstance(target, list) and last == len(target):
        target.append(value)
    else:
        target[last] = value
    return document


PUBLIC = jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
# Good for an issuer with a JWK set and for one with a SPIFFE bundle.
KEYS = json.dumps({"keys": [PUBLIC | {"kid": "one", "use": "sig"}, PUBLIC | {"kid": "two", "use": "jwt-svid"}]})


SECRET = "6b1a4f4e-hunter2"


def certificate():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vault.example")])
    begins = datetime(2026, 3, 1, tzinfo=UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(begins).not_valid_after(begins + timedelta(days=1))
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


CERTIFICATE = certificate().decode()


class Place:
    """A directory with all that the valid configuration names."""

    def __init__(self, directory):
        self.directory = directory
        self.file = directory / "broker.toml"
        self.key = directory / "master.key"
        self.key.write_bytes(bytes(range(32)))
        self.key.chmod(0o600)
        (directory / "keys.json").write_text(KEYS)
        (directory / "ca.pem").write_text(CERTIFICATE)
        for name in ("role-id", "secret-id", "token"):
            (directory / name).touch(mode=0o600)
            (directory / name).write_text(f"{SECRET}\n")
        (directory / "policies").mkdir()
        (directory / "policies" / "crm.cedar").write_text("// naïve\n")
        (directory / "policies" / "schema.cedarschema").write_text("entity Agent;\n")
        (directory / "policies" / "README.md").write_text("not a policy")

    def load(self, document=VALID, environ=None, **options):
        self.write(document)
        return load(self.file, environ or {}, **options)

    def write(self, document=VALID):
        self.file.write_text("".join(f"{toml(name)} = {toml(value)}\n" for name, value in document.items()))

    def problems(self, document=VALID, environ=None):
        with pytest.raises(ConfigurationError) as refused:
            self.load(document, environ)
        return refused.value.problems

    def the_problem(self, document=VALID, environ=None):
        found = self.problems(document, environ)
        assert len(found) == 1, found
        return found[0]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# --- What is accepted -----------------------------------------------------------------------------------------------


def test_what_it_says_of_vault_is_what_the_provider_gets(place):
    found = place.load()
    files = {name: str(place.directory / name) for name in ("role-id", "secret-id", "ca.pem")}
    assert found.vault == VaultSettings(
        address="https://vault.example:8200",
        auth=VaultAuth(
            method="approle", mount="approle", role_id_file=files["role-id"], secret_id_file=files["secret-id"]
        ),
        ca_file=files["ca.pem"],
        deadline=timedelta(seconds=5),
        lease_prefix_exclusive=True,
    )
    resource = found.catalogue.resource("urn:db:orders:readonly")
    # With the defaults written out: another version of the broker reads the same from it.
    assert resource.settings == {"engine": "database", "mount": "database", "role": "jit-orders-ro"}
    assert SecretSource.parse(resource.settings).lease_prefix == "database/creds/jit-orders-ro/"
    assert found.catalogue.resources[0].settings == {}


def test_a_configuration_without_vault_is_the_document_it_always_was(place):
    document = spoiled(spoiled(spoiled(VALID, "resources[3]", ABSENT), "resources[2]", ABSENT), "vault", ABSENT)
    found = place.load(document)
    assert found.vault is None
    assert all("settings" not in resource for resource in found.catalogue.as_document()["resources"])


AUTHS = [
    {"method": "kubernetes", "role": "broker"},
    {"method": "kubernetes", "role": "broker", "token_file": "token", "mount": "clusters/prod"},
    {"method": "jwt", "role": "broker", "token_file": "token"},
    {"method": "token_file", "token_file": "token"},
    {"method": "approle", "role_id_file": "role-id", "secret_id_file": "secret-id", "mount": "logins/approle"},
]


@pytest.mark.parametrize("auth", AUTHS, ids=str)
def test_each_way_to_log_in_to_vault_is_read(place, auth):
    found = place.load(spoiled(VALID, "vault.auth", auth)).vault.auth
    assert found.method == auth["method"]
    assert found.token_file in ("", str(place.directory / "token"), VaultAuth(method="kubernetes", role="x").token_file)
    assert found.mount == auth.get("mount", "" if auth["method"] == "token_file" else auth["method"])


TABLES = [
    {"engine": "database", "role": "r", "mount": "teams/crm/database", "token_role": "jit-crm"},
    {"engine": "pki", "role": "r", "bound_s": 60},
    {"engine": "pki", "role": "r", "operation": "issue", "common_name": "{grant_id}.agents.example"},
    {"engine": "ssh", "role": "r", "principals": "deploy,ops"},
    {"engine": "generic", "mount": "aws", "path": "sts/r", "revocation": "ttl_only", "least_ttl_s": 895},
    {
        "engine": "generic",
        "mount": "kubernetes",
        "path": "creds/r",
        "method": "write",
        "ttl_parameter": "ttl",
        "parameters": {"kubernetes_namespace": "agents", "cluster_role_binding": False},
        "revocation": "hard",
    },
]


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_each_engine_of_vault_is_read_as_the_provider_reads_it(place, table):
    document = spoiled(spoiled(VALID, "resources[2].vault", table), "resources[2].max_ttl_s", 900)
    settings = place.load(document).catalogue.resources[2].settings
    read, plain = SecretSource.parse(settings), SecretSource.parse(table)
    # `accepts` and `shape` are functions, the same for the same engine.
    assert read == plain
    assert {name: settings[name] for name in table} == table


@pytest.mark.parametrize(
    ("key", "parse", "least"),
    [
        (keys.ENGINES, SecretSource.parse, {"role": "r", "mount": "m", "path": "p", "revocation": "hard"}),
        (keys.AUTH_METHODS, lambda table: VaultAuth(**table), {"role": "r"}),
    ],
    ids=["engines", "auth methods"],
)
def test_every_key_that_is_documented_for_vault_is_one_the_provider_knows(key, parse, least):
    """What the reference says and what the provider reads are written in two places, and stay together."""
    selector = "engine" if key is keys.ENGINES else "method"
    for chosen, members in key.items():
        names = {member.name for member in members}
        values = {"principals": "deploy", "parameters": {}, "common_name": "x", "operation": "issue"}
        values |= {name: "x" for name in names if name.endswith("_file")}
        known = {"method": "read"} if chosen == "generic" else {}
        values |= {"bound_s": 5, "least_ttl_s": 5} | known | least
        table = {name: values[name] for name in names if name in values}
        if chosen == "generic":
            table |= {"revocation": "bounded"}
        parse({selector: chosen, **table})
        with pytest.raises((Invalid, TypeError)):
            parse({selector: chosen, **table, "surely_unknown": "x"})


def test_a_valid_configuration_is_what_it_says(place):
    found = place.load()
    assert found.issuer == "https://broker.example"
    assert (found.server.host, found.server.port, found.server.unix_path) == ("127.0.0.1", 8080, None)
    assert (found.server.metrics_host, found.server.metrics_port, found.server.workers) == ("127.0.0.1", 9090, 1)
    assert found.redis_url == "redis://127.0.0.1:6379/0"
    assert found.rotate_every == timedelta(days=1)
    assert found.limits == Limits(max_ttl=timedelta(seconds=1800))
    assert found.source == place.file
    catalogue = found.catalogue
    assert catalogue.version == 0
    assert catalogue.policies == {"crm.cedar": "// naïve\n"}
    assert catalogue.schema == "entity Agent;\n"
    assert catalogue.issuers[0] == TrustedIssuer(
        name="corp", issuer="https://idp.example/", key_source="discovery", algorithms=("ES256", "RS256")
    )
    assert catalogue.issuers[3].location == "https://people.example/k"
    assert catalogue.principals[0].claims == {"kubernetes.io.namespace": "agents", "tier": 2, "signed": True}
    assert catalogue.principals[2].subject_prefix == "repo:org/"
    assert catalogue.resources[0].offered == {"contacts:read", "contacts:write"}


def test_relative_paths_are_relative_to_the_file_and_not_to_where_the_broker_was_started(place, monkeypatch):
    monkeypatch.chdir("/")
    found = place.load(spoiled(VALID, "server.listen", "unix:broker.sock"))
    assert found.master_key_file == place.key
    assert found.store_url == f"sqlite:///{place.directory}/broker.db"
    assert found.server.unix_path == place.directory / "broker.sock"
    assert found.server.listen == f"unix:{place.directory}/broker.sock"
    assert found.catalogue.issuers[1].location == found.catalogue.issuers[2].location == f"{place.directory}/keys.json"


def test_a_relative_configuration_file_still_gives_absolute_paths(place, monkeypatch):
    place.load()
    monkeypatch.chdir(place.directory)
    assert load(Path("broker.toml"), {}).master_key_file == place.key


def test_sqlalchemy_opens_the_very_file_the_store_url_names(tmp_path):
    directory = tmp_path / "a b#c@d:e"
    directory.mkdir()
    assert sa.make_url(Place(directory).load().store_url).database == f"{directory}/broker.db"


def test_everything_that_has_a_default_may_be_left_out(place):
    found = place.load(
        {"issuer": "http://127.0.0.1:8080", "store": VALID["store"], "keys": {"master_key_file": "master.key"}}
    )
    assert found.limits == Limits()
    assert found.server.listen == "127.0.0.1:8080"
    assert found.redis_url is None
    assert found.server.metrics_listen is None
    assert found.catalogue.principals == ()


def test_a_resource_that_names_no_lifetime_is_capped_by_that_of_all_grants(place):
    found = place.load(spoiled(spoiled(VALID, "grants.max_ttl_s", 600), "resources[0].max_ttl_s", ABSENT))
    assert found.catalogue.resources[0].max_ttl_s == 600


def test_the_catalogue_survives_being_a_document(place):
    catalogue = place.load().catalogue
    assert Catalogue.from_document(0, json.loads(json.dumps(catalogue.as_document()))) == catalogue


def test_the_settings_do_not_show_the_passwords_they_hold(place):
    document = spoiled(VALID, "store.url", "postgresql+psycopg://broker:hunter2@db.example/broker")
    document = spoiled(document, "redis.url", "rediss://:hunter2@cache.example/0")
    found = place.load(document)
    assert "hunter2" in found.store_url
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("issuer", "https://broker.example:8443"),
        ("issuer", "http://localhost:8080"),
        ("issuer", "http://[::1]:8080"),
        ("server.listen", "0.0.0.0:80"),
        ("server.listen", "[::]:80"),
        ("store.url", "postgresql+psycopg:///broker"),
        ("store.url", "postgresql+psycopg://u:p%40ss@db.example:5432/broker?sslmode=require"),
        ("redis.url", "unix:///run/redis.sock"),
        ("principals[1].subject", "auth0|5f7c8ec7c33c6c004bbafe82"),
        ("principals[1].subject", "spiffe://other.example/ns/a"),  # attested by an OIDC issuer, as SPIRE's is
        ("principals[2].subject_prefix", "system:serviceaccount:agents:"),
        ("principals[2].subject_prefix", "agents/"),
        ("principals[2].subject_prefix", "https://host.example/agents/"),
        ("principals[2].subject_prefix", "spiffe://prod.example/ns/"),
        ("resources[1].identifier", "http://127.0.0.1:9000/mcp"),
        ("resources[1].identifier", "spiffe://prod.example/ns/db"),
        ("resources[1].identifier", "api://00000000-0000-0000-0000-000000000000"),
        ("principals[0].roles", []),
        ("issuers[0].issuer", "https://idp.example/realms/one"),
    ],
)
def test_what_is_safe_is_accepted(place, path, value):
    place.load(spoiled(VALID, path, value))


def test_an_algorithm_is_configurable_if_and_only_if_it_can_be_checked():
    assert set(WORKLOAD_ALGORITHMS) == jose.ALGORITHMS


def test_the_production_example_loads_as_it_stands(place):
    found = load(ROOT / "config" / "broker.toml", {"BROKER__KEYS__MASTER_KEY_FILE": str(place.key)})
    assert found.server.workers == 2
    assert {rule.name for rule in found.catalogue.principals} >= {"summarizer", "ada"}
    assert "sqlite" not in found.store_url
    assert PolicySet.compile(found.catalogue).ids  # the policies beside it name only what it declares


def test_the_production_example_shows_every_section():
    text = (ROOT / "config" / "broker.toml").read_text()
    for section in keys.SECTIONS:
        assert re.search(rf"^(# )?\[{section}\]$", text, re.MULTILINE), section
    for section in keys.ARRAYS:
        assert f"[[{section}]]" in text


def test_the_production_example_loads_with_vault_when_its_comments_are_taken_off(place):
    """What is commented out there is right too."""
    text = (ROOT / "config" / "broker.toml").read_text()
    vault = re.search(r"^# \[vault\]\n(# .*\n)+", text, re.MULTILINE)
    resource = re.search(r"^# \[\[resources\]\]\n(# .*\n)+", text, re.MULTILINE)
    for block in (vault, resource):
        text = text.replace(block[0], re.sub(r"^# ", "", block[0], flags=re.MULTILINE))
    place.file.write_text(text.replace("/etc/broker/", ""))
    found = load(place.file, {})
    assert found.vault.auth.method == "approle"
    assert SecretSource.parse(found.catalogue.resource("urn:db:orders:readonly").settings).revocation == "hard"


def test_the_reference_is_what_the_code_says():
    written = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert written == config_reference()


def test_the_reference_has_every_key_once():
    rows = re.findall(r"^\| `(\w+)` \|", config_reference(), re.MULTILINE)
    expected = []
    for table in (keys.TOP, *keys.SECTIONS.values(), *keys.ARRAYS.values()):
        expected += [key.name for key in table]
        expected += [below.name for key in table for variant in key.variants.values() for below in variant]
    assert rows == expected


# --- What is refused ------------------------------------------------------------------------------------------------

# key, value, what stands for the value in the message, what the remedy says
REFUSED = [
    # the broker's own name
    ("issuer", "https://broker.example/path", None, 'write "https://broker.example"'),
    ("issuer", "https://broker.example/", None, 'ends with a slash.*write "https://broker.example"'),
    ("issuer", "https://broker.example?x=1", "https://broker.example?[not shown]", "has a query.*write"),
    ("issuer", "https://broker.example/#", None, "has a fragment.*take out"),
    ("issuer", "https://Broker.example:443", None, 'write "https://broker.example"'),
    ("issuer", "https://u:hunter2@broker.example", "https://[not shown]@broker.example", "take it out"),
    ("issuer", "http://broker.example", None, "plain http off loopback.*use https"),
    ("issuer", "http://127.1:8080", None, "write https://host"),
    ("issuer", "http://localhost.evil.example", None, "use https"),
    ("issuer", "broker.example", None, "write https://host"),
    ("issuer", "https://broker.example\\@evil.example", "https://[not shown]@evil.example", "write https://host"),
    ("issuer", "ftp://broker.example", None, "write https://host"),
    ("issuer", "https://broker.example:99999", None, "write https://host"),
    ("issuer", "https://[broker", None, "write https://host"),
    ("issuer", "", None, "is empty"),
    ("issuer", " https://broker.example", None, "blank; take it out"),
    ("issuer", "https://broker.example\x00", "\\u0000", "take it out"),
    ("issuer", "https://broker.example\u202e", "\\u202E", "take it out"),
    ("issuer", 5, "5", "an integer; write a string"),
    ("issuer", ["https://broker.example"], "[…]", "an array; write a string"),
    # server
    ("server.listen", ":8080", None, "127.0.0.1:8080, or 0.0.0.0:8080"),
    ("server.listen", "8080", None, "write 127.0.0.1:8080"),
    ("server.listen", "127.0.0.1:0", None, "port from 1 to 65535"),
    ("server.listen", "127.0.0.1:65536", None, "port from 1 to 65535"),
    ("server.listen", "::1:8080", None, "write 127.0.0.1:8080"),
    ("server.listen", "unix:", None, "write unix:/run/broker.sock"),
    ("server.listen", "unix:/" + "x" * 120, None, "107 bytes.*shorten"),
    ("server.workers", 0, "0", "an integer from 1 to 64"),
    ("server.workers", 65, "65", "an integer from 1 to 64"),
    ("server.workers", True, "true", "is a boolean; write an integer"),
    ("server.workers", 1.0, "1.0", "is a float; write an integer"),
    ("server.workers", "1", None, "is a string; write an integer"),
    ("server.workers", 2, "2", "SQLite.*write 1, or use PostgreSQL"),
    ("server.workers", 2**5000, "[an integer of more than 64 bits]", "an integer from 1 to 64"),
    ("server.metrics_listen", "unix:/run/metrics.sock", None, "write 127.0.0.1:8080"),
    ("server.metrics_listen", "127.0.0.1:8080", None, "a port of their own"),
    ("feed.listen", "127.0.0.1:8080", None, "is server.listen too"),
    ("feed.listen", "unix:/run/feed.sock", None, "write 127.0.0.1:8080"),
    ("feed.kept_for_s", 3600, None, "7200"),
    ("feed.streams_of_serve", 33, None, "32"),
    ("server", {**VALID["server"], "metrics_listen": "127.0.0.1:8079", "workers": 2}, "127.0.0.1:8079", "of their own"),
    ("server", {**VALID["server"], "metrics_listen": "127.0.0.1:65535", "workers": 2}, "65535", "use a smaller one"),
    # store and redis
    ("store.url", "sqlite://", None, "in memory.*name a file"),
    ("store.url", "sqlite:///", None, "in memory.*name a file"),
    ("store.url", "sqlite:///:memory:", None, "in memory.*name a file"),
    ("store.url", "sqlite://:memory:", None, "in memory.*name a file"),
    ("store.url", "sqlite:///file:x?mode=memory&uri=true", "sqlite:///file:x", "in memory.*name a file"),
    ("store.url", "sqlite:///x.db?timeout=1", "sqlite:///x.db", "write sqlite:///var/broker.db"),
    ("store.url", "sqlite://host/x.db", None, "write sqlite:///var/broker.db"),
    ("store.url", "sqlite:///missing/broker.db", None, "no directory .*/missing; make it"),
    ("store.url", f"sqlite:///{'x' * 300}/broker.db", None, "no directory"),
    ("store.url", "sqlite:///a%20b.db", None, "rename"),
    ("store.url", "mysql://db.example/broker", None, "write one of the two"),
    ("store.url", "postgresql://db.example/broker", None, "postgresql\\+psycopg://"),
    ("store.url", "postgresql+psycopg://db.example", None, "with a database name; write"),
    ("store.url", "postgresql+psycopg://u:p@ss/w@db.example:x/b", "[not shown]", "percent-encoded"),
    ("redis.url", "http://cache.example", None, "write redis://host:6379/0"),
    ("redis.url", "redis:///0", None, "write redis://host:6379/0"),
    # keys
    ("keys.master_key_file", "absent.key", None, "no file .*/absent.key; make it with .umask 077"),
    ("keys.master_key_file", "policies", None, "not a regular file; make it with"),
    ("keys.master_key_file", "keys.json/x", None, "cannot be opened"),
    ("keys.master_key_file", "x" * 300, None, "cannot be opened"),
    ("keys.rotate_every_s", 599, "599", "an integer from 600"),
    ("keys.rotate_every_s", -1, "-1", "an integer from 600"),
    ("keys.rotate_every_s", float("inf"), "inf", "a float; write an integer"),
    # limits
    ("tasks.max_deadline_s", 0, "0", "an integer from 1"),
    ("tasks.max_deadline_s", 2592001, "2592001", "to 2592000"),
    ("grants.max_ttl_s", 3601, "3601", "to 3600"),
    ("grants.default_ttl_s", 1801, "1801", "above grants.max_ttl_s, which is 1800; lower it"),
    ("grants.max_live_per_agent", 0, "0", "an integer from 1"),
    ("grants.max_delegation_depth", 17, "17", "to 16"),
    # policies
    ("policies.directory", "absent", None, "directory .*/absent cannot be read.*make it"),
    ("policies.directory", "keys.json", None, "cannot be read.*correct the path"),
    # issuers
    ("issuers[0].name", "corp one", None, "use up to 100 letters"),
    ("issuers[0].issuer", "https://idp.example?x", "https://idp.example?[not shown]", "has a query.*take it out"),
    ("issuers[0].issuer", "http://idp.example", None, "by discovery"),
    ("issuers[0].issuer", "kubernetes/serviceaccount", None, "write https://host"),
    ("issuers[0].issuer", "spiffe://corp.example", None, "write spiffe_bundle_file or spiffe_bundle_url"),
    ("issuers[0].issuer", "https://broker.example", None, "is the broker itself.*trust another"),
    ("issuers[0].algorithms[1]", "HS256", None, "HMAC.*use one of"),
    ("issuers[0].algorithms[1]", "none", None, "nobody signed; use one of"),
    ("issuers[0].algorithms[1]", "nOnE", None, "nobody signed; use one of"),
    ("issuers[0].algorithms[1]", "ES257", None, "use one of"),
    ("issuers[0].algorithms[1]", "ES256", None, "there twice; take one out"),
    ("issuers[0].algorithms[1]", 256, "256", "an array of strings"),
    ("issuers[0].algorithms", [], "[]", "believes no signature; name one"),
    ("issuers[0].algorithms", "ES256", None, "is a string; write an array"),
    ("issuers[0].max_lifetime_s", 86401, "86401", "to 86400"),
    ("issuers[0].single_use", 1, "1", "is an integer; write true or false"),
    ("issuers[0].users", "true", None, "is a string; write true or false"),
    ("issuers[1].issuer", "https://prod.example", None, "write spiffe://<trust domain>"),
    ("issuers[1].issuer", "spiffe://prod.example/path", None, "write spiffe://<trust domain>"),
    ("issuers[1].issuer", "spiffe://Prod.example", None, "write spiffe://<trust domain>"),
    ("issuers[1].spiffe_bundle_file", "absent.json", None, "no file .*/absent.json; make it"),
    ("issuers[2].jwks_file", "policies/crm.cedar", None, "is not JSON; write the issuer's JWK set there"),
    ("issuers[2].jwks_file", "policies", None, "not a regular file"),
    ("issuers[3].issuer", "https://idp.example/", None, r"already the issuer of issuers\[0\]; give each its own"),
    ("issuers[3].name", "local", None, r"already the name of issuers\[2\]; give each its own"),
    ("issuers[3].jwks_uri", "http://people.example/keys", None, "plain http off loopback.*use https"),
    ("issuers[3].jwks_uri", "file:///etc/passwd", None, "write https://host/path"),
    ("issuers[3].users", False, "people", "used by no principal.*users = true"),
    # principals
    ("principals[0].name", "crm-api", None, r"already the name of|principals\[0\]; give each its own"),
    ("principals[0].kind", "robot", None, 'write one of "agent", "orchestrator"'),
    ("principals[0].roles[0]", "root", None, "is not a role; the roles are agent"),
    ("principals[0].roles[1]", "agent", None, "there twice"),
    ("principals[1].issuer", "cropp", None, "the name of no issuer; did you mean corp"),
    ("principals[1].issuer", "elsewhere", None, "there are corp, local, people, prod"),
    ("principals[0].subject", "", None, "is empty"),
    ("principals[0].subject", "*", None, "would match everything; write the subject"),
    ("principals[0].subject", "%", None, "would match everything; write the subject"),
    ("principals[0].subject", "spiffe://prod.example/ns/*", None, "or a subject_prefix"),
    ("principals[0].subject", "spiffe://evil.example/ns/a", None, "outside the trust domain.*spiffe://prod.example/"),
    ("principals[0].subject", "spiffe://prod.example.evil.test/a", None, "outside the trust domain"),
    ("principals[0].subject", "summarizer", None, "outside the trust domain"),
    ("principals[0].subject", "spiffe://prod.example", None, "nothing after the trust domain.*write"),
    ("principals[0].subject", "spiffe://prod.example/ns/../a", None, "is not a SPIFFE ID; write"),
    ("principals[0].subject", "spiffe://prod.example/ns//a", None, "is not a SPIFFE ID; write"),
    ("principals[0].subject", "spiffe://prod.example/ns/", None, "is not a SPIFFE ID; write"),
    ("principals[0].subject", "SPIFFE://prod.example/ns/a", None, "is not a SPIFFE ID; write"),
    ("principals[2].subject_prefix", "repo:org", None, 'does not end with "/"'),
    ("principals[2].subject_prefix", "repo:", None, "matches everything.*one level more"),
    ("principals[2].subject_prefix", "repo:/", None, "matches everything.*one level more"),
    ("principals[2].subject_prefix", "system:", None, "matches everything.*one level more"),
    ("principals[2].subject_prefix", "system:serviceaccount:", None, "matches everything.*one level more"),
    ("principals[2].subject_prefix", "/", None, "would match everything"),
    ("principals[2].subject_prefix", "ab/", None, "matches everything"),
    ("principals[2].subject_prefix", "https://", None, "matches everything"),
    ("principals[2].subject_prefix", "https://host.example/", None, "matches everything"),
    ("principals[2].subject_prefix", "https://host.example:8080/", None, "matches everything"),
    ("principals[2].subject_prefix", "repo:*/", None, "compared character by character"),
    ("principals[2].subject_prefix", "spiffe://prod.example/", None, "nothing after the trust domain.*write"),
    ("principals[2].subject_prefix", "spiffe://", None, "is not a SPIFFE ID; write"),
    ("principals[0].groups[0]", "two words", None, "use up to 100 letters"),
    ("principals[0].owner", "x" * 1001, "xxx", "1000 are the most"),
    ("principals[0].implicit_tasks", "no", None, "write true or false"),
    ("principals[0].claims", ["a"], "[…]", "write a table of strings"),
    ("principals[0].claims.tier", 1.5, "1.5", "is a float; write a string"),
    ("principals[0].claims.tier", {"io": "x"}, None, "one quoted key"),
    ("principals[0].claims.tier", ["a"], "[…]", "is an array; write a string"),
    ("principals[0].claims", {"a..b": 1}, '"a..b"', "is not the path of a claim; write names joined"),
    ("principals[0].attributes.clearance", 2**63, "[an integer of more than 64 bits]", "write it as a string"),
    ("principals[0].attributes.clearance", "a\nb", "a\\u000Ab", "take it out"),
    ("principals[0].attributes.owner", "me", None, "may not be restated; rename it"),
    ("principals[0].attributes.a-b", "me", None, "is not the name of an attribute; use letters"),
    # resources
    ("resources[0].identifier", "crm", None, "write https://host/path or urn:"),
    ("resources[0].identifier", "/api", None, "write https://host/path or urn:"),
    ("resources[0].identifier", "https://crm.example/a b", None, "write https://host/path or urn:"),
    ("resources[0].identifier", "https://crm.example/api#x", None, "take out"),
    ("resources[0].identifier", "urn:db:orders#x", None, "RFC 8707 forbids; take out"),
    ("resources[0].identifier", "http://crm.example/api", None, "plain http off loopback.*use https"),
    ("resources[0].identifier", "https:crm.example", None, "write https://host/path"),
    ("resources[0].identifier", "https://u@crm.example", "https://[not shown]@crm.example", "take it out"),
    ("resources[0].identifier", "HTTPS://crm.example/api", None, "use lower case"),
    ("resources[0].identifier", "javascript:alert(1)", None, "not an audience; write"),
    ("resources[0].identifier", "https://broker.example", None, "is the broker itself.*write another"),
    ("resources[1].identifier", "https://crm.example/api", None, r"already the identifier of resources\[0\]"),
    ("resources[0].provider", "acme", None, "there are jwt, vault, and one that a package"),
    ("resources[0].scopes", [], "[]", "name at least one scope"),
    ("resources[0].scopes[1]", "contacts read", None, "RFC 6749.*rename it"),
    ("resources[0].scopes[1]", 'quo"te', 'quo\\"te', "RFC 6749.*rename it"),
    ("resources[0].scopes[1]", "contacts:read", None, "there twice"),
    ("resources[0].sensitivity", "secret", None, 'write one of "public"'),
    ("resources[0].environment", "Big Prod", None, "is not a word; use"),
    ("resources[0].max_ttl_s", 1801, "1801", "above grants.max_ttl_s, which is 1800; lower it"),
    ("resources[0].max_ttl_s", 0, "0", "an integer from 1"),
    ("resources[0].signing_algorithm", "HS256", None, 'write one of "ES256", "RS256", "EdDSA"'),
    ("resources[0].token_typ", "jwt", None, 'write one of "at\\+jwt", "JWT"'),
    ("resources[0].require_dpop", "yes", None, "write true or false"),
    ("resources[0].verifiers[0]", "crm-apy", None, "no principal; did you mean crm-api"),
    ("resources[0].verifiers[0]", "summarizer", None, 'without role verifier; add "verifier"'),
    ("resources[0].attributes.provider", "x", None, "may not be restated; rename it"),
    # keys in Vault
    ("keys", {"vault_transit": "transit/broker"}, "transit/broker", "write transit/keys/<name>"),
    ("keys", {"vault_transit": "a/../b/keys/broker"}, "a/../b/keys/broker", "is not a path in Vault; write 1 to"),
    ("keys", {"vault_transit": "transit/keys/a/b"}, "transit/keys/a/b", "write transit/keys/<name>"),
    # vault
    ("vault.address", "vault.example:8200", None, "is not an absolute https URL"),
    ("vault.address", "http://vault.example:8200", None, "plain http off loopback.*use https"),
    ("vault.address", "https://vault.example/v1", None, "write https://vault.example:8200"),
    ("vault.address", "https://u:hunter2@vault.example", "https://[not shown]@vault.example", "take it out"),
    ("vault.address", "https://vault.example?token=hunter2", "?[not shown]", "write https://vault.example:8200"),
    ("vault.namespace", "a/../b", None, "is not a path in Vault; write 1 to"),
    ("vault.ca_file", "absent.pem", None, "no file .*/absent.pem; make it"),
    ("vault.ca_file", "keys.json", None, "has no certificate in PEM; write"),
    ("vault.token_role", "../x", None, "is not a name in Vault; use"),
    ("vault.deadline_s", 61, "61", "an integer from 1 to 60"),
    ("vault.deadline_s", 0, "0", "an integer from 1 to 60"),
    ("vault.lease_prefix_exclusive", False, "false", "must be true: .*roles of its own, and write true"),
    ("vault.lease_prefix_exclusive", "yes", None, "write true or false"),
    ("vault.auth", "approle", None, "is a string; write a table such as { method ="),
    ("vault.auth.method", "userpass", None, 'write one of "approle", "kubernetes"'),
    ("vault.auth.role_id_file", "absent", None, "no file .*/absent; write the role id there"),
    ("vault.auth.secret_id_file", "absent", None, "no file .*/absent; write the secret id there"),
    ("vault.auth.secret_id_file", "policies", None, "not a regular file; write the secret id there"),
    ("vault.auth.secret_id_file", "ca.pem", None, "has mode 0644, open to others; chmod 0600"),
    ("vault.auth", {"method": "token_file", "token_file": "absent"}, "absent", "write the token there"),
    ("vault.auth", {"method": "jwt", "role": "b", "token_file": "absent"}, "absent", "make it, or correct"),
    ("vault.auth", {"method": "jwt", "role": "../x", "token_file": "token"}, "../x", "is not a name in Vault"),
    ("vault.auth.mount", "a/../b", None, "is not a path in Vault; write"),
    # the vault tables of resources
    ("resources[2].vault", "database", None, "is a string; write a table such as { engine ="),
    ("resources[2].vault.engine", "kv", None, 'write one of "database", "pki"'),
    ("resources[2].vault.role", "../x", None, "is not a name in Vault; use"),
    ("resources[2].vault.role", "a/b", None, "is not a name in Vault; use"),
    ("resources[2].vault.mount", "/database", None, "is not a path in Vault; write"),
    ("resources[2].vault.mount", "a" + "/a" * 8, None, "write 1 to 8 parts"),
    ("resources[3].vault.bound_s", 0, "0", "an integer from 1"),
    ("resources[3].vault.revocation", "soft", None, 'write one of "hard", "bounded", "ttl_only"'),
    ("resources[3].vault.least_ttl_s", 901, "901", "a max_ttl_s of the resource of 906 at least.* is 900.*raise"),
    ("resources[3].vault.parameters.vhost", 1.5, "1.5", "is a float; write a string"),
    ("resources[3].vault.parameters.vhost", {"a": 1}, "{…}", "is a table; write a string"),
    ("resources[3].vault.parameters", {"a b": 1}, '"a b"', "is not the name of a parameter; use"),
    ("resources[2].require_dpop", True, "true", "is about tokens.*take it out"),
    ("resources[2].signing_algorithm", "EdDSA", None, "is about tokens.*take it out"),
]


@pytest.mark.parametrize(("path", "value", "shown", "remedy"), REFUSED, ids=lambda v: ascii(v)[:50])
def test_an_unsafe_or_wrong_value_is_refused_by_key_value_and_remedy(place, path, value, shown, remedy):
    problems = place.problems(spoiled(VALID, path, value))
    problem = next((p for p in problems if re.search(remedy, p)), problems[0])
    assert re.search(remedy, problem), problem
    assert problem.startswith(f"{place.file}: {path.partition('[')[0].partition('.')[0]}")
    assert (shown if shown is not None else value[:100] if isinstance(value, str) else "") in problem, problem
    assert "hunter2" not in problem
    assert problem.isprintable()
    # A value that only clashes with others may be reported at the other end; every other one is named where it stands.
    if "already" not in remedy and "used by no principal" not in remedy:
        key = re.escape(path)
        assert re.search(rf'{key}|{key.rpartition(".")[0]}\."', problem), problem


STRUCTURE = [
    ("vault.auth", ABSENT, "vault.auth: is missing; write a table such as { method ="),
    ("vault.address", ABSENT, "vault.address: is missing; write a string .*of the active node"),
    ("vault.lease_prefix_exclusive", ABSENT, "vault.lease_prefix_exclusive = false: must be true"),
    ("vault.tokenrole", "jit", "vault.tokenrole: is not a key of this version; did you mean token_role"),
    ("vault.token", "hvs.hunter2", "vault.token: is not read from here.*mode 0600, and write auth = "),
    ("vault.auth.secret_id", "hunter2", "vault.auth.secret_id: is not read from here.*write secret_id_file"),
    ("vault.auth.method", ABSENT, 'vault.auth.method: is missing; write one of "approle"'),
    ("vault.auth.role_id_file", ABSENT, "vault.auth.role_id_file: is missing; write a string"),
    ("vault.auth.role", "x", r"vault.auth.role: is not a key of this version; "),
    ("vault.auth.zzzz", "x", 'the keys with method "approle" are method, role_id_file, secret_id_file, mount'),
    ("keys.vault_transit", "transit/keys/broker", "keys.vault_transit: is there beside master_key_file; keep one"),
    ("resources[2].vault", ABSENT, r'resources\[2\]: has provider "vault" and no table vault; write vault = '),
    ("resources[0].vault", VALID["resources"][2]["vault"], r'\[0\].vault: has no meaning with provider "jwt"; write'),
    ("resources[2].vault.role", ABSENT, r"resources\[2\].vault.role: is missing; write a string"),
    ("resources[2].vault.engine", ABSENT, r'resources\[2\].vault.engine: is missing; write one of "database"'),
    ("resources[2].vault.rolle", "x", r"resources\[2\].vault.rolle: is not a key of this version; did you mean role"),
    ("resources[2].vault.bound_s", 5, r'vault.bound_s: is not a key.*the keys with engine "database" are engine, role'),
    ("resources[3].vault.bound_s", ABSENT, r"resources\[3\].vault.bound_s: bound_s goes with revocation bounded"),
    ("resources[3].vault.method", "read", r"resources\[3\].vault.method: a path that is read takes no parameters"),
    ("sever", {}, "sever: is not a key of this version; did you mean server"),
    ("server.wrokers", 2, "server.wrokers: is not a key of this version; did you mean workers"),
    ("principals[0].role", ["agent"], r"principals\[0\].role: is not a key.*did you mean roles"),
    ("store.zzz", 1, "store.zzz: is not a key of this version; the keys here are url"),
    ("server", "127.0.0.1:8080", r"server: is a string and must be a table; write \[server\]"),
    ("issuers", {"name": "corp"}, r"issuers: is a table and must be an array of tables; write \[\[issuers\]\]"),
    ("principals[1]", "crm", r"principals\[1\]: is a string and must be a table; write \[\[principals\]\]"),
    ("issuer", ABSENT, "issuer: is missing; write a string"),
    ("store", ABSENT, "store.url: is missing; write a string .*postgresql"),
    ("keys.master_key_file", ABSENT, "keys.master_key_file: is missing; write the path .*32 random bytes, or vault_tr"),
    ("principals[0].roles", ABSENT, r"principals\[0\].roles: is missing; write an array of strings .*verifier"),
    ("principals[0].kind", ABSENT, r'principals\[0\].kind: is missing; write one of "agent"'),
    ("resources[0].scopes", ABSENT, r"resources\[0\].scopes: is missing; write an array of strings"),
    ("principals[0].subject", ABSENT, r"principals\[0\]: has no subject.*exactly one of subject and subject_prefix"),
    ("principals[0].subject_prefix", "spiffe://prod.example/ns/", r"principals\[0\]: has both.*exactly one"),
    ("issuers[0].discovery", ABSENT, r"issuers\[0\]: has no key source; write exactly one of discovery, jwks_uri"),
    ("principals[1].name", ABSENT, r"principals\[1\].name: is missing; write a string"),
    ("issuers[0].name", 5, r"issuers\[0\].name = 5: is an integer; write a string"),
    ("issuers[0].discovery", False, r"issuers\[0\]: has no key source; write exactly one"),
    ("issuers[0].jwks_uri", "https://idp.example/k", r"issuers\[0\]: has 2 key sources \(discovery, jwks_uri\); write"),
]


@pytest.mark.parametrize(("path", "value", "message"), STRUCTURE, ids=lambda v: ascii(v)[:50])
def test_a_key_that_is_unknown_missing_or_one_too_many_is_named(place, path, value, message):
    assert re.search(message, place.the_problem(spoiled(VALID, path, value)))


def test_a_public_listener_is_refused_while_the_issuer_is_http(place):
    document = spoiled(spoiled(VALID, "issuer", "http://127.0.0.1:8080"), "server.listen", "0.0.0.0:8080")
    problem = place.the_problem(document)
    assert 'server.listen = "0.0.0.0:8080": is reachable from outside' in problem
    assert "listen on 127.0.0.1:8080, or make the issuer https" in problem


def test_an_issuer_that_no_principal_uses_is_refused(place):
    document = spoiled(VALID, "principals[2]", ABSENT)
    assert 'issuers[2].name = "local": is used by no principal' in place.the_problem(document)


def test_two_principals_for_the_same_identity_are_refused(place):
    twin = VALID["principals"][1] | {"name": "twin"}
    assert 'principals[3].subject = "crm": is already principals[1]' in place.the_problem(
        spoiled(VALID, "principals[3]", twin)
    )


def test_two_principals_that_their_claims_tell_apart_are_accepted(place):
    place.load(spoiled(VALID, "principals[3]", VALID["principals"][1] | {"name": "twin", "claims": {"tier": 1}}))


def added(**resource):
    """The first resource is one of a provider that was added."""
    providers = [{"name": "acme", "settings": {"url": "https://acme.example", "tries": 3}}]
    first = {name: VALID["resources"][0][name] for name in ("identifier", "scopes")}
    changed = spoiled(VALID, "resources[0]", first | {"provider": "acme"} | resource)
    return changed | {"providers": providers}


def test_a_provider_that_was_added_has_its_settings_and_its_resources_theirs(place):
    found = place.load(added(settings={"role": "reader", "deep": True}))
    assert found.providers == {"acme": {"url": "https://acme.example", "tries": 3}}
    assert "acme.example" not in repr(found)
    assert found.catalogue.resources[0].settings == {"role": "reader", "deep": True}
    assert place.load(added()).catalogue.resources[0].settings == {}


@pytest.mark.parametrize(
    ("spoil", "value", "said"),
    [
        ("providers[0].name", "vault", "is a provider that the broker has; write another"),
        ("providers[0].name", "other", r'provider = "acme": is no provider here; there are jwt, vault, other, and'),
        ("resources[0].vault", {"engine": "pki", "role": "r"}, "has no meaning with provider"),
        ("resources[0].require_dpop", True, "is about tokens.*take it out"),
        ("resources[1].settings", {"a": 1}, r"resources\[1\].settings.*has no meaning with provider.*take it out"),
        ("providers[0].settings", {"a b": 1}, "is not the name of a setting"),
    ],
)
def test_what_contradicts_an_added_provider_is_refused(place, spoil, value, said):
    with pytest.raises(ConfigurationError, match=said):
        place.load(spoiled(added(), spoil, value))


def test_all_problems_come_at_once(place):
    document = VALID
    spoils = [(path, value) for path, value, _, _ in REFUSED if path.startswith(("issuers[0].a", "tasks.", "redis."))]
    for path, value in dict(spoils).items():
        document = spoiled(document, path, value)
    place.key.chmod(0o644)
    found = place.problems(
        spoiled(document, "principals[0].rolls", []), {"BROKER__SERVER__WORKERS": "two", "BROKER__X": "1"}
    )
    for key in ("redis.url", "tasks.max_deadline_s", "issuers[0].algorithms", "master_key_file", "principals[0].rolls"):
        assert any(key in problem for problem in found), key
    assert any("BROKER__SERVER__WORKERS" in problem for problem in found)
    assert any("BROKER__X" in problem for problem in found)


def test_one_mistake_is_one_problem(place):
    problem = place.the_problem(spoiled(VALID, "issuers[1].max_lifetime_s", 0))
    assert "issuers[1].max_lifetime_s" in problem
    assert "principals" not in problem


# --- Files ----------------------------------------------------------------------------------------------------------


def test_the_master_key_is_the_bytes_of_its_file(place):
    assert read_master_key(place.key) == bytes(range(32))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o644])
def test_a_master_key_open_to_others_is_refused(place, mode):
    place.key.chmod(mode)
    problem = place.the_problem()
    assert f'keys.master_key_file = "master.key": {place.key} has mode {mode:04o}' in problem
    assert f"chmod 0600 {place.key}" in problem
    with pytest.raises(ConfigurationError, match="chmod 0600"):
        read_master_key(place.key)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_master_key_of_another_size_is_refused_without_showing_it(place, size):
    place.key.write_bytes(b"k" * size)
    problem = place.the_problem()
    assert "must have 32; make it with" in problem
    assert "kk" not in problem
    with pytest.raises(ConfigurationError, match="must have 32"):
        read_master_key(place.key)


def test_a_pipe_for_a_master_key_is_refused_and_not_waited_for(place):
    place.key.unlink()
    os.mkfifo(place.key, 0o600)
    assert "not a regular file" in place.the_problem()


@pytest.mark.parametrize("key", ["0f" * 32, "k" * 43, "k" * 43 + "="])
def test_a_master_key_written_into_the_configuration_is_not_shown(place, key):
    problem = place.the_problem(spoiled(VALID, "keys.master_key_file", key))
    assert "keys.master_key_file: looks like the key itself" in problem
    assert key not in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is not UTF-8 at byte 0; save it as UTF-8"),
        (b"permit\0", "has a NUL; take it out"),
        (b"/" * (256 * 1024 + 1), "more than the 262144 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["bad.cedar", "schema.cedarschema"])
def test_a_policy_file_that_cannot_be_read_as_text_is_refused(place, name, content, message):
    (place.directory / "policies" / name).write_bytes(content)
    problem = place.the_problem()
    assert 'policies.directory = "policies"' in problem
    assert f"/policies/{name} " in problem
    assert message in problem


def test_a_policy_file_of_exactly_the_most_bytes_is_accepted(place):
    (place.directory / "policies" / "big.cedar").write_bytes(b"/" * (256 * 1024))
    assert len(place.load().catalogue.policies["big.cedar"]) == 256 * 1024


def test_a_policy_that_is_no_file_is_refused_and_not_left_out(place):
    (place.directory / "policies" / "forbid.cedar").symlink_to("gone")
    assert "no file" in place.the_problem()


def test_a_policy_file_with_an_invisible_character_in_its_name_is_refused(place):
    (place.directory / "policies" / "a\nb.cedar").write_text("")
    problem = place.the_problem()
    assert "a\\u000Ab.cedar" in problem
    assert "rename it" in problem


@pytest.mark.parametrize("content", ["[]", "{}", '{"keys": []}', '{"keys": {}}'])
def test_a_file_that_is_no_key_set_is_refused(place, content):
    (place.directory / "keys.json").write_text(content)
    found = place.problems()
    assert len(found) == 2
    assert all('has no "keys"; write the issuer' in problem for problem in found)


@pytest.mark.parametrize(
    ("keys", "of_a_bundle"),
    [
        ([{"kty": "oct", "k": "c2VjcmV0", "kid": "one", "use": "sig"}], 2),
        ([PUBLIC | {"d": "AQAB", "kid": "one", "use": "sig"}], 2),
        ([PUBLIC | {"x": "AQAB", "kid": "one", "use": "sig"}], 2),
        ([{"kty": "EC"}], 2),
        ([PUBLIC | {"kid": "one", "use": "enc"}], 2),
        ([PUBLIC | {"kid": "one", "alg": "ES384"}], 2),
        ([PUBLIC | {"kid": "one", "use": "sig"}], 1),  # none of them is for JWT-SVIDs
        ([PUBLIC | {"use": "sig"}, PUBLIC | {"use": "jwt-svid"}], 1),  # without a kid
        ([PUBLIC | {"kid": f"{number}", "use": "sig"} for number in range(101)], 2),
    ],
)
def test_a_key_set_in_which_no_key_can_check_a_token_is_refused(place, keys, of_a_bundle):
    (place.directory / "keys.json").write_text(json.dumps({"keys": keys}))
    found = place.problems()
    assert len(found) == of_a_bundle
    assert all("/keys.json " in problem and "; write " in problem for problem in found)
    assert "c2VjcmV0" not in "".join(found)
    assert "issuers[1].spiffe_bundle_file" in found[0]


TRUSTED = ["broker.toml", "keys.json", "policies/crm.cedar", "policies/schema.cedarschema"]


@pytest.mark.parametrize("mode", [0o646, 0o666, 0o642])
@pytest.mark.parametrize("name", TRUSTED)
def test_a_file_that_everybody_may_write_is_refused(place, name, mode):
    place.load()
    (place.directory / name).chmod(mode)
    with pytest.raises(ConfigurationError) as refused:
        load(place.file, {})
    file = place.directory / name
    assert f"{file} has mode {mode:04o}, so that others may write it; chmod go-w {file}" in str(refused.value)


@pytest.mark.parametrize(
    ("group", "safe"),
    [
        (("me", 1000, []), True),
        (("me", 1000, ["me"]), True),
        (("me", 1000, ["mallory"]), False),
        (("staff", 1000, []), False),
        (("me", 1001, []), False),
        (None, False),
    ],
)
def test_a_file_that_a_group_may_write_is_refused_unless_the_group_is_its_owner(place, monkeypatch, group, safe):
    def found(_):
        if group is None:
            raise KeyError
        name, number, members = group
        return SimpleNamespace(gr_name=name, gr_gid=number, gr_mem=members)

    place.load()
    monkeypatch.setattr(grp, "getgrgid", found)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="me", pw_gid=1000))
    (place.directory / "policies" / "crm.cedar").chmod(0o664)
    if safe:
        assert place.load()
    else:
        assert "has mode 0664, so that others may write it" in place.the_problem()


def test_a_principal_of_an_issuer_of_people_could_never_call_and_is_refused(place):
    document = spoiled(VALID, "principals[1].issuer", "people")
    problems = [problem for problem in place.problems(document) if "principals[1].issuer" in problem]
    assert len(problems) == 1
    assert 'principals[1].issuer = "people": is an issuer of people' in problems[0]
    assert "take this principal out" in problems[0]


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_resource_that_is_the_broker_itself_is_refused(place, path):
    problem = place.the_problem(spoiled(VALID, "resources[1].identifier", f"https://broker.example{path}"))
    assert "is the broker itself" in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"issuer = ", "is not TOML: Invalid value .*correct it there"),
        (b'issuer = "a"\nissuer = "b"', "is not TOML"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (b"x = " + b"[" * 100_000, "nested too deeply"),
        (b"x = " + b"9" * 10_000, "is not TOML"),
        (b"#" * (4 * 1024 * 1024 + 1), "make it smaller"),
    ],
    ids=range(6),
)
def test_a_file_that_is_no_toml_is_refused(place, content, message):
    place.file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as refused:
        load(place.file, {})
    assert str(refused.value).startswith(f"{place.file}: ")


def test_a_configuration_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"there is no file .*/broker\.toml; make it, or correct the path"):
        load(tmp_path / "broker.toml", {})


# --- Vault ----------------------------------------------------------------------------------------------------------


def test_a_resource_of_vault_without_a_section_that_says_where_it_is_is_refused(place):
    found = place.problems(spoiled(VALID, "vault", ABSENT))
    assert len(found) == 2
    assert 'resources[2].provider = "vault": is Vault, and there is no section [vault]' in found[0]


def test_keys_may_be_in_vault_if_there_is_one(place):
    document = spoiled(VALID, "keys", {"vault_transit": "transit/keys/broker"})
    found = place.load(document)
    assert (found.vault_transit, found.master_key_file) == ("transit/keys/broker", None)
    document = spoiled(spoiled(spoiled(document, "vault", ABSENT), "resources[3]", ABSENT), "resources[2]", ABSENT)
    assert "keys.vault_transit" in (problem := place.the_problem(document))
    assert "there is no section [vault]; add one" in problem


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o622])
@pytest.mark.parametrize("name", ["role_id_file", "secret_id_file", "token_file"])
def test_a_secret_for_vault_that_is_open_to_others_is_refused(place, name, mode):
    document = VALID
    if name == "token_file":
        document = spoiled(VALID, "vault.auth", {"method": "token_file", "token_file": "token"})
    file = place.directory / document["vault"]["auth"][name]
    file.chmod(mode)
    problem = place.the_problem(document)
    assert f"vault.auth.{name} = " in problem
    assert f"{file} has mode {mode:04o}, open to others; chmod 0600 {file}" in problem


@pytest.mark.parametrize("method", ["kubernetes", "jwt"])
def test_a_token_that_the_platform_writes_has_its_mode_but_no_other_writer(place, method):
    document = spoiled(VALID, "vault.auth", {"method": method, "role": "broker", "token_file": "token"})
    (place.directory / "token").chmod(0o644)
    place.load(document)
    (place.directory / "token").chmod(0o666)
    assert "so that others may write it; chmod go-w" in place.the_problem(document)


@pytest.mark.parametrize("content", [b"", b"\n", b"hunter2 hunter2", b"hunter2\nhunter2", b"\xff", b"x" * 70_000])
def test_a_file_that_holds_no_secret_is_refused_without_showing_it(place, content):
    (place.directory / "secret-id").write_bytes(content)
    problem = place.the_problem()
    assert "secret-id does not hold one word of printable ASCII; write the secret id there" in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    "secret", ["6b1a4f4e-9d0e-4c3c-8a53-2f0de3c1a9aa", "hvs.CAESIJ3hunter2hunter2", "s.hunter2hunter2hunter2aaaa"]
)
@pytest.mark.parametrize("name", ["role_id_file", "secret_id_file"])
def test_a_secret_for_vault_that_is_written_into_the_configuration_is_not_shown(place, name, secret):
    problem = place.the_problem(spoiled(VALID, f"vault.auth.{name}", secret))
    assert f"vault.auth.{name}: looks like the" in problem
    assert secret not in problem


def test_who_is_about_to_make_the_files_of_the_login_need_not_have_them(place):
    for name in ("role-id", "secret-id"):
        (place.directory / name).unlink()
    assert len(place.problems()) == 2
    assert place.load(before_vault_setup=True).vault.auth.secret_id_file == str(place.directory / "secret-id")


def test_the_provider_has_the_last_word_about_vault(place):
    # What one reader of addresses takes and the other does not is refused, whichever it is.
    problem = place.the_problem(spoiled(VALID, "vault.address", "https://vault.example:8200//"))
    assert "vault.address" in problem


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text() | st.from_regex(r"https?://[a-z0-9.\[\]:@?#/%-]{1,30}", fullmatch=True))
def test_an_address_of_vault_that_is_accepted_is_one_the_provider_accepts(playground, text):
    try:
        found = playground.load(spoiled(VALID, "vault.address", text))
    except ConfigurationError as refused:
        assert any("vault.address" in problem for problem in refused.problems)
    else:
        address_of(found.vault.address, "address")


def test_the_administrator_of_vault_is_who_the_environment_says():
    found = vault_administrator({"VAULT_ADDR": "https://vault.example:8200", "VAULT_TOKEN": "hvs.hunter2"})
    assert found.address == "https://vault.example:8200"
    assert found.token.reveal() == "hvs.hunter2"
    assert "hunter2" not in repr(found)
    nobody = vault_administrator({"VAULT_ADDR": "", "VAULT_TOKEN": ""})
    assert (nobody.address, nobody.token) == (None, None)
    with pytest.raises(ConfigurationError, match=r"environment: VAULT_ADDR = .*plain http off loopback"):
        vault_administrator({"VAULT_ADDR": "http://vault.example:8200"})


# --- The environment ------------------------------------------------------------------------------------------------


def test_the_environment_overrides_the_file(place):
    found = place.load(
        environ={
            "BROKER__ISSUER": "https://other.example",
            "BROKER__STORE__URL": "postgresql+psycopg://u:hunter2@db.example/broker",
            "BROKER__SERVER__WORKERS": "2",
            "BROKER__GRANTS__MAX_DELEGATION_DEPTH": "0",
            "BROKER_URL": "not ours",
            "PATH": "/bin",
        }
    )
    assert found.issuer == "https://other.example"
    assert found.store_url == "postgresql+psycopg://u:hunter2@db.example/broker"
    assert found.server.workers == 2
    assert found.limits.max_delegation_depth == 0


def test_the_environment_reaches_into_the_login_at_vault(place):
    environ = {
        "BROKER__VAULT__ADDRESS": "http://127.0.0.1:8200",
        "BROKER__VAULT__DEADLINE_S": "7",
        "BROKER__VAULT__LEASE_PREFIX_EXCLUSIVE": "true",
        "BROKER__VAULT__AUTH__METHOD": "token_file",
        "BROKER__VAULT__AUTH__TOKEN_FILE": "token",
    }
    found = place.load(spoiled(VALID, "vault", ABSENT), environ).vault
    assert (found.address, found.deadline) == ("http://127.0.0.1:8200", timedelta(seconds=7))
    assert found.auth == VaultAuth(method="token_file", token_file=str(place.directory / "token"))
    moved = place.load(environ={"BROKER__VAULT__AUTH__SECRET_ID_FILE": "token"}).vault.auth
    assert moved.secret_id_file == str(place.directory / "token")
    assert moved.role_id_file == str(place.directory / "role-id")


def test_the_environment_may_give_a_section_the_file_does_not_have(place):
    document = spoiled(VALID, "redis", ABSENT)
    assert place.load(document, {"BROKER__REDIS__URL": "redis://c.example"}).redis_url == "redis://c.example"


def test_the_environment_of_the_process_is_read_unless_another_is_given(place, monkeypatch):
    monkeypatch.setenv("BROKER__ISSUER", "https://other.example")
    assert place.load().issuer == "https://broker.example"
    assert load(place.file).issuer == "https://other.example"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BROKER__SERVER__WORKERS", "two", 'WORKERS = "two": is a string; write an integer from 1 to 64'),
        ("BROKER__SERVER__WORKERS", "1.0", 'WORKERS = "1.0": is a string; write an integer'),
        ("BROKER__SERVER__WORKERS", "true", 'WORKERS = "true": is a string; write an integer'),
        ("BROKER__SERVER__WORKERS", "٢", 'WORKERS = "٢": is a string; write an integer'),
        ("BROKER__SERVER__WORKERS", "65", "WORKERS = 65: is out of bounds; write an integer from 1 to 64"),
        ("BROKER__SERVER__WORKERS", "", 'WORKERS = "": is a string; write an integer'),
        ("BROKER__ISSUER", "http://broker.example", 'ISSUER = "http://broker.example": is plain http off loopback'),
        ("BROKER__ISSUER", "\udcff", 'ISSUER = "\\uDCFF": has a character that cannot be seen'),
        ("BROKER__KEYS__MASTER_KEY_FILE", "gone", 'FILE = "gone": there is no file'),
        (
            "BROKER__SERVER__WROKERS",
            "2",
            "WROKERS overrides no key of this version; did you mean BROKER__SERVER__WORKERS?",
        ),
        ("BROKER__issuer", "x", "BROKER__issuer overrides no key of this version"),
        (
            "BROKER__QQQQQQQQQQQQQQQQQQQQ",
            "x",
            "overrides no key of this version; what can be set is BROKER__ALERTS__SECRET_FILE",
        ),
        ("BROKER__ISSUERS__0__NAME", "x", "BROKER__ISSUERS__0__NAME overrides no key"),
        ("BROKER__SERVER", "x", "BROKER__SERVER overrides no key"),
        ("BROKER__VAULT__TOKEN", "hunter2", "BROKER__VAULT__TOKEN overrides no key"),
        ("BROKER__VAULT__AUTH", "hunter2", "BROKER__VAULT__AUTH overrides no key"),
        ("BROKER__VAULT__AUTH__METHOD", "userpass", 'METHOD = "userpass": is not known here; write one of "approle"'),
        ("BROKER__VAULT__AUTH__SECRET_ID_FILE", "gone", 'FILE = "gone": there is no file'),
    ],
)
def test_a_variable_that_is_wrong_is_refused_by_its_name(place, variable, value, message):
    problem = place.the_problem(environ={variable: value})
    assert problem.startswith("environment: BROKER__")
    assert message in problem
    assert "hunter2" not in problem


def test_a_boolean_in_the_environment_is_true_or_false():
    key = keys._boolean("x", "", default=False)
    assert [from_text(key, text) for text in ("true", "false", "1", "True")] == [True, False, "1", "True"]


# --- Secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://broker:hunter2@db.example/broker",
        "postgresql+psycopg://broker:hunter2@db.example",
        "postgresql+psycopg://broker:hunter2@db.example:port/broker",
        "postgresql+psycopg://broker:hun/hunter2@db.example/broker",
        "postgresql+psycopg://broker:a@hunter2@db.example",
        "postgresql+psycopg://broker:a?hunter2@db.example",
        "postgresql+psycopg://db.example/?password=hunter2",
        "postgresql+psycopg://db.example?password=x@hunter2",
        "postgresql+psycopg://db.example/a/b#hunter2",
        "postgresql+psycopg://:hunter2",
        "postgresql+psycopg:/broker:hunter2@db.example/broker",
        "postgresql+psycopg//broker:hunter2@db.example/broker",
        "host=db.example password=hunter2",
        "hunter2",
        "broker:hunter2@db.example/broker",
        "sqlite://u:hunter2@/x.db",
        "sqlite:///x.db?key=hunter2",
        "postgresql+psycopg://broker:hunter2@db.example/broker\n",
        ["postgresql+psycopg://broker:hunter2@db.example/broker"],
        {"password": "hunter2"},
        "https://db.example/broker?password=a@hunter2",
    ],
)
@pytest.mark.parametrize("path", ["store.url", "redis.url", "store.pasword", "store", "redis", "passwords"])
def test_a_password_is_never_in_a_message(place, path, url):
    for problem in place.problems(spoiled(VALID, path, url)):
        assert "hunter2" not in problem


@pytest.mark.parametrize("variable", ["BROKER__STORE__URL", "BROKER__REDIS__URL", "BROKER__STORE__PASSWORD"])
def test_a_password_in_the_environment_is_never_in_a_message(place, variable):
    assert "hunter2" not in place.the_problem(environ={variable: "mysql://u:hunter2@db.example/broker"})


@pytest.mark.parametrize(
    "url", ["http://h/k?key=hunter2", "http://h/k?key=a@hunter2", "http://a:hunter2@h/k", "http://a?b:hunter2@h/k"]
)
@pytest.mark.parametrize("path", ["issuer", "issuers[0].issuer", "issuers[3].jwks_uri", "resources[0].identifier"])
def test_what_a_url_carries_is_never_in_a_message(place, path, url):
    for problem in place.problems(spoiled(VALID, path, url)):
        assert "hunter2" not in problem


def test_a_message_about_a_url_still_says_which_server(place):
    problem = place.the_problem(spoiled(VALID, "store.url", "mysql://u:hunter2@db.example/broker"))
    assert 'store.url = "mysql://[not shown]@db.example/broker": is neither' in problem


# --- Junk -----------------------------------------------------------------------------------------------------------


def paths(value, at=()):
    yield at
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members:
        yield from paths(member, (*at, name))


PATHS = [path for path in paths(VALID) if path]
WORDS = """* / :// spiffe:// https://[ https://a:b unix: sqlite:/// sqlite://// postgresql+psycopg://[/x redis://a:b:c
urn: .. none ~ spiffe://a/../b [::]:1"""
words = st.sampled_from([*WORDS.split(), "", "\0", "x" * 999, "a" * 300 + "/"])
leaves = (
    st.booleans()
    | st.integers()
    | st.integers(min_value=2**62, max_value=2**20000)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | words
    | st.builds(str.__add__, words, words)
)
junk = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=6,
)


def put(document, path, value):
    """`spoiled` in place, where an earlier change may have taken the place away."""
    *above, last = path
    try:
        for step in above:
            document = document[step]
        document[last] = value
    except (KeyError, IndexError, TypeError):
        pass


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("junk"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(changes=st.lists(st.tuples(st.sampled_from(PATHS), junk), min_size=1, max_size=3))
@example(changes=[(("issuers",), [{}, {"name": []}])])
@example(changes=[(("principals", 0, "claims"), {"a": {"b": 1}, "": 2**9999})])
def test_junk_in_any_place_is_at_worst_a_configuration_error(playground, changes):
    document = copy.deepcopy(VALID)
    for path, value in changes:
        put(document, path, value)
    try:
        playground.load(document)
    except ConfigurationError as refused:
        assert refused.problems
        assert all(problem.isprintable() for problem in refused.problems)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from([*VALID, "vault", "x"]), junk, max_size=5))
def test_a_document_of_junk_is_at_worst_a_configuration_error(playground, document):
    with pytest.raises(ConfigurationError):
        playground.load(document)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_of_junk_are_at_worst_a_configuration_error(playground, content):
    playground.file.write_bytes(content)
    with pytest.raises(ConfigurationError):
        load(playground.file, {})


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(
        ["BROKER__ISSUER", "BROKER__STORE__URL", "BROKER__SERVER__WORKERS", "BROKER__SERVER__LISTEN", "BROKER__X"]
    ),
    st.text() | words,
)
def test_junk_in_the_environment_is_at_worst_a_configuration_error(playground, variable, value):
    try:
        playground.load(environ={variable: value})
    except ConfigurationError as refused:
        assert all(problem.isprintable() for problem in refused.problems)


class TestAlerts:
    HOOK = "https://chat.example/hooks/T0/B0"

    def configured(self, place, url=HOOK, mode=0o600, **alerts):
        for name, content in (("hook", url), ("signing", "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")):
            (place.directory / name).write_text(content)
            (place.directory / name).chmod(mode)
        return VALID | {"alerts": {"webhook_url_file": "hook"} | alerts}

    def test_without_the_section_nobody_is_told_but_the_log(self, place):
        assert place.load().alerts is None

    def test_the_files_are_read_and_shown_nowhere(self, place):
        found = place.load(self.configured(place, secret_file="signing"))
        assert found.alerts.webhook_url.reveal() == self.HOOK
        assert found.alerts.secret.reveal() == "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
        assert "hooks" not in repr(found) and "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=" not in repr(found)

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"mode": 0o644}, "open to others"),
            ({"url": "ftp://chat.example/secret-path"}, "https"),
            ({"url": "http://chat.example/secret-path"}, "https"),
            ({"url": "two words"}, "does not hold one word"),
            ({"webhook_url_file": "nowhere"}, "there is no file"),
        ],
    )
    def test_what_is_wrong_is_said_without_the_address(self, place, wrong, says):
        problem = place.the_problem(self.configured(place, **wrong))
        assert "alerts.webhook_url_file" in problem and says in problem
        assert "secret-path" not in problem

    def test_a_secret_that_signs_nothing_is_refused(self, place):
        self.configured(place)
        problem = place.the_problem(VALID | {"alerts": {"secret_file": "signing"}})
        assert "alerts.secret_file" in problem


class TestTargets:
    def configured(self, place, url="postgresql://watch:s3cret@db.example/orders", **row):
        (place.directory / "orders-url").write_text(url)
        (place.directory / "orders-url").chmod(0o600)
        return VALID | {"targets": [{"name": "orders", "url_file": "orders-url", "heir": "jit_heir"} | row]}

    def test_a_database_that_is_looked_at_itself_is_named_and_its_url_shown_nowhere(self, place):
        document = spoiled(self.configured(place), "resources[2].vault.target", "orders")
        found = place.load(document)
        assert [(target.name, target.heir) for target in found.targets] == [("orders", "jit_heir")]
        assert found.catalogue.resource("urn:db:orders:readonly").settings["target"] == "orders"
        assert "s3cret" not in repr(found)

    def test_a_target_that_is_not_there_is_refused_by_the_resource_that_names_it(self, place):
        problem = place.the_problem(spoiled(self.configured(place), "resources[2].vault.target", "order"))
        assert "resources" in problem and "target" in problem and "orders" in problem

    @pytest.mark.parametrize(
        ("wrong", "key"),
        [({"url": "mysql://watch:s3cret@db.example/orders"}, "url_file"), ({"heir": "Heir; DROP"}, "heir")],
    )
    def test_what_is_wrong_is_said_without_the_password(self, place, wrong, key):
        problem = place.the_problem(self.configured(place, **wrong))
        assert key in problem and "s3cret" not in problem

    def test_who_is_about_to_make_its_login_need_not_have_the_file(self, place):
        document = self.configured(place)
        (place.directory / "orders-url").unlink()
        assert "targets[0].url_file" in place.the_problem(document)
        (target,) = place.load(document, before_vault_setup=True).targets
        assert target.url_file == place.directory / "orders-url"

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o622])
    def test_a_url_that_is_open_to_others_is_refused(self, place, mode):
        document = self.configured(place)
        (place.directory / "orders-url").chmod(mode)
        assert "open to others; chmod 0600" in place.the_problem(document)


MAIL = {"format": "email", "host": "mail.example", "sender": "b@example.org", "recipients": ["s@example.org"]}


class TestNotify:
    HOOK = "https://chat.example/hooks/T0/B0"

    def configured(self, place, via, *, url=HOOK, mode=0o600, **more):
        for name, content in (("hook", url), ("signing", "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")):
            (place.directory / name).write_text(content)
            (place.directory / name).chmod(mode)
        return VALID | {"notify": [{"name": "them", "via": via} | more]}

    def test_without_it_nobody_is_told(self, place):
        assert place.load().notify == ()

    def test_hooks_and_mail_are_read_and_their_secrets_shown_nowhere(self, place):
        document = self.configured(place, {"format": "json", "url_file": "hook", "secret_file": "signing"})
        document["notify"].append({"name": "chat", "via": {"format": "slack", "url_file": "hook"}})
        document["notify"].append({"name": "mail", "via": MAIL | {"user": "b", "password_file": "signing"}})
        hook, chat, mail = place.load(document).notify
        assert (hook.format, chat.format, mail.format) == ("json", "slack", "email")
        assert hook.url.reveal() == self.HOOK and hook.secret is not None and chat.secret is None
        assert (mail.mail.port, mail.mail.tls, mail.mail.recipients) == (587, "starttls", ("s@example.org",))
        assert "hooks" not in repr((hook, chat, mail)) and "whsec" not in repr((hook, chat, mail))

    @pytest.mark.parametrize(
        ("via", "more", "at", "says"),
        [
            ({"format": "json", "url_file": "hook"}, {"mode": 0o644}, "notify[0].via.url_file", "open to others"),
            (
                {"format": "teams", "url_file": "hook"},
                {"url": "http://chat.example/x"},
                "notify[0].via.url_file",
                "https",
            ),
            ({"format": "slack", "url_file": "nowhere"}, {}, "notify[0].via.url_file", "there is no file"),
            ({"format": "pigeon"}, {}, "notify[0].via.format", "json"),
            (
                {"format": "slack", "url_file": "hook", "secret_file": "signing"},
                {},
                "notify[0].via.secret_file",
                "is not a key",
            ),
            (
                {"format": "slack", "url_file": "hook"},
                {"groups": ["securty"]},
                "notify[0].groups[0]",
                "no principal has",
            ),
            (MAIL | {"tls": "none"}, {}, "notify[0].via.tls", "in the clear"),
            (MAIL | {"recipients": []}, {}, "notify[0].via.recipients", "names nobody"),
            (MAIL | {"recipients": ["a@b.c\nBcc: x@y.z"]}, {}, "notify[0].via.recipients[0]", ""),
            (MAIL | {"sender": "Broker <b@example.org>"}, {}, "notify[0].via.sender", "is not an address"),
            (MAIL | {"user": "b"}, {}, "notify[0].via.user", "belong together"),
            (MAIL | {"host": "mail example"}, {}, "notify[0].via.host", "name of a host"),
        ],
    )
    def test_what_is_wrong_is_said(self, place, via, more, at, says):
        problem = place.the_problem(self.configured(place, via, **more))
        assert at in problem and says in problem
        assert "chat.example/x" not in problem
