"""A save that ends at its k-th operation on the file system, or within a file: killed, or by an error of the disk."""

import errno
import os
import resource
import signal
import sys

from mindpet.errors import MindPetError
from mindpet.utils import files

OPERATIONS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile"}
DONE, PASSED_OVER, REFUSED, KILLED = "done", "passed over", "refused", "killed"
CODES = [DONE, PASSED_OVER, REFUSED]


def faults(root, prepare):
    """The outcomes of a save that ends at every moment, each in a forked process.

    It is killed, or gets an OSError, at its first operation, at its second and so on, until there are no more; then
    when a file gets longer than so many bytes.

    Args:
        root (Path): operations on paths below it count, and those on descriptors.
        prepare (callable): called before each process is forked; returns the function that saves.

    Yields:
        (fault, outcome): a text, and DONE, PASSED_OVER (done in spite of the error), REFUSED (by an OSError or an error
        of mindpet) or KILLED.
    """
    for kills in (True, False):
        number, outcome = 0, None
        while outcome != DONE:
            outcome = _outcome(prepare(), lambda k=kills, n=number: _end_at(str(root), n, k))
            yield f"{'killed' if kills else 'an error'} at operation {number}", outcome
            number += 1
        assert number > 5, "the operations were not seen"
        for size in (0, 10, 200):
            outcome = _outcome(prepare(), lambda k=kills, s=size: _limit(s, k))
            yield f"{'killed' if kills else 'an error'} after {size} bytes", outcome


def _outcome(save, arm):
    child = os.fork()
    if not child:
        code = 99
        try:
            signal.alarm(60)
            sink = os.open(os.devnull, os.O_WRONLY)
            trace, _ = os.dup(2), [os.dup2(sink, stream) for stream in (1, 2)]
            has_ended = arm()
            try:
                save()
                code = CODES.index(PASSED_OVER if has_ended() else DONE)
            except (OSError, MindPetError):
                code = CODES.index(REFUSED)
            except BaseException:
                os.dup2(trace, 2)
                sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ), os.WTERMSIG(status)
        return KILLED
    return CODES[os.WEXITSTATUS(status)]


def _end_at(root, number, kills):
    """End this process, or raise an error, at an operation; returns a function that tells whether it was reached."""
    made = 0

    def count():
        nonlocal made
        made += 1
        if made == number + 1:
            if kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")

    def hook(event, arguments):
        if event not in OPERATIONS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(root) or event in ("os.remove", "os.rmdir") and not os.path.isabs(path):
            count()

    def fsync(descriptor):
        count()
        real_fsync(descriptor)

    def exchange(*folders):
        try:
            count()
        except OSError:
            return False
        return real_exchange(*folders)

    real_fsync, os.fsync = os.fsync, fsync
    real_exchange, files.exchange = files.exchange, exchange
    sys.addaudithook(hook)
    return lambda: made > number


def _limit(size, kills):
    """Let no file get longer than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if kills:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    return lambda: True
