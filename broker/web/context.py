"""The broker behind the current request."""

from __future__ import annotations

from flask import current_app

from broker.wiring import Broker


def broker() -> Broker:
    found: Broker = current_app.extensions["broker"]
    return found
