"""Reading JSON and YAML that anybody may have written."""

import json
import math
import os
from typing import Any

import yaml

from mindpet.utils.hints import PathLike
from mindpet.utils.quote import quote

LARGEST_JSON = 100_000_000  # bytes: room for an index of a million tensors
LARGEST_YAML = 300_000  # some seconds in PyYAML
DEEPEST = 32
LONGEST_WORD = 1_000


def read_json(path: PathLike, error: type[Exception]) -> Any:
    """The value in a JSON file; see `parse_json`.

    Raises:
        FileNotFoundError: there is no such file, or it is none to read from, such as a folder or a pipe.
        error: it is not JSON as it is read here.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file.")
    with open(path, "rb") as file:
        data = file.read(LARGEST_JSON + 1)
    try:
        return parse_json(data)
    except ValueError as problem:
        raise error(f"{path}: not JSON: {problem}") from problem


def parse_json(data: bytes) -> Any:
    """The value of JSON as its standard has it, with numbers that 64 bits hold.

    Raises:
        ValueError: it is something else: NaN, a key twice in an object, more than 32 levels and the like.
    """
    if len(data) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON:,} bytes")
    deep = ValueError(f"more than {DEEPEST} levels deep")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_doubles,
            parse_constant=_number,
            parse_float=_number,
            parse_int=_int64,
        )
    except RecursionError as error:
        raise deep from error
    level = _nested([value])
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _nested(outer)]
    if level:
        raise deep
    if b"\\u" in data:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a ValueError for half of a character
    return value


def _nested(value):
    """The objects and arrays right inside of one."""
    entries = value.values() if isinstance(value, dict) else value
    return [entry for entry in entries if isinstance(entry, (dict, list))]


def _without_doubles(pairs):
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {quote(double)} is there twice")
    return content


def _number(text):
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{quote(text)} is no number, or one that is too large")
    return number


def _int64(text):
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{quote(text)} is a number that is too large")
    return int(text)


def parse_yaml(data: bytes) -> Any:
    """The value of a YAML document that says what it means: no aliases, no key twice in a mapping, no long words.

    Raises:
        ValueError: it is something else.
    """
    if len(data) > LARGEST_YAML:
        raise ValueError(f"more than {LARGEST_YAML:,} bytes")
    try:
        return yaml.load(data.decode("utf-8"), _Loader)
    except Exception as error:  # for a wrong tag PyYAML raises whatever the conversion does, such as IndexError
        text = "more levels than can be read" if isinstance(error, RecursionError) else str(error) or repr(error)
        raise ValueError(" ".join(text.split())) from error


class _Loader(yaml.SafeLoader):
    """Refuses what is without end from a few lines, or slow to read: aliases, long numbers, many brackets."""

    def fetch_flow_collection_start(self, TokenClass):  # noqa: N803, the name that PyYAML has
        if self.flow_level >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, f"more than {DEEPEST} levels deep", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_WORD:
            problem = f"a word of more than {LONGEST_WORD} characters"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {quote(key.value)} is there twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node
