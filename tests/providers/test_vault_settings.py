"""What the configuration may say of Vault, and what an agent may send: nothing of either leads anywhere else."""

import base64
import pickle
from dataclasses import FrozenInstanceError
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.errors import ConfigurationError, Invalid
from broker.providers import base
from broker.providers.base import RevocationClass, SecretData
from broker.providers.vault import SecretSource, VaultAuth, VaultSettings
from broker.providers.vault.settings import path_of
from tests.openbao import DATABASE, GENERIC, PKI, PKI_ISSUE, SSH
from tests.providers.contract import csr, ssh_key

TABLE = {
    "address": "https://vault.example:8200",
    "auth": {"method": "approle", "role_id_file": "role-id", "secret_id_file": "secret-id"},
    "lease_prefix_exclusive": True,
}
# What must not become part of a path.
HOSTILE = [
    "",
    "/",
    "a/",
    "/a",
    "a//b",
    "..",
    "../x",
    "a/../b",
    ".a",
    "a b",
    "a\n",
    "a%2fb",
    "a?x",
    "a#x",
    "a*",
    "+",
    "ä",
]


def test_the_vault_table_of_the_documentation_is_read():
    settings = VaultSettings.parse({**TABLE, "namespace": "", "token_role": "jit"})
    assert (settings.address, settings.deadline) == ("https://vault.example:8200", timedelta(seconds=10))
    assert settings.auth == VaultAuth(
        method="approle", mount="approle", role_id_file="role-id", secret_id_file="secret-id"
    )
    with pytest.raises(FrozenInstanceError):
        settings.address = "https://elsewhere.example"


@pytest.mark.parametrize(
    ("changed", "member"),
    [
        ({"address": "vault.example:8200"}, "address"),
        ({"address": "http://vault.example:8200"}, "address"),
        ({"address": "https://vault.example:8200/v1"}, "address"),
        ({"address": "https://user:pass@vault.example"}, "address"),
        ({"address": "https://vault.example?x=1"}, "address"),
        ({"address": "https://vault.example\n.evil.test"}, "address"),
        ({"address": "http://127.0.0.1@evil.test"}, "address"),
        ({"address": 7}, "address"),
        ({"namespace": "a/../b"}, "namespace"),
        ({"token_role": "../x"}, "token_role"),
        ({"ca_file": "/nonexistent/ca.pem"}, "ca_file"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": 61}, "deadline_s"),
        ({"deadline_s": "10"}, "deadline_s"),
        ({"deadline_s": True}, "deadline_s"),
        ({"lease_prefix_exclusive": False}, "lease_prefix_exclusive"),
        ({"lease_prefix_exclusive": "yes"}, "lease_prefix_exclusive"),
        ({"adress": "https://vault.example"}, "adress"),
        ({"auth": None}, "auth"),
        ({"auth": {}}, "auth.method"),
        ({"auth": {"method": "userpass"}}, "auth.method"),
        ({"auth": {"method": "approle", "role_id_file": "x"}}, "auth.secret_id_file"),
        ({"auth": {"method": "jwt", "role": "x"}}, "auth.token_file"),
        ({"auth": {"method": "jwt", "role": "../x", "token_file": "x"}}, "auth.role"),
        ({"auth": {"method": "jwt", "role": "x", "token_file": "x", "mount": "a/../b"}}, "auth.mount"),
        ({"auth": {"method": "token_file", "token_file": "x", "role": "x"}}, "auth.role"),
        ({"auth": {"method": "token_file", "token_file": "x", "mount": "x"}}, "auth.mount"),
        ({"auth": {"method": "token_file", "token_file": "x", "password": "x"}}, "auth.password"),
    ],
    ids=str,
)
def test_a_vault_table_that_is_wrong_is_refused_by_the_name_of_its_key(changed, member):
    with pytest.raises(Invalid) as refused:
        VaultSettings.parse({**TABLE, **changed})
    assert refused.value.member == member


def test_the_prefix_must_be_said_to_be_ours_alone():
    table = {name: value for name, value in TABLE.items() if name != "lease_prefix_exclusive"}
    with pytest.raises(Invalid, match="nobody else may take secrets"):
        VaultSettings.parse(table)


def test_a_kubernetes_login_finds_its_token_where_kubernetes_puts_it():
    auth = VaultAuth(method="kubernetes", role="broker")
    assert auth.token_file == "/var/run/secrets/kubernetes.io/serviceaccount/token"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("key", ["mount", "role", "token_role"])
def test_no_part_of_a_path_leads_elsewhere(key, text):
    """INV-31."""
    with pytest.raises(Invalid) as refused:
        SecretSource.parse({**DATABASE, key: text})
    assert refused.value.member == key


@given(st.text())
def test_whatever_is_a_path_is_the_path_it_seems_to_be(text):
    try:
        path = path_of(text, "mount")
    except Invalid:
        return
    assert path == text
    assert not set(path) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-/")
    assert not any(part.startswith(".") or not part for part in path.split("/"))


@pytest.mark.parametrize(
    ("table", "path", "revocation", "prefix"),
    [
        (DATABASE, "database/creds/jit-orders-ro", RevocationClass.HARD, "database/creds/jit-orders-ro/"),
        (PKI, "pki/sign/jit-agent", RevocationClass.BOUNDED, "pki/sign/jit-agent/"),
        ({"engine": "pki", "role": "jit"}, "pki/sign/jit", RevocationClass.TTL_ONLY, "pki/sign/jit/"),
        (PKI_ISSUE, "pki/issue/jit-agent-with-key", RevocationClass.BOUNDED, "pki/issue/jit-agent-with-key/"),
        (SSH, "ssh/sign/jit-host", RevocationClass.TTL_ONLY, None),
        (GENERIC, "database/creds/jit-orders-ro", RevocationClass.HARD, "database/creds/jit-orders-ro/"),
    ],
    ids=lambda value: value["engine"] if isinstance(value, dict) else None,
)
def test_what_a_resource_says_becomes_one_path_one_class_and_one_prefix(table, path, revocation, prefix):
    source = SecretSource.parse(table)
    assert (source.path, source.revocation, source.lease_prefix) == (path, revocation, prefix)


@pytest.mark.parametrize(
    ("table", "member"),
    [
        ({}, "engine"),
        ({"engine": "kv", "role": "x"}, "engine"),
        ({"engine": ["database"], "role": "x"}, "engine"),
        ({"engine": "database"}, "role"),
        ({**DATABASE, "path": "creds/x"}, "path"),
        ({**DATABASE, "revocation": "hard"}, "revocation"),
        ({**PKI, "operation": "sign-verbatim"}, "operation"),
        ({**PKI, "bound_s": 0}, "bound_s"),
        ({**PKI, "bound_s": "60"}, "bound_s"),
        ({"engine": "pki", "role": "x", "operation": "issue"}, "common_name"),
        ({**PKI_ISSUE, "common_name": "{agent}.example"}, "common_name"),
        ({"engine": "ssh", "role": "x"}, "principals"),
        ({**SSH, "principals": ""}, "principals"),
        ({**SSH, "principals": "deploy,,root"}, "principals"),
        ({**SSH, "principals": "*"}, "principals"),
        ({**GENERIC, "revocation": "soft"}, "revocation"),
        ({**GENERIC, "revocation": "bounded"}, "bound_s"),
        ({**GENERIC, "bound_s": 60}, "bound_s"),
        ({**GENERIC, "path": "creds/../../sys/raw"}, "path"),
        ({**GENERIC, "method": "delete"}, "method"),
        ({**GENERIC, "ttl_parameter": "ttl"}, "method"),
        ({**GENERIC, "method": "write", "ttl_parameter": "t t"}, "ttl_parameter"),
        ({**GENERIC, "method": "write", "parameters": {"x": ["y"]}}, "parameters"),
        ({**GENERIC, "method": "write", "parameters": {"x y": "z"}}, "parameters"),
        ({**GENERIC, "least_ttl_s": 0}, "least_ttl_s"),
    ],
    ids=str,
)
def test_a_vault_table_of_a_resource_that_is_wrong_is_refused_by_the_name_of_its_key(table, member):
    with pytest.raises(Invalid) as refused:
        SecretSource.parse(table)
    assert refused.value.member == member


# --- what an agent sends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [DATABASE, PKI_ISSUE, GENERIC], ids=lambda table: table["engine"])
def test_an_engine_that_takes_nothing_is_sent_nothing(table):
    with pytest.raises(Invalid, match="it takes: none"):
        SecretSource.parse(table).checked({"ttl": "9999h"})


@pytest.mark.parametrize("name", ["common_name", "alt_names", "ttl", "role", "CSR", "csr\n"])
def test_a_parameter_outside_the_closed_set_is_refused_by_its_name(name):
    with pytest.raises(Invalid, match="takes no parameter"):
        SecretSource.parse(PKI).checked({"csr": csr(), name: "evil.test"})


def signed_by_another(request_pem):
    """A request whose signature is not by the key it is for."""
    request = x509.load_pem_x509_csr(request_pem.encode())
    raw = bytearray(request.public_bytes(Encoding.DER))
    raw[-1] ^= 1
    body = base64.encodebytes(bytes(raw)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


def weak():
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a.agents.example")])
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is missing"),
        ("x", "in PEM"),
        (csr() + csr(), "in PEM"),
        ("# comment\n" + csr(), "in PEM"),
        (csr().replace("REQUEST", "X"), "in PEM"),
        ("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----", "cannot be read"),
        (signed_by_another(csr()), "not signed by the key"),
        (weak(), "RSA from 2048"),
        ("x" * 20_000, "more than 16384"),
    ],
    ids=range(9),
)
def test_a_certificate_request_that_proves_nothing_is_refused_before_vault_is_asked(text, why):
    with pytest.raises(Invalid, match=why) as refused:
        SecretSource.parse(PKI).checked({"csr": text})
    assert refused.value.member == "parameters.csr"


def test_a_certificate_request_is_passed_on_as_it_was_understood():
    """INV-22: not the text, which may hold more than was read."""
    text = csr()
    assert SecretSource.parse(PKI).checked({"csr": f"\n{text}\n "}) == {"csr": text}


def openssh(key):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x", "one line"),
        (f"{ssh_key()}\n{ssh_key()}", "one line"),
        (f'command="sh" {ssh_key()}', "one line"),
        (ssh_key().replace("ssh-ed25519 ", "ssh-ed25519-cert-v01@openssh.com "), "one line"),
        (ssh_key().replace("ssh-ed25519 ", "ssh-dss "), "one line"),
        ("ssh-ed25519 AAAA", "cannot be read"),
        (openssh(rsa.generate_private_key(public_exponent=65537, key_size=1024)), "RSA from 2048"),
    ],
    ids=range(7),
)
def test_an_ssh_key_that_is_no_plain_key_is_refused_before_vault_is_asked(text, why):
    with pytest.raises(Invalid, match=why) as refused:
        SecretSource.parse(SSH).checked({"public_key": text})
    assert refused.value.member == "parameters.public_key"


def test_an_ssh_key_is_passed_on_without_its_comment():
    key = openssh(ec.generate_private_key(ec.SECP256R1()))
    assert SecretSource.parse(SSH).checked({"public_key": f"{key} root@host\n"}) == {"public_key": key}


def test_the_body_is_what_the_configuration_fixes_what_was_checked_and_how_long():
    source = SecretSource.parse(PKI_ISSUE)
    assert source.body("grt_01k0", {}, timedelta(minutes=2)) == {
        "common_name": "grt-01k0.agents.example",
        "ttl": "120s",
    }


# --- what crosses the floor ------------------------------------------------------------------------------------------


def test_what_an_agent_receives_shows_itself_to_nothing_but_reveal():
    """INV-30."""
    data = SecretData({"username": "jit", "password": "hunter2"})
    assert "hunter2" not in f"{data} {data!r} {data:>20} {[data]}"
    assert data.reveal() == {"username": "jit", "password": "hunter2"}
    for leak in (lambda: pickle.dumps(data), lambda: data == data, lambda: {data}):
        with pytest.raises(TypeError):
            leak()


def test_what_is_revealed_is_a_copy_and_what_is_kept_is_its_hash():
    data = SecretData({"b": [1], "a": "ä"})
    data.reveal()["b"].append(2)
    assert data.reveal() == {"a": "ä", "b": [1]}
    assert data.sha256() == SecretData({"a": "ä", "b": [1]}).sha256()


def test_a_provider_that_is_not_installed_is_refused_with_those_that_are():
    with pytest.raises(ConfigurationError, match="0 installed packages offer a provider 'other'"):
        base.third_party("other")


def test_an_installed_package_plugs_in_a_provider_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "acme_secrets.py").write_text("def provider(settings, clock):\n    return (settings, clock())\n")
    info = tmp_path / "acme_secrets-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-secrets\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[broker.providers]\nacme = acme_secrets:provider\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert base.third_party("acme")({"a": 1}, lambda: "now") == ({"a": 1}, "now")
