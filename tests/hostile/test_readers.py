"""The strict readers, tried with everything: they read what all others read alike, and refuse the rest."""

import json
from urllib.parse import parse_qsl, quote, urlencode

import pytest
from flask import Flask, Response
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.domain import strict_json
from broker.domain.clock import from_epoch
from broker.domain.errors import BrokerError, Invalid, InvalidScope
from broker.domain.identity import is_id, new_id
from broker.domain.scope import parse_scope
from broker.web.reading import form, printable, trace_id_of

FORM = "application/x-www-form-urlencoded"
SOME = settings(derandomize=True, database=None, max_examples=150, deadline=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=6), below, max_size=4),
    max_leaves=20,
)
NEARLY_JSON = st.lists(
    st.sampled_from([*'[]{}":, \t\n0123456789-+.eE\\', "true", "null", "NaN", "Infinity", '"a"', '"a":', "\\u0000",
                     "\\ud800", '{"a":1,"a":2}', "1e999", "9" * 30, "\ufeff", "\x00", "é"]),
    max_size=40,
).map("".join)  # fmt: skip


# --- JSON ------------------------------------------------------------------------------------------------------


@SOME
@given(ANY_JSON | NEARLY_JSON, st.booleans())
def test_what_is_read_is_what_a_lenient_reader_reads(value, ascii_only):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=ascii_only)
    raw = text.encode(errors="surrogatepass")
    try:
        read = strict_json.loads(raw)
    except Invalid as problem:
        assert problem.detail
        assert problem.__cause__ is None
        return
    assert read == json.loads(raw)
    assert json.dumps(read, allow_nan=False).encode()
    assert json.dumps(read, ensure_ascii=False).encode()  # no half of a pair
    assert "\\u0000" not in json.dumps(read)


@SOME
@given(st.dictionaries(TEXT, st.integers(0, 9), min_size=1, max_size=5), st.data())
def test_a_member_that_comes_twice_is_refused_however_it_is_spelled(members, data):
    name = data.draw(st.sampled_from(sorted(members)))
    spelled = data.draw(st.sampled_from([json.dumps(name), json.dumps(name, ensure_ascii=False)]))
    pairs = [f"{json.dumps(key)}:{value}" for key, value in members.items()]
    pairs.insert(data.draw(st.integers(0, len(pairs))), f"{spelled}:0")
    with pytest.raises(Invalid, match="twice"):
        strict_json.loads(("{" + ",".join(pairs) + "}").encode())


@SOME
@given(st.integers(1, 80), st.sampled_from(["[]", "{}", "mixed"]))
def test_depth_is_counted_and_not_guessed(depth, kind):
    opening = {"[]": "[", "{}": '{"a":', "mixed": '[{"a":'}[kind]
    closing = {"[]": "]", "{}": "}", "mixed": "}]"}[kind]
    levels = depth * (2 if kind == "mixed" else 1)
    raw = (opening * depth + "1" + closing * depth).encode()
    if levels <= strict_json.MAX_DEPTH:
        assert strict_json.loads(raw) == json.loads(raw)
    else:
        with pytest.raises(Invalid, match="deeper"):
            strict_json.loads(raw)


@SOME
@given(st.integers(-(2**70), 2**70))
def test_an_integer_is_read_exactly_or_not_at_all(number):
    raw = json.dumps({"a": [number]}).encode()
    if -(2**63) <= number < 2**63:
        assert strict_json.loads(raw) == {"a": [number]}
    else:
        with pytest.raises(Invalid) as refused:
            strict_json.loads(raw)
        assert refused.value.member == "a[0]"


@SOME
@given(
    st.lists(st.sampled_from(["a", "b.c", "0"]) | st.integers(0, 3), max_size=6),
    st.sampled_from(["NaN", "-Infinity", "1e999"]),
)
def test_a_number_that_is_none_is_found_wherever_it_is(path, number):
    text, where = number, ""
    for step in reversed(path):
        text = f'{{"x": 1, {json.dumps(step)}: {text}}}' if isinstance(step, str) else f"[{'0, ' * step}{text}]"
    for step in path:
        where += f"[{step}]" if isinstance(step, int) else f".{step}" if where else step
    with pytest.raises(Invalid) as refused:
        strict_json.loads(text.encode())
    assert refused.value.member == (where[:60] or None)


# --- forms -----------------------------------------------------------------------------------------------------


def read_form(raw, content_type=FORM, query=""):
    with Flask("x", static_folder=None).test_request_context(
        f"/oauth2/token{query}", method="POST", data=raw, content_type=content_type
    ):
        return form(raw)


@SOME
@given(st.dictionaries(TEXT.filter(bool), TEXT, max_size=8))
def test_a_form_is_read_as_it_was_written_or_refused_for_a_control_character(parameters):
    wanted = {name: value for name, value in parameters.items() if value}
    try:
        assert read_form(urlencode(parameters).encode()) == wanted
    except Invalid as problem:
        assert [value for value in parameters.values() if not value.isprintable()]
        assert "control" in problem.detail


@SOME
@given(st.binary(max_size=80) | st.text("a=&%+;0fF\x00é", max_size=40).map(str.encode))
def test_no_bytes_break_the_reader_of_forms(raw):
    try:
        read = read_form(raw)
    except Invalid as problem:
        assert problem.detail.isprintable()
        return
    assert read == {name: value for name, value in parse_qsl(raw.decode(), keep_blank_values=True) if value}


@SOME
@given(st.text(min_size=1, max_size=5).filter(lambda text: text.isprintable()), st.integers(2, 4))
def test_a_parameter_that_comes_twice_is_refused_whatever_its_values(name, times):
    spelled = [quote(name, safe=""), "".join(f"%{byte:02x}" for byte in name.encode())]
    raw = "&".join(f"{spelled[n % 2]}={n % 2 or ''}" for n in range(times)).encode()
    with pytest.raises(Invalid, match="more than once"):
        read_form(raw)


# --- scopes, ids, traces -----------------------------------------------------------------------------------------


@SOME
@given(st.text(max_size=60) | st.text('ab: "\\\t\n\x7f*,/', max_size=30))
def test_scopes_are_the_tokens_of_rfc_6749_and_nothing_else(text):
    try:
        scopes = parse_scope(text)
    except InvalidScope as problem:
        assert problem.member == "scope"
        return
    assert sorted(scopes) == sorted(set(text.split(" ")))
    for scope in scopes:
        assert all(character == "!" or "#" <= character <= "[" or "]" <= character <= "~" for character in scope)


@SOME
@given(
    st.text(max_size=40)
    | st.text("0123456789abcdefghijklmnopqrstuvwxyz\n", min_size=25, max_size=27).map("task_".__add__)
)
def test_only_what_we_could_have_made_is_an_id(text):
    for prefix in ("task", "grt", "evt", "lck"):
        if is_id(text, prefix):
            assert text.startswith(f"{prefix}_")
            assert len(text) == len(prefix) + 27
            assert text.isascii()
            assert text.isprintable()
            assert not set(text[len(prefix) + 1 :]) & set("ilou")


@SOME
@given(st.lists(st.integers(1_577_836_800, 7_258_118_400), min_size=2, max_size=20))
def test_ids_are_ours_all_different_and_sort_as_time_does(moments):
    ids = [new_id("grt", from_epoch(moment)) for moment in sorted(moments)]
    assert all(is_id(made, "grt") and not is_id(made, "task") for made in ids)
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids)


@SOME
@given(st.text(max_size=80) | st.text("0f", min_size=32, max_size=32).map("00-{}-00f067aa0ba902b7-01".format))
def test_a_trace_id_is_32_hexadecimal_digits_or_not_taken(text):
    found = trace_id_of(text)
    assert found is None or (len(found) == 32 and set(found) <= set("0123456789abcdef") and set(found) != {"0"})


@SOME
@given(st.text(max_size=300))
def test_somebody_elses_text_is_one_printable_line_wherever_it_is_shown(text):
    shown = printable(text)
    assert len(shown) <= 200
    assert len(shown.splitlines()) <= 1
    assert shown.encode() or not text
    Response(headers={"X-Shown": quote(shown)})


@pytest.mark.parametrize("reader", [strict_json.loads, read_form, lambda raw: parse_scope(raw.decode("latin-1"))])
def test_every_refusal_is_one_of_ours(reader):
    for raw in (b"", b"\x00", b"\xff" * 100, b"[" * 65_537, b"a=" * 40_000, b"%" * 1000, b" " * 1000):
        try:
            reader(raw)
        except BrokerError as problem:
            assert problem.detail
        except Exception as problem:
            assert type(problem).__name__ == "TooLarge"
