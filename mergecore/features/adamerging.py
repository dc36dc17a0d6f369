"""AdaMerging: coefficients of the models' deltas, of the whole model or of each layer, by least entropy of predictions.

Yang et al. 2024, "AdaMerging: adaptive model merging for multi-task learning": theta = theta_0 + sum_n lambda_n^l tau_n
on unlabelled samples of all tasks.
"""

from __future__ import annotations

from torch import Tensor

from mergecore.engine import Fit
from mergecore.features.fitting import Fitting
from mergecore.features.learning import BATCH, Mixed, Mixture, batch_bytes, entropy, leaf, learn, schedule_of
from mergecore.features.skeleton import OUTSIDE
from mergecore.methods.base import Coefficients, per_model
from mergecore.planning import MergePlan


def fit(fitting: Fitting) -> Fit:
    """The coefficients of all tensors; steps are those of the optimisation."""
    level, count = fitting.parameter("level"), len(fitting.models)
    names = [name for name in fitting.models[0].shapes if level == "task" or name in fitting.network.names]
    groups = {name: _group(fitting, name, level) for name in names}
    start = fitting.parameter("start")
    leaves = {group: leaf(count, 1, start, fitting.device) for group in dict.fromkeys(groups.values())}
    mixtures = {name: Mixture(fitting.models, leaves[group], base=fitting.base) for name, group in groups.items()}
    samples = [sample for task in fitting.samples for sample in task]

    def loss(number: int, logits: Tensor) -> Tensor:
        return entropy(logits)

    curve = learn(
        Mixed(fitting.network, mixtures, fitting.dtype),
        leaves,
        samples,
        loss,
        schedule_of(fitting),
        fitting.scratch,
        fitting.step,
    )
    learned = {group: found.detach().cpu() for group, found in leaves.items()}
    coefficients = {name: Coefficients(learned[group].clone()) for name, group in groups.items()}
    return Fit(
        {**_rest(fitting, coefficients, start), **coefficients},
        {"level": level, "loss": curve, "lambda": {name: found.flatten().tolist() for name, found in learned.items()}},
    )


def kept_bytes(plan: MergePlan) -> dict[str, int]:
    """Hidden states of one batch only."""
    return {BATCH: batch_bytes(plan)}


def _group(fitting: Fitting, name: str, level: str) -> str:
    """Which coefficients a tensor shares."""
    if level != "layer":
        return "model" if level == "task" else name
    network = fitting.network
    if name == network.embedding:
        return "embedding"
    if name in (network.head, network.head_bias):
        return "head"
    number = next(number for number, names in network.groups.items() if name in names)
    return "outside" if number == OUTSIDE else f"layers.{number}"


def _rest(fitting: Fitting, known: dict[str, Coefficients], value: float) -> dict[str, Coefficients]:
    """Tensors that are merged but that the model does not run, or that some models lack: they stay where the
    optimisation began."""
    return {
        job.name: Coefficients(per_model([value] * len(job.models)))
        for job in fitting.plan.jobs
        if job.merges and job.name not in known
    }
