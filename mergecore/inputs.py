"""One model as a merge reads it: a checkpoint, what its tensors are after dequantising and adapters, and its config.

From references in a spec to sources of windows. Not for matching tensors of several models.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergecore.checkpoint import Checkpoint, open_checkpoint
from mergecore.sources import Source, Stored

Resolve = Callable[[str, str | None], Path]
"""(path or name, revision) as a spec has them -> where the model lies."""


@dataclass(frozen=True, eq=False)
class Input:
    """One model of a merge. `tensors` are in the order of file and offset."""

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Source]
    files: tuple[Checkpoint, ...] = ()
    """The checkpoint, and the adapter if there is one; empty for the result of an earlier merge of the same spec."""
    identity: str | None = None
    """Of the result of an earlier merge: the merge's."""
    warnings: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> Path:
        """Where config.json and the tokenizer lie."""
        return self.path if not self.files else self.files[0].folder

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this input, as it was at opening; JSON-serialisable."""
        if self.identity is not None:
            return {"merge": self.identity}
        base, *adapters = (checkpoint.fingerprint() for checkpoint in self.files)
        return {**base, "adapters": adapters} if adapters else base

    def check_unchanged(self) -> None:
        """InputFault when a weight file was replaced or modified since it was opened."""
        for checkpoint in self.files:
            checkpoint.check_unchanged()


class Inputs:
    """Opens each model of a spec once, by whatever name it is listed."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._opened: dict[str, Input] = {}

    def open(self, reference: str) -> Input:
        """The model that `reference` names; CheckpointError says what is missing or malformed."""
        path = self._resolve(reference, None)
        key = os.path.realpath(path)
        if key not in self._opened:
            self._opened[key] = _open(reference, path)
        return self._opened[key]


def _open(reference: str, path: Path) -> Input:
    checkpoint = open_checkpoint(path)
    tensors: dict[str, Source] = {name: Stored(info) for name, info in checkpoint.tensors.items()}
    return Input(reference, checkpoint.path, checkpoint.config, tensors, (checkpoint,))
