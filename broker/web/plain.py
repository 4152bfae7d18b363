"""Which characters may stand in text that people and logs will see (INV-31).

Left out are the control characters (Unicode Cc), the line separators, and the format characters (Cf): what reorders or
hides its neighbours makes an approver read another sentence than the one that was sent.
"""

from __future__ import annotations

_RANGES = (
    (0x00, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x600, 0x605), (0x61C, 0x61C), (0x6DD, 0x6DD), (0x70F, 0x70F),
    (0x890, 0x891), (0x8E2, 0x8E2), (0x180E, 0x180E), (0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x206F),
    (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB), (0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x13430, 0x1345F),
    (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip


def _written(point: int) -> str:
    # As an escape where every reader of regular expressions knows one: Python's, pydantic's, JSON Schema's.
    return f"\\u{point:04x}" if point < 0x10000 else chr(point)


# The inside of a character class.
NOT_PLAIN = "".join(f"{_written(first)}-{_written(last)}" for first, last in _RANGES)
PLAIN_PATTERN = f"^[^{NOT_PLAIN}]*$"
