"""What the documents say is so: links lead somewhere, names are names, configuration loads, policies compile."""

import ast
import importlib
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker.cli import main
from broker.config import load
from broker.domain.policy import PolicySet, read_tests, run_tests
from broker.providers import jose
from broker.providers.dev_issuer import DevIssuer
from tests.docs.documents import (
    DOCUMENTS,
    ROOT,
    all_blocks,
    anchors,
    blocks,
    commands,
    links,
    name_of,
    what_is_wrong,
)

BASE = """\
issuer = "https://broker.example"
[store]
url = "sqlite:///broker.db"
[keys]
master_key_file = "master.key"
"""
# Of each kind one for a JWK set and one for a SPIFFE bundle: what cannot check a token does not load.
KEY_PAIRS = {"ec": ec.generate_private_key(ec.SECP256R1()), "rsa": rsa.generate_private_key(65537, 2048)}
KEY_SET = {
    "keys": [
        jose.public_jwk(key.public_key()) | {"kid": f"{kind}-{use}", "use": use}
        for kind, key in KEY_PAIRS.items()
        for use in ("sig", "jwt-svid")
    ]
}
CONFIGURATION = [block for block in all_blocks("toml") if "[[tests]]" not in block.text]
POLICY_TESTS = [block for block in all_blocks("toml") if "[[tests]]" in block.text]

# Documents that name modules, classes and functions of the broker, by the room they are in.
NAMING = [
    path
    for path in DOCUMENTS
    if path.name in ("architecture.md", "security-model.md") or path.parent.name == "decisions"
]
_NAME = re.compile(r"\b(?:domain|store|providers|services|web|config|wiring|telemetry|scheduler)(?:\.\w+)+")
_FILE = re.compile(r"\b(?:domain|store|providers|services|web|sdk|tests|migrations)/[\w/]+\.py")


@pytest.fixture
def place(tmp_path):
    key = tmp_path / "master.key"
    key.touch(mode=0o600)
    key.write_bytes(bytes(range(32)))
    (tmp_path / "policies").mkdir()
    return tmp_path


@pytest.fixture
def development(place):
    """The configuration that `broker dev` runs on."""
    DevIssuer.create_or_load(place)
    for policy in (ROOT / "config" / "policies").glob("*.cedar"):
        (place / "policies" / policy.name).write_text(policy.read_text())
    file = place / "broker.toml"
    file.write_text((ROOT / "config" / "development.toml").read_text())
    return load(file, environ={}).catalogue


def fragment(text: str, place: Path):
    """The catalogue of a fragment of configuration: what it leaves out is added, the files it names are made."""
    declared = tomllib.loads(text)
    for issuer in declared.get("issuers", []):
        for name in ("jwks_file", "spiffe_bundle_file"):
            if name in issuer:
                (place / issuer[name]).write_text(json.dumps(KEY_SET))
    for name, file in declared.get("vault", {}).get("auth", {}).items():
        if name.endswith("_file"):
            (place / file).touch(mode=0o600)
            (place / file).write_text("one-word\n")
    for told in declared.get("notify", []):
        if "url_file" in told["via"]:
            file = place / told["via"]["url_file"]
            file.parent.mkdir(exist_ok=True)
            file.touch(mode=0o600)
            file.write_text("https://hooks.example/services/one")
    named = {issuer["name"] for issuer in declared.get("issuers", [])}
    missing = {principal["issuer"] for principal in declared.get("principals", [])} - named
    more = "".join(
        f'\n[[issuers]]\nname = "{name}"\nissuer = "spiffe://{name}.example"\n'
        f'spiffe_bundle_url = "https://{name}.example/bundle"\n'
        for name in missing
    )
    file = place / "fragment.toml"
    file.write_text(BASE + text + more)
    return load(file, environ={}).catalogue


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_and_option_that_is_named_exists(path):
    wrong = {written: what_is_wrong(words, main) for written, words in commands(path)}
    assert not {written: why for written, why in wrong.items() if why}


@pytest.mark.parametrize("path", NAMING, ids=name_of)
def test_every_name_of_the_code_is_one(path):
    text = path.read_text()
    for name in set(_NAME.findall(text)) - {"config.py", "wiring.py", "telemetry.py", "scheduler.py"}:
        assert resolves(name), name
    for file in set(_FILE.findall(text)):
        assert (ROOT / file).exists() or (ROOT / "broker" / file).exists(), file


def resolves(name: str) -> bool:
    parts = f"broker.{name}".split(".")
    for split in range(len(parts), 1, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("block", CONFIGURATION, ids=str)
def test_a_fragment_of_configuration_loads(block, place):
    fragment(block.text, place)


@pytest.mark.parametrize("block", all_blocks("cedar"), ids=str)
def test_a_policy_compiles_where_it_is_said_to_stand(block, development, place):
    catalogue = replace(development, policies={"shown.cedar": block.text})
    for shown in blocks(block.path, "toml"):
        if "[[tests]]" not in shown.text:
            added = fragment(shown.text, place)
            catalogue = replace(
                catalogue,
                principals=catalogue.principals + added.principals,
                resources=catalogue.resources + added.resources,
            )
    PolicySet.compile(catalogue)


@pytest.mark.parametrize("block", POLICY_TESTS, ids=str)
def test_tests_of_policies_that_are_shown_pass(block, development):
    results = run_tests(PolicySet.compile(development), read_tests(tomllib.loads(block.text), development))
    assert results
    assert not [result.wrong for result in results if not result.passed]


def test_the_policy_the_readme_shows_is_the_one_that_decides_what_it_shows():
    [shown] = blocks(ROOT / "README.md", "cedar")
    assert shown.text in (ROOT / "config" / "policies" / "crm.cedar").read_text()


@pytest.mark.parametrize("block", all_blocks("json"), ids=str)
def test_json_is_json(block):
    json.loads(block.text)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_yaml_is_yaml(block):
    assert yaml.safe_load(block.text)


@pytest.mark.parametrize("block", all_blocks("py", "python"), ids=str)
def test_python_is_python(block):
    ast.parse(block.text)
