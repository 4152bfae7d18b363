"""A broker whose keys a real OpenBao seals, killed and started again while that is sealed itself."""

from pathlib import Path

import pytest

from tests.processes import PATIENCE_S, until
from tests.services.sealings import KEY, OnOpenBao


@pytest.fixture
def vault(openbao, tmp_path):
    made = OnOpenBao(openbao, tmp_path)
    yield made
    made.close()


def seal_with(vault, deployment):
    """Write into the configuration that a key in Vault seals the broker's keys."""
    settings = vault.settings
    text = deployment.configuration.read_text().replace('master_key_file = "master.key"', f'vault_transit = "{KEY}"')
    deployment.configuration.write_text(
        f'{text}\n[vault]\naddress = "{settings.address}"\nlease_prefix_exclusive = true\n'
        f'auth = {{ method = "token_file", token_file = "{settings.auth.token_file}" }}\n'
    )


def test_it_starts_while_vault_is_sealed_verifies_revokes_and_signs_when_vault_is_open(deployment, vault):
    seal_with(vault, deployment)
    with deployment.broker() as broker:
        task = broker.open_task()
        kept, ended = (broker.grant(task) for _ in range(2))
        published = broker.get("/oauth2/jwks").json()
        vault.falls_silent()
        try:
            broker.kill()
            broker.start()
            broker.until_ready()
            assert broker.get("/oauth2/jwks").json() == published
            assert broker.is_active(kept.token)
            receipt = broker.post(f"/v1/grants/{ended.id}/revoke", "summarizer", {})
            assert (receipt.status_code, receipt.json()["jws"]) == (200, None)
            assert not broker.is_active(ended.token)
            refused = broker.ask(task)
            assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
            # Who rotates by hand is told, and nothing changes.
            rotated = deployment.run("keys", "rotate")
            assert (rotated.returncode, "Traceback" in rotated.stderr) == (1, False)
        finally:
            vault.answers_again()
        until(lambda: broker.ask(task).status_code == 201, within_s=PATIENCE_S, what="the next token")
        assert deployment.run("keys", "rotate").returncode == 0
        assert broker.is_active(kept.token)
        assert broker.ask(task).status_code == 201
    log = broker.log.read_text()
    assert "the signing keys were not confirmed" in log
    assert Path(vault.settings.auth.token_file).read_text() not in log
