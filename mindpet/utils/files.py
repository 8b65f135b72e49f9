"""Writing files so that a reader finds the old content or the new, and never half of it."""

import contextlib
import os
import pathlib
import tempfile


@contextlib.contextmanager
def atomic(path):
    """A path to write to, in the folder of `path`; it takes the name `path` when the block ends without an error."""
    path = pathlib.Path(path)
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".incomplete")
    os.close(handle)
    try:
        yield staged
        with open(staged, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(staged, 0o600)
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staged)
        raise
