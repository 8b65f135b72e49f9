"""The command line: `mindpet plan | inspect | merge | convert | quantize`."""

import argparse
import contextlib
import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Optional

from mindpet.errors import BuildError, MindPetError, ShardError
from mindpet.files.convert import convert, inspect, load_config
from mindpet.files.merge import merge
from mindpet.files.names import NameMap
from mindpet.files.quantize import quantize_files
from mindpet.network.match import ALL_LINEAR
from mindpet.network.quantize import QuantizationConfig
from mindpet.parallel import dry_run
from mindpet.parallel.launcher import load_function
from mindpet.utils.quantization import BITS
from mindpet.utils.quote import printable


def run_plan(arguments: argparse.Namespace) -> None:
    """Compile a network for many ranks and print its shard plan."""
    given = {
        "pipeline_stages": arguments.pipeline_stages,
        "enable_parallel_optimizer": arguments.parallel_optimizer,
    }
    report = dry_run(
        arguments.build,
        arguments.device_num,
        arguments.rank,
        not arguments.eval,
        arguments.timeout,
        **{name: value for name, value in given.items() if value is not None},
    )
    print(report)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(report.to_json() + "\n", encoding="utf-8")


def run_inspect(arguments: argparse.Namespace) -> None:
    """Show what is in a folder or file of an adapter, and for which base it is."""
    print(inspect(arguments.path))


def run_merge(arguments: argparse.Namespace) -> None:
    """Fold a LoRA adapter into the files of its base."""
    config, names = _config_and_names(arguments)
    report = merge(arguments.base, arguments.adapter, arguments.out, config, names, force=arguments.force)
    for row in report if arguments.verbose else ():
        print(row)
    worst = max(report, key=lambda row: row.largest_error, default=None)
    print(f"{len(report)} weights merged into {arguments.out}" + (f"; largest error: {worst}" if worst else ""))


def run_convert(arguments: argparse.Namespace) -> None:
    """Turn an adapter's folder into a delta file of mindpet, or a delta file into a folder."""
    config, names = _config_and_names(arguments)
    convert(arguments.source, arguments.target, config, names, arguments.prefix_path, arguments.force)
    print(f"wrote {arguments.target}")


def run_quantize(arguments: argparse.Namespace) -> None:
    """Quantise the linear weights in the files of a base, tensor by tensor."""
    config = QuantizationConfig(
        arguments.bits,
        arguments.group_size,
        not arguments.single,
        arguments.target or ALL_LINEAR,
        arguments.exclude,
    )
    report = quantize_files(arguments.base, arguments.out, config)
    for row in report if arguments.verbose else ():
        print(row)
    before, after = (sum(getattr(row, name) for row in report) for name in ("bytes_before", "bytes_after"))
    worst = max(report, key=lambda row: row.relative_error)
    print(
        f"{len(report)} weights quantised into {arguments.out}, {before:,} to {after:,} bytes; largest error: {worst}"
    )


def _config_and_names(arguments):
    config = load_config(arguments.config) if arguments.config else None
    return config, _names(arguments.names) if arguments.names else None


def _names(reference):
    """What a function of the user returns."""
    try:
        names = load_function(reference)()
    except Exception as error:  # whatever the file raises
        raise BuildError(f"--names {reference}: {error!r}") from error
    if not isinstance(names, NameMap):
        raise BuildError(f"--names {reference}: must return a NameMap, but returned {names!r}.")
    return names


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="mindpet", description="Parameter-efficient fine-tuning for MindSpore.")
    commands = parser.add_subparsers(metavar="command", required=True)

    def add(name, run):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command

    command = add("plan", run_plan)
    command.add_argument("build", metavar="FILE.py:build", help="function that returns (network, inputs[, optimizer])")
    command.add_argument("--device-num", type=int, required=True, metavar="N", help="number of ranks")
    command.add_argument("--rank", type=int, default=0, metavar="R", help="whose plan it is (default: %(default)s)")
    command.add_argument("--eval", action="store_true", help="a forward pass instead of a training step")
    command.add_argument("--pipeline-stages", type=int, metavar="P", help="default: 1, or what AutoParallel says")
    command.add_argument(
        "--parallel-optimizer", action="store_true", default=None, help="cut weights and state over replicas too"
    )
    command.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds (default: %(default)s)")
    command.add_argument("--json", metavar="F", help="write the report to this file, too")

    command = add("inspect", run_inspect)
    command.add_argument("path", metavar="PATH", help="folder of an adapter, or a .ckpt or .safetensors file")

    command = add("merge", run_merge)
    command.add_argument(
        "--base", required=True, help="a .ckpt or .safetensors file, or a folder of .safetensors files"
    )
    command.add_argument("--adapter", required=True, help="folder of an adapter, or a delta file of mindpet")
    command.add_argument("--out", required=True, help="what is written: a folder or a file, as the base is")
    command.add_argument("--verbose", action="store_true", help="print the error of every weight")
    _add_config_and_names(command)

    command = add("convert", run_convert)
    command.add_argument("source", metavar="SOURCE", help="folder of an adapter, or a delta file of mindpet")
    command.add_argument("target", metavar="TARGET", help="a .ckpt or .safetensors file, or else a folder")
    command.add_argument(
        "--prefix-path",
        help="where the network has its prefix or its prompt (default: prefix_encoder, or prompt)",
    )
    _add_config_and_names(command)

    command = add("quantize", run_quantize)
    command.add_argument("base", metavar="BASE", help="a .safetensors file, or a folder of .safetensors files")
    command.add_argument("out", metavar="OUT", help="what is written: a folder or a file, as the base is")
    command.add_argument("--bits", choices=BITS, default="nf4", help="default: %(default)s")
    command.add_argument(
        "--group-size",
        type=int,
        default=64,
        metavar="N",
        help="numbers of 4 bits with one scale (default: %(default)s)",
    )
    command.add_argument("--single", action="store_true", help="leave the scales of 4 bits in float32")
    command.add_argument("--target", nargs="+", metavar="NAME", help="layers (default: all linear ones but the head)")
    command.add_argument("--exclude", nargs="+", metavar="NAME", help="layers to leave out")
    command.add_argument("--verbose", action="store_true", help="print the error of every weight")
    return parser


def _add_config_and_names(command):
    command.add_argument("--config", metavar="F.json", help="configuration of a delta file, such as its lora_alpha")
    command.add_argument("--names", metavar="FILE.py:f", help="function that returns a mindpet.peft.NameMap")
    command.add_argument("--force", action="store_true", help="use what was trained on another base, or changed since")


class Stopped(BaseException):
    """A signal ends the command; the argument is its number."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 1 if the front end refuses a plan, 128 and the number of the signal that ends the
        command, 2 for anything else.
    """
    format_before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        with _signals_raise():
            arguments = make_parser().parse_args(argv)
            arguments.run(arguments)
    except Stopped as stop:
        print(f"mindpet: stopped by {signal.Signals(stop.args[0]).name}", file=sys.stderr)
        return 128 + stop.args[0]
    except (MindPetError, OSError, TypeError, ValueError) as error:
        print(f"mindpet: {_message(error)}", file=sys.stderr)
        return 1 if isinstance(error, ShardError) else 2
    finally:
        warnings.formatwarning = format_before
    return 0


@contextlib.contextmanager
def _signals_raise():
    """Have the signals that end a program raise `Stopped` instead, so that what is begun is cleaned up.

    What the program has set for them, or its caller (as `nohup` does), stays.
    """
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
                number = getattr(signal, name)
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    before[number] = signal.getsignal(number)
                    signal.signal(number, _stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number, frame):
    raise Stopped(number)


def _message(error):
    """What is shown of an error: one line, or if several things are wrong a line for each below that."""
    lines = printable(error).splitlines()
    return " ".join(map(str.strip, lines)) if len(lines) == 2 else "\n".join(lines)


def _warning(message, *rest, **keywords):
    return f"mindpet: warning: {_message(message)}\n"


if __name__ == "__main__":
    sys.exit(main())
