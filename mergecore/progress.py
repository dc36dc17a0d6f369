"""What a merge tells while it runs, and when it is done. Nothing is computed or written here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


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

    def after(self, done: MergeResult, total: Progress) -> Progress:
        """This progress where other merges were `done` before; of them all together `total` tells the totals."""
        return replace(
            total,
            tensors_done=done.tensors + self.tensors_done,
            bytes_read=done.bytes_read + self.bytes_read,
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
