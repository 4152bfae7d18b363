import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.errors import Invalid
from broker.domain.strict_json import loads

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.booleans())
def test_what_is_plain_json_is_read_as_everybody_reads_it(value, ascii_only):
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert loads(raw) == json.loads(raw)


@given(st.binary(max_size=200) | st.text(alphabet='[]{}":,\\u0d8 1e-+NaInfty', max_size=60).map(str.encode))
def test_whatever_comes_is_read_or_refused_and_nothing_else(raw):
    try:
        loads(raw)
    except Invalid as problem:
        assert problem.detail
        assert problem.__cause__ is None


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 01}', "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'"\x00"', "not JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),  # a surrogate, written as if it were a character
        (b'{"ttl": 1, "ttl": 2}', "'ttl' appears twice"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "'b' appears twice"),
        (b'{"ttl": NaN}', "NaN"),
        (b'{"ttl": Infinity}', "Infinity"),
        (b'{"ttl": -Infinity}', "-Infinity"),
        (b'{"ttl": 1e400}', "too large"),
        (b'{"ttl": 9223372036854775808}', "64 bits"),
        (b'{"ttl": -9223372036854775809}', "64 bits"),
        (b'{"ttl": ' + b"9" * 5000 + b"}", "64 bits"),
        (b'{"a": [{"b": "x\\u0000"}]}', "'a\\[0\\].b' holds a NUL"),
        (b'{"a\\u0000": 1}', "NUL"),
        (b'{"a": "\\ud800"}', "'a' holds half a surrogate"),
        (b'{"\\udc00": 1}', "half a surrogate"),
        (b'["\\udc00\\ud800"]', "half a surrogate"),
        (b"[" * 33 + b"]" * 33, "deeper than 32"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "deeper than 32"),
        (b"[" * 60000, "deeper than 32"),
        (b'"' + b"x" * 65536 + b'"', "65538 bytes"),
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(raw, reason):
    with pytest.raises(Invalid, match=reason):
        loads(raw)


@pytest.mark.parametrize(
    ("raw", "member"),
    [
        (b'{"ttl_s": NaN}', "ttl_s"),
        (b'{"a": 1, "b": [0, {"c": -Infinity}]}', "b[1].c"),
        (b'{"a": 1e400, "b": NaN}', "a"),
        (b'{"a": 99999999999999999999}', "a"),
        (b"NaN", None),
        (b'{"a": NaN, "b": }', None),  # what follows cannot be read, so there is no whole to say where in
        (b'{"a": NaN, "a": 1}', None),
    ],
)
def test_a_number_that_is_none_is_refused_by_the_name_of_its_member(raw, member):
    with pytest.raises(Invalid) as refused:
        loads(raw)
    assert refused.value.member == member
    assert refused.value.__suppress_context__
    assert (member is None) or repr(member) in refused.value.detail


def test_a_whole_surrogate_pair_is_a_character():
    assert loads(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_the_largest_integers_and_the_deepest_nesting_are_read():
    assert loads(b"[9223372036854775807, -9223372036854775808]") == [2**63 - 1, -(2**63)]
    assert loads(b"[" * 32 + b"]" * 32)


def test_brackets_in_strings_and_beside_each_other_are_not_depth():
    many = {"a": ["[{" * 40, '\\"[' * 40, *[[] for _ in range(40)]]}
    assert loads(json.dumps(many).encode()) == many


@pytest.mark.parametrize("raw", [b"[" * 40 + b'"' + b'\\"' * 32000, b"[" * 20 + b'"[[' * 20000, b'{"' * 20000])
def test_hostile_nesting_costs_no_time(raw):
    started = time.perf_counter()
    with pytest.raises(Invalid):
        loads(raw)
    assert time.perf_counter() - started < 0.5


def test_the_refusal_does_not_carry_the_document():
    """INV-30: a traceback of it ends in a log."""
    with pytest.raises(Invalid) as refused:
        loads(b'{"password": "hunter2" "more": 1}')
    assert refused.value.__suppress_context__
    assert "hunter2" not in str(refused.value)
