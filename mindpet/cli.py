"""The command line: `mindpet plan FILE.py:build --device-num N`."""

import argparse
import pathlib
import sys

from mindpet.errors import MindPetError, ShardError
from mindpet.parallel import dry_run


def plan(arguments):
    """Compile a network for many ranks and print its shard plan."""
    report = dry_run(
        arguments.build,
        arguments.device_num,
        arguments.rank,
        not arguments.eval,
        arguments.timeout,
        pipeline_stages=arguments.pipeline_stages,
        enable_parallel_optimizer=arguments.parallel_optimizer,
    )
    print(report)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(report.to_json() + "\n", encoding="utf-8")


def make_parser():
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="mindpet", description="Parameter-efficient fine-tuning for MindSpore.")
    commands = parser.add_subparsers(metavar="command", required=True)
    command = commands.add_parser("plan", help=plan.__doc__, description=plan.__doc__)
    command.set_defaults(run=plan)
    command.add_argument("build", metavar="FILE.py:build", help="function that returns (network, inputs[, optimizer])")
    command.add_argument("--device-num", type=int, required=True, metavar="N", help="number of ranks")
    command.add_argument("--rank", type=int, default=0, metavar="R", help="whose plan it is (default: %(default)s)")
    command.add_argument("--eval", action="store_true", help="a forward pass instead of a training step")
    command.add_argument("--pipeline-stages", type=int, default=1, metavar="P", help="default: %(default)s")
    command.add_argument("--parallel-optimizer", action="store_true", help="cut weights and state over replicas too")
    command.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds (default: %(default)s)")
    command.add_argument("--json", metavar="F", help="write the report to this file, too")
    return parser


def main(argv=None):
    """Run a command; returns the exit code: 0, 1 if the front end refuses a plan, 2 for anything else."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (MindPetError, OSError, TypeError, ValueError) as error:
        print(f"mindpet: {error}", file=sys.stderr)
        return 1 if isinstance(error, ShardError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
