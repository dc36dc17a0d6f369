"""How linear models and their submodules are in the differences of weights: the measures of SLTA, section 2 and A.

For every submodule, on the base's features: the Non-linearity Score of each model (eq. 19), and for merges of several
models the projection distance (eq. 8) and the cosine (eq. 15-16) beside that of the models among each other (eq. 17).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergecore.features.fitting import Fitting, opened
from mergecore.features.passes import States, Tensors, run
from mergecore.features.samples import Sample
from mergecore.features.submodules import ATTENTION, Heads, Submodules
from mergecore.features.weights import Combined
from mergecore.planning import plan
from mergecore.spec import load_spec

STEPS = 10
"""N of eq. 18-19: the line between base and model is cut into so many parts."""
PAIR, TRIPLE = (0.2, 0.4, 0.6, 0.8, 1.0), (0.3, 0.5, 0.7)
"""The weights of merges of two and of three models that the paper averages over."""

Output = Callable[[Sequence[float]], States]
"""Weights of the models' deltas -> the submodule's features of all samples."""


@dataclass(frozen=True)
class Measured:
    """One submodule's measures. `nonlinearity` has the score of each model; the others are means over the merges of
    two (or three) models and their weights, None for a single model."""

    module: str
    nonlinearity: list[float]
    projection_distance: float | None
    cosine: float | None
    cosine_between_models: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def linearity(
    base: str,
    models: Sequence[str],
    data: Sequence[str],
    *,
    level: str = "attn_mlp",
    samples: int = 30,
    length: int = 512,
    field: str = "text",
    dtype: str = "float32",
    seed: int = 0,
    device: torch.device | None = None,
    tell: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Measured]:
    """The measures of all submodules at a level, in the order of the model.

    `data` has a file of samples for each model. Raises what planning a merge of these models raises.
    """
    spec = load_spec(
        {
            "merge_method": "slta",
            "base_model": base,
            "models": [{"model": model, "data": file} for model, file in zip(models, data, strict=True)],
            "parameters": {"level": level},
            "calibration": {"samples": samples, "length": length, "field": field, "dtype": dtype},
            "seed": seed,
        }
    )
    planned = plan(spec)
    with (
        tempfile.TemporaryDirectory(prefix="mergecore-") as scratch,
        opened(planned, Path(scratch), device or torch.device("cpu"), tell) as fitting,
        torch.no_grad(),
    ):
        found = []
        for name, output in _outputs(fitting, level):
            found.append(measure(name, output, [len(task) for task in fitting.samples]))
        return found


def measure(name: str, output: Output, tasks: Sequence[int]) -> Measured:
    """The measures of one submodule, whose samples are those of the first task, then of the next, so many each."""
    count = len(tasks)
    zero = output([0.0] * count)
    firsts = list(itertools.accumulate([0, *tasks]))
    scores, whole = [], []
    for model in range(count):
        line = [zero]
        for k in range(1, STEPS + 1):
            weights = [0.0] * count
            weights[model] = k / STEPS
            line.append(output(weights))
        whole.append(line[-1])
        own = range(firsts[model], firsts[model + 1])
        scores.append(_mean(_nonlinearity([points[i] for points in line]) for i in own))
    if count == 1:
        return Measured(name, scores, None, None, None)
    everything = range(firsts[-1])
    deltas = [[_flat(one[i]) - _flat(zero[i]) for one in whole] for i in everything]
    between = _mean(_mean(_cosine(a, b) for a, b in itertools.combinations(differences, 2)) for differences in deltas)
    distances, cosines = [], []
    for size, values in ((2, PAIR), (3, TRIPLE)):
        for chosen in itertools.combinations(range(count), size):
            for some in itertools.product(values, repeat=size):
                weights = [0.0] * count
                for model, value in zip(chosen, some, strict=True):
                    weights[model] = value
                merged = output(weights)
                pairs = [_merged(merged[i], zero[i], deltas[i], weights) for i in everything]
                distances.append(abs(1.0 - _mean(projection for projection, _ in pairs)))
                cosines.append(_mean(cosine for _, cosine in pairs))
    return Measured(name, scores, _mean(distances), _mean(cosines), between)


def _nonlinearity(points: Sequence[Tensor]) -> float:
    """Eq. 19 for one sample: features at the places 0, 1/N .. 1 between base and model."""
    steps = len(points) - 1
    rows = torch.stack([_flat(point) for point in points])
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    length = distances[0, -1]
    if length == 0:
        return 0.0  # the model is the base here
    places = torch.arange(steps + 1, dtype=torch.float64) / steps
    expected = (places[:, None] - places[None, :]).abs()
    return float((distances / length - expected).square().sum())


def _merged(merged: Tensor, zero: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float]:
    """For one sample, what eq. 8 takes the mean of, and the cosine of eq. 15."""
    found = _flat(merged) - _flat(zero)
    expected = torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)]).sum(dim=0)
    square = expected @ expected
    if square == 0:
        return 1.0, 1.0  # nothing differs here
    return float(found @ expected / square), _cosine(found, expected)


def _outputs(fitting: Fitting, level: str) -> Iterator[tuple[str, Output]]:
    """Every submodule at a level with its features; the next one is made when the last has been measured."""
    samples = [sample for task in fitting.samples for sample in task]
    network, base = fitting.network, fitting.base
    assert base is not None
    if level == "model":
        yield "model", lambda weights: _of_model(fitting, samples, weights)
        return
    states = fitting.states([len(sample.tokens) for sample in samples], network.skeleton.hidden_size)
    outside = network.outside(base)
    for i, sample in enumerate(samples):
        states[i] = network.begin(sample.tokens.to(fitting.device), base, outside)
    for number in range(network.layers):
        parameters = network.layer(base, number)
        others = [network.layer(model, number) for model in fitting.models]
        submodules = Submodules(network, number, parameters, states[0].to(fitting.device))
        for part in submodules.parts(level):
            if level == "head_mlp" and part == ATTENTION:
                heads = Heads(submodules)
                for head in range(heads.count):

                    def of_head(
                        mixed: Tensors,
                        hidden: Tensor,
                        base: Tensors = parameters,
                        heads: Heads = heads,
                        head: int = head,
                    ) -> Tensor:
                        inputs = heads.inputs(base, mixed, hidden)
                        return heads.features(head, inputs, mixed[heads.weight_name]).unsqueeze(0)

                    yield f"layers.{number}.head.{head}", _of_states(fitting, states, parameters, others, of_head)
            else:
                of_part = partial(submodules.output, part, parameters)
                yield f"layers.{number}.{part}", _of_states(fitting, states, parameters, others, of_part)
        for i in range(len(samples)):
            states[i] = network.skeleton.layer(number, parameters, states[i].to(fitting.device))
        fitting.step(number + 1, network.layers, "layers")


def _of_model(fitting: Fitting, samples: Sequence[Sample], weights: Sequence[float]) -> States:
    network, base = fitting.network, fitting.base
    assert base is not None
    states = fitting.states([len(sample.tokens) for sample in samples], network.skeleton.hidden_size)
    outside = run(network, Combined(base, fitting.models, lambda name: weights), samples, states)
    for i in range(len(samples)):
        states[i] = network.skeleton.end(states[i].to(fitting.device), outside)
    return states


def _of_states(
    fitting: Fitting,
    states: States,
    base: Tensors,
    others: Sequence[Tensors],
    features: Callable[[Tensors, Tensor], Tensor],
) -> Output:
    """The Output of a submodule: `features` makes them of weights in the place of the base's, and of hidden states."""

    def output(weights: Sequence[float]) -> States:
        found = fitting.states([states[i].shape[1] for i in range(len(states))], fitting.network.skeleton.hidden_size)
        mixed = _mixed(base, others, weights)
        for i in range(len(states)):
            found[i] = features(mixed, states[i].to(fitting.device))
        return found

    return output


def _mixed(base: Mapping[str, Tensor], others: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    return {
        name: sum(
            (weight * (other[name] - tensor) for weight, other in zip(weights, others, strict=True) if weight),
            start=tensor,
        )
        for name, tensor in base.items()
    }


def _flat(features: Tensor) -> Tensor:
    return features.reshape(-1).double().cpu()


def _cosine(a: Tensor, b: Tensor) -> float:
    product = float(a.norm() * b.norm())
    return float(a @ b) / product if product > 0 else 1.0


def _mean(values: Iterator[float] | Sequence[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
