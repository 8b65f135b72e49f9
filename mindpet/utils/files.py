"""Writing files so that a reader finds the old content or the new, and never half of it."""

import contextlib
import ctypes
import itertools
import os
import pathlib
import re
import shutil
import socket

COUNTER = itertools.count()
STAGED = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]*)-(?P<process>\d+)-\d+\.incomplete")


@contextlib.contextmanager
def atomic(path):
    """A path to write to, in the folder of `path`; it takes the name `path` when the block ends without an error.

    The file has the mode that the umask gives. What a process of this machine that is no longer there has left half
    written under the same name is removed.

    Args:
        path (str): the file.
    """
    path = pathlib.Path(path)
    remove_left(path)
    staged = staged_name(path)
    os.close(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield staged
        sync(staged)
        os.replace(staged, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staged)
        raise


def staged_name(path):
    """The name, beside `path`, of what is not whole yet; no other process, of this machine or another, has it."""
    path = pathlib.Path(path)
    return str(path.parent / f".{path.name}.{_host()}-{os.getpid()}-{next(COUNTER)}.incomplete")


def remove_left(path):
    """Remove the files that were to become `path`, and whose process is gone; those of other machines stay."""
    path = pathlib.Path(path)
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        found = STAGED.fullmatch(entry.name)
        if found and found["name"] == path.name and found["host"] == _host() and not _is_alive(int(found["process"])):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


@contextlib.contextmanager
def together(folder, names):
    """A new folder to write files to, that come into `folder` together when the block ends without an error.

    Where the folder is missing or empty, it appears with all of them. Else the files take their names in the order of
    `names`; if any between the first and the last is other than before, the two folders are exchanged, and where that
    cannot be (other content, a file system without it) the last file is removed first. So the last file is never beside
    others of another save than its own, but for the first one, which must tell of both.

    Args:
        folder (str): the folder; it is made if it is missing.
        names (tuple of str): the files that are written.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_left(folder)
    for name in names:
        remove_left(folder / name)
    staged = pathlib.Path(staged_name(folder))
    staged.mkdir()
    try:
        yield staged
        for path in (*(staged / name for name in names), staged):
            sync(path)
        if not _is_moved(staged, folder) and not _is_exchanged(staged, folder, names):
            _, *middle, last = names
            if any(_differ(staged / name, folder / name) for name in middle):
                (folder / last).unlink(missing_ok=True)
            for name in names:
                os.replace(staged / name, folder / name)
        sync(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _is_moved(staged, folder):
    """Whether `staged` has become `folder`, which was missing or empty."""
    if folder.is_dir() and (any(folder.iterdir()) or _is_inside(folder)):
        return False
    with contextlib.suppress(OSError):
        if folder.is_dir():
            shutil.copymode(folder, staged)
        os.rename(staged, folder)
        return True
    return False


def _is_exchanged(staged, folder, names):
    """Whether the folders have been exchanged, because files between the first and the last differ.

    That is one operation (renameat2 of Linux). It is not done to a folder with other content, or that this process is
    in: a process in the old folder would stand in one that is gone.
    """
    has_more = set(os.listdir(folder)) - set(names)
    changed = any(_differ(staged / name, folder / name) for name in names[1:-1])
    if has_more or _is_inside(folder) or not changed:
        return False
    shutil.copymode(folder, staged)
    return exchange(staged, folder)


def _is_inside(folder):
    """Whether this process stands in a folder."""
    return folder in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents)


def exchange(one, other):
    """Give two folders each other's name in one operation; returns whether that could be done."""
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with contextlib.suppress(AttributeError, OSError):
        return ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), flag) == 0
    return False


def _differ(one, other):
    return not other.is_file() or one.read_bytes() != other.read_bytes()


def sync(path):
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host():
    return re.sub(r"[^\w-]", "_", socket.gethostname())


def _is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
