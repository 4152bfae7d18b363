"""Vectors are those of draft-ietf-oauth-status-list, sections 4.1, 4.2, 5.1 and appendix C."""

import base64
import time
import tracemalloc
import zlib
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.clock import from_epoch
from broker.domain.errors import Invalid
from broker.domain.status_list import INVALID, SUSPENDED, VALID, StatusBits, claims, decode, encode
from tests.conftest import NOW

ONE_BIT = [1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1]
TWO_BITS = [1, 2, 0, 3, 0, 1, 0, 1, 1, 2, 3, 3]

C1 = (
    "eNrt3AENwCAMAEGogklACtKQPg9LugC9k_ACvreiogEAAKkeCQAAAAAAAAAAAAAAAAAAAIBylgQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAXG9IAAAAAAAAAPwsJAAAAAAAAAAAAAAAvhsSAAAAAAAAAAAA7KpLAAAAAAAAAAAAAAAAAAAAAJsLCQAAAAAAAAAA"
    "ADjelAAAAAAAAAAAKjDMAQAAAACAZC8L2AEb"
)
C1_STATUSES = dict.fromkeys((0, 1993, 25460, 159495, 495669, 554353, 645645, 723232, 854545, 934534, 1000345), 1)
C2 = (
    "eNrt2zENACEQAEEuoaBABP5VIO01fCjIHTMStt9ovGVIAAAAAABAbiEBAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEB5WwIAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAID0ugQA"
    "AAAAAAAAAAAAAAAAQG12SgAAAAAAAAAAAAAAAAAAAAAAAAAAAOCSIQEAAAAAAAAAAAAAAAAAAAAAAAD8ExIAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAwJEuAQAAAAAAAAAAAAAAAAAAAAAAAMB9SwIAAAAAAAAAAAAAAAAAAACoYUoAAAAAAAAAAAAAAEBqH81gAQw"
)
C2_STATUSES = {
    0: 1,
    1993: 2,
    25460: 1,
    159495: 3,
    495669: 1,
    554353: 1,
    645645: 2,
    723232: 1,
    854545: 1,
    934534: 2,
    1000345: 3,
}


def with_bytes(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@pytest.mark.parametrize(
    ("bits", "packed", "lst", "statuses"),
    [(1, "b9a3", "eNrbuRgAAhcBXQ", ONE_BIT), (2, "c944f9", "eNo76fITAAPfAgc", TWO_BITS)],
)
def test_the_examples_of_the_standard_are_read(bits, packed, lst, statuses):
    read = decode(bits, lst, max_bytes=100)
    assert read.packed.hex() == packed
    assert [read.status_at(index) for index in range(len(read))] == statuses


def test_the_examples_of_the_standard_are_written():
    assert encode(1, 16, [index for index, status in enumerate(ONE_BIT) if status]) == "eNrbuRgAAhcBXQ"
    written = StatusBits.of(
        bits=2,
        size=12,
        invalid=[index for index, status in enumerate(TWO_BITS) if status == 1],
        suspended=[index for index, status in enumerate(TWO_BITS) if status == 2],
    )
    # The example also has three statuses of 3, which we never write: without them 0xC9 0x44 0xF9 is this.
    assert written.packed.hex() == "094409"


@pytest.mark.parametrize(("bits", "lst", "statuses"), [(1, C1, C1_STATUSES), (2, C2, C2_STATUSES)])
def test_the_long_vectors_of_the_standard_are_read(bits, lst, statuses):
    read = decode(bits, lst, max_bytes=2**20)
    assert len(read) == 2**20
    assert {index: read.status_at(index) for index in statuses} == statuses
    others = bytearray(read.packed)
    for index in statuses:
        others[index * bits // 8] = 0
    assert not any(others)


def test_the_long_vector_of_one_bit_is_written():
    # Compared unpacked: two zlib of the same level need not agree on the bytes.
    assert decode(1, encode(1, 2**20, C1_STATUSES), max_bytes=2**20) == decode(1, C1, max_bytes=2**20)


@given(st.sampled_from([2, 4, 8]), st.sets(st.integers(0, 199)), st.sets(st.integers(0, 199)))
def test_what_was_marked_is_found_and_nothing_else(bits, invalid, suspended):
    read = decode(bits, encode(bits, 200, invalid, suspended), max_bytes=200)
    for index in range(200):
        expected = INVALID if index in invalid else SUSPENDED if index in suspended else VALID
        assert read.status_at(index) == expected


def test_an_invalid_token_that_is_also_suspended_stays_invalid():
    """INV-23: one or-ed into the other would be an application's own status 3."""
    assert decode(2, encode(2, 4, [1], suspended=[1]), max_bytes=1).status_at(1) == INVALID


@pytest.mark.parametrize("index", [-1, 8, 2**31])
def test_an_index_outside_the_list_is_never_marked_and_never_valid(index):
    with pytest.raises(ValueError, match="is not in a list of 8"):
        encode(2, 8, [index])
    with pytest.raises(Invalid, match="is beyond the 8 statuses"):
        decode(2, encode(2, 8, []), max_bytes=2).status_at(index)


@pytest.mark.parametrize(("bits", "size"), [(0, 8), (3, 8), (16, 8), (2, 0), (2, 7), (2, -4)])
def test_a_list_of_no_possible_shape_is_refused(bits, size):
    with pytest.raises(ValueError, match=r"must be 1, 2, 4 or 8|do not fill whole bytes"):
        encode(bits, size, [])


def test_suspension_does_not_fit_into_one_bit():
    with pytest.raises(ValueError, match="does not fit"):
        encode(1, 8, [], suspended=[1])


def test_a_bomb_is_refused_before_it_unfolds():
    bomb = with_bytes(zlib.compress(bytes(16 * 2**20), 9))
    tracemalloc.start()
    try:
        with pytest.raises(Invalid, match="more than 32768 bytes"):
            decode(2, bomb, max_bytes=32768)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


GOOD = encode(2, 64, [3])


@pytest.mark.parametrize(
    "lst",
    [
        "",
        "?",
        "é",
        GOOD + "=",
        GOOD[:-1] + "\n",
        GOOD[:8] + "\n" + GOOD[8:],
        with_bytes(b"not zlib"),
        with_bytes(zlib.compress(bytes(16))[:-1]),  # no whole checksum
        with_bytes(zlib.compress(bytes(16)) + b"x"),
        with_bytes(zlib.compress(bytes(16))[2:-4]),  # bare DEFLATE
    ],
)
def test_a_list_that_is_not_whole_and_exact_is_refused(lst):
    with pytest.raises(Invalid, match=r"^lst "):
        decode(2, lst, max_bytes=1024)


@pytest.mark.parametrize("bits", [0, 3, -1, 64])
def test_an_unknown_width_is_refused(bits):
    with pytest.raises(Invalid, match="bits is"):
        decode(bits, GOOD, max_bytes=1024)


def test_the_claims_are_those_of_the_standards_example():
    assert claims(
        uri="https://example.com/statuslists/1",
        issued_at=from_epoch(1686920170),
        expires_at=from_epoch(2291720170),
        ttl_s=43200,
        lst="eNrbuRgAAhcBXQ",
        bits=1,
    ) == {
        "exp": 2291720170,
        "iat": 1686920170,
        "status_list": {"bits": 1, "lst": "eNrbuRgAAhcBXQ"},
        "sub": "https://example.com/statuslists/1",
        "ttl": 43200,
    }


@pytest.mark.parametrize(("lifetime_s", "ttl_s"), [(0, 10), (-1, 10), (15, 0), (15, -1)])
def test_a_status_list_always_has_an_end(lifetime_s, ttl_s):
    with pytest.raises(ValueError, match="positive ttl"):
        claims(uri="u", issued_at=NOW, expires_at=NOW + timedelta(seconds=lifetime_s), ttl_s=ttl_s, lst=GOOD)


def test_a_full_size_list_is_small_and_quick():
    size = 2**17
    for invalid in (range(0), range(1000, 2000), range(0, size, 100), range(size)):
        began = time.perf_counter()
        lst = encode(2, size, invalid)
        took = time.perf_counter() - began
        print(f"{len(invalid)} of {size} invalid: {len(lst)} characters, {took * 1000:.1f} ms")  # noqa: T201
        assert len(lst) < size // 4
