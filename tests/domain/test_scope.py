from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.errors import InvalidScope
from broker.domain.scope import MAX_SCOPES, effective_ttl, parse_scope, require_offered

seconds = st.integers(1, 10**6).map(lambda s: timedelta(seconds=s))


@given(requested=st.none() | seconds, ceilings=st.dictionaries(st.sampled_from("abcd"), seconds, min_size=1))
def test_a_lifetime_is_never_above_any_ceiling(requested, ceilings):
    ttl, decided_by = effective_ttl(requested, ceilings)
    assert all(ttl <= ceiling for ceiling in ceilings.values())
    assert ttl == (ceilings | {"request": requested})[decided_by]


def test_a_forgotten_ceiling_is_not_unlimited():
    with pytest.raises(TypeError):
        effective_ttl(timedelta(seconds=60), {})


@pytest.mark.parametrize("text", ["", "a  b", " a", "a\n", 'a"b', "a\\b", "é", "a\x00", "a" * 201])
def test_what_rfc_6749_does_not_allow_is_refused(text):
    with pytest.raises(InvalidScope):
        parse_scope(text)


def test_too_many_scopes_are_refused():
    with pytest.raises(InvalidScope, match="more than the 64"):
        parse_scope(" ".join(f"s{n}" for n in range(MAX_SCOPES + 1)))


def test_a_scope_that_is_not_offered_is_named_with_those_that_are():
    with pytest.raises(InvalidScope, match=r"'b'; it offers a, c"):
        require_offered(frozenset("ab"), frozenset("ac"), "https://crm.example")
