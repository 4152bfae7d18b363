"""The broker behind the current request, and the lanes its body is read in."""

from __future__ import annotations

from flask import current_app

from broker.web.bodies import Bodies
from broker.wiring import Broker


def broker() -> Broker:
    found: Broker = current_app.extensions["broker"]
    return found


def bodies() -> Bodies:
    found: Bodies = current_app.extensions["bodies"]
    return found
