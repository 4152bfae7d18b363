"""From a file and the environment to settings. The only room that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from broker.config.checks import (
    check_breakers,
    check_feed,
    check_issuers,
    check_keys,
    check_limits,
    check_principals,
    check_providers,
    check_resources,
    check_server,
    check_store,
    check_vault,
    read_alerts,
    read_notify,
    read_policies,
    read_targets,
    read_transmitters,
    stated,
)
from broker.config.keys import ARRAYS, SECTIONS, TOP
from broker.config.reading import Reader
from broker.config.settings import FeedSettings, ServerSettings, Settings, SsfSettings, VaultAdministrator
from broker.config.values import address, vault_address
from broker.config.wording import Wrong, shown
from broker.domain.catalogue import (
    KEY_SOURCES,
    Catalogue,
    Limits,
    PrincipalRule,
    Resource,
    TrustedIssuer,
)
from broker.domain.errors import ConfigurationError, Invalid
from broker.domain.secret import Secret
from broker.domain.shared_signals import StreamBounds
from broker.providers.vault import VaultSettings


def load(
    path: Path,
    environ: Mapping[str, str] | None = None,
    *,
    before_vault_setup: bool = False,
) -> Settings:
    """The settings of a TOML file under its overrides; `ConfigurationError` with every problem at once.

    Relative paths are relative to the directory of the file. `environ` is `os.environ` unless given.
    `before_vault_setup` is for who is about to make the files of the broker's logins at Vault and at what it makes
    users of: they may be absent.
    """
    reader = Reader(path)
    document = reader.overridden(reader.document(), os.environ if environ is None else environ)
    reader.refuse_unknown(document, [*(key.name for key in TOP), *SECTIONS, *ARRAYS], "")
    top = reader.table({name: document[name] for name in ("issuer",) if name in document}, TOP, "")
    section = {name: reader.section(document, name, keys) for name, keys in SECTIONS.items()}
    rows = {name: reader.rows(document, name, keys) for name, keys in ARRAYS.items()}

    check_server(reader, section["server"], top.get("issuer"))
    check_feed(reader, section["feed"], section["server"], top.get("issuer"))
    check_store(reader, section["store"].get("url"), section["server"].get("workers"))
    has_vault = "vault" in document
    check_keys(reader, section["keys"], document.get("keys"), has_vault=has_vault)
    check_vault(reader, section["vault"], before_setup=before_vault_setup)
    check_issuers(reader, rows["issuers"], rows["principals"], top.get("issuer"))
    check_principals(reader, rows["principals"], rows["issuers"])
    check_limits(reader, section["grants"], rows["resources"])
    check_breakers(reader, section["limits"])
    added = check_providers(reader, rows["providers"])
    check_resources(reader, rows["resources"], rows["principals"], top.get("issuer"), added, has_vault=has_vault)
    policies, schema = read_policies(reader, section["policies"].get("directory"))
    vault = _vault(reader, section["vault"])
    targets = read_targets(reader, rows["targets"], rows["resources"], before_setup=before_vault_setup)
    alerts = read_alerts(reader, section["alerts"])
    notify = read_notify(reader, rows["notify"], rows["principals"])
    transmitters = read_transmitters(reader, rows["transmitters"], rows["issuers"], top.get("issuer"))
    if reader.problems:
        raise ConfigurationError(reader.problems)

    grants, keys, approvals = section["grants"], section["keys"], section["approvals"]
    activities = section["activities"]
    return Settings(
        issuer=top["issuer"],
        server=_server(reader, section["server"]),
        store_url=_store(reader, section["store"]["url"]),
        redis_url=section["redis"]["url"],
        master_key_file=reader.path(keys["master_key_file"]) if keys["master_key_file"] else None,
        vault_transit=keys["vault_transit"],
        rotate_every=timedelta(seconds=keys["rotate_every_s"]),
        limits=Limits(
            max_deadline=timedelta(seconds=section["tasks"]["max_deadline_s"]),
            default_ttl=timedelta(seconds=grants["default_ttl_s"]),
            max_ttl=timedelta(seconds=grants["max_ttl_s"]),
            max_live_per_agent=grants["max_live_per_agent"],
            max_delegation_depth=grants["max_delegation_depth"],
            approve_within=timedelta(seconds=approvals["within_s"]),
            collect_within=timedelta(seconds=approvals["collect_within_s"]),
            max_open_approvals_per_agent=approvals["max_open_per_agent"],
            max_open_approvals_per_group=approvals["max_open_per_group"],
            **_breakers(section["limits"]),
            review_within=timedelta(seconds=approvals["review_within_s"]),
            keep_activities=timedelta(seconds=activities["keep_s"]),
            max_activities_per_grant=activities["max_per_grant"],
            max_activities_per_minute=activities["max_per_minute"],
        ),
        catalogue=Catalogue(
            issuers=tuple(_issuer(reader, values) for _, _, values in rows["issuers"]),
            principals=tuple(PrincipalRule(**_tupled(values)) for _, _, values in rows["principals"]),
            resources=tuple(map(_resource, (values for _, _, values in rows["resources"]))),
            policies=policies,
            schema=schema,
            time_zone=section["policies"]["time_zone"],
        ),
        source=reader.source,
        policies_directory=reader.path(section["policies"]["directory"]),
        vault=vault,
        feed=_feed(section["feed"]),
        alerts=alerts,
        notify=notify,
        ssf=_ssf(section["ssf"]),
        transmitters=transmitters,
        targets=targets,
        providers={values["name"]: values["settings"] for _, _, values in rows["providers"]},
    )


def vault_administrator(environ: Mapping[str, str] | None = None) -> VaultAdministrator:
    """What the environment says of the administrator of Vault, as the command lines of Vault and OpenBao read it."""
    environ = os.environ if environ is None else environ
    at, token = environ.get("VAULT_ADDR") or None, environ.get("VAULT_TOKEN") or None
    if at is not None:
        try:
            vault_address(at)
        except Wrong as wrong:
            raise ConfigurationError([f"environment: VAULT_ADDR = {shown(at)}: {wrong}"]) from None
    return VaultAdministrator(address=at, token=Secret(token) if token else None)


def _breakers(limits: Mapping[str, Any]) -> dict[str, Any]:
    """What `[limits]` says, as `Limits` calls it."""
    durations = {"window_s": "window", "denials_window_s": "denials_window", "throttle_pause_s": "throttle_pause"}
    found: dict[str, Any] = {durations[name]: timedelta(seconds=limits[name]) for name in durations}
    for name, value in limits.items():
        if name not in durations:
            found[f"max_{name}" if name.startswith("live_") else name] = value
    return found


def _tupled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _server(reader: Reader, server: Mapping[str, Any]) -> ServerSettings:
    listen, metrics = server["listen"], server["metrics_listen"]
    metrics_host, metrics_port = address(metrics) if metrics else (None, None)
    path = reader.path(listen.removeprefix("unix:")) if listen.startswith("unix:") else None
    host, port = (None, None) if path else address(listen)
    return ServerSettings(
        listen=f"unix:{path}" if path else listen,
        host=host,
        port=port,
        unix_path=path,
        workers=server["workers"],
        metrics_listen=metrics,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
    )


def _feed(feed: Mapping[str, Any]) -> FeedSettings:
    host, port = address(feed["listen"]) if feed["listen"] else (None, None)
    metrics_host, metrics_port = address(feed["metrics_listen"]) if feed["metrics_listen"] else (None, None)
    return FeedSettings(
        host=host,
        port=port,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        streams=feed["streams"],
        streams_of_serve=feed["streams_of_serve"],
        longest_stream=timedelta(seconds=feed["longest_stream_s"]),
        kept_for=timedelta(seconds=feed["kept_for_s"]),
    )


def _ssf(ssf: Mapping[str, Any]) -> SsfSettings:
    bounds = StreamBounds(
        most_waiting=ssf["most_waiting"],
        min_verification_interval=timedelta(seconds=ssf["min_verification_interval_s"]),
        inactivity_timeout=timedelta(seconds=ssf["inactivity_timeout_s"]),
    )
    return SsfSettings(bounds=bounds, push_networks=tuple(map(ip_network, ssf["push_networks"])))


def _store(reader: Reader, url: str) -> str:
    if not url.startswith("sqlite:"):
        return url
    return f"sqlite:///{reader.path(url.removeprefix('sqlite:///'))}"


def _vault(reader: Reader, vault: Mapping[str, Any]) -> VaultSettings | None:
    """The settings of `[vault]`; the provider itself has the last word about them."""
    if not vault or reader.problems:
        return None
    try:
        return VaultSettings.parse({**stated(vault), "auth": stated(vault["auth"])})
    except Invalid as problem:
        reader.refuse(f"vault.{problem.member}" if problem.member else "vault", problem.detail)
        return None


def _resource(values: Mapping[str, Any]) -> Resource:
    own = {name: value for name, value in _tupled(values).items() if name not in ("vault", "settings")}
    # With its defaults written out: what a role was is told by the version, not by the code that reads it later.
    return Resource(**own, settings=stated(values["vault"] or values["settings"]))


def _issuer(reader: Reader, values: Mapping[str, Any]) -> TrustedIssuer:
    own = {name: value for name, value in _tupled(values).items() if name not in KEY_SOURCES}
    source = next(source for source in KEY_SOURCES if values[source])
    location = values[source] if source != "discovery" else None
    if source.endswith("_file"):
        location = str(reader.path(values[source]))
    return TrustedIssuer(**own, key_source=source, location=location)
