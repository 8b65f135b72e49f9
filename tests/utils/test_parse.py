"""JSON and YAML of others: a value, or a short error at once."""

import time

import pytest

from mindpet.errors import CheckpointError, ConfigError
from mindpet.utils.parse import LARGEST_YAML, parse_json, parse_yaml, read_json
from mindpet.utils.quote import LONGEST_MESSAGE, printable, quote


def test_json_is_read():
    assert parse_json(b' {"a": [1, -2.5e3, true, null, "\\u00e9"], "b": {}} ') == {
        "a": [1, -2500.0, True, None, "é"],
        "b": {},
    }
    assert parse_json(b"null") is None and parse_json(b"[" * 32 + b"]" * 32)
    assert parse_json(b"9223372036854775807") == 2**63 - 1


@pytest.mark.parametrize(
    "text, problem",
    [
        (b"{", "Expecting property name"),
        (b"[" * 100_000, "more than 32 levels"),
        (b'{"a":' * 100_000, "more than 32 levels"),
        (b"[" * 33 + b"]" * 33, "more than 32 levels"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is there twice"),
        (b"[NaN]", "'NaN' is no number"),
        (b"-Infinity", "'-Infinity' is no number"),
        (b"1e400", "'1e400' is no number, or one that is too large"),
        (b"9223372036854775808", "'9223372036854775808' is a number that is too large"),
        (b"7" * 1_000_000, "'777.*' is a number that is too large"),
        (b'"\xff"', "can't decode byte 0xff"),
        (b'"\x1b[2J"', "Invalid control character"),
        (b'{"a": ["\\ud800"]}', "surrogates not allowed"),
    ],
)
def test_what_is_not_json_as_the_standard_has_it(text, problem):
    start = time.monotonic()
    with pytest.raises(ValueError, match=problem) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 1000 and time.monotonic() - start < 2


def test_a_file_of_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1}')
    assert read_json(path, ConfigError) == {"a": 1}
    path.write_bytes(b"\xff" * 100_000)
    with pytest.raises(CheckpointError, match="a.json: not JSON: 'utf-8'") as caught:
        read_json(path, CheckpointError)
    assert len(str(caught.value)) < 1000
    for other in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_json(other, ConfigError)


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk"))


@pytest.mark.parametrize(
    "text, problem",
    [
        (BOMB, "aliases are not read"),
        ("a: &a {b: 1}\nc: {<<: *a}", "aliases are not read"),
        ("a: [1]\nb: {c: 1, 'c': 2}", "the key 'c' is there twice"),
        ("[" * 100_000, "more than 32 levels"),
        ("- " * 100_000, "more levels than can be read"),
        ("a: 0x" + "f" * 100_000, "a word of more than 1000 characters"),
        ("a: 1" + ":59" * 50_000, "a word of more than 1000 characters"),
        ("!!int ''", "string index out of range"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("2001-99-99", "month must be"),
        ("\x1b[2J", "special characters are not allowed"),
        ("x" * (LARGEST_YAML + 1), "more than 300,000 bytes"),
    ],
)
def test_yaml_that_is_not_read(text, problem):
    start = time.monotonic()
    with pytest.raises(ValueError, match=problem) as caught:
        parse_yaml(text.encode())
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value) and time.monotonic() - start < 2


def test_yaml_is_read():
    assert parse_yaml("freeze:\n  include: ['*', é]\n  exclude: [a]".encode()) == {
        "freeze": {"include": ["*", "é"], "exclude": ["a"]}
    }


def test_values_are_quoted_short():
    bomb = ["x" * 1000]
    for _ in range(50):
        bomb = [bomb] * 50
    for value in (bomb, {"a": bomb}, "y" * 10**6, 16**5000, list(range(10**5)), b"\xff" * 1000):
        assert len(quote(value)) < 400
    assert quote([1, "a", {"b": None}]) == "[1, 'a', {'b': None}]"
    assert quote("\x1b[2J\u202e\ud800\n") == r"'\x1b[2J\u202e\ud800\n'"


def test_messages_have_no_control_characters():
    assert printable("é\x1b[2J\r\u202e\ud800\n  b") == "é\\x1b[2J\\r\\u202e\\ud800\n  b"
    assert str(CheckpointError("\x07 a")) == "\\x07 a"
    assert len(str(ConfigError("a" * 10**6))) < LONGEST_MESSAGE + 100
