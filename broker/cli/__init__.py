"""`broker …`: the door for people. Server commands build a broker; client commands speak HTTP through the SDK."""

from broker.cli.main import main

__all__ = ["main"]
