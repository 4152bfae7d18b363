"""What a development directory holds besides its configuration. Apart, so that a token is made without a broker."""

from __future__ import annotations

from pathlib import Path

from broker.providers.dev_issuer import DevIssuer


def dev_issuer(directory: Path) -> DevIssuer:
    """The development issuer kept in this directory, made on first use."""
    return DevIssuer.create_or_load(directory)
