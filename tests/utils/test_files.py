"""Atomic writing."""

import os
import pathlib
import re
import signal

import pytest

from mindpet.utils.files import atomic, open_staging, together


def test_the_file_appears_when_it_is_whole(tmp_path):
    file = tmp_path / "a.txt"
    with atomic(file) as staged:
        pathlib.Path(staged).write_text("new")
        assert not file.exists() and pathlib.Path(staged).name == "a.txt"
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


def fork(work):
    """Have a forked process do some work and be killed."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return child


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    def killed(name):
        with atomic(tmp_path / name):
            os.kill(os.getpid(), signal.SIGKILL)

    fork(lambda: killed("a.txt"))
    (left,) = tmp_path.iterdir()
    dead = fork(lambda: killed("a.txt.b"))
    others = [tmp_path / f".a.txt.{other}-{dead}-0.incomplete" for other in ("another-host", "another-4026531836")]
    host, process = re.fullmatch(r"\.a\.txt\.(.+)-(\d+)-\d+\.incomplete", left.name).groups()
    living, link = (tmp_path / f".a.txt.{host}-{number}-999.incomplete" for number in (os.getppid(), process))
    (tmp_path / "kept").mkdir()
    link.symlink_to(tmp_path / "kept")
    (tmp_path / "kept/file").touch()
    for path in (*others, living):
        path.write_text("half")
    with atomic(tmp_path / "a.txt") as outer, atomic(tmp_path / "a.txt") as inner:
        assert outer != inner and os.path.isdir(os.path.dirname(outer))  # this process is alive
        for path in (outer, inner):
            pathlib.Path(path).touch()
        assert not left.exists() and not link.is_symlink() and (tmp_path / "kept/file").exists()
    assert {path.name for path in tmp_path.glob(".a.txt.b.*")} and all(path.exists() for path in (*others, living))


def test_what_cannot_be_removed_is_in_nobodys_way(tmp_path, monkeypatch):
    fork(lambda: open_staging(tmp_path / "a.txt"))

    def refuse(*arguments, **keywords):
        raise PermissionError("not yours")

    def write():
        with atomic(tmp_path / "a.txt") as staged:
            pathlib.Path(staged).touch()

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", refuse)
        write()
    assert len(list(tmp_path.iterdir())) == 3
    write()
    assert os.listdir(tmp_path) == ["a.txt"], "nor what this process could not remove"


def test_an_error_undoes_files_that_come_together_beside_others(tmp_path, monkeypatch):
    names, folder = ("first", "middle", "last"), tmp_path / "folder"

    def write(number):
        with together(folder, names) as staged:
            for name in names:
                (staged / name).write_text(f"{name} {number}")

    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    write(1)
    replace, calls = os.replace, []
    for failing in range(6):  # three files go out, three come in

        def counted(*arguments):
            calls.append(arguments)
            if len(calls) == failing + 1:  # noqa: B023
                raise OSError("No space left on device")
            replace(*arguments)

        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", counted)
            with pytest.raises(OSError, match="No space left"):
                write(2)
        assert len(calls) == 2 * failing + 1  # each move, the one that failed, and each move back
        assert [(folder / name).read_text() for name in names] == ["first 1", "middle 1", "last 1"]
        assert sorted(os.listdir(folder)) == ["first", "last", "middle", "notes.txt"] and os.listdir(tmp_path) == [
            "folder"
        ]
    write(2)
    assert [(folder / name).read_text() for name in names] == ["first 2", "middle 2", "last 2"]
