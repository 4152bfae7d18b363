"""What our servers have in common: the web server says what it has to say where all else is said, as JSON."""

from __future__ import annotations

import logging
from typing import Any

LOG: dict[str, Any] = {
    "formatters": {},
    "handlers": {},
    "loggers": {"_granian": {"handlers": [], "propagate": True}, "granian.access": {"handlers": [], "propagate": True}},
}


def say_only_news() -> None:
    """It warns of more threads than cores at each start; ours wait for others, and that is why they are many."""
    logging.getLogger("_granian").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "Python threads" not in record.getMessage()
