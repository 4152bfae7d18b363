import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.domain.errors import ConfigurationError
from broker.providers import jose
from broker.providers.dev_issuer import DevIssuer
from broker.providers.key_sets import KeySets
from tests.workloads import NOW

BROKER = "http://127.0.0.1:8080"


def test_its_tokens_are_verified_by_its_key_file(tmp_path):
    dev = DevIssuer.create_or_load(tmp_path / "var")
    token = dev.token("summarizer", BROKER, NOW)
    key = KeySets().key_for(dev.trusted(), jose.unverified(token).key_id, "ES256", NOW)
    claims = jose.verify(
        token,
        key=key.key,
        algorithms=dev.trusted().algorithms,
        issuer=dev.issuer,
        audience=BROKER,
        now=NOW,
        max_lifetime=timedelta(hours=1),
    )
    assert claims["sub"] == "summarizer"


def test_it_is_the_same_issuer_the_next_time(tmp_path):
    first = DevIssuer.create_or_load(tmp_path)
    first.jwks_file.unlink()
    again = DevIssuer.create_or_load(tmp_path)
    assert again.kid == first.kid
    assert json.loads(again.jwks_file.read_bytes())["keys"][0]["kid"] == first.kid


def test_two_that_begin_at_once_become_one(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: DevIssuer.create_or_load(tmp_path), range(8)))
    assert len({dev.kid for dev in made}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev-issuer.jwks.json", "dev-issuer.pem"]


def test_its_key_is_only_for_its_owner(tmp_path):
    """INV-30."""
    dev = DevIssuer.create_or_load(tmp_path)
    key_file = tmp_path / "dev-issuer.pem"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert "d" not in json.loads(dev.jwks_file.read_bytes())["keys"][0]
    assert "PrivateKey" not in repr(dev)
    key_file.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        DevIssuer.create_or_load(tmp_path)


@pytest.mark.parametrize("other", [False, True])
def test_a_key_file_that_holds_no_key_of_ours_is_refused(tmp_path, other):
    DevIssuer.create_or_load(tmp_path)
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "dev-issuer.pem").write_bytes(pem if other else b"not a key")
    with pytest.raises(ConfigurationError, match="delete it"):
        DevIssuer.create_or_load(tmp_path)


@pytest.mark.parametrize("audience", ["https://broker.example", "http://127.0.0.1.evil.test", "", "http://10.0.0.1"])
def test_it_makes_no_token_for_a_broker_elsewhere(tmp_path, audience):
    with pytest.raises(ConfigurationError, match="loopback"):
        DevIssuer.create_or_load(tmp_path).token("summarizer", audience, NOW)
