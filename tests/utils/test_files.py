"""Atomic writing."""

import os
import pathlib
import subprocess
import sys

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


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_that_the_umask_gives(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with atomic(tmp_path / "a.txt") as staged:
            pathlib.Path(staged).write_text("new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    code = "import os, sys; from mindpet.utils.files import atomic\nwith atomic(sys.argv[1]): os.kill(os.getpid(), 9)"
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    for name in ("a.txt", "a.txt.b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], env=environment, check=False)
    other = tmp_path / ".a.txt.another-host-1-0.incomplete"
    other.write_text("half")
    assert len(list(tmp_path.iterdir())) == 3
    with atomic(tmp_path / "a.txt") as outer, atomic(tmp_path / "a.txt") as inner:
        assert outer != inner and os.path.exists(outer)  # this process is alive
    assert sorted(path.name.split(".")[1:3] for path in tmp_path.iterdir() if path != tmp_path / "a.txt") == [
        ["a", "txt"],  # the other host's, and that of a.txt.b
        ["a", "txt"],
    ]
