"""What values must be together, and with the files they name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from broker.config.files import (
    MAX_POLICY_BYTES,
    SCHEMA_FILE,
    master_key,
    read_file,
    require_attestation,
    require_certificates,
    require_key_set,
    require_secret,
)
from broker.config.keys import ARRAYS, PROVIDERS
from broker.config.reading import Reader, Row
from broker.config.settings import AlertSettings
from broker.config.values import WORKLOAD_ALGORITHMS, address, is_loopback, web_url
from broker.config.wording import Wrong, bare, nearest, quoted, shown
from broker.domain.catalogue import KEY_SOURCES, TrustedIssuer
from broker.domain.errors import Invalid
from broker.domain.identity import Role
from broker.domain.secret import Secret
from broker.domain.shared_signals import Transmitter
from broker.providers.alerts import webhook_key, webhook_url
from broker.providers.key_sets import SSF_DISCOVERY
from broker.providers.notices import ChannelSettings, Mail
from broker.providers.targets import Target, target_url
from broker.providers.vault.sources import SecretSource


def check_server(reader: Reader, server: Mapping[str, Any], issuer: str | None) -> None:
    listen = server.get("listen")
    if listen is None:
        return
    if listen.startswith("unix:"):
        path = reader.path(listen.removeprefix("unix:"))
        if len(os.fsencode(path)) > 107:
            reader.refuse(
                "server.listen", f"{path} is longer than the 107 bytes of a socket's path; shorten it", listen
            )
        return
    host, port = address(listen)
    if issuer is not None and issuer.startswith("http:") and not is_loopback(host):
        reader.refuse(
            "server.listen",
            f"is reachable from outside while issuer is {shown(issuer)}, and credentials would travel in the clear; "
            f"listen on 127.0.0.1:{port}, or make the issuer https",
            listen,
        )
    metrics = server.get("metrics_listen")
    if metrics is None:
        return
    metrics_host, first = address(metrics)
    workers = server.get("workers") or 1
    if first + workers - 1 > 65535:
        reader.refuse(
            "server.metrics_listen", f"leaves no {workers} ports, one for each worker; use a smaller one", metrics
        )
    elif metrics_host == host and first <= port < first + workers:
        what = "is server.listen too" if workers == 1 else f"and the {workers - 1} after it hold that of server.listen"
        reader.refuse("server.metrics_listen", f"{what}; give the metrics a port of their own", metrics)


def check_feed(reader: Reader, feed: Mapping[str, Any], server: Mapping[str, Any], issuer: str | None) -> None:
    taken = {server.get("listen"): "server.listen", server.get("metrics_listen"): "server.metrics_listen"}
    for name in ("listen", "metrics_listen"):
        listen = feed.get(name)
        if listen is None:
            continue
        if listen in taken:
            reader.refuse(f"feed.{name}", f"is {taken[listen]} too; give it an address of its own", listen)
        taken[listen] = f"feed.{name}"
        host, port = address(listen)
        if name == "listen" and issuer is not None and issuer.startswith("http:") and not is_loopback(host):
            reader.refuse(
                "feed.listen",
                f"is reachable from outside while issuer is {shown(issuer)}, and tokens would travel in the clear; "
                f"listen on 127.0.0.1:{port}, or make the issuer https",
                listen,
            )


def check_store(reader: Reader, url: str | None, workers: int | None) -> None:
    if url is None or not url.startswith("sqlite:"):
        return
    path = reader.path(url.removeprefix("sqlite:///"))
    if {"?", "%"} & set(str(path)):
        reader.refuse("store.url", f'{path} has a "?" or a "%", which mean something else in a URL; rename it', url)
    elif not os.path.isdir(path.parent):  # Path.is_dir raises for a name that is too long
        reader.refuse("store.url", f"there is no directory {path.parent}; make it, or correct the path", url)
    if workers is not None and workers > 1:
        reader.refuse(
            "server.workers",
            "is more than SQLite allows: two writing processes wait for each other; write 1, or use PostgreSQL",
            workers,
        )


def check_keys(reader: Reader, keys: Mapping[str, Any], written: object, *, has_vault: bool) -> None:
    raw = written if isinstance(written, dict) else {}
    if "vault_transit" not in raw and "master_key_file" not in raw:
        reader.refuse(
            "keys.master_key_file",
            "is missing; write the path of a file of 32 random bytes, or vault_transit for a key in Vault",
        )
    elif "vault_transit" in raw and "master_key_file" in raw:
        reader.refuse("keys.vault_transit", "is there beside master_key_file; keep one of the two")
    if keys.get("vault_transit") is not None and not has_vault:
        reader.refuse(
            "keys.vault_transit",
            "is a key in Vault, and there is no section [vault]; add one, or write master_key_file instead",
            keys["vault_transit"],
        )
    _check_master_key(reader, keys.get("master_key_file"))


def _check_master_key(reader: Reader, value: str | None) -> None:
    if value is None:
        return
    if re.fullmatch(r"[0-9A-Fa-f]{64}|[A-Za-z0-9+/_-]{43}=?", value):
        why = "looks like the key itself and is not shown; put its 32 bytes into a file, and write the file's path"
        reader.refuse("keys.master_key_file", why)
        return
    try:
        master_key(reader.path(value))
    except Wrong as wrong:
        reader.refuse("keys.master_key_file", str(wrong), value)


def check_limits(reader: Reader, grants: dict[str, Any], resources: Sequence[Row]) -> None:
    longest = grants.get("max_ttl_s")
    if longest is None:
        return
    default = grants.get("default_ttl_s", 0)
    if default > longest:
        reader.refuse("grants.default_ttl_s", f"is above grants.max_ttl_s, which is {longest}; lower it", default)
    for at, raw, values in resources:
        if "max_ttl_s" not in raw:
            values["max_ttl_s"] = min(values["max_ttl_s"], longest)
        elif values.get("max_ttl_s", 0) > longest:
            reader.refuse(
                f"{at}.max_ttl_s", f"is above grants.max_ttl_s, which is {longest}; lower it", values["max_ttl_s"]
            )


def check_breakers(reader: Reader, limits: Mapping[str, Any]) -> None:
    names = ("denials_window_s", "denials_throttle", "throttle_pause_s", "denials_lockdown")
    if not all(name in limits for name in names):
        return
    window_s, throttle, pause_s, lockdown = (limits[name] for name in names)
    if lockdown <= throttle:
        reader.refuse(
            "limits.denials_lockdown",
            f"is not above limits.denials_throttle, which is {throttle}: an agent would be locked down before it is "
            "throttled; raise it",
            lockdown,
        )
        return
    reached = throttle + window_s // pause_s
    if lockdown > reached:
        reader.refuse(
            "limits.denials_lockdown",
            f"is never reached: an agent that pauses {pause_s} s after each denial from number {throttle} on comes to "
            f"{reached} in {window_s} s; lower it, or throttle_pause_s, or raise denials_window_s",
            lockdown,
        )


def _unique(reader: Reader, rows: Sequence[Row], key: str) -> None:
    first: dict[str, str] = {}
    for at, _, values in rows:
        value = values.get(key)
        if value is not None and first.setdefault(value, at) != at:
            reader.refuse(f"{at}.{key}", f"is already the {key} of {first[value]}; give each its own", value)


def _written(rows: Sequence[Row], key: str) -> list[str]:
    """What other sections may refer to; a row refused for another reason counts, or one mistake would be two."""
    return [raw[key] for _, raw, _ in rows if isinstance(raw.get(key), str)]


def check_issuers(reader: Reader, rows: Sequence[Row], principals: Sequence[Row], own: str | None) -> None:
    _unique(reader, rows, "name")
    _unique(reader, rows, "issuer")
    used = _written(principals, "issuer")
    for at, raw, values in rows:
        name, issuer = values.get("name"), values.get("issuer")
        if issuer is not None and issuer == own:
            reader.refuse(
                f"{at}.issuer",
                "is the broker itself, whose credentials would then open it; trust another issuer",
                issuer,
            )
        if values.get("algorithms") == []:
            reader.refuse(f"{at}.algorithms", f"believes no signature; name one of {quoted(WORKLOAD_ALGORITHMS)}", [])
        unused = values.get("users") is False and name not in used and "principals" not in reader.unreadable
        if name is not None and unused:
            reader.refuse(
                f"{at}.name",
                "is used by no principal, so that nobody it attests is anybody; add [[principals]] with this issuer "
                "and a subject, or users = true, or take the issuer out",
                name,
            )
        _check_user_attributes(reader, at, values)
        sources = [source for source in KEY_SOURCES if source in raw and raw[source] is not False]
        if len(sources) != 1:
            found = f"has {len(sources)} key sources ({', '.join(sources)})" if sources else "has no key source"
            reader.refuse(at, f"{found}; write exactly one of {', '.join(KEY_SOURCES)}")
        elif issuer is not None:
            _check_key_source(reader, at, values, issuer, sources[0])
        for source in ("jwks_file", "spiffe_bundle_file"):
            if values.get(source) is not None:
                try:
                    require_key_set(reader.path(values[source]), source, values)
                except Wrong as wrong:
                    reader.refuse(f"{at}.{source}", str(wrong), values[source])


def _check_user_attributes(reader: Reader, at: str, values: Mapping[str, Any]) -> None:
    wanted = values.get("user_attributes")
    if wanted and values.get("users") is False:
        reader.refuse(f"{at}.user_attributes", "is said of users, and this issuer has none; write users = true, or not")
    for name, claim in (wanted or {}).items():
        if not isinstance(claim, str) or not all(claim.split(".")):
            reader.refuse(
                f"{at}.user_attributes.{bare(name)}", 'is not the path of a claim; write names joined by "."', claim
            )


def _check_key_source(reader: Reader, at: str, values: Mapping[str, Any], issuer: str, source: str) -> None:
    if source.startswith("spiffe_bundle"):
        if not issuer.startswith("spiffe://"):
            reader.refuse(
                f"{at}.issuer",
                f"is not what {source} vouches for, a trust domain; write spiffe://<trust domain>",
                issuer,
            )
    elif issuer.startswith("spiffe://"):
        reader.refuse(
            f"{at}.issuer",
            f"is a trust domain, whose keys come as a bundle and not by {source}; write spiffe_bundle_file or "
            "spiffe_bundle_url",
            issuer,
        )
    elif source == "discovery":
        try:
            web_url(issuer)
        except Wrong as wrong:
            reader.refuse(f"{at}.issuer", f"{wrong} (its keys come from there by discovery)", issuer)


def check_principals(reader: Reader, rows: Sequence[Row], issuers: Sequence[Row]) -> None:
    _unique(reader, rows, "name")
    declared = {values["name"]: values for _, _, values in issuers if "name" in values}
    names = _written(issuers, "name")
    same: dict[str, str] = {}
    for at, raw, values in rows:
        issuer = values.get("issuer")
        if issuer is not None and issuer not in names and "issuers" not in reader.unreadable:
            reader.refuse(f"{at}.issuer", _unknown("issuer", issuer, names, "issuers"), issuer)
        if issuer is not None and declared.get(issuer, {}).get("users"):
            reader.refuse(
                f"{at}.issuer",
                "is an issuer of people on whose behalf others act, whose tokens open nothing themselves; give its "
                "callers an issuer without users = true, or take this principal out",
                issuer,
            )
        for index, role in enumerate(values.get("roles", ())):
            if role not in set(Role):
                reader.refuse(f"{at}.roles[{index}]", f"is not a role; the roles are {', '.join(Role)}", role)
        subjects = [key for key in ("subject", "subject_prefix") if key in raw]
        if len(subjects) != 1:
            found = "has both subject and subject_prefix" if subjects else "has no subject, which would be everybody"
            reader.refuse(at, f"{found}; write exactly one of subject and subject_prefix")
            continue
        subject = values.get(subjects[0])
        if issuer is None or subject is None:
            continue
        domain = declared.get(issuer, {}).get("issuer", "")
        if domain.startswith("spiffe://") and not subject.startswith(f"{domain}/"):
            reader.refuse(
                f"{at}.{subjects[0]}", f"is outside the trust domain of its issuer; write {domain}/<path>", subject
            )
        if "claims" in values:
            # A broker that could not tell two of them apart would refuse both, at their first call.
            rule = json.dumps([issuer, subjects[0], subject, values["claims"]], sort_keys=True)
            if same.setdefault(rule, at) != at:
                reader.refuse(
                    f"{at}.{subjects[0]}",
                    f"is already {same[rule]}, with the same claims; keep one of the two",
                    subject,
                )


# What each file of `[vault] auth` holds; which of them come from a platform that decides about their mode.
_AUTH_FILES = {"role_id_file": "the role id", "secret_id_file": "the secret id", "token_file": "the token"}
_ATTESTED = ("kubernetes", "jwt")
_LOOKS_SECRET = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?:hv)?[sbr]\..{16,}|eyJ.+", re.IGNORECASE)


def check_vault(reader: Reader, vault: dict[str, Any], *, before_setup: bool) -> None:
    """Judge `[vault]`, and make its paths absolute. `before_setup`: the files of its login are yet to be made."""
    auth = dict(vault.get("auth", {}))
    for name, what in _AUTH_FILES.items():
        if auth.get(name) is None:
            continue
        at, value = f"vault.auth.{name}", auth[name]
        if _LOOKS_SECRET.fullmatch(value):
            reader.refuse(at, f"looks like {what} itself and is not shown; put it into a file, and write the path")
            continue
        auth[name] = str(reader.path(value))
        if before_setup:
            continue
        try:
            require = require_attestation if auth["method"] in _ATTESTED else require_secret
            require(Path(auth[name]), what)
        except Wrong as wrong:
            reader.refuse(at, str(wrong), value)
    if auth:
        vault["auth"] = auth
    if vault.get("ca_file") is not None:
        value, vault["ca_file"] = vault["ca_file"], str(reader.path(vault["ca_file"]))
        try:
            require_certificates(Path(vault["ca_file"]))
        except Wrong as wrong:
            reader.refuse("vault.ca_file", str(wrong), value)
    if vault.get("lease_prefix_exclusive") is False:
        reader.refuse(
            "vault.lease_prefix_exclusive",
            "must be true: what is found under the leases of the resources' roles and belongs to no grant is killed, "
            "so nobody else may take secrets from them; give the broker roles of its own, and write true",
            False,
        )


def read_alerts(reader: Reader, alerts: Mapping[str, Any]) -> AlertSettings | None:
    """Who is told; the files hold secrets, and what is wrong with them is told without their content."""
    found: dict[str, Secret] = {}
    for name, what in (("webhook_url_file", "the URL of the webhook"), ("secret_file", "the secret")):
        if alerts.get(name) is None:
            continue
        try:
            found[name] = require_secret(reader.path(alerts[name]), what)
        except Wrong as wrong:
            reader.refuse(f"alerts.{name}", str(wrong), alerts[name])
    url = found.get("webhook_url_file")
    if url is None:
        if "secret_file" in found:
            reader.refuse("alerts.secret_file", "signs nothing without webhook_url_file; add it, or take this out")
        return None
    for name, judge in (("webhook_url_file", webhook_url), ("secret_file", webhook_key)):
        try:
            if name in found:
                judge(found[name].reveal())
        except Invalid as invalid:
            reader.refuse(f"alerts.{name}", invalid.detail)
            return None
    return AlertSettings(webhook_url=url, secret=found.get("secret_file"))


_OF_HOOK = {"url_file": "the URL of the hook", "secret_file": "the secret"}


def read_notify(reader: Reader, rows: Sequence[Row], principals: Sequence[Row]) -> tuple[ChannelSettings, ...]:
    """Who is told that people are asked, and how; the files hold secrets, and are not shown."""
    _unique(reader, rows, "name")
    groups = sorted({group for _, raw, _ in principals for group in _texts(raw.get("groups")) or ()})
    found: list[ChannelSettings] = []
    for at, _, values in rows:
        for index, group in enumerate(values.get("groups", ())):
            if group not in groups and "principals" not in reader.unreadable:
                hint = nearest(group, groups)
                reader.refuse(f"{at}.groups[{index}]", f"is a group that no principal has; {hint or 'add it'}", group)
        via = values.get("via")
        if not via or "name" not in values:
            continue
        before = len(reader.problems)
        common = {"name": values["name"], "groups": frozenset(values.get("groups", ())), "format": via["format"]}
        if via["format"] == "email":
            common["mail"] = _mail(reader, f"{at}.via", via)
        else:
            common |= _hook(reader, f"{at}.via", via)
        if len(reader.problems) == before:
            found.append(ChannelSettings(**common))
    return tuple(found)


def _texts(value: object) -> list[str] | None:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else None


def _secret_of(reader: Reader, at: str, name: str, value: str | None, what: str) -> Secret | None:
    if value is None:
        return None
    try:
        return require_secret(reader.path(value), what)
    except Wrong as wrong:
        reader.refuse(f"{at}.{name}", str(wrong), value)
        return None


def _hook(reader: Reader, at: str, via: Mapping[str, Any]) -> dict[str, Secret | None]:
    url = _secret_of(reader, at, "url_file", via.get("url_file"), _OF_HOOK["url_file"])
    secret = _secret_of(reader, at, "secret_file", via.get("secret_file"), _OF_HOOK["secret_file"])
    for name, secret_value, judge in (("url_file", url, webhook_url), ("secret_file", secret, webhook_key)):
        try:
            if secret_value is not None:
                judge(secret_value.reveal())
        except Invalid as invalid:
            reader.refuse(f"{at}.{name}", invalid.detail)
    return {"url": url, "secret": secret}


def _mail(reader: Reader, at: str, via: Mapping[str, Any]) -> Mail | None:
    if not {"host", "sender", "recipients"} <= via.keys():
        return None
    if not via["recipients"]:
        reader.refuse(f"{at}.recipients", "names nobody; write at least one address", [])
    if via["tls"] == "none" and not is_loopback(via["host"]):
        reader.refuse(f"{at}.tls", "sends mail and password in the clear; write starttls or tls", "none")
    if (via.get("user") is None) != (via.get("password_file") is None):
        reader.refuse(f"{at}.user", "and password_file belong together; write both, or neither", via.get("user"))
    return Mail(
        host=via["host"],
        port=via["port"],
        tls=via["tls"],
        sender=via["sender"],
        recipients=tuple(via["recipients"]),
        user=via.get("user"),
        password=_secret_of(reader, at, "password_file", via.get("password_file"), "the password"),
    )


_TRANSMITTER_KEYS = {"discovery": SSF_DISCOVERY, "jwks_uri": "jwks_uri", "jwks_file": "jwks_file"}


def read_transmitters(
    reader: Reader, rows: Sequence[Row], issuers: Sequence[Row], own: str | None
) -> tuple[Transmitter, ...]:
    """Whose security events are believed, and about whom."""
    for key in ("name", "issuer"):
        _unique(reader, rows, key)
    known = _written(issuers, "name")
    found: list[Transmitter] = []
    for at, raw, values in rows:
        before = len(reader.problems)
        if values.get("issuer") is not None and values["issuer"] == own:
            reader.refuse(f"{at}.issuer", "is the broker itself, which need not be told by itself; take it out", own)
        _check_whom(reader, at, values, known)
        sources = [source for source in _TRANSMITTER_KEYS if source in raw and raw[source] is not False]
        if len(sources) != 1:
            reader.refuse(at, f"has {len(sources)} key sources; write exactly one of {', '.join(_TRANSMITTER_KEYS)}")
        elif sources == ["jwks_file"] and values.get("jwks_file") is not None:
            _check_key_file(reader, at, values)
        if values.get("poll_token_file") is not None:
            _secret_of(reader, at, "poll_token_file", values["poll_token_file"], "the token")
            if values.get("poll_url") is None:
                reader.refuse(f"{at}.poll_token_file", "opens nothing without poll_url; add it, or take this out")
        is_whole = {key.name for key in ARRAYS["transmitters"]} <= values.keys()
        if len(reader.problems) == before and is_whole and own is not None:
            found.append(_transmitter(reader, values, sources[0], own))
    return tuple(found)


def _check_whom(reader: Reader, at: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in ("speaks_of", "events", "algorithms"):
        if values.get(name) == []:
            reader.refuse(f"{at}.{name}", "is empty, so that nothing it says counts; name at least one", [])
    for index, name in enumerate(values.get("speaks_of", ())):
        if name not in known and "issuers" not in reader.unreadable:
            reader.refuse(f"{at}.speaks_of[{index}]", _unknown("issuer", name, known, "issuers"), name)
    for index, name in enumerate(values.get("lockdown_on", ())):
        if name not in values.get("events", ()):
            reader.refuse(f"{at}.lockdown_on[{index}]", "is not among events, so that nothing comes of it", name)


def _check_key_file(reader: Reader, at: str, values: Mapping[str, Any]) -> None:
    try:
        require_key_set(reader.path(values["jwks_file"]), "jwks_file", values)
    except Wrong as wrong:
        reader.refuse(f"{at}.jwks_file", str(wrong), values["jwks_file"])


def _transmitter(reader: Reader, values: Mapping[str, Any], source: str, own: str) -> Transmitter:
    location: str | None = None if source == "discovery" else values[source]
    if location is not None and source == "jwks_file":
        location = str(reader.path(location))
    token_file = values["poll_token_file"]
    return Transmitter(
        name=values["name"],
        keys=TrustedIssuer(
            name=values["name"],
            issuer=values["issuer"],
            key_source=_TRANSMITTER_KEYS[source],
            location=location,
            algorithms=tuple(values["algorithms"]),
        ),
        audience=values["audience"] or own,
        events=frozenset(values["events"]),
        speaks_of=tuple(values["speaks_of"]),
        max_age=timedelta(seconds=values["max_age_s"]),
        lockdown_on=frozenset(values["lockdown_on"]),
        risk_lasts=timedelta(seconds=values["risk_lasts_s"]),
        poll_url=values["poll_url"],
        poll_token_file=None if token_file is None else str(reader.path(token_file)),
    )


def read_targets(
    reader: Reader, rows: Sequence[Row], resources: Sequence[Row], *, before_setup: bool
) -> tuple[Target, ...]:
    """The databases that are looked at themselves; every one that a resource names has to be there.

    `before_setup`: the login that the file of each is about is yet to be made.
    """
    _unique(reader, rows, "name")
    found: list[Target] = []
    for at, _, written in rows:
        if not {"name", "url_file", "heir"} <= written.keys():
            continue
        path = reader.path(written["url_file"])
        try:
            if not before_setup:
                target_url(require_secret(path, "the URL of the connection").reveal())
            found.append(Target(name=written["name"], url_file=path, heir=written["heir"]))
        except Wrong as wrong:
            reader.refuse(f"{at}.url_file", str(wrong), written["url_file"])
        except Invalid as invalid:
            reader.refuse(f"{at}.{invalid.member or 'url_file'}", invalid.detail)
    names = _written(rows, "name")
    for at, _, written in resources:
        wanted = (written.get("vault") or {}).get("target")
        if wanted is not None and wanted not in names:
            reader.refuse(f"{at}.vault.target", _unknown("target", wanted, names, "targets"), wanted)
    return tuple(found)


def check_providers(reader: Reader, rows: Sequence[Row]) -> set[str]:
    """The names of those that were added; what each is given is its own affair."""
    _unique(reader, rows, "name")
    names = _written(rows, "name")
    for at, _, written in rows:
        if written.get("name") in PROVIDERS:
            reader.refuse(f"{at}.name", "is a provider that the broker has; write another", written["name"])
    return set(names)


def check_resources(
    reader: Reader,
    rows: Sequence[Row],
    principals: Sequence[Row],
    own: str | None,
    added: Collection[str],
    *,
    has_vault: bool,
) -> None:
    """`added` are the names of `[[providers]]`."""
    _unique(reader, rows, "identifier")
    roles = {values["name"]: values.get("roles") for _, _, values in principals if "name" in values}
    names = _written(principals, "name")
    for at, raw, values in rows:
        identifier = values.get("identifier")
        if identifier is not None and own is not None and identifier.rstrip("/") in (own, f"{own}/v1"):
            reader.refuse(
                f"{at}.identifier",
                "is the broker itself, which its credentials may not open; write another",
                identifier,
            )
        provider = values.get("provider")
        # Where a name of theirs cannot be read, it may be the one that is meant.
        if not (provider is None or provider in PROVIDERS or provider in added or "providers" in reader.unreadable):
            reader.refuse(
                f"{at}.provider",
                f"is no provider here; there are {', '.join((*PROVIDERS, *sorted(added)))}, and one that a package "
                "offers is added with [[providers]]",
                provider,
            )
        _check_vault_of(reader, at, raw, values, has_vault=has_vault)
        if provider in PROVIDERS and "settings" in raw:
            reader.refuse(f"{at}.settings", f"has no meaning with provider {shown(provider)}; take it out")
        if provider not in PROVIDERS:
            _refuse_what_is_of_tokens(reader, at, raw)
        if values.get("scopes") == []:
            reader.refuse(f"{at}.scopes", "offers nothing that could be asked for; name at least one scope", [])
        for index, verifier in enumerate(values.get("verifiers", ())):
            if verifier not in names:
                if "principals" in reader.unreadable:
                    continue  # it may be the one whose name cannot be read: one mistake, one problem
                reader.refuse(
                    f"{at}.verifiers[{index}]", _unknown("principal", verifier, names, "principals"), verifier
                )
            elif (held := roles.get(verifier)) is not None and Role.VERIFIER not in held:
                reader.refuse(
                    f"{at}.verifiers[{index}]",
                    'is a principal without role verifier; add "verifier" to its roles',
                    verifier,
                )


# What is about tokens the broker signs, and says nothing of a secret that another system makes.
_OF_TOKENS = ("signing_algorithm", "token_typ", "require_dpop")


def _check_vault_of(
    reader: Reader, at: str, raw: Mapping[str, Any], values: Mapping[str, Any], *, has_vault: bool
) -> None:
    """The `vault` table of a resource, which goes with its provider."""
    provider = values.get("provider")
    if provider != "vault":
        if provider is not None and "vault" in raw:
            reader.refuse(
                f"{at}.vault",
                f'has no meaning with provider {shown(provider)}; write provider = "vault", or take it out',
            )
        return
    if not has_vault:
        reader.refuse(
            f"{at}.provider",
            "is Vault, and there is no section [vault] that says where that is and how to log in; add one",
            provider,
        )
    _refuse_what_is_of_tokens(reader, at, raw)
    if "vault" not in raw:
        reader.refuse(at, 'has provider "vault" and no table vault; write vault = { engine = "database", role = "…" }')
    table = values.get("vault")
    if not table:
        return
    try:
        least = SecretSource.parse(stated(table)).least_to_ask
    except Invalid as problem:
        reader.refuse(f"{at}.vault" + (f".{problem.member}" if problem.member else ""), problem.detail)
        return
    longest = values.get("max_ttl_s")
    if least is not None and longest is not None and least > timedelta(seconds=longest):
        reader.refuse(
            f"{at}.vault.least_ttl_s",
            f"needs a max_ttl_s of the resource of {int(least.total_seconds())} at least, and it is {longest}, so that "
            "nothing could be issued; raise that one",
            table.get("least_ttl_s"),
        )


def _refuse_what_is_of_tokens(reader: Reader, at: str, raw: Mapping[str, Any]) -> None:
    for name in _OF_TOKENS:
        if name in raw:
            reader.refuse(
                f"{at}.{name}",
                "is about tokens that the broker signs, and a secret from elsewhere is none; take it out",
                raw[name],
            )


def stated(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with its defaults, without the keys that have none."""
    return {name: value for name, value in table.items() if value is not None}


def _unknown(noun: str, name: str, known: Sequence[str], section: str) -> str:
    near = nearest(name, known) or (
        f"there are {', '.join(map(bare, sorted(known)[:20]))}" if known else "there are none"
    )
    return f"is the name of no {noun}; {near}; add it to [[{section}]], or correct the name"


def read_policies(reader: Reader, value: str | None) -> tuple[dict[str, str], str | None]:
    """File name to text of every `*.cedar`, and the text of the schema. A policy left out could be a forbid."""
    if value is None:
        return {}, None
    directory = reader.path(value)
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".cedar") or name == SCHEMA_FILE)
    except OSError as error:
        why = f"the directory {directory} cannot be read ({error.strerror}); make it, or correct the path"
        reader.refuse("policies.directory", why, value)
        return {}, None
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = _policy(directory / name)
        except Wrong as wrong:
            reader.refuse("policies.directory", str(wrong), value)
    schema = found.pop(SCHEMA_FILE, None)
    return found, schema


def _policy(path: Path) -> str:
    if not path.name.isprintable():
        raise Wrong(f"{shown(str(path))} has a character in its name that cannot be seen; rename it")
    content = read_file(path, MAX_POLICY_BYTES)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise Wrong(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if "\0" in text:  # PostgreSQL keeps no NUL in a document
        raise Wrong(f"{path} has a NUL; take it out")
    return text
