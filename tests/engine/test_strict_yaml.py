import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vidtta.engine.strict_yaml import dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("-2.", -2.0), ("+1.5e3", 1500.0), ("7.0", 7.0)),
        *(("7", 7), ("-7", -7), ("010", 10), ("0o17", 15), ("0x1F", 31)),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("", None)),
        *(("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("1_000", "1_000"), ("1:30", "1:30")),
        *(("2020-01-01", "2020-01-01"), ("1e", "1e"), (".", "."), ("'1'", "1"), ("<<", "<<"), ("=", "=")),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    found = parse(text)
    assert found == value and type(found) is type(value)


def test_infinity_and_nan_are_floats():
    assert parse("-.inf") == -math.inf
    assert math.isnan(parse(".nan"))


def test_keys_are_text():
    assert parse("{1: a, true: b, null: c, on: d}") == {"1": "a", "true": "b", "null": "c", "on": "d"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "line 4: the key c is given twice"),
        ("a: &x [1]\nb: *x", "line 1: an anchor is not allowed in settings"),
        ("b: *x", "line 1: an alias is not allowed in settings"),
        ("a: !!python/name:os.system", "line 1: a tag is not allowed in settings"),
        ("a: !!float 1", "line 1: a tag is not allowed in settings"),
        ("? [1]\n: 2", "line 1: a key should be text"),
        ("a: 1\n---\nb: 1", "line 2: but found another document"),
        ("a: [1", "line 1: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("a: @x", "line 1: found character '@' that cannot start any token"),
        ("a: \x07", "the character U+0007 is not allowed in YAML"),
        (f"a: {'9' * 101}", "line 1: a number with more than 100 digits"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole message is compared
        parse(text)
    assert str(caught.value) == message


plain = st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | st.text()


@example({"\x85": "a\u2028b"})
@settings(max_examples=50, deadline=None)
@given(st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12))
def test_what_is_written_reads_back_the_same(value):
    found = parse(dump(value))
    assert found == value and repr(found) == repr(value)  # repr tells 1 from 1.0 and true


def test_lists_stand_in_brackets_and_long_text_in_one_line():
    assert dump({"a": [1, 2], "b": "x " * 100 + "x"}) == f"a: [1, 2]\nb: {'x ' * 100}x\n"
