"""Bringing a database to the newest revision, and telling whether it is there."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from broker.store import locks
from broker.store.database import Database

_PACKAGE = Path(__file__).parents[1]


def migrate(database: Database) -> None:
    """Run what is missing; all of it or, on an error, none of it. Of several that start at once, one does the work."""
    with database.begin() as db:
        locks.hold_for_migration(db)
        config = _config()
        config.attributes["connection"] = db
        command.upgrade(config, "head")


def is_current(database: Database) -> bool:
    """Whether the database is at the newest revision."""
    with database.begin() as db:
        have = MigrationContext.configure(db).get_current_heads()
    return set(have) == set(ScriptDirectory.from_config(_config()).get_heads())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    return config


def scripts() -> Path:
    """The revisions: inside an installed package, beside the package in a checkout."""
    installed = _PACKAGE / "migrations"
    return installed if installed.is_dir() else _PACKAGE.parent / "migrations"
