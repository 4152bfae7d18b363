"""A just-in-time credential broker for AI agents.

An agent proves what it is, names the task it works on, and receives a credential that can do only
what the task needs, for minutes. When the task ends, everything issued for it dies.
"""

__version__ = "0.1.0"
