"""How far a merge is, and what a finished one cost: alone, after others of the same file, or in a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergecore.planning import MergePlan
    from mergecore.sweeping import SweepPlan


@dataclass(frozen=True)
class SearchProgress:
    """How far a search for parameters is: candidate number `candidate` of generation number `generation` is at work,
    both from 1; `best` is the best score so far. At the end the best candidate is merged: `candidate` is 0."""

    generation: int
    generations: int
    candidate: int
    population: int
    best: float | None

    def __str__(self) -> str:
        """In words."""
        at = f"candidate {self.candidate}/{self.population}" if self.candidate else "the best"
        return f"generation {self.generation}/{self.generations}, {at}"


@dataclass(frozen=True)
class Progress:
    """How far a merge is; bytes are those of windows read (every pass counts) and of output written."""

    tensors_done: int
    tensors_total: int
    bytes_read: int
    bytes_read_total: int
    bytes_written: int
    bytes_written_total: int
    seconds: float
    step: str = ""
    """What is fitted on samples before the first tensor is written: layers, or steps of an optimisation."""
    steps_done: int = 0
    steps_total: int = 0
    search: SearchProgress | None = None

    def __str__(self) -> str:
        """In words, without bytes."""
        words = [] if self.search is None else [str(self.search)]
        if self.steps_done < self.steps_total:
            words.append(f"fitting: {self.step} {self.steps_done}/{self.steps_total}")
        return ", ".join([*words, f"{self.tensors_done}/{self.tensors_total} tensors"])

    @property
    def ratio(self) -> float:
        """From 0 to 1; a fit counts as much as the merge."""
        moved = self.bytes_read + self.bytes_written
        merged = moved / max(1, self.bytes_read_total + self.bytes_written_total)
        return (self.steps_done / self.steps_total + merged) / 2 if self.steps_total else merged

    @classmethod
    def start(cls, merges: Sequence[MergePlan | SweepPlan]) -> Progress:
        """Nothing done yet of these merges."""
        return cls(
            tensors_done=0,
            tensors_total=sum(len(merge.jobs) for merge in merges),
            bytes_read=0,
            bytes_read_total=sum(merge.bytes_to_read for merge in merges),
            bytes_written=0,
            bytes_written_total=sum(merge.bytes_to_write for merge in merges),
            seconds=0.0,
        )

    def after(self, done: MergeResult, total: Progress) -> Progress:
        """This progress where other merges were `done` before; of them all together `total` tells the totals."""
        read = done.bytes_read + self.bytes_read
        return replace(
            total,
            tensors_done=done.tensors + self.tensors_done,
            bytes_read=read,
            bytes_read_total=max(total.bytes_read_total, read),
            bytes_written=done.bytes_written + self.bytes_written,
            seconds=done.seconds + self.seconds,
        )


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: where it lies and what it cost (bytes, seconds, peak resident bytes of the process)."""

    output: Path
    method: str
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_rss: int
    resumed: bool
    warnings: tuple[str, ...]

    def after(self, done: MergeResult) -> MergeResult:
        """This merge and those `done` before, as one."""
        return replace(
            self,
            tensors=done.tensors + self.tensors,
            bytes_read=done.bytes_read + self.bytes_read,
            bytes_written=done.bytes_written + self.bytes_written,
            seconds=done.seconds + self.seconds,
            peak_rss=max(done.peak_rss, self.peak_rss),
            resumed=done.resumed or self.resumed,
            warnings=(*done.warnings, *self.warnings),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "output": str(self.output), "warnings": list(self.warnings)}
