"""Gram matrices of what the linear layers of a model are given: X^T X over all tokens, gathered by a streamed pass.

Not for how they are stored (gather.py), nor for what is made of them (methods/gathered.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergecore.features.passes import Network, States, run
from mergecore.features.samples import Sample
from mergecore.features.weights import Weights


def gram_sizes(network: Network) -> dict[str, int]:
    """Of the stored weights of linear layers inside of layers, how many inputs they have.

    Left out are those of which a module takes only a part, or several at once: experts that are put together.
    """
    found = {}
    for number in range(network.layers):
        for name, (_, inputs) in _linear_layers(network, number).items():
            found[name] = inputs
    return found


def gather_grams(
    network: Network,
    weights: Weights,
    samples: Sequence[Sample],
    done: Callable[[str, Tensor], None],
    after_layer: Callable[[int], None],
) -> None:
    """Calls `done` with each weight's name and X^T X, float64 (inputs, inputs), as soon as its layer has run.

    X has a row for every token of the samples. One layer's matrices are held.
    """
    with ExitStack() as watching:
        sums: dict[str, Tensor] = {}

        def begin(number: int) -> None:
            sums.update(watching.enter_context(_watched(network, number)))

        def end(number: int) -> None:
            watching.close()
            for name in list(sums):
                done(name, sums.pop(name))
            after_layer(number)

        lengths = [len(sample.tokens) for sample in samples]
        states = States(lengths, network.skeleton.hidden_size, weights.dtype)
        run(network, weights, samples, states, begin, end)


def _linear_layers(network: Network, number: int) -> dict[str, tuple[nn.Module, int]]:
    """The modules of a layer by the stored names of their weights, with their inputs."""
    stored = network.skeleton.unchanged(network.groups[number])
    linear = network.skeleton.linear_layers(number)
    return {stored[name]: found for name, found in linear.items() if name in stored}


@contextmanager
def _watched(network: Network, number: int) -> Iterator[dict[str, Tensor]]:
    """While it is open, what the modules of a layer are given is added up."""
    layers = _linear_layers(network, number)
    device = network.skeleton.device
    sums = {
        name: torch.zeros(inputs, inputs, dtype=torch.float64, device=device) for name, (_, inputs) in layers.items()
    }
    products = _Products()

    def given(name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        sums[name] += products.of(arguments[0] if arguments else next(iter(keywords.values())))

    with ExitStack() as hooks:
        for name, (module, _) in layers.items():
            handle = module.register_forward_pre_hook(partial(given, name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield sums


class _Products:
    """X^T X; modules that are given the same tensor one after the other share one product."""

    def __init__(self) -> None:
        self._inputs: Tensor | None = None
        self._product = torch.empty(0)

    def of(self, inputs: Tensor) -> Tensor:
        if inputs is not self._inputs:
            rows = inputs.detach().reshape(-1, inputs.shape[-1]).double()
            self._inputs, self._product = inputs, rows.T @ rows
        return self._product
