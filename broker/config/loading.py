"""From a file and the environment to settings. The only room that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from broker.config.checks import (
    check_issuers,
    check_limits,
    check_master_key,
    check_principals,
    check_resources,
    check_server,
    check_store,
    read_policies,
)
from broker.config.keys import ARRAYS, PROVIDERS, SECTIONS, TOP
from broker.config.reading import Reader
from broker.config.settings import ServerSettings, Settings
from broker.config.values import address
from broker.domain.catalogue import (
    KEY_SOURCES,
    Catalogue,
    Limits,
    PrincipalRule,
    Resource,
    TrustedIssuer,
)
from broker.domain.errors import ConfigurationError


def load(path: Path, environ: Mapping[str, str] | None = None, *, providers: Sequence[str] = PROVIDERS) -> Settings:
    """The settings of a TOML file under its overrides; `ConfigurationError` with every problem at once.

    Relative paths are relative to the directory of the file. `environ` is `os.environ` unless given.
    """
    reader = Reader(path)
    document = reader.overridden(reader.document(), os.environ if environ is None else environ)
    reader.refuse_unknown(document, [*(key.name for key in TOP), *SECTIONS, *ARRAYS], "")
    top = reader.table({name: document[name] for name in ("issuer",) if name in document}, TOP, "")
    section = {name: reader.section(document, name, keys) for name, keys in SECTIONS.items()}
    rows = {name: reader.rows(document, name, keys) for name, keys in ARRAYS.items()}

    check_server(reader, section["server"], top.get("issuer"))
    check_store(reader, section["store"].get("url"), section["server"].get("workers"))
    check_master_key(reader, section["keys"].get("master_key_file"))
    check_issuers(reader, rows["issuers"], rows["principals"], top.get("issuer"))
    check_principals(reader, rows["principals"], rows["issuers"])
    check_limits(reader, section["grants"], rows["resources"])
    check_resources(reader, rows["resources"], rows["principals"], top.get("issuer"), providers)
    policies, schema = read_policies(reader, section["policies"].get("directory"))
    if reader.problems:
        raise ConfigurationError(reader.problems)

    grants = section["grants"]
    return Settings(
        issuer=top["issuer"],
        server=_server(reader, section["server"]),
        store_url=_store(reader, section["store"]["url"]),
        redis_url=section["redis"]["url"],
        master_key_file=reader.path(section["keys"]["master_key_file"]),
        rotate_every=timedelta(seconds=section["keys"]["rotate_every_s"]),
        limits=Limits(
            max_deadline=timedelta(seconds=section["tasks"]["max_deadline_s"]),
            default_ttl=timedelta(seconds=grants["default_ttl_s"]),
            max_ttl=timedelta(seconds=grants["max_ttl_s"]),
            max_live_per_agent=grants["max_live_per_agent"],
            max_delegation_depth=grants["max_delegation_depth"],
        ),
        catalogue=Catalogue(
            issuers=tuple(_issuer(reader, values) for _, _, values in rows["issuers"]),
            principals=tuple(PrincipalRule(**_tupled(values)) for _, _, values in rows["principals"]),
            resources=tuple(Resource(**_tupled(values)) for _, _, values in rows["resources"]),
            policies=policies,
            schema=schema,
        ),
        source=reader.source,
        policies_directory=reader.path(section["policies"]["directory"]),
    )


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


def _store(reader: Reader, url: str) -> str:
    if not url.startswith("sqlite:"):
        return url
    return f"sqlite:///{reader.path(url.removeprefix('sqlite:///'))}"


def _issuer(reader: Reader, values: Mapping[str, Any]) -> TrustedIssuer:
    own = {name: value for name, value in _tupled(values).items() if name not in KEY_SOURCES}
    source = next(source for source in KEY_SOURCES if values[source])
    location = values[source] if source != "discovery" else None
    if source.endswith("_file"):
        location = str(reader.path(values[source]))
    return TrustedIssuer(**own, key_source=source, location=location)
