"""The gateway's own configuration: one TOML file, read once, every problem of it said at once.

A file that it names holds one secret in one line and is for its owner alone; it is read again at each use, so that it
can be replaced underneath. Who may ask the gateway gets the upstream's credential for a token: so it listens on a
socket that the system guards, or wants a secret of the proxy.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from broker.sdk import BrokerError, Secret
from broker.sdk.exchange import is_private, origin_of

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_LINE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62})")
_LONGEST_SECRET = 16_384
# What a proxy or a server reads the form of a message by; a credential is none of it.
_STRUCTURAL = frozenset(
    {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)

Proxy = Literal["nginx", "traefik", "envoy"]


class Wrong(Exception):
    """Everything that is wrong with a configuration, a sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class NoSecret(Exception):
    """Why a secret cannot be had from its file now; never what the file holds."""


def _origin(value: str) -> str:
    try:
        return origin_of(value)
    except BrokerError as problem:
        raise ValueError(problem.detail) from None


def _upstream_origin(value: str) -> str:
    """As the agents write it, which is what their proofs are made for."""
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.raw_path not in (b"", b"/") or url.userinfo:
        raise ValueError("it is scheme and host only, like https://crm.example")
    if not is_private(url.scheme, url.host):
        raise ValueError("agents would show their tokens in the clear: use https (http is for loopback only)")
    return str(url).rstrip("/")


def _header(value: str) -> str:
    if not _TOKEN.fullmatch(value) or value.lower() in _STRUCTURAL or value.lower().startswith("x-broker-"):
        raise ValueError("it is not the name of a header that carries a credential")
    return value


def _some(value: Any) -> Any:
    if value == []:
        raise ValueError("there has to be one")
    return tuple(value) if isinstance(value, list) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Brokered(_Strict):
    """A secret of the broker's that the gateway asks for itself, as an agent, and renews."""

    resource: str
    scopes: tuple[str, ...]
    task: str | None = None
    member: str | None = None
    ttl_s: int | None = Field(default=None, ge=1)

    @field_validator("scopes", mode="before")
    @classmethod
    def _some(cls, value: Any) -> Any:
        return _some(value)


class Upstream(_Strict):
    """One resource behind the proxy. `methods` says which scopes each needs; one that it does not name is refused."""

    name: str
    audience: str = Field(min_length=1)
    origin: Annotated[str, AfterValidator(_upstream_origin)]
    methods: Mapping[str, tuple[str, ...]] = Field(min_length=1)
    require_dpop: bool = False
    header: Annotated[str, AfterValidator(_header)] = "Authorization"
    scheme: Literal["bearer", "basic", "raw"] = "bearer"
    credential_file: Path | None = None
    credential: Brokered | None = None

    @field_validator("name")
    @classmethod
    def _path_segment(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("it is small letters, digits and dashes: it stands in the address that the proxy asks")
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _needs(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            method: tuple(scopes) if isinstance(scopes, list) else scopes
            for methods, scopes in value.items()
            for method in methods.split(",")
        }

    @field_validator("credential_file", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return Path(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Upstream:
        if (self.credential_file is None) == (self.credential is None):
            raise ValueError("give its credential as exactly one of credential_file and credential")
        for method, scopes in self.methods.items():
            if not re.fullmatch("[A-Z]{1,20}", method) or not scopes:
                raise ValueError('methods is like { "GET,HEAD" = ["contacts:read"] }, with a scope for each')
        return self


class GatewaySettings(_Strict):
    listen: str
    broker: Annotated[str, AfterValidator(_origin)]
    token_file: Path
    proxy: Proxy
    proxy_secret_file: Path | None = None
    timeout_s: float = Field(default=2.0, gt=0, le=30)
    upstreams: tuple[Upstream, ...]

    @field_validator("token_file", "proxy_secret_file", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return Path(value) if isinstance(value, str) else value

    @field_validator("upstreams", mode="before")
    @classmethod
    def _some(cls, value: Any) -> Any:
        return _some(value)

    @property
    def socket(self) -> Path | None:
        return Path(self.listen.removeprefix("unix:")) if self.listen.startswith("unix:") else None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @model_validator(mode="after")
    def _guarded(self) -> GatewaySettings:
        names = [upstream.name for upstream in self.upstreams]
        if len(set(names)) != len(names):
            raise ValueError("two upstreams have the same name")
        if self.socket is not None:
            return self
        host, port = self.listen.rpartition(":")[::2]
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536 or not host:
            raise ValueError("listen is unix:/run/broker-gateway.sock, or host:port")
        if self.proxy_secret_file is None:
            raise ValueError(
                "on a port anybody who reaches it would be given the upstream's credential: set proxy_secret_file, "
                "or listen on unix:/run/broker-gateway.sock"
            )
        return self


def read_settings(path: Path) -> GatewaySettings:
    """The settings of a file; raises Wrong with every problem. Relative paths are relative to its directory."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise Wrong([f"{path} cannot be read: {problem.strerror}"]) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise Wrong([f"{path} is not TOML: {problem}"]) from None
    try:
        found = GatewaySettings.model_validate(document)
    except ValidationError as problem:
        raise Wrong([f"{path}: {sentence}" for sentence in _sentences(problem)]) from None
    settings = _beside(found, path.parent)
    problems = []
    for file in _secret_files(settings):
        try:
            secret_in(file)
        except NoSecret as wrong:
            problems.append(f"{path}: {wrong}")
    if problems:
        raise Wrong(problems)
    return settings


def secret_in(file: Path) -> Secret:
    """The one line of a file that nobody else can read."""
    try:
        # Not blocking: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        raise NoSecret(f"{file} cannot be read: {problem.strerror}") from None
    with open(descriptor, "rb") as opened:
        # Of the open file, not of the path: what was checked is what is read (INV-22).
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) or mode & 0o077:
            raise NoSecret(f"{file} is not a file for its owner alone: chmod 600 {shlex.quote(str(file))}")
        content = opened.read(_LONGEST_SECRET + 2)
    # What is in it is not shown, be it ever so wrong (INV-30).
    text = content.removesuffix(b"\n").decode("latin-1")
    return header_value(text, str(file))


def header_value(text: str, source: str) -> Secret:
    """What may stand in a header (INV-31)."""
    if len(text) > _LONGEST_SECRET or not _LINE.fullmatch(text):
        raise NoSecret(f"{source} is not one line of visible characters, which is all that a header holds")
    return Secret(text)


def _beside(settings: GatewaySettings, directory: Path) -> GatewaySettings:
    """With the files it names taken from the directory of the configuration."""
    upstreams = tuple(
        upstream.model_copy(update={"credential_file": directory / upstream.credential_file})
        if upstream.credential_file is not None
        else upstream
        for upstream in settings.upstreams
    )
    more: dict[str, Any] = {"upstreams": upstreams, "token_file": directory / settings.token_file}
    if settings.proxy_secret_file is not None:
        more["proxy_secret_file"] = directory / settings.proxy_secret_file
    if settings.socket is not None:
        more["listen"] = f"unix:{directory / settings.socket}"
    return settings.model_copy(update=more)


def _secret_files(settings: GatewaySettings) -> Iterator[Path]:
    if settings.proxy_secret_file is not None:
        yield settings.proxy_secret_file
    for upstream in settings.upstreams:
        if upstream.credential_file is not None:
            yield upstream.credential_file


def _sentences(problem: ValidationError) -> Iterator[str]:
    for error in problem.errors(include_url=False, include_input=False, include_context=False):
        at = ".".join(map(str, error["loc"])) or "the whole"
        words = {"extra_forbidden": "no key of this name is known", "missing": "it is missing"}
        yield f"{at}: {words.get(error['type'], error['msg'].removeprefix('Value error, '))}"
