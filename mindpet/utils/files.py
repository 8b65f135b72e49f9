"""Writing files so that a reader finds the old content or the new, and never half of it."""

import contextlib
import itertools
import os
import pathlib
import re
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
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                entry.unlink()


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
