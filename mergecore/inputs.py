"""One model as a merge reads it: a checkpoint, what its tensors are after dequantising and adapters, and its config.

From references in a spec to sources of windows. Not for matching tensors of several models.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergecore.adapters import adapted, open_adapter
from mergecore.checkpoint import Checkpoint, open_checkpoint
from mergecore.quantised import dequantised
from mergecore.references import parse_reference
from mergecore.sources import Source

Resolve = Callable[[str, str | None], Path]
"""(path or name, revision) as a spec has them -> where the model lies."""


@dataclass(frozen=True, eq=False)
class Input:
    """One model of a merge. `tensors` are in the order of file and offset."""

    name: str
    path: Path
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, Source] = field(repr=False)
    files: tuple[Checkpoint, ...] = field(default=(), repr=False)
    """The checkpoint, if it is not the result of an earlier merge of the same spec; then the adapter, if there is
    one."""
    identity: str | None = None
    """Of the result of an earlier merge: the merge's."""
    tokenizer: Path | None = None
    """Of the result of an earlier merge: where its tokenizer's files lie already."""

    @property
    def folder(self) -> Path:
        """Where config.json and the tokenizer lie."""
        if self.identity is not None:
            return self.tokenizer or self.path
        return self.path if self.path.is_dir() else self.path.parent

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this input, as it was at opening; JSON-serialisable."""
        found = [file.fingerprint() for file in self.files]
        own = {"merge": self.identity} if self.identity is not None else found.pop(0)
        return {**own, "adapters": found} if found else own

    def check_unchanged(self) -> None:
        """InputFault when a weight file was replaced or modified since it was opened."""
        for checkpoint in self.files:
            checkpoint.check_unchanged()


class Inputs:
    """Opens each model of a spec once, by whatever name it is listed."""

    def __init__(self, resolve: Resolve, directory: Path) -> None:
        self.resolve, self._directory = resolve, directory
        self._results: dict[str, Input] = {}
        self._opened: dict[tuple[str, str | None], Input] = {}

    def add(self, name: str, model: Input) -> None:
        """From now on `name` names this model: the result of an earlier merge."""
        self._results[name] = model

    def open(self, text: str) -> Input:
        """The model that `text` names, with its adapter; CheckpointError says what is missing or malformed."""
        name, _, adapter_of_result = text.partition("+")
        if name in self._results:
            result = self._results[name]
            return _adapt(text, result, self.resolve(adapter_of_result, None)) if adapter_of_result else result
        reference = parse_reference(text, self._directory)
        path = self.resolve(reference.path, reference.revision)
        adapter = None if reference.lora is None else self.resolve(*reference.lora)
        # The base is the base by whatever name it is listed.
        key = (os.path.realpath(path), None if adapter is None else os.path.realpath(adapter))
        if key not in self._opened:
            self._opened[key] = _open(text, path, adapter)
        return self._opened[key]


def _open(name: str, path: Path, adapter: Path | None) -> Input:
    checkpoint = open_checkpoint(path)
    model = Input(name, checkpoint.path, checkpoint.config, dequantised(checkpoint), (checkpoint,))
    return model if adapter is None else _adapt(name, model, adapter)


def _adapt(name: str, model: Input, path: Path) -> Input:
    adapter = open_adapter(path)
    tensors = adapted(model.tensors, adapter, model.config)
    return replace(model, name=name, tensors=tensors, files=(*model.files, adapter))
