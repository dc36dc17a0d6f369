"""Which tensor of each model belongs to which output tensor, and whether they fit together.

Only names, shapes and dtypes are compared: what is done to the tensors is planning's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergecore.architecture import HEAD, embedding_of, is_bias, is_buffer, is_embedding, is_tied
from mergecore.checkpoint import Checkpoint, TensorInfo
from mergecore.errors import CheckpointError
from mergecore.output.layout import ITEM_BYTES
from mergecore.spec import MergeSpec
from mergecore.spec.problems import Keys

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
WHOLE_NUMBERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
"""Stored dtypes that are merged, with their bytes, and those that are copied."""
MAX_LISTED = 8


class Matching:
    """Which tensor of each model belongs to which output tensor; raises CheckpointError where they do not fit."""

    def __init__(self, spec: MergeSpec, reference: Checkpoint, members: list[tuple[Checkpoint, int | None]]) -> None:
        self.spec, self.reference = spec, reference
        self.models = tuple(model for model, _ in members)
        self.everyone = list({model.path: model for model in (reference, *self.models)}.values())
        self.keys: dict[Path, Keys] = {reference.path: ("base_model",)}
        self.keys |= {model.path: ("models", i, "model") for model, i in members if i is not None}
        self.tied = all(is_tied(model.config, model.tensors) for model in self.everyone)
        self.warnings: list[str] = []
        self.names = list(reference.tensors)
        for model in self.models:
            self._add_names(model)
        if self.tied and HEAD in self.names:
            self.names.remove(HEAD)
            self.warnings.append(f"{HEAD} is tied to the embedding; the output stores it once")
        self.constants = {name for name in self.names if is_buffer(name, self.any_tensor(name).shape)}
        self.merged = {name for name in self.names if name not in self.constants and self._has_floats(name)}
        for model in self.everyone:
            self._check(model)
        copied = [name for name in self.names if name not in self.merged | self.constants]
        if copied:
            self.warnings.append(f"{_count(copied)} of whole numbers copied from {reference.path}: {_listed(copied)}")

    def tensor(self, model: Checkpoint, name: str) -> TensorInfo | None:
        """The tensor of `model` for output tensor `name`; a tied head is the embedding; None stands for zeros."""
        info = model.tensors.get(name)
        if info is None and name == HEAD:
            embedding = embedding_of(model.tensors)
            info = model.tensors[embedding] if embedding is not None else None
        return info

    def any_tensor(self, name: str) -> TensorInfo:
        """The first model's that has it, the reference first."""
        found = (self.tensor(model, name) for model in self.everyone)
        return next(info for info in found if info is not None)

    def _has_floats(self, name: str) -> bool:
        infos = (self.tensor(model, name) for model in self.everyone)
        return any(info.dtype in FLOATS for info in infos if info is not None)

    def _add_names(self, model: Checkpoint) -> None:
        """Adds what the model has and the models before it have not, as far as it may be absent."""
        known = set(self.names)
        extra = [name for name in model.tensors if name not in known]
        for name in [name for name in extra if is_buffer(name, model.tensors[name].shape)]:
            extra.remove(name)
            self.warnings.append(
                f"{model.path}: {name} is a constant that {self.reference.path} does not store; left out"
            )
        unknown = [name for name in extra if name != HEAD and not is_bias(name)]
        if unknown:
            raise self._error(
                model,
                f"has {_count(unknown)} that {self.reference.path} does not have: {_listed(unknown)}; "
                "the models must be of one architecture",
            )
        self.names += extra

    def _check(self, model: Checkpoint) -> None:
        missing, zeros, differing, unsupported = [], [], [], []
        for name in self.names:
            info, expected = self.tensor(model, name), self.any_tensor(name)
            if info is None:
                if is_bias(name):
                    zeros.append(name)
                elif name not in self.constants:
                    missing.append(name)
                continue
            if info.shape != expected.shape:
                differing.append((name, info.shape, expected.shape))
            usable = ITEM_BYTES if name in self.constants else FLOATS if name in self.merged else WHOLE_NUMBERS
            if info.dtype not in usable or (usable is WHOLE_NUMBERS and "quantization_config" in model.config):
                unsupported.append(f"{name} ({info.dtype})")
        if missing:
            raise self._error(
                model,
                f"lacks {_count(missing)} that the other models have: {_listed(missing)}; "
                "the models must be of one architecture",
            )
        if differing:
            raise self._error(model, _differing(differing, self.reference))
        if unsupported:
            raise self._error(
                model,
                f"is quantised or of a dtype that cannot be merged: {_listed(unsupported)}; "
                "inputs can be F32, F16 or BF16: convert the model first",
            )
        if zeros:
            self.warnings.append(f"{model.path} lacks {_count(zeros, 'bias tensor')}, read as zeros: {_listed(zeros)}")

    def _error(self, model: Checkpoint, message: str) -> CheckpointError:
        return input_error(self.spec, self.keys[model.path], f"{model.path} {message}")


def input_error(spec: MergeSpec, keys: Keys, message: str) -> CheckpointError:
    """The error of an input, with the place in the spec that names it."""
    return CheckpointError(str(spec.error(message, *keys)))


def _differing(found: list[tuple[str, tuple[int, ...], tuple[int, ...]]], reference: Checkpoint) -> str:
    shapes = [f"{name} {list(shape)} instead of {list(expected)}" for name, shape, expected in found]
    vocabulary = all((is_embedding(name, a) or name == HEAD) and a[1:] == b[1:] for name, a, b in found)
    hint = (
        "the vocabularies differ: resize the embeddings to one vocabulary first"
        if vocabulary
        else "the models must be of one size"
    )
    return f"differs in shape from {reference.path} in {_count(found)}: {_listed(shapes)}; {hint}"


def _count(items: Sequence[Any], what: str = "tensor") -> str:
    return f"{len(items)} {what}" + ("s" if len(items) != 1 else "")


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
