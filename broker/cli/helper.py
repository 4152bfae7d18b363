"""Commands that other programs call for a credential, each in that program's own protocol.

Stdout is the protocol and nothing else. Each call asks for a credential of its own, which nobody hands back: it lives
until it expires or its task ends, and `broker exec` is the way where that matters. Nothing is kept, so there is nothing
to steal. A value that would break the protocol's form is refused (INV-31).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import click
import httpx

from broker.cli.asking import asking_options, first, wait_option
from broker.cli.client import client_options
from broker.cli.delivery import Render, Undeliverable, member_of, session_token, whole
from broker.cli.output import fail
from broker.domain.clock import epoch, rfc3339
from broker.sdk import BrokerError, Credential, CredentialSource
from broker.sdk.exchange import is_private

_EXEC_API = "client.authentication.k8s.io"
_LONGEST_QUESTION = 65_536
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_member_option = click.option(
    "--member", metavar="NAME", help="Of a secret that has several members: the one that is the token."
)


@click.group()
def helper() -> None:
    """Credential helpers that other programs call: AWS SDKs, kubectl, git."""


@helper.command()
@wait_option
@client_options
@asking_options
def aws(source: CredentialSource, /, *, wait_s: int | None) -> None:
    """For `credential_process` in the configuration of AWS SDKs and the AWS CLI.

    They ask again by themselves, some of them 15 minutes before the end: ask for an hour.

    \b
    cat >> ~/.aws/config <<'END'
    [profile reports]
    credential_process = broker helper aws --resource urn:aws:reports --scope read --ttl 1h
    END
    BROKER_TASK="$TASK" aws --profile reports s3 ls
    """
    credential = first(source, wait_s)
    answer = {
        "Version": 1,
        "AccessKeyId": _rendered(member_of("access_key"), credential),
        "SecretAccessKey": _rendered(member_of("secret_key"), credential),
        "SessionToken": _rendered(session_token, credential),
        "Expiration": rfc3339(credential.expires_at),
    }
    click.echo(json.dumps(answer))


@helper.command()
@_member_option
@click.option("--exec-info", envvar="KUBERNETES_EXEC_INFO", hidden=True)
@wait_option
@client_options
@asking_options
def kubernetes(source: CredentialSource, /, *, member: str | None, exec_info: str | None, wait_s: int | None) -> None:
    """An exec credential plugin for kubectl and every client-go program.

    \b
    kubectl config set-credentials agent --exec-api-version client.authentication.k8s.io/v1 \\
        --exec-interactive-mode Never --exec-command=broker --exec-arg helper --exec-arg kubernetes \\
        --exec-arg=--resource --exec-arg https://cluster.example --exec-arg=--scope --exec-arg pods:read
    BROKER_TASK="$TASK" kubectl --user agent get pods
    broker helper kubernetes --task "$TASK" --resource https://cluster.example --scope pods:read  # what kubectl reads
    """
    version = _exec_version(exec_info)
    credential = first(source, wait_s)
    answer = {
        "apiVersion": version,
        "kind": "ExecCredential",
        "status": {
            "token": _rendered(_token(member), credential),
            "expirationTimestamp": rfc3339(credential.expires_at),
        },
    }
    click.echo(json.dumps(answer))


@helper.command()
@click.argument("operation", type=click.Choice(["get", "store", "erase"]))
@click.option("--host", required=True, metavar="URL", help="For this server alone: https, or http on loopback.")
@click.option(
    "--username", default="x-access-token", show_default=True, help="Under which name the server takes a token."
)
@_member_option
@wait_option
@client_options
@asking_options
def git(
    source: CredentialSource,
    /,
    *,
    operation: str,
    host: str,
    username: str,
    member: str | None,
    wait_s: int | None,
) -> None:
    """A credential helper for git over HTTP. It answers for --host, and stays silent for every other.

    Nothing is stored. Let no helper that stores stand beside it: the empty one above it takes them away.

    \b
    git config --global credential.https://git.example.helper ""
    git config --global --add credential.https://git.example.helper \\
        '!broker helper git --host https://git.example --resource https://git.example --scope repo:read'
    BROKER_TASK="$TASK" git clone https://git.example/crm/leads.git
    """
    server = _server(host)
    asked = _question(sys.stdin.read(_LONGEST_QUESTION + 1))
    if operation != "get" or (asked.get("protocol"), asked.get("host", "").lower()) != server:
        return
    if asked.get("username", username) != username:
        return
    try:
        credential = first(source, wait_s)
        password = _rendered(_token(member), credential)
    except (BrokerError, click.exceptions.Exit):
        # Or git would ask whoever sits before it, and nobody does.
        click.echo("quit=1")
        raise
    click.echo(f"username={username}\npassword={password}\npassword_expiry_utc={epoch(credential.expires_at)}")


def _rendered(render: Render, credential: Credential) -> str:
    try:
        value = render(credential)
    except Undeliverable as problem:
        raise fail(str(problem)) from None
    if _CONTROL.search(value):
        raise fail("the secret has characters that this program's protocol cannot carry")
    return value


def _token(member: str | None) -> Render:
    return whole if member is None else member_of(member)


def _exec_version(exec_info: str | None) -> str:
    """The version that the caller speaks (`KUBERNETES_EXEC_INFO`); the answer has to be in it."""
    if not exec_info:
        return f"{_EXEC_API}/v1"
    try:
        asked: Any = json.loads(exec_info)
    except (ValueError, RecursionError):
        asked = None
    version = asked.get("apiVersion") if isinstance(asked, Mapping) else None
    if version not in (f"{_EXEC_API}/v1", f"{_EXEC_API}/v1beta1"):
        raise fail(f"KUBERNETES_EXEC_INFO asks for no version this speaks: set {_EXEC_API}/v1 in the kubeconfig")
    return str(version)


def _server(host: str) -> tuple[str, str]:
    """(protocol, host with its port where it has one), as git says them."""
    try:
        url = httpx.URL(host)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if not is_private(url.scheme, url.host) or url.userinfo or url.query or url.fragment or url.path not in ("", "/"):
        raise click.BadParameter(
            f"{host!r} is not like https://git.example: a password is sent nowhere in the clear", param_hint="--host"
        )
    return url.scheme, url.netloc.decode("ascii").lower()


def _question(text: str) -> dict[str, str]:
    """The attributes that git sends, one a line; it ends with an empty line."""
    if len(text) > _LONGEST_QUESTION:
        raise fail("git asks for more than fits a question")
    lines = text.partition("\n\n")[0].splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}
