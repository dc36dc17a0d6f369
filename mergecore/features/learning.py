"""Merging coefficients that are learned: a model whose tensors are scaled sums, and the steps of an optimisation.

Of the models, one layer is held at a time, as stored, and its sum; what stays are coefficients and optimiser states.
What the loss is, and which tensors share coefficients, is said in dam.py and adamerging.py.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mergecore.errors import NonFiniteError
from mergecore.features.backward import value_and_gradient
from mergecore.features.columns import scaled_sum
from mergecore.features.fitting import Fitting, Step, hidden_bytes, replace_file, sample_tokens
from mergecore.features.passes import HEAD_BYTES, Network, Tensors
from mergecore.features.samples import Sample
from mergecore.features.weights import Stored
from mergecore.ops import Axis
from mergecore.output.config import COUNTS
from mergecore.planning import MergePlan

KEEP_STEPS = 10
"""A step is kept so often; what is lost with a crash is done again."""
LOGITS = 1 << 22
"""Of so many the loss is computed at once, in float64."""


@dataclass(frozen=True)
class Mixture:
    """One tensor: sum_n c_n W_n, or with a base W0 + sum_n c_n (W_n - W0). `axis` says what c has one number for.

    `coefficients` is float64 (models, 1) or (models, n), a leaf of the optimisation or constant. The tensor is seen
    as a matrix: a vector as one row, several matrices as one below the other, with the same coefficients for each.
    """

    models: Sequence[Stored]
    coefficients: Tensor
    axis: Axis = Axis.TENSOR
    base: Stored | None = None

    def rows(self, name: str, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows of the tensor's first dimension, with the graph that leads to the coefficients."""
        shape = self.models[0].shapes[name]
        matrix = _as_matrix(shape, count)
        parts = [model.as_stored(name, first, count).reshape(matrix) for model in self.models]
        base = None if self.base is None else self.base.as_stored(name, first, count).reshape(matrix)
        coefficients = self.coefficients
        if self.axis is Axis.ROWS:
            own = coefficients.shape[1]
            if matrix[0] % own == 0 and len(shape) > 2:
                coefficients = coefficients.repeat(1, matrix[0] // own)
            else:
                coefficients = coefficients[:, first : first + count]
        return scaled_sum(coefficients, parts, base, dtype=dtype, axis=self.axis).view(count, *shape[1:])


def _as_matrix(shape: tuple[int, ...], count: int) -> tuple[int, int]:
    """`count` rows of a tensor's first dimension as a matrix: the last dimension of two or three is the columns."""
    if len(shape) < 2:
        return 1, count
    if len(shape) == 3:
        return count * shape[1], shape[2]
    return count, prod(shape[1:])


class Mixed:
    """A model whose tensors are mixtures, made whenever they are asked for (backward.Differentiable)."""

    def __init__(self, network: Network, mixtures: Mapping[str, Mixture], dtype: torch.dtype) -> None:
        self.network, self.mixtures, self.dtype = network, mixtures, dtype

    def stored(self, group: int) -> Tensors:
        return {name: self._whole(name) for name in self.network.groups[group]}

    def embedding_rows(self, numbers: Tensor) -> Tensor:
        wanted = numbers.tolist()
        starts = [i for i in range(len(wanted)) if i == 0 or wanted[i] != wanted[i - 1] + 1]
        ends = [*starts[1:], len(wanted)]
        name = self.network.embedding
        mixture = self.mixtures[name]
        return torch.cat(
            [mixture.rows(name, wanted[i], end - i, self.dtype) for i, end in zip(starts, ends, strict=True)]
        )

    def head_windows(self) -> Iterator[tuple[int, Tensor]]:
        name = self.network.head
        rows, width = self.mixtures[name].models[0].shapes[name]
        step = max(1, HEAD_BYTES // (width * self.dtype.itemsize))
        for first in range(0, rows, step):
            yield first, self.mixtures[name].rows(name, first, min(step, rows - first), self.dtype)

    def head_bias(self) -> Tensor | None:
        return None if self.network.head_bias is None else self._whole(self.network.head_bias)

    def _whole(self, name: str) -> Tensor:
        shape = self.mixtures[name].models[0].shapes[name]
        return self.mixtures[name].rows(name, 0, shape[0] if shape else 1, self.dtype).view(shape)


@dataclass(frozen=True)
class Schedule:
    """AdamW (Loshchilov and Hutter 2019, without weight decay) over all samples in an order drawn by `seed`."""

    learning_rate: float
    epochs: int
    batch: int
    seed: int

    def batches(self, samples: int) -> list[list[int]]:
        """The samples of every step, by number."""
        chance, found = random.Random(self.seed), []
        for _ in range(self.epochs):
            order = list(range(samples))
            chance.shuffle(order)
            found += [order[i : i + self.batch] for i in range(0, samples, self.batch)]
        return found


def schedule_of(fitting: Fitting) -> Schedule:
    """What the method's parameters say of the optimisation."""
    names: Any = {name: fitting.parameter(name) for name in ("learning_rate", "epochs", "batch")}
    return Schedule(**names, seed=fitting.plan.spec.seed)


BATCH = "hidden states of a batch, in memory"


def batch_bytes(plan: MergePlan) -> int:
    """What a step keeps of its samples, at most: the states in front of every layer, and behind the last."""
    batch = next(job.parameters["batch"] for job in plan.jobs if job.parameters is not None)
    text = plan.config.get("text_config") or plan.config
    layers = next((int(text[name]) for name in COUNTS if name in text), 0)
    tokens = min(batch * plan.spec.calibration.length, sample_tokens(plan))
    return (layers + 1) * hidden_bytes(plan, tokens)


SampleLoss = Callable[[int, Tensor], Tensor]
"""(number of the sample, the merged model's logits (1, n, vocabulary)) -> a scalar."""


def learn(
    model: Mixed,
    leaves: Mapping[str, Tensor],
    samples: Sequence[Sample],
    loss: SampleLoss,
    schedule: Schedule,
    scratch: Path,
    step: Step,
    penalty: Callable[[], Tensor] | None = None,
    before: tuple[int, int] = (0, 0),
) -> list[float]:
    """Moves the leaves, in place, to less of the mean loss of a batch plus `penalty`; returns the loss of every step.

    Goes on from what `scratch` keeps of an earlier run, to the same bytes. `before` is (done, of how many) steps of
    other work, for the progress. NonFiniteError if the loss is not finite.
    """
    optimiser = torch.optim.AdamW(list(leaves.values()), lr=schedule.learning_rate, weight_decay=0.0)
    batches = schedule.batches(len(samples))
    curve = _restore(scratch, leaves, optimiser)
    for number in range(len(curve), len(batches)):
        batch = batches[number]
        optimiser.zero_grad(set_to_none=True)
        tokens = [samples[i].tokens.to(model.network.skeleton.device) for i in batch]
        losses = value_and_gradient(
            model.network,
            model,
            tokens,
            lambda i, logits, batch=batch: loss(batch[i], logits) / len(batch),  # type: ignore[misc]
        )
        value = sum(losses)
        if penalty is not None:
            with torch.enable_grad():
                added = penalty()
            if added.requires_grad:  # not where all its weights are 0
                added.backward()
            value += float(added.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of step {number + 1} is {value}: lower learning_rate, unless a model is broken"
            )
        optimiser.step()
        curve.append(value)
        done = number + 1
        if done % KEEP_STEPS == 0 or done == len(batches):
            _store(scratch, leaves, optimiser, curve)
        step(before[0] + done, before[1] + len(batches), "steps")
    return curve


_STATE = "learned.safetensors"


def _store(scratch: Path, leaves: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, curve: list[float]) -> None:
    """One file, so that coefficients and optimiser state are of one step; the curve is in its header."""
    tensors = {f"leaf {name}": leaf.detach().cpu().clone() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        tensors |= {f"{key} {name}": value.cpu().clone() for key, value in optimiser.state[leaf].items()}
    replace_file(scratch / _STATE, save(tensors, {"curve": json.dumps(curve)}))


def _restore(scratch: Path, leaves: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> list[float]:
    """The losses so far, with leaves and optimiser as they were after the last of them."""
    with suppress(FileNotFoundError):
        content = (scratch / _STATE).read_bytes()
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        curve: list[float] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["curve"])
        states: dict[str, dict[str, Any]] = {name: {} for name in leaves}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(" ")
            if kind == "leaf":
                leaves[name].data.copy_(tensor)
            else:
                states[name][kind] = tensor if kind == "step" else tensor.to(leaves[name].device)
        for name, leaf in leaves.items():
            if states[name]:
                optimiser.state[leaf] = states[name]
        return curve
    return []


def leaf(models: int, length: int, value: float, device: torch.device) -> Tensor:
    """Coefficients to be learned, float64 (models, length), all of one value."""
    return torch.full((models, length), value, dtype=torch.float64, device=device, requires_grad=True)


def entropy(logits: Tensor) -> Tensor:
    """Mean over tokens of the entropy, in nats, of what is predicted; logits (1, n, vocabulary)."""

    def of_tokens(part: Tensor) -> Tensor:
        logs = torch.log_softmax(part.double(), dim=-1)
        return -(logs.exp() * logs).sum(dim=-1)

    return mean_over_tokens(of_tokens, logits[0])


def mean_over_tokens(loss: Callable[..., Tensor], logits: Tensor, *beside: Tensor) -> Tensor:
    """The mean of `loss`, (m,) of m tokens, over all tokens: the first dimension of what it is given.

    It is computed for a few tokens at a time, and again for their gradient: in float64 a large vocabulary takes much
    memory.
    """
    count = max(1, LOGITS // logits.shape[-1])
    sums: list[Any] = [
        checkpoint(lambda *parts: loss(*parts).sum(), *parts, use_reentrant=False, preserve_rng_state=False)
        for parts in zip(*(tensor.split(count) for tensor in (logits, *beside)), strict=True)
    ]
    return torch.stack(sums).sum() / len(logits)
