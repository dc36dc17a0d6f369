"""SLTA: the weights of each submodule's deltas that keep the features of every task best, in closed form.

Dai et al. 2025, "Leveraging submodule linearity enhances task arithmetic performance in LLMs", section 3 and A.3.
Features are those of the base, gathered layer by layer; a sample is one text, its features one vector.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergecore.engine import Fit
from mergecore.errors import NonFiniteError
from mergecore.features.fitting import Fitting, hidden_bytes, replace_file, sample_tokens
from mergecore.features.passes import States, Tensors, run
from mergecore.features.samples import Sample
from mergecore.features.submodules import ATTENTION, Heads, Submodules
from mergecore.methods.base import Coefficients, per_model
from mergecore.planning import MergePlan

WORST_CONDITION = 1e12
"""Of A beyond which its inverse says nothing in float64: then the least squares of least length are taken."""
MODEL = "model"


@dataclass(frozen=True)
class Solution:
    """Of one submodule: alpha, float64 (models,), the condition of A, and how it was solved."""

    alphas: Tensor
    condition: float
    solver: str

    def as_dict(self) -> dict[str, Any]:
        return {"alphas": self.alphas.tolist(), "condition": self.condition, "solver": self.solver}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Solution:
        return cls(torch.tensor(found["alphas"], dtype=torch.float64), found["condition"], found["solver"])


class Products:
    """B of eq. 14 or 34: per task, the mean over its samples of the products of all pairs of feature differences."""

    def __init__(self, models: int, *, balance: bool) -> None:
        self.sums = torch.zeros(models, models, models, dtype=torch.float64)
        self.counts = [0] * models
        self.balance = balance

    def add(self, task: int, differences: Sequence[Tensor]) -> None:
        """One sample's differences f(x; theta_t) - f(x; theta_0), one per model, of any equal shape."""
        rows = torch.stack([difference.reshape(-1).double() for difference in differences])
        products = (rows @ rows.T).cpu()
        mean = float(products.diagonal().mean())
        if self.balance and mean > 0:
            products = products / mean
        self.sums[task] += products
        self.counts[task] += 1

    def solve(self) -> Solution:
        """alpha = A^-1 b (eq. 12-13)."""
        means = torch.stack([total / max(1, count) for total, count in zip(self.sums, self.counts, strict=True)])
        a = means.sum(dim=0)
        b = means.diagonal(dim1=0, dim2=2).sum(dim=1)  # b_j = sum_t B_tjt
        if not bool(torch.isfinite(a).all()):
            raise NonFiniteError("the features of a submodule are not finite: is one of the models broken?")
        condition = float(torch.linalg.cond(a)) if bool(a.any()) else math.inf
        if condition <= WORST_CONDITION:
            return Solution(torch.linalg.solve(a, b), condition, "exact")
        return Solution(torch.linalg.pinv(a, hermitian=True) @ b, min(condition, sys.float_info.max), "least squares")


def fit(fitting: Fitting) -> Fit:
    """The coefficients of all tensors. Steps are layers; a fit that was interrupted goes on from the last one."""
    level, plan = fitting.parameter("level"), fitting.plan
    if level == MODEL:
        found = {MODEL: _of_model(fitting)}
        weights: dict[str, tuple[Tensor, str | None]] = {
            name: (found[MODEL].alphas.unsqueeze(1), None) for name in fitting.models[0].shapes
        }
    else:
        found, weights = _of_layers(fitting, level)
    coefficients = {}
    for job in plan.jobs:
        if not job.merges or job.parameters is None:
            continue
        outside = [1 / len(job.models) if weight is None else weight for weight in job.parameters["weight"]]
        values, axis = weights.get(job.name, (per_model(outside), None))
        coefficients[job.name] = Coefficients(values, axis=axis)  # type: ignore[arg-type]
    report = {
        "level": level,
        "balance": fitting.parameter("balance"),
        "modules": {name: one.as_dict() for name, one in found.items()},
    }
    return Fit(coefficients, report)


def kept_bytes(plan: MergePlan) -> dict[str, int]:
    """The hidden states: those in front of and behind a layer, the base's, and every model's differences to them."""
    return {"hidden states": (3 + len(plan.data)) * hidden_bytes(plan, sample_tokens(plan))}


def _of_model(fitting: Fitting) -> Solution:
    """The whole model as one module; its features are what the head is given."""
    network, samples = fitting.network, [sample for task in fitting.samples for sample in task]
    assert fitting.base is not None
    states, last = _states(fitting, samples), _states(fitting, samples)
    differences = [_states(fitting, samples) for _ in fitting.models]
    total = network.layers * (1 + len(fitting.models))

    for number, weights in enumerate([fitting.base, *fitting.models]):

        def tell(layer: int, before: int = number * network.layers) -> None:
            fitting.step(before + layer + 1, total, "layers")

        outside = run(network, weights, samples, states, tell)
        for i in range(len(samples)):
            with torch.no_grad():
                features = network.skeleton.end(states[i].to(fitting.device), outside)
            if number == 0:
                last[i] = features
            else:
                differences[number - 1][i] = features - last[i].to(features.device)
    return _solved(fitting, lambda i: [one[i] for one in differences])


def _of_layers(fitting: Fitting, level: str) -> tuple[dict[str, Solution], dict[str, tuple[Tensor, str | None]]]:
    """Of every submodule its weights, and of every tensor of the layers what they come to."""
    network, samples = fitting.network, [sample for task in fitting.samples for sample in task]
    base = fitting.base
    assert base is not None
    known = _known(fitting)
    found: dict[str, Solution] = {}
    spread: dict[str, tuple[Tensor, str | None]] = {}
    states, after = _states(fitting, samples), _states(fitting, samples)
    with torch.no_grad():
        outside = network.outside(base)
        for i, sample in enumerate(samples):
            states[i] = network.begin(sample.tokens.to(fitting.device), base, outside)
        for number in range(network.layers):
            parameters = network.layer(base, number)
            submodules = Submodules(network, number, parameters, states[0].to(fitting.device))
            for i in range(len(samples)):
                after[i] = network.skeleton.layer(number, parameters, states[i].to(fitting.device))
            for part in submodules.parts(level):
                heads = Heads(submodules) if level == "head_mlp" and part == ATTENTION else None
                names = [f"layers.{number}.head.{head}" for head in range(heads.count)] if heads else []
                names = names or [f"layers.{number}.{part}"]
                if any(name not in known for name in names):
                    solved = (
                        _of_heads(fitting, heads, number, parameters, states)
                        if heads
                        else [_of_part(fitting, submodules, part, parameters, states, after)]
                    )
                    known |= dict(zip(names, solved, strict=True))
                found |= {name: known[name] for name in names}
                alphas = torch.stack([known[name].alphas for name in names], dim=1)
                for name in network.groups[number]:
                    if submodules.part_of(name, level) == part:
                        spread[name] = _spread(fitting, heads, alphas, name, number)
            states, after = after, states
            _remember(fitting, known)
            fitting.step(number + 1, network.layers, "layers")
    return found, spread


def _spread(fitting: Fitting, heads: Heads | None, alphas: Tensor, name: str, number: int) -> tuple[Tensor, str | None]:
    if heads is None:
        return alphas, None
    parameter, shape = fitting.network.skeleton.name_in_layer(name, number), fitting.models[0].shapes[name]
    return heads.spread(alphas, parameter, shape[-1] if parameter == heads.weight_name else shape[0])


def _of_part(
    fitting: Fitting, submodules: Submodules, part: str, base: Tensors, states: States, after: States
) -> Solution:
    """A layer, an attention or an MLP. One model's weights are held beside the base's."""
    samples = [sample for task in fitting.samples for sample in task]
    reference = after
    if part == ATTENTION:
        reference = _states(fitting, samples)
        for i in range(len(samples)):
            reference[i] = submodules.output(part, base, base, states[i].to(fitting.device))
    differences = []
    for model in fitting.models:
        other = fitting.network.layer(model, submodules.number)
        differences.append(_states(fitting, samples))
        for i in range(len(samples)):
            output = submodules.output(part, base, other, states[i].to(fitting.device))
            differences[-1][i] = output - reference[i].to(fitting.device)
    return _solved(fitting, lambda i: [one[i] for one in differences])


def _of_heads(fitting: Fitting, heads: Heads, number: int, base: Tensors, states: States) -> list[Solution]:
    """Each head of an attention. Held: every model's output projection, and what it is given."""
    samples = [sample for task in fitting.samples for sample in task]
    width = heads.count * heads.width
    inputs, projections = [], []
    for weights in (None, *fitting.models):
        other = base if weights is None else fitting.network.layer(weights, number)
        inputs.append(_states(fitting, samples, width))
        projections.append(other[heads.weight_name].clone())
        for i in range(len(samples)):
            inputs[-1][i] = heads.inputs(base, other, states[i].to(fitting.device))

    def differences(head: int, i: int) -> list[Tensor]:
        features = [
            heads.features(head, given[i].to(fitting.device), projection)
            for given, projection in zip(inputs, projections, strict=True)
        ]
        return [feature - features[0] for feature in features[1:]]

    return [_solved(fitting, lambda i, head=head: differences(head, i)) for head in range(heads.count)]  # type: ignore[misc]


def _solved(fitting: Fitting, differences: Callable[[int], list[Tensor]]) -> Solution:
    products = Products(len(fitting.models), balance=fitting.parameter("balance"))
    for i, task in enumerate(_tasks(fitting)):
        products.add(task, differences(i))
    return products.solve()


def _tasks(fitting: Fitting) -> Iterator[int]:
    """The task of each sample."""
    for task, samples in enumerate(fitting.samples):
        yield from (task for _ in samples)


def _states(fitting: Fitting, samples: Sequence[Sample], width: int | None = None) -> States:
    lengths = [len(sample.tokens) for sample in samples]
    width = width or fitting.network.skeleton.hidden_size
    return fitting.states(lengths, width)


def _remember(fitting: Fitting, known: Mapping[str, Solution]) -> None:
    content = json.dumps({name: one.as_dict() for name, one in known.items()})
    replace_file(fitting.scratch / "slta.json", content.encode())


def _known(fitting: Fitting) -> dict[str, Solution]:
    with suppress(FileNotFoundError):
        found = json.loads((fitting.scratch / "slta.json").read_bytes())
        return {name: Solution.of(one) for name, one in found.items()}
    return {}
