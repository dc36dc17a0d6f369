"""Passes of many samples through a model, layer by layer: one layer's weights are held, and the samples' states.

Binds a skeleton to the names that a merge has for its tensors. Not for what is computed from the states.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mergecore.features.samples import Sample
from mergecore.features.skeleton import OUTSIDE, Skeleton, stored_names
from mergecore.features.weights import Weights, some_rows, whole
from mergecore.output.staging import reporting

HEAD_BYTES = 64 << 20
"""Of the head's weights, held at once."""
Tensors = dict[str, Tensor]


class Network:
    """A causal language model without weights, and which of the stored tensors `shapes` belong to which part of it.

    `layers` is the number of layers; `groups` has the names by layer, and under OUTSIDE what lies outside of them,
    but for `embedding`, `head` (the same if they are tied) and `head_bias`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.skeleton = Skeleton(config, dtype, device)
        self.layers = len(self.skeleton.layers)
        names = stored_names(shapes)
        self.groups: dict[int, list[str]] = {number: [] for number in (OUTSIDE, *range(self.layers))}
        for name, number in self.skeleton.groups(names).items():
            self.groups[number].append(name)
        self.embedding = self.skeleton.embedding_of(names)
        self.head, self.head_bias = self.skeleton.head_of(names)

    @property
    def names(self) -> set[str]:
        """All tensors that are run."""
        ends = {self.embedding, self.head, *([] if self.head_bias is None else [self.head_bias])}
        return ends.union(*self.groups.values())

    @property
    def tied(self) -> bool:
        return self.head == self.embedding

    def layer(self, weights: Weights, number: int) -> Tensors:
        """One layer's parameters by their names in it."""
        return self.skeleton.layer_parameters(number, self.stored(weights, number))

    def outside(self, weights: Weights) -> Tensors:
        """The parameters outside of layers, embedding and head, by their names in the model."""
        return self.skeleton.outside_parameters(self.stored(weights, OUTSIDE))

    def stored(self, weights: Weights, number: int) -> Tensors:
        """The tensors of a group by their stored names."""
        return {name: whole(weights, name) for name in self.groups[number]}

    def begin(self, tokens: Tensor, weights: Weights, outside: Tensors) -> Tensor:
        """The hidden states that the first layer is given: (1, n, hidden)."""
        return self.skeleton.begin(tokens, lambda ids: some_rows(weights, self.embedding, ids), outside)

    def logits(self, features: Tensor, weights: Weights, outside: Tensors) -> Tensor:
        """(1, n, vocabulary) from what `Skeleton.end` gave; the head is read in windows."""
        raw = torch.cat([linear(features, rows) for _, rows in self.head_windows(weights)], dim=-1)
        if self.head_bias is not None:
            raw += whole(weights, self.head_bias)
        return self.skeleton.logits(raw, outside)

    def head_windows(self, weights: Weights) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the head's weight, in order."""
        rows, width = weights.shapes[self.head]
        step = max(1, HEAD_BYTES // (width * weights.dtype.itemsize))
        for first in range(0, rows, step):
            yield first, weights.rows(self.head, first, min(step, rows - first))


def mapped(entries: int, dtype: torch.dtype, scratch: Path) -> Tensor:
    """Zeros in a mapped file without a name in the folder `scratch`. OutputError if the disk is too full."""
    with (
        reporting("make room in", scratch),
        tempfile.NamedTemporaryFile(dir=scratch) as file,
    ):  # its space is given back with the mapping
        os.posix_fallocate(file.fileno(), 0, entries * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=entries, dtype=dtype)


class States:
    """Hidden states of several samples, each (1, n, width): in memory, or in a mapped file without a name in the folder
    `scratch`. OutputError if the disk is too full."""

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, scratch: Path | None = None) -> None:
        entries = sum(lengths) * width
        flat = torch.empty(entries, dtype=dtype) if scratch is None else mapped(entries, dtype, scratch)
        parts = flat.view(-1, width).split(list(lengths))
        self._parts = [part.unsqueeze(0) for part in parts]

    def __getitem__(self, number: int) -> Tensor:
        return self._parts[number]

    def __setitem__(self, number: int, states: Tensor) -> None:
        self._parts[number].copy_(states)

    def __len__(self) -> int:
        return len(self._parts)

    @staticmethod
    def nbytes(tokens: int, width: int, dtype: torch.dtype) -> int:
        """Bytes that the states of so many tokens take."""
        return tokens * width * dtype.itemsize


def run(
    network: Network,
    weights: Weights,
    samples: Sequence[Sample],
    states: States,
    before_layer: Callable[[int], None] = lambda number: None,
    after_layer: Callable[[int], None] = lambda number: None,
    tick: Callable[[], None] = lambda: None,
) -> Tensors:
    """Runs all samples through the layers; `states` end as what the last layer gives. Returns what lies outside.

    `tick` is called before each sample of each layer, and may raise Interrupted.
    """
    with torch.no_grad():
        outside = network.outside(weights)
        for number, sample in enumerate(samples):
            states[number] = network.begin(sample.tokens.to(weights.device), weights, outside)
        for layer in range(network.layers):
            before_layer(layer)
            parameters = network.layer(weights, layer)
            for number in range(len(samples)):
                tick()
                here = states[number].to(weights.device)
                states[number] = network.skeleton.layer(layer, parameters, here)
            after_layer(layer)
    return outside
