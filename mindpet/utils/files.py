"""Writing files so that a reader finds the old content or the new, and never half of it."""

import contextlib
import ctypes
import itertools
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterator, Sequence

from mindpet.utils.hints import PathLike

COUNTER = itertools.count()
_in_use = set()  # names of this process's staging folders
STAGED = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]*)-(?P<process>\d+)-\d+\.incomplete")


@contextlib.contextmanager
def atomic(path: PathLike) -> Iterator[str]:
    """A path to write to, with the name of `path`; its file becomes `path` when the block ends without an error.

    The file has the mode that the umask gives.
    """
    path = pathlib.Path(path)
    with staging(path) as folder:
        yield str(folder / path.name)
        publish(folder / path.name, path)


@contextlib.contextmanager
def staging(path: PathLike) -> Iterator[pathlib.Path]:
    """A new folder beside `path`, for what is to become `path`; what is still in it when the block ends is removed.

    So is what has been left for the same path, see `remove_left`.
    """
    folder = open_staging(path)
    try:
        yield folder
    finally:
        close_staging(folder)


def open_staging(path: PathLike) -> pathlib.Path:
    """Make the folder of `staging`, whose names no other process has, of this machine or another."""
    path = pathlib.Path(path)
    remove_left(path)
    folder = path.parent / f".{path.name}.{_host()}-{os.getpid()}-{next(COUNTER)}.incomplete"
    _in_use.add(folder.name)
    folder.mkdir()
    return folder


def close_staging(folder: PathLike) -> None:
    """Remove it; if that fails, the next one for the same path does it."""
    shutil.rmtree(folder, ignore_errors=True)
    _in_use.discard(folder.name)


def publish(staged: PathLike, path: PathLike, replace: bool = True) -> None:
    """Have a whole file in a staging folder on the disk, and give it its name and the mode that the umask gives.

    Args:
        staged: the file.
        path: its name from now on.
        replace: whether that may be another's name. Default: True.

    Raises:
        FileExistsError: it is, and may not be.
    """
    staged, path = pathlib.Path(staged), pathlib.Path(path)
    staged.chmod(staged.parent.stat().st_mode & 0o666)  # the folder's mode tells of the umask
    sync(staged)
    if replace or not _is_linked(staged, path):
        os.replace(staged, path)
    sync(path.parent)


def _is_linked(staged, path):
    """Whether a file has a new name, too: in one operation, which file systems without hard links do not have."""
    try:
        os.link(staged, path)
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(f"{path}: exists already.") from None
        return False
    return True


def remove_left(path: PathLike) -> None:
    """Remove what was to become `path`, and whose process is gone or has given it up.

    What other machines have left stays, for nobody here knows their processes. What cannot be removed stays, too: it is
    in nobody's way.
    """
    path, entries = pathlib.Path(path), ()
    with contextlib.suppress(OSError):
        entries = list(path.parent.iterdir())
    for entry in entries:
        match = STAGED.fullmatch(entry.name)
        is_mine = match and match["name"] == path.name and match["host"] == _host()
        if is_mine and not _is_writing(int(match["process"]), entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    entry.unlink()


@contextlib.contextmanager
def together(folder: PathLike, names: Sequence[str]) -> Iterator[pathlib.Path]:
    """A new folder to write files to, that come into `folder` together when the block ends without an error.

    Where the folder is missing or empty, it appears with all of them. Else the files take their names in the order of
    `names`; if any between the first and the last is other than before, the two folders are exchanged, and where that
    cannot be (other content, a file system without it) the old files are moved out first. So the last file is never
    beside others of another save than its own, but for the first one, which must tell of both.

    Args:
        folder: made if it is missing.
        names: of the files that are written.
    """
    folder = pathlib.Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        remove_left(folder / name)
    with staging(folder) as staged:
        yield staged
        for path in (*(staged / name for name in names), staged):
            sync(path)
        if not _is_moved(staged, folder):
            changed = any(_differ(staged / name, folder / name) for name in names[1:-1])
            if not changed:
                for name in names:
                    os.replace(staged / name, folder / name)
            elif not _is_exchanged(staged, folder, names):
                _replace_all(staged, folder, names)
        sync(folder)
        sync(folder.parent)


def _is_moved(staged, folder):
    """Whether `staged` has become `folder`, which was missing or empty."""
    is_there = folder.is_dir()
    if is_there:
        if any(folder.iterdir()) or _is_inside(folder):
            return False
        shutil.copymode(folder, staged)
    try:
        os.rename(staged, folder)
    except OSError:
        if is_there:
            return False
        raise
    return True


def _is_exchanged(staged, folder, names):
    """Whether the folders have been exchanged.

    That is one operation (renameat2 of Linux). It is not done to a folder with other content, or that this process is
    in: a process in the old folder would stand in one that is gone.
    """
    if set(os.listdir(folder)) - set(names) or _is_inside(folder):
        return False
    shutil.copymode(folder, staged)
    return exchange(staged, folder)


def _replace_all(staged, folder, names):
    """Move the old files out, the last one first, and the new ones in; an error undoes it."""
    moves = [(folder / name, staged / f"{name}.old") for name in reversed(names) if (folder / name).exists()]
    moves += [(staged / name, folder / name) for name in names]
    done = []
    try:
        for move in moves:
            os.replace(*move)
            done.append(move)
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def _is_inside(folder):
    """Whether this process stands in a folder."""
    return folder in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents)


def exchange(one: PathLike, other: PathLike) -> bool:
    """Give two folders each other's name in one operation; returns whether that could be done."""
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with contextlib.suppress(AttributeError, OSError):
        return ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), flag) == 0
    return False


def _differ(one, other):
    return not other.is_file() or one.read_bytes() != other.read_bytes()


def sync(path: PathLike) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host():
    """This machine, and the container on it: the number of a process says nothing elsewhere."""
    name = re.sub(r"[^\w-]", "_", socket.gethostname())
    with contextlib.suppress(OSError):
        return f"{name}-{os.stat('/proc/self/ns/pid').st_ino}"
    return name


def _is_writing(process, name):
    """Whether a process of this machine has not ended, nor done with a staging folder."""
    if process == os.getpid():
        return name in _in_use
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
