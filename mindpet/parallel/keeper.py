"""Keeps the child process of a dry run: when that ends, takes too long, or the caller is gone, nothing is left.

The caller starts this file as a small process between itself and the child, without anything to import. Whatever
signal ends the caller, and whenever, Linux then ends this process in an orderly way, so that the caller's handlers of
signals stay as they are. The folder of the run belongs to this process, and so does every process that the child has
started: those whose parent ends become children of this one.
"""

import contextlib
import ctypes
import fcntl
import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Optional

SET_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
LONGEST_WAIT = 1e8  # seconds; the functions of the operating system have a limit


def main() -> None:
    """Do the one job that the caller sends; what is sent back tells how the child ended, when nothing is left of it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    die_with(int(sys.argv[1]), signal.SIGTERM)
    try:
        job = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # the caller has given up
        return
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGCHLD))  # from here on they are waited for
    try:
        outcome = run(**job)
    except OSError as error:
        outcome = {"error": str(error)}
    with contextlib.suppress(BrokenPipeError), open(sys.stdout.fileno(), "wb") as pipe:
        pipe.write(pickle.dumps(outcome))


def die_with(parent: int, number: int) -> None:
    """Have Linux send this process a signal when its parent ends; if that has happened already, end."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, int(number))
    if os.getppid() != parent:
        os._exit(1)


def run(folder: str, request: bytes, command: list[str], timeout: float) -> dict[str, Any]:
    """Run a command to its end, or kill it.

    Args:
        folder: where it finds `request` and writes `results`; made and removed here.
        request: content of that file.
        command: program and arguments.
        timeout: seconds.

    Returns:
        `code` (None: it took too long, or the caller is gone), `results` and the end of the output, `log`.
    """
    remove_left(folder)
    lock = make_folder(folder)
    try:
        with open(os.path.join(folder, "request"), "wb") as file:
            file.write(request)
        try:
            with open(os.path.join(folder, "log"), "wb") as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=functools.partial(_prepare, os.getpid()),
                )
            code = wait(child, timeout)
        finally:
            kill_all()
        results, log = (_read(os.path.join(folder, name)) for name in ("results", "log"))
        return {"code": code, "results": results, "log": log[-3000:].decode(errors="replace")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _prepare(parent):
    """What the child does first."""
    die_with(parent, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _read(path):
    """The content of a file; empty if there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return b""


def wait(child: subprocess.Popen, timeout: float) -> Optional[int]:
    """The exit code of the child; None if it takes longer than `timeout` seconds, or the caller ends before."""
    end = time.monotonic() + min(timeout, LONGEST_WAIT)
    code = None
    while code is None:
        left = max(0, end - time.monotonic())
        come = signal.sigtimedwait((signal.SIGTERM, signal.SIGCHLD), left)
        if come is None or come.si_signo == signal.SIGTERM:
            return None
        code = child.poll()
    return code


def kill_all() -> None:
    """Kill all children, and theirs, which become children of this process as soon as their parent is dead."""
    with contextlib.suppress(ChildProcessError):  # there is none any more
        while True:
            for pid in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def children() -> list[int]:
    """The processes whose parent this is."""
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            after_name = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
            if after_name and int(after_name[1]) == os.getpid():
                pids.append(int(pid))
    return pids


def make_folder(folder: str) -> int:
    """Make the folder, and lock it; returns the descriptor that holds the lock."""
    while True:
        os.mkdir(folder, 0o700)
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody removes what has none
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(folder):  # else it was removed as one that had no lock yet
            return lock
        os.close(lock)


def remove_left(folder: str) -> None:
    """Remove what runs have left that were killed together with this process of theirs: no lock is on it."""
    parent, name = os.path.split(folder)
    prefix = name[: name.rindex("-") + 1]
    for left in (os.path.join(parent, name) for name in os.listdir(parent) if name.startswith(prefix)):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


if __name__ == "__main__":
    main()
