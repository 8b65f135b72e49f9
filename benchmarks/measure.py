"""Times that can be compared: candidates in turn, ratios within a turn, the median of all turns."""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import mindspore as ms

OUTPUT = pathlib.Path("output/benchmarks")


def in_turns(candidates: dict[str, Callable[[], Any]], turns: int, at_least: float = 0.05) -> dict[str, list[float]]:
    """Seconds of a call of each candidate in each turn.

    Every turn calls all candidates one after the other, so that a machine that slows down does so for all of them.

    Args:
        candidates: by name; a call returns when the work is done.
        turns: how many.
        at_least: seconds that a candidate runs in a turn, by as many calls as that takes. Default: 0.05.
    """
    calls = {}
    for name, call in candidates.items():
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
        calls[name] = max(1, round(at_least / seconds))
    times = {name: [] for name in candidates}
    for turn in range(turns):
        names = list(candidates)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            for _ in range(calls[name]):
                candidates[name]()
            times[name].append((time.perf_counter() - started) / calls[name])
    return times


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """The median over the turns of a candidate's time in units of another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference]))


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a new process, which has none of this one's memory and graphs."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> int:
    """The most bytes of memory that the process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a table of rows with the same keys, and write it, with what it was made on, to output/benchmarks."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines), end="\n\n", flush=True)
    machine = {"mindspore": ms.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "rows": rows}, indent=1)
    (OUTPUT / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _shown(value):
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
