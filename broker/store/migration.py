"""Bringing a database to the newest revision, and telling whether it is there."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from broker.store.database import Database


def migrate(database: Database, scripts: Path) -> None:
    """Run what is missing; all of it or, on an error, none of it."""
    with database.begin() as db:
        config = Config()
        config.set_main_option("script_location", str(scripts).replace("%", "%%"))
        config.attributes["connection"] = db
        command.upgrade(config, "head")


def is_current(database: Database, scripts: Path) -> bool:
    """Whether the database is at the newest revision."""
    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    with database.begin() as db:
        have = MigrationContext.configure(db).get_current_heads()
    return set(have) == set(ScriptDirectory.from_config(config).get_heads())
