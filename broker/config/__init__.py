"""Settings: one TOML file and `BROKER__SECTION__KEY`, read once and strictly into something frozen.

Everything wrong is said at once, each with file, key, value and remedy; an unsafe value is refused and not warned
about, so that whoever holds `Settings` holds checked ones. The only room that reads the environment. It never shows
a password: not the value of a key that may hold one, nor that of a key it does not know (INV-30).
"""

from __future__ import annotations

from broker.config.files import MASTER_KEY_BYTES, read_master_key
from broker.config.keys import PROVIDERS
from broker.config.loading import load, vault_administrator
from broker.config.reference import config_reference
from broker.config.settings import ServerSettings, Settings, VaultAdministrator
from broker.config.values import WORKLOAD_ALGORITHMS

__all__ = [
    "MASTER_KEY_BYTES",
    "PROVIDERS",
    "WORKLOAD_ALGORITHMS",
    "ServerSettings",
    "Settings",
    "VaultAdministrator",
    "config_reference",
    "load",
    "read_master_key",
    "vault_administrator",
]
