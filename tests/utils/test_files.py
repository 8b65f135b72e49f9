"""Atomic writing."""

import pathlib

import pytest

from mindpet.utils.files import atomic


def test_the_file_appears_when_it_is_whole(tmp_path):
    file = tmp_path / "a.txt"
    with atomic(file) as staged:
        pathlib.Path(staged).write_text("new")
        assert not file.exists() and pathlib.Path(staged).parent == tmp_path
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(KeyError):
        with atomic(file) as staged:
            pathlib.Path(staged).write_text("half")
            raise KeyError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
