"""`Secret`: anything that opens something. It cannot be printed, logged, compared or pickled (INV-30)."""

from __future__ import annotations

import hashlib
from typing import Any, NoReturn


class Secret:
    """A value that only `reveal` shows.

    >>> str(Secret("hunter2")), repr([Secret("hunter2")])
    ('[secret]', '[[secret]]')
    """

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        return self.__value

    def sha256(self) -> str:
        """What may be kept of it: the lower-case hex SHA-256 of its UTF-8 bytes."""
        return hashlib.sha256(self.__value.encode()).hexdigest()

    def __repr__(self) -> str:
        return "[secret]"

    def __format__(self, spec: str) -> str:
        return "[secret]"

    # Comparing would leak by timing and invite `==` on secrets; hashing would let them be dict keys.
    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("a Secret is not compared; compare its sha256() with hmac.compare_digest")

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        raise TypeError("a Secret is not pickled or copied")
