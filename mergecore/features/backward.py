"""The gradient of a loss of logits, streamed: layers are recomputed one by one from the last to the first.

At any time one layer's weights and their gradient are held, and for every layer the hidden states of the samples at
work. What the weights are made of, and so what the gradient reaches, is the caller's affair (`Differentiable`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from mergecore.features.passes import Network, Tensors
from mergecore.features.skeleton import OUTSIDE

Loss = Callable[[int, Tensor], Tensor]
"""(number of the sample, its logits (1, n, vocabulary)) -> a scalar."""


class Differentiable(Protocol):
    """A model whose tensors are made on demand, each time anew, with the graph of what they are made of."""

    def stored(self, group: int) -> Tensors:
        """The tensors of a layer, or OUTSIDE, by their stored names."""

    def embedding_rows(self, numbers: Tensor) -> Tensor:
        """(m, width): rows of the token embedding, of ascending numbers."""

    def head_windows(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the head's weight, in order."""

    def head_bias(self) -> Tensor | None:
        """(vocabulary,)."""


def value_and_gradient(network: Network, model: Differentiable, batch: Sequence[Tensor], loss: Loss) -> list[float]:
    """The losses of the samples of a batch (token ids, int64 (n,)); the gradient of their sum is added to the `grad` of
    every leaf that `model` makes its tensors of."""
    skeleton = network.skeleton
    with torch.no_grad():
        outside = skeleton.outside_parameters(model.stored(OUTSIDE))
        states = [[skeleton.begin(tokens, model.embedding_rows, outside) for tokens in batch]]
        for number in range(network.layers):
            parameters = skeleton.layer_parameters(number, model.stored(number))
            states.append([skeleton.layer(number, parameters, hidden) for hidden in states[-1]])
    losses, gradients = _of_end(network, model, states.pop(), loss)
    for number in reversed(range(network.layers)):
        gradients = _of_layer(network, model, number, states.pop(), gradients)
    _of_beginning(network, model, batch, gradients)
    return losses


def _of_end(
    network: Network, model: Differentiable, states: list[Tensor], loss: Loss
) -> tuple[list[float], list[Tensor]]:
    """From the last layer's states: the losses, and their gradients with respect to those states."""
    skeleton = network.skeleton
    losses, gradients = [], []
    for number, state in enumerate(states):
        hidden = state.detach().requires_grad_()
        with torch.enable_grad():
            outside, leaves, made = _as_leaves(model.stored(OUTSIDE))
            parameters = skeleton.outside_parameters(outside)
            features = skeleton.end(hidden, parameters)
        given = features.detach().requires_grad_()
        with torch.no_grad():
            parts = [linear(given, rows) for _, rows in model.head_windows()]
            raw = torch.cat(parts, dim=-1)
            bias = model.head_bias()
            raw = raw if bias is None else raw + bias
        raw.requires_grad_()
        with torch.enable_grad():
            value = loss(number, skeleton.logits(raw, parameters))
        losses.append(float(value.detach()))
        value.backward()
        assert raw.grad is not None
        with torch.enable_grad():
            for first, rows in model.head_windows():
                part = linear(given, rows)
                part.backward(raw.grad[..., first : first + rows.shape[0]])
            bias = model.head_bias()
            if bias is not None and bias.requires_grad:
                bias.backward(raw.grad.sum(dim=(0, 1)))
        assert given.grad is not None
        features.backward(given.grad)
        _pass_on(leaves, made)
        gradients.append(hidden.grad if hidden.grad is not None else torch.zeros_like(hidden))
    return losses, gradients


def _of_layer(
    network: Network, model: Differentiable, number: int, states: list[Tensor], gradients: list[Tensor]
) -> list[Tensor]:
    """Gradients with respect to what a layer is given, from those with respect to what it gives."""
    with torch.enable_grad():
        stored, leaves, made = _as_leaves(model.stored(number))
        found = []
        for state, gradient in zip(states, gradients, strict=True):
            hidden = state.detach().requires_grad_()
            parameters = network.skeleton.layer_parameters(number, stored)
            network.skeleton.layer(number, parameters, hidden).backward(gradient)
            assert hidden.grad is not None
            found.append(hidden.grad)
        _pass_on(leaves, made)
    return found


def _of_beginning(network: Network, model: Differentiable, batch: Sequence[Tensor], gradients: list[Tensor]) -> None:
    with torch.enable_grad():
        for tokens, gradient in zip(batch, gradients, strict=True):
            outside = network.skeleton.outside_parameters(model.stored(OUTSIDE))
            hidden = network.skeleton.begin(tokens, model.embedding_rows, outside)
            if hidden.requires_grad:
                hidden.backward(gradient)


def _as_leaves(stored: Tensors) -> tuple[Tensors, list[Tensor], list[Tensor]]:
    """Tensors cut off from their graphs, so that these are gone through once; those that have one, and these."""
    cut = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in stored.items()}
    graphs = [name for name, tensor in stored.items() if tensor.requires_grad]
    return cut, [cut[name] for name in graphs], [stored[name] for name in graphs]


def _pass_on(leaves: list[Tensor], made: list[Tensor]) -> None:
    """Takes the gradients of leaves on into what the tensors were made of."""
    reached = [(tensor, leaf.grad) for tensor, leaf in zip(made, leaves, strict=True) if leaf.grad is not None]
    if reached:
        torch.autograd.backward([tensor for tensor, _ in reached], [gradient for _, gradient in reached])
