"""From a plan whose method is fitted on samples to coefficients of its tensors: what every fit needs, the registry.

A fit goes once, before the first tensor is written; its result is kept beside the output until that is published, so
that a merge that is resumed does not fit again.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from mergecore.engine import Fit
from mergecore.errors import Interrupted
from mergecore.features.passes import Network, States
from mergecore.features.samples import Sample, read_samples, tokenizer_in
from mergecore.features.weights import Reader, Stored, members, sources_of
from mergecore.methods.base import Coefficients
from mergecore.output.staging import reporting
from mergecore.planning import MergePlan
from mergecore.progress import Progress

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FITS = {method: f"mergecore.features.{method}" for method in ("slta", "dam", "adamerging")}
"""Method -> the module whose `fit` makes a Fit of a Fitting."""

Step = Callable[[int, int, str], None]
"""(done, of how many, of what): says how far a fit is. Raises Interrupted when it shall stop."""


@dataclass(frozen=True)
class Fitting:
    """What a fit has to work with: a network without weights, the members' weights, and samples of every model's task.

    Everything computes in `dtype` on `device`. `scratch` is a folder for what a fit keeps, over interruptions too.
    """

    plan: MergePlan
    network: Network
    base: Stored | None
    models: list[Stored]
    samples: list[list[Sample]]
    dtype: torch.dtype
    device: torch.device
    scratch: Path
    step: Step

    def states(self, lengths: Sequence[int], width: int) -> States:
        """Room for states of the samples: in memory, or in a scratch file if they are larger than run.memory."""
        nbytes = States.nbytes(sum(lengths), width, self.dtype)
        return States(lengths, width, self.dtype, self.scratch if nbytes > self.plan.spec.run.memory else None)

    def parameter(self, name: str) -> Any:
        """A parameter that is one for the whole model; it may be a tuple of one value per model."""
        job = next(job for job in self.plan.jobs if job.parameters is not None and name in job.parameters)
        assert job.parameters is not None
        return job.parameters[name]


def fitted(
    plan: MergePlan,
    scratch: Path,
    device: torch.device,
    progress: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Fit:
    """The coefficients of all tensors that `plan` merges. Raises what reading and running the models raises."""
    kept = _kept(scratch)
    if kept is not None:
        return kept
    last = ("", 0)

    def step(done: int, total: int, what: str) -> None:
        nonlocal last
        last = what, total
        if should_stop is not None and should_stop():
            raise Interrupted("stopped on request while it fitted; --resume continues")
        if progress is not None:
            progress(_progress(plan, done, total, what))

    with opened(plan, scratch, device, step) as fitting:
        fit: Fit = import_module(FITS[plan.method.name]).fit(fitting)
        seen = {
            "models": [member.model.name for member in plan.sections[0].members],
            "samples": [len(task) for task in fitting.samples],
            "tokens": [sum(len(sample.tokens) for sample in task) for task in fitting.samples],
        }
    missing = [job.name for job in plan.jobs if job.merges and job.name not in fit.coefficients]
    assert not missing, missing
    fit = replace(fit, report={**seen, **fit.report}, step=last[0], steps=last[1])
    _keep(scratch, fit)
    return fit


@contextmanager
def opened(plan: MergePlan, scratch: Path, device: torch.device, step: Step) -> Iterator[Fitting]:
    """A plan's models and samples, ready to be run."""
    dtype = DTYPES[plan.spec.calibration.dtype]
    with Reader(sources_of(plan), plan.spec.run.read) as reader:
        base, models = members(plan, reader, dtype, device)
        network = Network(plan.config or plan.reference.config, models[0].shapes, dtype, device)
        yield Fitting(plan, network, base, models, draw(plan), dtype, device, scratch, step)


def kept_bytes(plan: MergePlan) -> dict[str, int]:
    """What a fit keeps beside one layer's weights, at most, by what it is: in memory as far as run.memory allows."""
    found: dict[str, int] = import_module(FITS[plan.method.name]).kept_bytes(plan)
    return found


def held_bytes(plan: MergePlan) -> int:
    """Memory that a fit holds at most, beside the process itself: what it keeps, and a layer of every model."""
    budget = (len(plan.models) + 3) * plan.spec.run.memory  # beyond it states lie in files, each for itself
    kept = [nbytes if what.endswith("in memory") else min(nbytes, budget) for what, nbytes in kept_bytes(plan).items()]
    layers: Counter[float] = Counter()
    for job in plan.jobs:
        layers[job.place] += math.prod(job.shape)
    # The layer of each model and the base, as it is merged and its gradient or a copy on the way.
    copies = len(plan.models) + 3
    return sum(kept) + copies * max(layers.values(), default=0) * DTYPES[plan.spec.calibration.dtype].itemsize


def sample_tokens(plan: MergePlan) -> int:
    """Tokens of all samples, at most."""
    return len(plan.data) * plan.spec.calibration.samples * plan.spec.calibration.length


def hidden_bytes(plan: MergePlan, tokens: int) -> int:
    """What the hidden states of so many tokens take."""
    text = plan.config.get("text_config") or plan.config
    width = int(text.get("hidden_size") or text.get("n_embd") or 0)
    return States.nbytes(tokens, width, DTYPES[plan.spec.calibration.dtype])


def draw(plan: MergePlan) -> list[list[Sample]]:
    """The samples of each model's task, tokenised for the output."""
    how = plan.spec.calibration
    own = plan.vocabulary is None
    tokenizer = tokenizer_in(plan.reference.folder if own else None, plan.tokenizer)
    return [
        read_samples(
            path, tokenizer, count=how.samples, length=how.length, field=how.field, seed=plan.spec.seed * 1000 + number
        )
        for number, path in enumerate(plan.data)
    ]


def _progress(plan: MergePlan, done: int, total: int, what: str) -> Progress:
    return Progress(
        tensors_done=0,
        tensors_total=len(plan.jobs),
        bytes_read=0,
        bytes_read_total=plan.bytes_to_read,
        bytes_written=0,
        bytes_written_total=plan.bytes_to_write,
        seconds=0.0,
        step=what,
        steps_done=done,
        steps_total=total,
    )


_COEFFICIENTS, _REPORT = "coefficients.safetensors", "fit.json"


def _keep(scratch: Path, fit: Fit) -> None:
    """The report last: with it the fit is complete."""
    about = {name: [found.base, found.axis] for name, found in fit.coefficients.items()}
    report = {"report": fit.report, "step": fit.step, "steps": fit.steps, "coefficients": about}
    tensors = {name: found.values.clone() for name, found in fit.coefficients.items()}
    replace_file(scratch / _COEFFICIENTS, save(tensors))
    replace_file(scratch / _REPORT, json.dumps(report).encode())


def _kept(scratch: Path) -> Fit | None:
    with suppress(FileNotFoundError):
        report = json.loads((scratch / _REPORT).read_bytes())
        values = load_file(scratch / _COEFFICIENTS)
        coefficients = {
            name: Coefficients(values[name], base, axis) for name, (base, axis) in report["coefficients"].items()
        }
        return Fit(coefficients, report["report"], report["step"], report["steps"])
    return None


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file in the place of another one, durably and all at once. OutputError if that fails."""
    with reporting("write", path):
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
