"""Status lists: two bits a token that say whether it still counts (IETF Token Status List).

Pure bytes: packing, compressing, and their inverse for lists whose origin was verified elsewhere. What cannot be
read is refused and never "valid" (INV-24).
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from broker.domain.clock import epoch
from broker.domain.errors import Invalid

VALID, INVALID, SUSPENDED = 0, 1, 2

_WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class StatusBits:
    """The statuses of one list, `bits` each: index 0 is the lowest bits of the first byte."""

    bits: int
    packed: bytes = field(repr=False)

    @classmethod
    def of(cls, *, bits: int, size: int, invalid: Iterable[int], suspended: Iterable[int] = ()) -> StatusBits:
        """`size` statuses, valid but for those named; what is both invalid and suspended is invalid (INV-23)."""
        _require_width(bits)
        per_byte = 8 // bits
        if size <= 0 or size % per_byte:
            raise ValueError(f"{size} statuses of {bits} bits do not fill whole bytes: take a multiple of {per_byte}")
        packed = bytearray(size // per_byte)
        _put(packed, suspended, SUSPENDED, bits, size)
        _put(packed, invalid, INVALID, bits, size)
        return cls(bits=bits, packed=bytes(packed))

    def __len__(self) -> int:
        return len(self.packed) * 8 // self.bits

    def status_at(self, index: int) -> int:
        """The status at `index`; Invalid beyond the end, where a list says nothing (INV-24)."""
        if not 0 <= index < len(self):
            raise Invalid(f"index {index} is beyond the {len(self)} statuses of this list", member="idx")
        at = index * self.bits
        return self.packed[at >> 3] >> (at & 7) & ((1 << self.bits) - 1)

    def lst(self) -> str:
        """The `lst` member: ZLIB of level 9, base64url without padding."""
        return base64.urlsafe_b64encode(zlib.compress(self.packed, 9)).rstrip(b"=").decode("ascii")


def encode(bits: int, size: int, invalid: Iterable[int], suspended: Iterable[int] = ()) -> str:
    """The `lst` of a list of `size` statuses in which only these are not valid.

    >>> decode(2, encode(2, 8, invalid=[1], suspended=[6]), max_bytes=2).packed.hex()
    '0420'
    """
    return StatusBits.of(bits=bits, size=size, invalid=invalid, suspended=suspended).lst()


def decode(bits: int, lst: str, *, max_bytes: int) -> StatusBits:
    """The statuses in a `lst` of at most `max_bytes` once decompressed; Invalid for anything else."""
    if bits not in _WIDTHS:
        raise Invalid(f"bits is {bits!r:.20} and must be 1, 2, 4 or 8", member="bits")
    try:
        compressed = base64.urlsafe_b64decode(lst.encode("ascii") + b"=" * (-len(lst) % 4))
    except (UnicodeEncodeError, binascii.Error):
        raise Invalid("lst is not base64url", member="lst") from None
    if base64.urlsafe_b64encode(compressed).rstrip(b"=") != lst.encode("ascii"):
        # Python's decoder skips what it does not know.
        raise Invalid("lst is not base64url without padding", member="lst")
    inflater = zlib.decompressobj()
    try:
        # Bounded while inflating: 64 KiB of zeros compressed twice would otherwise be gigabytes.
        packed = inflater.decompress(compressed, max_bytes + 1)
    except zlib.error:
        raise Invalid("lst is not ZLIB data", member="lst") from None
    if len(packed) > max_bytes:
        raise Invalid(f"lst is more than {max_bytes} bytes once decompressed", member="lst")
    # `eof` is set only after the checksum matched: a list that was cut short would end in fewer revocations.
    if not inflater.eof or inflater.unused_data:
        raise Invalid("lst does not end where its ZLIB data does", member="lst")
    return StatusBits(bits=bits, packed=packed)


def claims(
    *, uri: str, issued_at: datetime, expires_at: datetime, ttl_s: int, lst: str, bits: int = 2
) -> dict[str, Any]:
    """The payload of a `statuslist+jwt`; `uri` is what the tokens that point here call it, letter by letter."""
    if ttl_s <= 0 or expires_at <= issued_at:
        raise ValueError("a status list needs a positive ttl and an expiry after its issue")
    return {
        "sub": uri,
        "iat": epoch(issued_at),
        "exp": epoch(expires_at),
        "ttl": ttl_s,
        "status_list": {"bits": bits, "lst": lst},
    }


def _put(packed: bytearray, indexes: Iterable[int], status: int, bits: int, size: int) -> None:
    if status >> bits:
        indexes = tuple(indexes)
        if indexes:
            raise ValueError(f"status {status} does not fit into {bits} bit")
    per_byte = 8 // bits
    shift = per_byte.bit_length() - 1
    keep = tuple(0xFF ^ (((1 << bits) - 1) << (place * bits)) for place in range(per_byte))
    write = tuple(status << (place * bits) for place in range(per_byte))
    last = per_byte - 1
    for index in indexes:
        # A negative one would count from the end and mark somebody else's token.
        if not 0 <= index < size:
            raise ValueError(f"index {index} is not in a list of {size} statuses")
        place = index & last
        packed[index >> shift] = packed[index >> shift] & keep[place] | write[place]


def _require_width(bits: int) -> None:
    if bits not in _WIDTHS:
        raise ValueError(f"bits is {bits!r} and must be 1, 2, 4 or 8")
