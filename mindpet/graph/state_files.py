"""The folder of a resumable run: what is in it, which step is complete, and what goes when."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import warnings
from typing import Any, NamedTuple, Optional

from mindpet.errors import CheckpointError
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.utils import files
from mindpet.utils.hints import Arrays, PathLike
from mindpet.utils.parse import read_json

FOLDER = "resume"  # beside the checkpoints
MARKER = re.compile(r"rank_(?P<rank>\d+)_of_(?P<ranks>\d+)\.json")


class Step(NamedTuple):
    """A step that was saved, or half of it; they are ordered in time.

    Attributes:
        run: number of the run in its folder.
        step: steps of training that were done.
        path: the folder.
    """

    run: int
    step: int
    path: pathlib.Path

    def file(self, rank: int, ranks: int) -> pathlib.Path:
        """The tensors of a rank; its marker has the same name, but for the ending."""
        return self.path / f"rank_{rank}_of_{ranks}.safetensors"

    def markers(self) -> dict[int, set[int]]:
        """Number of ranks -> those of them that have a marker and what belongs to it."""
        ranks = {}
        with contextlib.suppress(OSError):  # another process removes it
            for match in map(MARKER.fullmatch, os.listdir(self.path)):
                if match and self._is_whole(int(match["rank"]), int(match["ranks"])):
                    ranks.setdefault(int(match["ranks"]), set()).add(int(match["rank"]))
        return ranks

    def ranks(self) -> int:
        """Of how many ranks it is complete; 0: of none."""
        return max((ranks for ranks, there in self.markers().items() if len(there) == ranks), default=0)

    def problem(self) -> str:
        """What it lacks, as a text."""
        lacking = [
            f"rank_{rank}_of_{ranks}"
            for ranks, there in self.markers().items()
            for rank in sorted(set(range(ranks)) - there)
        ]
        return f"lacks {', '.join(lacking[:8])}" if lacking else "has no commit marker"

    def _is_whole(self, rank, ranks):
        file = self.file(rank, ranks)
        try:
            record = json.loads(file.with_suffix(".json").read_bytes())
            return record["bytes"] == file.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return False


def steps(directory: PathLike) -> list[Step]:
    """The steps in a folder of checkpoints, complete or not, in order of time."""
    there = []
    for run, folder in _numbered(pathlib.Path(directory) / FOLDER, "run"):
        there += [Step(run, step, path) for step, path in _numbered(folder, "step")]
    return sorted(there)


def _numbered(folder, word):
    """Number and path of what is called `word_N` in a folder."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = re.fullmatch(rf"{word}_(\d+)", path.name)
            if match and path.is_dir():
                yield int(match[1]), path


def choose(directory: PathLike, step: Optional[int] = None) -> Optional[Step]:
    """The last complete step in a folder, or None; each that is passed over is told by a warning.

    Args:
        directory: of the checkpoints.
        step: the step that it must be. Default: None, for the last one.
    """
    for candidate in reversed(steps(directory)):
        if step in (None, candidate.step):
            if candidate.ranks():
                return candidate
            warnings.warn(f"resume: {candidate.path} {candidate.problem()}: it is passed over.", stacklevel=3)
    return None


def read(step: Step, rank: int, ranks: int) -> tuple[Arrays, dict[str, Any]]:
    """The tensors and the record of a rank.

    Raises:
        CheckpointError: the tensors are not those that the marker was written for, or cannot be read.
    """
    file = step.file(rank, ranks)
    record = read_json(file.with_suffix(".json"), CheckpointError)
    if not isinstance(record, dict) or _digest(file) != record.get("digest"):
        raise CheckpointError(f"{file}: damaged: not the content that its commit marker was written for.")
    return TensorFile(file).read_all(), record


class RunFolder:
    """Where a run saves its steps: it makes them complete, and removes old ones.

    Each rank writes its tensors, then, when these are on the disk under their name, its commit marker. Rank 0 removes
    old steps when a newer one is complete of all ranks.

    Args:
        directory: of the checkpoints.
        rank: of this process.
        ranks: how many there are.
        keep: how many complete steps are kept.
        before: numbers of the runs that this one continues; their steps are old ones, too.
    """

    def __init__(self, directory: PathLike, rank: int, ranks: int, keep: int, before: tuple[int, ...] = ()):
        self.directory, self.rank, self.ranks, self.keep = pathlib.Path(directory), rank, ranks, keep
        self.before = before
        self.run = max((run for run, _ in _numbered(self.directory / FOLDER, "run")), default=-1) + 1
        self._is_claimed = False
        self._told = False  # that ranks are missing

    def write(self, step: int, tensors: Arrays, record: dict[str, Any]) -> None:
        """Save a step of this rank.

        Args:
            step: how many were done.
            tensors: by name.
            record: what else there is, for JSON.

        Raises:
            OSError: it cannot be written; complete steps are left.
        """
        self._claim()
        place = Step(self.run, step, self._folder / f"step_{step}")
        _make_durable(place.path)
        file = place.file(self.rank, self.ranks)
        marker = file.with_suffix(".json")
        if marker.exists():  # the same step of a process that has gone on after an error
            marker.unlink()
            files.sync(place.path)
        save_tensors(file, tensors)
        record = {**record, "runs": [*self.before, self.run], "bytes": file.stat().st_size, "digest": _digest(file)}
        with files.atomic(marker) as staged:
            pathlib.Path(staged).write_text(json.dumps(record), encoding="utf-8")
        if self.rank == 0:
            self._remove_old(place)

    @property
    def _folder(self):
        return self.directory / FOLDER / f"run_{self.run}"

    def _claim(self):
        """Have a number that no other process has: of several ranks all take the same, so they cannot tell."""
        _make_durable(self.directory / FOLDER)
        while self.ranks == 1 and not self._is_claimed:
            try:
                self._folder.mkdir()
                files.sync(self._folder.parent)
                self._is_claimed = True
            except FileExistsError:
                self.run += 1
        _make_durable(self._folder)

    def _remove_old(self, last):
        """Remove what is older than the last `keep` complete steps, once the last one is complete of all ranks."""
        mine = [step for step in steps(self.directory) if step.run in (*self.before, self.run)]
        complete = [step for step in mine if step.ranks()]
        if last.ranks() != self.ranks and not self._told and len(mine) > 1 and mine[-2] not in complete:
            self._told = True
            warnings.warn(
                f"TrainableParamsCheckPoint: {mine[-2].path} {mine[-2].problem()}; do all ranks save to one folder?",
                stacklevel=2,
            )
        if self.run not in {step.run for step in complete}:
            return
        first = complete[-self.keep :][0]
        for step in mine[: mine.index(first)]:
            _remove(step.path)
            with contextlib.suppress(OSError):  # others are in it
                step.path.parent.rmdir()


def _remove(folder):
    """Remove a folder, which nobody sees half removed."""
    try:
        with files.staging(folder.parents[1] / "old") as staged:
            os.rename(folder, staged / folder.name)
    except OSError as error:
        warnings.warn(f"TrainableParamsCheckPoint: {folder} cannot be removed: {error}", stacklevel=2)


def _make_durable(folder):
    """Make a folder, and have its name on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        files.sync(path.parent)


def _digest(file):
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as content:
        for block in iter(lambda: content.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
