"""The table of characters that text may not hold, against Unicode's own."""

import re
import sys
from unicodedata import category

from broker.web.plain import NOT_PLAIN, PLAIN_PATTERN
from broker.web.shapes import WithReason

CHARACTERS = [chr(point) for point in range(sys.maxunicode + 1)]
PLAIN = re.compile(PLAIN_PATTERN)


def test_every_control_and_format_character_and_line_separator_is_in_it():
    inside = set(re.findall(f"[{NOT_PLAIN}]", "".join(CHARACTERS)))
    assert inside >= {character for character in CHARACTERS if category(character) in ("Cc", "Cf", "Zl", "Zp")}


def test_no_letter_mark_number_sign_or_blank_is_in_it():
    inside = set(re.findall(f"[{NOT_PLAIN}]", "".join(CHARACTERS)))
    # Hieroglyph joiners became letters and marks in newer versions of Unicode; variation selectors hide like tags.
    kept = {c for c in inside if category(c)[0] in "LNPS" or category(c) == "Zs"}
    assert not {c for c in kept if not 0x13430 <= ord(c) <= 0x1345F}


def test_every_reader_of_the_pattern_reads_it_alike():
    """Ours is pydantic's, in Rust; the document publishes it for everybody else's."""
    for character in CHARACTERS[::7]:
        if "\ud800" <= character <= "\udfff":
            continue
        try:
            WithReason(reason=f"a{character}b")
            accepted = True
        except ValueError:
            accepted = False
        assert accepted is (PLAIN.fullmatch(f"a{character}b") is not None), hex(ord(character))
