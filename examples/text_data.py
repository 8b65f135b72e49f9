"""Labelled sentences: from a TSV file, or from the docstrings that every installation has."""

import hashlib
import importlib
import inspect
import re
from typing import NamedTuple

DOCSTRING_MODULES = {
    "stats": ["scipy.stats"],
    "signal": ["scipy.signal"],
    "linalg": ["scipy.linalg", "numpy.linalg"],
    "sparse": ["scipy.sparse"],
    "special": ["scipy.special"],
    "interpolate": ["scipy.interpolate"],
    "spatial": ["scipy.spatial"],
    "optimize": ["scipy.optimize"],
    "vision": ["mindspore.dataset.vision"],
    "nn": ["mindspore.nn"],
    "ops": ["mindspore.ops"],
    "train": ["mindspore.train"],
}
DOTTED_PATH = re.compile(r":\w+:`[^`]*`|`*\b\w{2,}(?:\.\w+)+\b`*|\b(?:scipy|numpy|mindspore|np|ms)\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=\.)(?<!e\.g\.)(?<!i\.e\.)\s")
SIGNATURE = re.compile(r"\w+\(.*\)")


class Example(NamedTuple):
    """A text with its label. Examples of one `group` never straddle splits."""

    label: str
    text: str
    group: str


def read_tsv(path):
    """Read `label<TAB>text` lines.

    Args:
        path (str): a UTF-8 file; empty lines and a first line `label<TAB>text` are passed over.

    Returns:
        list of Example, each a group of its own.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not UTF-8, a line has no label, no text or no tab, or there are fewer than two labels; every
            bad line is named.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    examples, bad = [], []
    for number, line in enumerate(lines, 1):
        if number == 1 and line.strip().lower() == "label\ttext":
            continue
        label, tab, text = (part.strip() for part in line.partition("\t"))
        if line.strip() and not (label and text):
            bad.append(number)
        elif line.strip():
            examples.append(Example(label, text, text))
    if bad:
        raise ValueError(f"{path}: not `label<TAB>text` in line {', '.join(map(str, bad))}")
    labels = {example.label for example in examples}
    if len(labels) < 2:
        raise ValueError(f"{path}: two or more labels are needed, but the file has {sorted(labels)}")
    return examples


def read_docstrings(max_per_label=100):
    """The first sentences of the docstrings of scipy, numpy and mindspore, labelled by subpackage.

    Names of packages and dotted paths are taken out of the text, and no text comes twice.

    Args:
        max_per_label (int): at most so many texts a label, chosen by hash. Default: 100.

    Returns:
        list of Example, grouped by class.
    """
    by_text = {}
    for label, modules in DOCSTRING_MODULES.items():
        for module in map(importlib.import_module, modules):
            for group, document in _documents(module):
                text = first_sentence(document)
                if len(text.split()) >= 4 and not text.startswith("Refer to"):
                    by_text.setdefault(text.lower(), Example(label, text, f"{label}.{group}"))
    chosen = []
    for label in DOCSTRING_MODULES:
        texts = sorted(
            (example for example in by_text.values() if example.label == label), key=lambda e: fraction(e.text)
        )
        chosen += texts[:max_per_label]
    return chosen


def _documents(module):
    """(class or function name, docstring) of the public objects of a module and the public methods of its classes."""
    for name in sorted(dir(module)):
        thing = getattr(module, name, None)
        if name.startswith("_") or inspect.ismodule(thing):
            continue
        yield name, thing.__doc__
        if inspect.isclass(thing):
            for method in sorted(vars(thing)):
                if not method.startswith("_"):
                    yield name, getattr(thing, method).__doc__


def first_sentence(document):
    """The first sentence of a docstring, on one line, without dotted paths and call signatures; "" if there is none."""
    paragraphs = [" ".join(part.split()) for part in str(document or "").split("\n\n")]
    prose = [part for part in paragraphs if part and not SIGNATURE.fullmatch(part)]
    sentence = SENTENCE_END.split(DOTTED_PATH.sub("", prose[0]))[0] if prose else ""
    return re.sub(r"\s+([.,;:)])", r"\1", " ".join(sentence.split()))


def fraction(text):
    """A number in [0, 1) that depends only on `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split(examples, test_share=0.15, validation_share=0.15):
    """Three lists, ordered by hash: training, validation and test; a group falls into one of them.

    Args:
        examples (list of Example): what is split.
        test_share (float): share of the groups for testing. Default: 0.15.
        validation_share (float): share of the groups for validation. Default: 0.15.

    Returns:
        tuple of three lists of Example.

    Raises:
        ValueError: a list is empty: there are too few examples.
    """
    parts = [], [], []
    for example in sorted(examples, key=lambda e: fraction(e.text)):
        position = fraction("split " + example.group)
        parts[2 if position < test_share else 1 if position < test_share + validation_share else 0].append(example)
    if not all(parts):
        raise ValueError(
            f"{len(examples)} examples are too few: training, validation and test got {[len(part) for part in parts]}"
        )
    return parts
