"""DAM: one coefficient per model and column of each linear layer, learned by distillation from the models.

Gauthier-Caron et al. 2024, "Merging in a bottle: differentiable adaptive merging (DAM)", section 3:
W = sum_i W_i diag(c_i), by the divergence of the merged model from each model on its own samples. The models' logits
are computed once, each model streamed layer by layer, and kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergecore.architecture import Architecture, is_embedding, is_linear
from mergecore.engine import Fit
from mergecore.features.adamerging import schedule_of
from mergecore.features.fitting import DTYPES, Fitting, sample_tokens
from mergecore.features.learning import Mixed, Mixture, entropy, leaf, learn
from mergecore.features.passes import States, run
from mergecore.features.weights import Stored
from mergecore.methods.base import Coefficients
from mergecore.ops import Axis
from mergecore.planning import MergePlan

LOSSES = ("kl", "forward_kl", "mse", "entropy")


def fit(fitting: Fitting) -> Fit:
    """The coefficients of all tensors. Steps are the layers of the models' own passes, then the optimisation's."""
    count = len(fitting.plan.data)
    mixtures, leaves = _mixtures(fitting, count)
    samples = [sample for task in fitting.samples for sample in task]
    kind = fitting.parameter("loss")
    schedule = schedule_of(fitting)
    steps = len(schedule.batches(len(samples)))
    layers = 0 if kind == "entropy" or not steps else count * fitting.network.layers
    known = Targets(fitting, layers + steps) if layers else None

    def loss(number: int, logits: Tensor) -> Tensor:
        if known is None:
            return entropy(logits)
        return distance(kind, logits[0], *known[number])

    def penalty() -> Tensor:
        return regularisation(
            list(leaves.values()),
            cosine=fitting.parameter("lambda_cosine"),
            l1=fitting.parameter("lambda_l1"),
            l2=fitting.parameter("lambda_l2"),
        )

    model = Mixed(fitting.network, mixtures, fitting.dtype)
    curve = learn(model, leaves, samples, loss, schedule, fitting.scratch, fitting.step, penalty, (layers, layers))
    coefficients = {}
    for job in fitting.plan.jobs:
        if not job.merges:
            continue
        mixture = mixtures.get(job.name) or _fixed(fitting, count)
        values = torch.zeros(len(job.models), mixture.coefficients.shape[1], dtype=torch.float64)
        for model_values, stored in zip(mixture.coefficients.detach().cpu(), mixture.models, strict=True):
            values[fitting.models.index(stored)] = model_values
        axis: Any = {Axis.TENSOR: None, Axis.ROWS: "rows", Axis.COLUMNS: "columns"}[mixture.axis]
        coefficients[job.name] = Coefficients(values, axis=axis)
    spread = {name: [found.mean().item(), found.std(correction=0).item()] for name, found in leaves.items()}
    return Fit(coefficients, {"loss": curve, "mean and deviation of the coefficients": spread})


def kept_bytes(plan: MergePlan) -> dict[str, int]:
    """The models' logits of all samples."""
    parameters = next(job.parameters for job in plan.jobs if job.parameters is not None)
    if parameters["loss"] == "entropy":
        return {}
    text = plan.config.get("text_config") or plan.config
    vocabulary, top = int(text.get("vocab_size") or 0), parameters["top_k"]
    dtype = DTYPES[plan.spec.calibration.dtype]
    each = States.nbytes(sample_tokens(plan), top, dtype) + 8 * sample_tokens(plan) * top
    return {"logits": each if top else States.nbytes(sample_tokens(plan), vocabulary, dtype)}


def _mixtures(fitting: Fitting, count: int) -> tuple[dict[str, Mixture], dict[str, Tensor]]:
    """What every tensor is made of, and the coefficients among them that are learned."""
    merges_embeddings = fitting.parameter("embeddings") == "merge"
    merges_norms = fitting.parameter("norms") == "merge"
    plan, network = fitting.plan, fitting.network
    architecture = Architecture.of(
        plan.reference.config, fitting.models[0].shapes, plan.spec.orientation, fitting.models[0].shapes
    )
    mixtures, leaves = {}, {}
    for name, shape in fitting.models[0].shapes.items():
        head = name == network.head and not network.tied
        learned = (
            (merges_embeddings if is_embedding(name, shape) else head or is_linear(name, shape))
            if len(shape) > 1
            else merges_norms
        )
        if not learned:
            mixtures[name] = _fixed(fitting, count)
            continue
        # An input feature of a linear layer is a stored column, or row; of an embedding and a vector, an entry.
        rows = is_linear(name, shape) and architecture.orientation(name, shape) == "rows"
        length = (
            shape[-2] if rows else torch.Size(shape[1:]).numel() if len(shape) in (2, 4) else shape[-1] if shape else 1
        )
        leaves[name] = leaf(count, length, 1 / count, fitting.device)
        mixtures[name] = Mixture(fitting.models[:count], leaves[name], Axis.ROWS if rows else Axis.COLUMNS)
    return mixtures, leaves


def _fixed(fitting: Fitting, count: int) -> Mixture:
    """The base's tensor; without a base, the models' average."""
    taken: Sequence[Stored] = fitting.models[count:] or fitting.models
    values = torch.full((len(taken), 1), 1 / len(taken), dtype=torch.float64, device=fitting.device)
    return Mixture(taken, values)


class Targets:
    """Each model's logits of its own samples: whole, or the largest `top_k` of every token."""

    def __init__(self, fitting: Fitting, total: int) -> None:
        self.device, top = fitting.device, fitting.parameter("top_k")
        lengths = [len(sample.tokens) for task in fitting.samples for sample in task]
        network = fitting.network
        self.logits = fitting.states(lengths, top or network.skeleton.vocabulary)
        self.places = [torch.empty(length, top, dtype=torch.int64) for length in lengths] if top else None
        first = 0
        for task, (weights, samples) in enumerate(zip(fitting.models, fitting.samples, strict=False)):
            states = fitting.states([len(sample.tokens) for sample in samples], network.skeleton.hidden_size)

            def tell(layer: int, before: int = task * network.layers) -> None:
                fitting.step(before + layer + 1, total, "layers")

            outside = run(network, weights, samples, states, tell)
            for number in range(len(samples)):
                with torch.no_grad():
                    features = network.skeleton.end(states[number].to(self.device), outside)
                    logits = network.logits(features, weights, outside)[0]
                    if self.places is not None:
                        # What the rest of the vocabulary has is told by the logits being normalised.
                        logits = torch.log_softmax(logits.double(), dim=-1)
                        logits, self.places[first + number] = (part.cpu() for part in logits.topk(top, dim=-1))
                self.logits[first + number] = logits.unsqueeze(0)
            first += len(samples)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor | None]:
        """A sample's logits (n, vocabulary) and None; or log-probabilities (n, top_k) and which tokens they are of."""
        places = None if self.places is None else self.places[number].to(self.device)
        return self.logits[number][0].to(self.device), places


def distance(kind: str, merged: Tensor, model: Tensor, places: Tensor | None = None) -> Tensor:
    """A loss of section 3.3.1 or 5.1, mean over tokens, of logits (n, vocabulary): KL(merged || model), the other way
    round, or the mean squared difference. With `places`, `model` has log-probabilities of some tokens: divergences
    count the rest of the vocabulary as one token, squares leave it out."""
    merged, model = merged.double(), model.double()
    if kind == "mse":
        if places is not None:
            merged = torch.log_softmax(merged, dim=-1).gather(-1, places)
        return (merged - model).square().mean()
    ours = torch.log_softmax(merged, dim=-1)
    theirs = model if places is not None else torch.log_softmax(model, dim=-1)
    if places is not None:
        ours, theirs = (_with_rest(part) for part in (ours.gather(-1, places), theirs))
    weights, gap = (ours, ours - theirs) if kind == "kl" else (theirs, theirs - ours)
    return (weights.exp() * gap).sum(dim=-1).mean()


def _with_rest(logs: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together."""
    least = torch.finfo(logs.dtype).eps
    rest = (1 - logs.exp().sum(dim=-1, keepdim=True)).clamp(min=least)
    return torch.cat([logs, rest.log()], dim=-1)


def regularisation(coefficients: Sequence[Tensor], *, cosine: float, l1: float, l2: float) -> Tensor:
    """Sections 3.3.2 and 3.3.3: the cosines of the models' coefficients of each layer, their sizes and squares."""
    total = torch.zeros((), dtype=torch.float64)
    for one in coefficients:
        if cosine:
            pairs = itertools.combinations(one, 2)
            total = total + cosine * sum(
                (torch.nn.functional.cosine_similarity(a, b, dim=0) for a, b in pairs), start=torch.zeros(())
            )
        if l1:
            total = total + l1 * one.abs().sum()
        if l2:
            total = total + l2 * one.square().sum()
    return total
