"""`httpx`, without the command line that it comes with: that one loads a terminal library and a highlighter.

It would be most of what a program waits for before its first credential. httpx does without it where these are not
installed; here its import is made to fail in the same way, for as long as httpx is being loaded.
"""

import sys

_COMMAND_LINE = "httpx._main"

_is_wanted = "httpx" in sys.modules or _COMMAND_LINE in sys.modules
if not _is_wanted:
    sys.modules[_COMMAND_LINE] = None  # type: ignore[assignment] # what `import` takes for "not there"
try:
    import httpx
finally:
    if not _is_wanted:
        del sys.modules[_COMMAND_LINE]

__all__ = ["httpx"]
