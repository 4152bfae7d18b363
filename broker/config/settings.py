"""What a checked configuration is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from broker.domain.catalogue import Catalogue, Limits
from broker.domain.secret import Secret
from broker.domain.shared_signals import StreamBounds, Transmitter
from broker.providers.notices import ChannelSettings
from broker.providers.posting import Network
from broker.providers.targets import Target
from broker.providers.vault import VaultSettings


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the broker listens: `host` and `port`, or `unix_path`. `listen` is the same as text."""

    listen: str
    host: str | None = None
    port: int | None = None
    unix_path: Path | None = None
    workers: int = 1
    metrics_listen: str | None = None
    metrics_host: str | None = None
    metrics_port: int | None = None


@dataclass(frozen=True, kw_only=True)
class FeedSettings:
    """Where the streams of the feed are answered: some by `serve`, many by a server of their own, if it listens."""

    host: str | None = None
    port: int | None = None
    metrics_host: str | None = None
    metrics_port: int | None = None
    streams: int = 5000
    streams_of_serve: int = 16
    longest_stream: timedelta = timedelta(hours=1)
    kept_for: timedelta = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class SsfSettings:
    """Bounds of streams of security events, and where inside they may be pushed to."""

    bounds: StreamBounds = field(default_factory=StreamBounds)
    push_networks: tuple[Network, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AlertSettings:
    """Who is told of what must not wait."""

    webhook_url: Secret = field(repr=False)
    secret: Secret | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A checked configuration; every path in it is absolute, and its catalogue has no version yet.

    Exactly one of `master_key_file` and `vault_transit` is set, the latter only with `vault`.
    """

    issuer: str
    server: ServerSettings
    store_url: str = field(repr=False)  # may hold a password (INV-30)
    redis_url: str | None = field(default=None, repr=False)
    master_key_file: Path | None
    vault_transit: str | None = None
    rotate_every: timedelta
    limits: Limits
    catalogue: Catalogue
    source: Path
    policies_directory: Path | None = None
    vault: VaultSettings | None = None
    feed: FeedSettings = field(default_factory=FeedSettings)
    alerts: AlertSettings | None = None
    notify: tuple[ChannelSettings, ...] = ()
    ssf: SsfSettings = field(default_factory=SsfSettings)
    transmitters: tuple[Transmitter, ...] = ()
    targets: tuple[Target, ...] = ()
    providers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)  # of others, by name


@dataclass(frozen=True, kw_only=True)
class VaultAdministrator:
    """Where the administrator of Vault finds it and who they are, where the environment says so."""

    address: str | None
    token: Secret | None = field(repr=False)
