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
from mergecore.features.fitting import DTYPES, Fitting, hidden_bytes, sample_tokens
from mergecore.features.learning import (
    BATCH,
    Mixed,
    Mixture,
    batch_bytes,
    entropy,
    leaf,
    learn,
    mean_over_tokens,
    schedule_of,
)
from mergecore.features.passes import States, run
from mergecore.features.weights import Stored
from mergecore.methods.base import Coefficients, per_model
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
        mixture = mixtures.get(job.name)
        if mixture is None:  # some models lack it
            coefficients[job.name] = Coefficients(per_model([1 / len(job.models)] * len(job.models)))
            continue
        values = torch.zeros(len(job.models), mixture.coefficients.shape[1], dtype=torch.float64)
        for number, stored in enumerate(fitting.models):
            for own, model_values in zip(mixture.models, mixture.coefficients.detach().cpu(), strict=True):
                if own is stored:  # a model may be listed twice, for two tasks
                    values[number] = model_values
        axis: Any = {Axis.TENSOR: None, Axis.ROWS: "rows", Axis.COLUMNS: "columns"}[mixture.axis]
        coefficients[job.name] = Coefficients(values, axis=axis)
    spread = {name: [found.mean().item(), found.std(correction=0).item()] for name, found in leaves.items()}
    return Fit(coefficients, {"loss": curve, "mean and deviation of the coefficients": spread})


def kept_bytes(plan: MergePlan) -> dict[str, int]:
    """The models' logits of all samples, and the hidden states of one model's samples or of a batch."""
    parameters = next(job.parameters for job in plan.jobs if job.parameters is not None)
    tokens = sample_tokens(plan)
    found = {BATCH: batch_bytes(plan)}
    if parameters["loss"] != "entropy" and parameters["epochs"]:
        text = plan.config.get("text_config") or plan.config
        vocabulary, dtype = int(text.get("vocab_size") or 0), DTYPES[plan.spec.calibration.dtype]
        top = parameters["top_k"] if parameters["top_k"] < vocabulary else 0
        found["logits"] = States.nbytes(tokens, top + 1 if top else vocabulary, dtype) + 8 * tokens * top
        found["hidden states"] = hidden_bytes(plan, tokens // len(plan.data))
    return found


def _mixtures(fitting: Fitting, count: int) -> tuple[dict[str, Mixture], dict[str, Tensor]]:
    """What every tensor is made of, and the coefficients among them that are learned: of tensors that are run."""
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
        if learned and name not in network.names:
            mixtures[name] = _average(fitting, fitting.models[:count])
            continue
        if not learned:
            mixtures[name] = _fixed(fitting)
            continue
        # An input feature of a linear layer is a stored column, or row; of an embedding and a vector, an entry.
        rows = is_linear(name, shape) and architecture.orientation(name, shape) == "rows"
        length = (
            shape[-2] if rows else torch.Size(shape[1:]).numel() if len(shape) in (2, 4) else shape[-1] if shape else 1
        )
        leaves[name] = leaf(count, length, 1 / count, fitting.device)
        mixtures[name] = Mixture(fitting.models[:count], leaves[name], Axis.ROWS if rows else Axis.COLUMNS)
    return mixtures, leaves


def _fixed(fitting: Fitting) -> Mixture:
    """The base's tensor; without a base, the models' average."""
    section = fitting.plan.sections[0]
    if section.part.base_model is None:
        return _average(fitting, fitting.models)
    based = [member.model is section.reference for member in section.members]  # listed, or else the last
    return _average(fitting, [fitting.models[based.index(True)]])


def _average(fitting: Fitting, models: Sequence[Stored]) -> Mixture:
    values = torch.full((len(models), 1), 1 / len(models), dtype=torch.float64, device=fitting.device)
    return Mixture(models, values)


class Targets:
    """Each model's logits of its own samples: whole, or the largest `top_k` of every token and the rest's."""

    def __init__(self, fitting: Fitting, total: int) -> None:
        vocabulary, top = fitting.network.skeleton.vocabulary, fitting.parameter("top_k")
        self.device, top = fitting.device, top if top < vocabulary else 0
        lengths = [len(sample.tokens) for task in fitting.samples for sample in task]
        network = fitting.network
        self.logits = fitting.states(lengths, top + 1 if top else vocabulary)
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
                        places = logits.topk(top, dim=-1).indices
                        logits, self.places[first + number] = with_rest(logits.double(), places), places
                self.logits[first + number] = logits.unsqueeze(0)
            first += len(samples)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        """A sample's logits (n, vocabulary); or those of `with_rest` (n, top_k + 1) and which tokens they are of."""
        places = () if self.places is None else (self.places[number].to(self.device),)
        return self.logits[number][0].to(self.device), *places


def distance(kind: str, merged: Tensor, model: Tensor, *places: Tensor) -> Tensor:
    """A loss of section 3.3.1 or 5.1, mean over tokens, of logits (n, vocabulary): KL(merged || model), the other way
    round, or the mean squared difference. With `places` the model's are those of `with_rest`; squares leave the rest
    out."""

    def of_tokens(merged: Tensor, model: Tensor, *places: Tensor) -> Tensor:
        merged, model = merged.double(), model.double()
        if places:
            merged = with_rest(merged, *places)
        if kind == "mse":
            known = places[0].shape[-1] if places else model.shape[-1]
            return (merged - model)[:, :known].square().mean(dim=-1)
        ours, theirs = torch.log_softmax(merged, dim=-1), torch.log_softmax(model, dim=-1)
        weights, gap = (ours, ours - theirs) if kind == "kl" else (theirs, theirs - ours)
        return (weights.exp() * gap).sum(dim=-1)

    return mean_over_tokens(of_tokens, merged, model, *places)


def with_rest(logits: Tensor, places: Tensor) -> Tensor:
    """(n, k + 1): of logits (n, vocabulary) those of the tokens at `places`, int64 (n, k), k < vocabulary, and last the
    logit of all others as one token."""
    others = logits.scatter(-1, places, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logits.gather(-1, places), others], dim=-1)


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
