"""A save that ends at its k-th operation on the file system, or within a file: killed, or by an error of the disk."""

import contextlib
import errno
import os
import resource
import signal
import sys
from unittest import mock

from mindpet.errors import MindPetError
from mindpet.utils import files

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}
DONE, PASSED_OVER, REFUSED, KILLED = "done", "passed over", "refused", "killed"
SIZES = 0, 10, 200
_hooks = []  # Python keeps an audit hook for ever; what it calls comes and goes


def faults(root, prepare):
    """The outcomes of a save that ends at every moment.

    It is killed, in a forked process, or gets an OSError at the first operation that changes something below `root`, at
    the second and so on, until there are no more; then when a file gets longer than so many bytes. Nothing waits for
    the disk.

    Args:
        root (Path): a folder.
        prepare (callable): called before each save; returns the function that saves.

    Yields:
        (fault, outcome): a text, and DONE, PASSED_OVER (done in spite of an error), REFUSED (by an OSError or an error
        of mindpet) or KILLED.
    """
    with mock.patch("os.fsync", lambda descriptor: None):
        for run, name in ((_in_a_fork, "killed"), (_here, "error")):
            number, outcome = 0, None
            while outcome != DONE:
                outcome = run(prepare(), lambda act, n=number: _at_operation(str(root), n, act))
                yield f"{name} at operation {number}", outcome
                number += 1
            assert number > 4, "the operations were not seen"
            for size in SIZES:
                outcome = run(prepare(), lambda act, s=size: _at_size(s))
                yield f"{name} after {size} bytes", outcome


def _here(save, arm):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with arm(fail) as has_ended:
        try:
            save()
        except (OSError, MindPetError):
            return REFUSED
    return PASSED_OVER if has_ended() else DONE


def _in_a_fork(save, arm):
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with arm(lambda: os.kill(os.getpid(), signal.SIGKILL)):
                save()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ), os.WTERMSIG(status)
        return KILLED
    assert status == 0
    return DONE


@contextlib.contextmanager
def _at_operation(root, number, act):
    """Call `act` at an operation; gives a function that tells whether it was reached."""
    made = 0

    def count():
        nonlocal made
        made += 1
        if made == number + 1:
            act()

    def hook(event, arguments):
        is_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write or event in CHANGES) and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(arguments[0])  # shutil.rmtree has names in an open folder
            if path.startswith(root) or event in ("os.remove", "os.rmdir") and not os.path.isabs(path):
                count()

    def exchange(*folders):
        try:
            count()
        except OSError:
            return False
        return real_exchange(*folders)

    if not _hooks:
        sys.addaudithook(lambda *event: _hooks[-1](*event))
        _hooks.append(lambda *event: None)
    real_exchange = files.exchange
    _hooks.append(hook)
    try:
        with mock.patch("os.fsync", lambda descriptor: count()), mock.patch.object(files, "exchange", exchange):
            yield lambda: made > number
    finally:
        _hooks.pop()


@contextlib.contextmanager
def _at_size(size):
    """Let no file get longer; the system ends the process or raises an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield lambda: True
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
