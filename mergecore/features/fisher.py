"""The diagonal of the empirical Fisher information: the mean square of the gradients of single texts' likelihood.

Streamed: one layer's squares are held, those of embedding and head lie in scratch files. Not for how they are stored
(gather.py), nor for what is made of them (methods/gathered.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergecore.features.backward import value_and_gradient
from mergecore.features.passes import Network, Tensors, mapped
from mergecore.features.samples import Sample
from mergecore.features.skeleton import OUTSIDE
from mergecore.features.weights import Weights, some_rows, whole

Done = Callable[[str, Tensor], None]


def fisher_names(network: Network) -> list[str]:
    """The stored tensors that have a Fisher information: all parameters, a tied head once."""
    inside = [name for names in network.groups.values() for name in names]
    ends = (network.embedding, network.head, network.head_bias)
    return list(dict.fromkeys([*inside, *(name for name in ends if name is not None)]))


def gather_fisher(
    network: Network,
    weights: Weights,
    samples: Sequence[Sample],
    scratch: Path,
    dtype: torch.dtype,
    done: Done,
    after_layer: Callable[[int], None],
) -> None:
    """Calls `done` with the name of each stored tensor and, of its shape, the mean over the samples of the squared
    gradient of log p(text) (all tokens but the first, given those before). (Matena and Raffel 2022, with the text
    itself in the place of the model's draws: the empirical Fisher information.)

    Sums are float64; those of embedding and head are of `dtype`, in files without a name in the folder `scratch`. Held
    are the hidden states of all samples at every layer.
    """
    batch = [sample.tokens.to(weights.device) for sample in samples]
    squares = _Squares(network, weights, batch, scratch, dtype, done, after_layer)

    def loss(number: int, logits: Tensor) -> Tensor:
        return cross_entropy(logits[0, :-1].double(), batch[number][1:], reduction="sum")

    value_and_gradient(network, squares, batch, loss, squares.after)
    squares.finish()


class _Squares:
    """A model whose tensors are leaves (backward.Differentiable); adds up the squares of each sample's gradients."""

    def __init__(
        self,
        network: Network,
        weights: Weights,
        batch: Sequence[Tensor],
        scratch: Path,
        dtype: torch.dtype,
        done: Done,
        after_layer: Callable[[int], None],
    ) -> None:
        self.network, self.weights, self.batch = network, weights, batch
        self.done, self.after_layer = done, after_layer
        self.leaves: Tensors = {}
        self.sums: Tensors = {}
        self.from_end: list[Tensors] = []
        """Of each sample, gradients of what lies outside of the layers before the first one has been reached."""
        self.tied_rows: list[tuple[Tensor, list[Tensor]]] = []
        """Of each sample whose head is the embedding, the head's gradient in the rows of its tokens."""
        self.embedded: tuple[Tensor, Tensor] | None = None
        tables = dict.fromkeys((network.embedding, network.head))
        self.tables = {
            name: mapped(prod(weights.shapes[name]), dtype, scratch).view(weights.shapes[name]) for name in tables
        }

    # What backward.py asks for

    def stored(self, group: int) -> Tensors:
        tensors = self.network.stored(self.weights, group)
        if torch.is_grad_enabled():
            self.leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        return tensors

    def embedding_rows(self, numbers: Tensor) -> Tensor:
        rows = some_rows(self.weights, self.network.embedding, numbers)
        if torch.is_grad_enabled():
            self.embedded = numbers, rows.requires_grad_()
        return rows

    def head_windows(self) -> Iterator[tuple[int, Tensor]]:
        own = self.batch[len(self.from_end)].unique() if torch.is_grad_enabled() else None
        if own is not None and self.network.tied:
            self.tied_rows.append((own, []))
        for first, rows in self.network.head_windows(self.weights):
            if own is None:
                yield first, rows
            else:
                yield first, rows.requires_grad_()
                assert rows.grad is not None
                self._add_head(first, rows.grad, own)

    def head_bias(self) -> Tensor | None:
        name = self.network.head_bias
        if name is None:
            return None
        bias = whole(self.weights, name)
        if torch.is_grad_enabled():
            self.leaves[name] = bias.requires_grad_()
        return bias

    # Squares

    def after(self, group: int, sample: int) -> None:
        """Takes the gradients of one sample out of the leaves of a group (backward.After)."""
        gradients = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        for leaf in self.leaves.values():
            leaf.grad = None
        if group == OUTSIDE and self.embedded is None:
            self.from_end.append(gradients)
            return
        if group == OUTSIDE:
            # A parameter that is used before the layers and after them has one gradient.
            for name, gradient in self.from_end[sample].items():
                gradients[name] = gradient + gradients[name] if name in gradients else gradient
            self._add_embedding(sample)
        for name, gradient in gradients.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(gradient.shape, dtype=torch.float64, device=gradient.device)
            self.sums[name] += gradient.double().square()
        if group != OUTSIDE and sample == len(self.batch) - 1:
            self._give(self.network.groups[group])
            self.after_layer(group)

    def finish(self) -> None:
        """After the last sample: what lies outside of the layers."""
        bias = [self.network.head_bias] if self.network.head_bias is not None else []
        self._give([*self.network.groups[OUTSIDE], *bias])
        for name, table in self.tables.items():
            self.done(name, table.div_(len(self.batch)))

    def _give(self, names: Sequence[str]) -> None:
        """What has no gradient (an expert that no token is sent to) has zeros."""
        for name in names:
            zeros = torch.zeros(self.weights.shapes[name], dtype=torch.float64)
            self.done(name, self.sums.pop(name, zeros) / len(self.batch))

    def _add_head(self, first: int, gradient: Tensor, own: Tensor) -> None:
        """A window of the head; of one that is the embedding, the rows of the sample's tokens have another part."""
        squares = gradient.double().square()
        if self.network.tied:
            rows = own[(own >= first) & (own < first + gradient.shape[0])] - first
            self.tied_rows[-1][1].append(gradient[rows])
            squares[rows] = 0
        table = self.tables[self.network.head]
        table[first : first + gradient.shape[0]] += squares.to(table)

    def _add_embedding(self, sample: int) -> None:
        assert self.embedded is not None
        numbers, rows = self.embedded
        assert rows.grad is not None
        gradient = rows.grad.double()
        if self.network.tied:
            own, parts = self.tied_rows[sample]
            assert torch.equal(own, numbers)
            gradient = gradient + torch.cat(parts).double()
        table = self.tables[self.network.embedding]
        table.index_add_(0, numbers.cpu(), gradient.square().to(table))
