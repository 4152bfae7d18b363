"""`Secret`: what opens something. It cannot be printed, logged, compared, copied or pickled (INV-30)."""

from __future__ import annotations

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

    def __repr__(self) -> str:
        return "[secret]"

    def __format__(self, spec: str) -> str:
        return "[secret]"

    # Comparing would leak by timing and invite `==` on secrets.
    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("a Secret is not compared")

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        raise TypeError("a Secret is not pickled or copied")
