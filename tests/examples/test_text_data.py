"""Reading and splitting labelled text."""

import pytest
from text_data import DOCSTRING_MODULES, Example, first_sentence, read_docstrings, read_tsv, split


def test_docstrings_are_clean_distinct_and_at_most_100_a_label():
    examples = read_docstrings()
    texts = [example.text.lower() for example in examples]
    assert len(set(texts)) == len(texts) > 900
    counts = {label: sum(example.label == label for example in examples) for label in DOCSTRING_MODULES}
    assert len(counts) == 12 and max(counts.values()) == 100 and min(counts.values()) >= 30
    for text in texts:
        assert not {"scipy", "numpy", "mindspore", "np", "ms"} & set(text.replace("`", " ").split()), text
        assert "scipy." not in text and "numpy." not in text and "mindspore." not in text and "\n" not in text
    assert read_docstrings() == examples


def test_a_class_never_straddles_splits():
    parts = split(read_docstrings())
    groups = [{example.group for example in part} for part in parts]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert len(parts[0]) > 3 * len(parts[1]) > 300 and len(parts[2]) > 100


def test_splits_do_not_depend_on_the_order_of_the_examples():
    examples = read_docstrings(20)
    assert split(examples) == split(examples[::-1])


@pytest.mark.parametrize(
    "document, sentence",
    [
        ("Solve it. And more.\n\nDetails.", "Solve it."),
        ("jv(x, y, out=None)\n\n    Bessel function\n    of real order.\n", "Bessel function of real order."),
        ("Uses :func:`scipy.linalg.solve` on the input, as numpy.dot does.", "Uses on the input, as does."),
        ("A wrapper of numpy for e.g. arrays. More.", "A wrapper of for e.g. arrays."),
        (None, ""),
        ("", ""),
        ("f(x)", ""),
    ],
)
def test_first_sentence(document, sentence):
    assert first_sentence(document) == sentence


def test_tsv(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("good\tfine weather\n\n  \nbad\ttoo\tmany tabs\r\n", encoding="utf-8")
    assert read_tsv(path) == [
        Example("good", "fine weather", "fine weather"),
        Example("bad", "too\tmany tabs", "too\tmany tabs"),
    ]


def test_tsv_with_byte_order_mark_header_and_odd_line_breaks(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_bytes("\ufeffLabel\ttext\r\ngood\tone\u2028two\x0cthree\r\nbad\tfour".encode())
    assert [example[:2] for example in read_tsv(path)] == [("good", "one\u2028two\x0cthree"), ("bad", "four")]


@pytest.mark.parametrize(
    "content, match",
    [
        (b"good\tone\nbad two\n\tthree\nfour\t\n", "not `label<TAB>text` in line 2, 3, 4"),
        (b"good\tone\ngood\ttwo\n", "two or more labels are needed, but the file has \\['good'\\]"),
        (b"", "two or more labels are needed, but the file has \\[\\]"),
        (b"\n\n", "two or more labels"),
        (b"good\tone\nbad\t\xff\xfe\n", "not UTF-8 at byte 13"),
    ],
)
def test_bad_tsv(content, match, tmp_path):
    path = tmp_path / "data.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data.tsv: {match}"):
        read_tsv(path)


def test_too_few_examples():
    with pytest.raises(ValueError, match="2 examples are too few: training, validation and test got \\["):
        split([Example("a", "x", "x"), Example("b", "y", "y")])
