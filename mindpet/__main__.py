"""The command line; while MindSpore is imported, which takes seconds, Ctrl-C is one line, too."""

import os
import signal
import sys


def main() -> int:
    """Run `mindpet.cli.main`; returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from mindpet import cli

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def _leave(number, frame):
    """End the program, which has begun nothing yet: code that is being imported may catch an exception."""
    os.write(2, b"mindpet: stopped by SIGINT\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
