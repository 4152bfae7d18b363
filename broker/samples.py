"""Where the sample configuration and policies are: `config/` of a checkout, inside the package once installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def directory() -> Path:
    # Not "config" inside the package too: that name is the module that reads settings.
    installed = _PACKAGE / "_samples"
    return installed if installed.is_dir() else _PACKAGE.parent / "config"
