"""`Secret` and `SecretData`: whatever opens something. It cannot be printed, logged, compared or pickled (INV-30)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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


class SecretData:
    """What the agent receives: a JSON object that only `reveal` shows. It cannot be printed, compared or pickled.

    >>> data = SecretData({"username": "jit", "password": "hunter2"})
    >>> str(data), data.names, data.reveal()["username"]
    ('[secret]', ('password', 'username'), 'jit')
    """

    __slots__ = ("__names", "__sealed")

    def __init__(self, data: Mapping[str, Any]) -> None:
        # As text: whoever reveals it gets a copy, and what was hashed is what is handed out.
        self.__sealed = Secret(json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
        self.__names = tuple(sorted(data))

    @property
    def names(self) -> tuple[str, ...]:
        return self.__names

    def reveal(self) -> dict[str, Any]:
        revealed: dict[str, Any] = json.loads(self.__sealed.reveal())
        return revealed

    def sha256(self) -> str:
        """What may be kept of it: the hash of its members as compact JSON with sorted names."""
        return self.__sealed.sha256()

    def __repr__(self) -> str:
        return "[secret]"

    def __format__(self, spec: str) -> str:
        return "[secret]"

    def __eq__(self, other: object) -> bool:
        raise TypeError("SecretData is not compared; compare its sha256() with hmac.compare_digest")

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        raise TypeError("SecretData is not pickled or copied")
