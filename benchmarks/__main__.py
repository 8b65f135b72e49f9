"""`python -m benchmarks [NAME ...] [--short]`."""

import argparse
import importlib
import sys

NAMES = ("step_time", "compile_time", "memory", "frozen_bits", "files", "against_torch")


def main(arguments=None):
    """Run the benchmarks that are asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--short", action="store_true", help="tiny sizes: shows that they work, and measures nothing")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    for name in args.names or NAMES:
        importlib.import_module(f"benchmarks.{name}").run(short=args.short)


if __name__ == "__main__":
    sys.exit(main())
