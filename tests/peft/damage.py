"""What can have happened to a file: other bits, other structures, other tensors, on purpose or not."""

import json
import math
import re

import numpy as np
import yaml
from safetensors.numpy import load, save

LARGE = "@large@"  # becomes a number that no float holds
DEEP = "@deep@"  # becomes brackets in brackets
TWICE = "@twice@"  # becomes the key before it
SPECIAL = {LARGE: "1e400", DEEP: "[" * 2000 + "]" * 2000}
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 3, 2_000_000_000, 2**63, 10**100, 0.5, 2.0, -1e300, math.nan, math.inf, LARGE),
    *("", "a", "../x", "/etc/passwd", "a\x1b[2Jb", "\u202e\n", "\ud800", "x" * 5000),
    *("(", "(a", "[z-a]", "(?i)q", "*", ".*", "q{99999999999}"),
    *("LORA", "BITFIT", "ADAPTER", "LOW_RANK_ADAPTER", "PREFIX_TUNING", "SEQ_CLS", "all", "pissa"),
    *("I64", "BF16", "F16", [2, 8], [8, 2], [0, 64], [2**62, 0], ["y"] * 3000, ["query"], ["a", "a"]),
    *([], {}, [[]], [None], {"a": 1}, {"": {}}, {"query": 2_000_000_000}, DEEP),
]
KEYS = ["", "r", "query", "a.b", "../x", "\x1b[2J", "\n", "unknown", "self", "dropout_prob", "__metadata__", "k" * 5000]
KEYS += ["rank_pattern", TWICE]
JUNK = [b"\0", b"\xff", b"\x1b[2J", b"\xe2\x80\xae", b"[" * 5000, b"{}", b"\n", b'"', b"0" * 30]
LINES = ["a: &a [x]", "<<: *a", "- *a", "freeze:", "  include: ['*']", "- [", "!!int ''", "a: 0x" + "f" * 900, "\t"]


def pick(rng, values):
    return values[rng.integers(len(values))]


def damaged(rng, data):
    """Bytes with other bits, without a part, or with more than there were."""
    data = bytearray(data)
    first, second = sorted(rng.integers(0, len(data) + 1, 2))
    how = rng.integers(6)
    if how == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] ^= 1 << int(rng.integers(8))
    elif how == 1:
        del data[first:]
    elif how == 2:
        del data[first : min(second, first + 20)]
    elif how == 3:
        data[first:first] = data[first : min(second, first + 200)]
    elif how == 4:
        data[first : first + 8] = rng.bytes(8)
    else:
        data[first:first] = pick(rng, JUNK)
    return bytes(data)


def containers(value):
    """All dicts and lists in a value, with itself."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [] if inner is None else [value, *(found for one in inner for found in containers(one))]


def changed(rng, value):
    """A structure with one to three entries that are other ones."""
    value = {"": json.loads(json.dumps(value))}
    for _ in range(rng.integers(1, 4)):
        owner = pick(rng, containers(value))
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        new = json.loads(json.dumps(pick(rng, VALUES)))
        how = rng.integers(5)
        if how == 0 and keys and owner is not value:
            del owner[pick(rng, keys)]
        elif how == 1 and owner is not value:
            owner.update({pick(rng, KEYS): new}) if isinstance(owner, dict) else owner.append(new)
        elif how == 2 and isinstance(owner, dict) and owner is not value and keys:
            owner[pick(rng, KEYS)] = owner.pop(pick(rng, keys))
        elif keys:
            owner[pick(rng, keys)] = new
    return value[""]


def to_json(value):
    """JSON, with what `json` does not write."""
    text = json.dumps(value)
    for name, special in SPECIAL.items():
        text = text.replace(f'"{name}"', special)
    return re.sub(r'("[^"]*")(: [^,:]*, )"@twice@"', r"\1\2\1", text).encode()


def with_header(data, header):
    """A file in safetensors format with another header."""
    begin = 8 + int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[begin:]


def header_of(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def other_tensors(rng, data):
    """A whole file with other tensors."""
    tensors = {name: value.copy() for name, value in load(data).items()}
    name = pick(rng, list(tensors))
    value = tensors.pop(name)
    how = rng.integers(6)
    if how == 0:
        value = value.reshape(value.shape[::-1])
    elif how == 1:
        value = value.astype(pick(rng, [np.float16, np.float64, np.int32, np.uint8, np.bool_]))
    elif how == 2:
        value.reshape(-1)[0] = pick(rng, [np.nan, np.inf, -np.inf, 3e38, 0])
    elif how == 3:
        value = value[:-1]
    elif how == 4:
        tensors[name] = value
        name = pick(rng, [*KEYS[:-1], f"{name}.x", name.upper(), name.replace("lora_a", "lora_A")])
    return save({**tensors, **({} if how == 5 else {name: value})})


def mutated(rng, path):
    """Change a file."""
    data, how = path.read_bytes(), rng.integers(3)
    if path.suffix == ".safetensors" and how:
        changes = changed(rng, header_of(data)) if how == 1 else None
        data = with_header(data, to_json(changes)) if how == 1 else other_tensors(rng, data)
    elif path.suffix == ".json" and how:
        data = to_json(changed(rng, json.loads(data)))
    elif path.suffix == ".yaml" and how == 1:
        data = yaml.safe_dump(changed(rng, yaml.safe_load(data)), allow_unicode=True).encode("utf-8", "replace")
    elif path.suffix == ".yaml" and how == 2:
        lines = data.decode().splitlines()
        lines.insert(rng.integers(len(lines) + 1), pick(rng, LINES))
        data = "\n".join(lines).encode()
    else:
        data = damaged(rng, data)
    path.write_bytes(data)
