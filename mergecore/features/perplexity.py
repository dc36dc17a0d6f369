"""Bits per byte of texts under a model: cross-entropy that compares models with different tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from mergecore.features.passes import Network, States, run
from mergecore.features.samples import Sample, read_samples, tokenizer_in
from mergecore.features.weights import Reader, Stored, Weights
from mergecore.inputs import Input, Inputs
from mergecore.references import local_folder


def bits_per_byte(
    folder: Path,
    texts: Sequence[Path],
    *,
    samples: int = 30,
    length: int = 512,
    field: str = "text",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[], None] = lambda: None,
) -> list[float]:
    """Of each file of texts, bits per byte under the model in `folder`, which is streamed layer by layer.

    The first token of a sample is given, the others are predicted. `tick` is called again and again and may raise
    Interrupted. CheckpointError, SpecError, InputFault.
    """
    model = Inputs(lambda path, revision: local_folder(path, revision), Path()).open(str(folder))
    tokenizer = tokenizer_in(model.folder, {})
    drawn = [
        read_samples(path, tokenizer, count=samples, length=length, field=field, seed=seed + n)
        for n, path in enumerate(texts)
    ]
    together = [sample for each in drawn for sample in each]
    with Reader(list(model.tensors.values()), "map") as reader:
        weights = of_model(model, reader, dtype, torch.device("cpu"))
        nats = iter(negative_log_likelihoods(Network(model.config, weights.shapes, dtype), weights, together, tick))
    return [
        math.fsum(next(nats) for _ in each) / math.log(2) / max(1, sum(sample.nbytes for sample in each))
        for each in drawn
    ]


def of_model(model: Input, reader: Reader, dtype: torch.dtype, device: torch.device) -> Stored:
    """A single model's tensors."""
    shapes = {name: source.shape for name, source in model.tensors.items()}
    return Stored(reader, dict(model.tensors), shapes, dtype, device)


def negative_log_likelihoods(
    network: Network, weights: Weights, samples: Sequence[Sample], tick: Callable[[], None] = lambda: None
) -> list[float]:
    """Of each sample, -log p of its tokens after the first, in nats."""
    lengths = [len(sample.tokens) for sample in samples]
    states = States(lengths, network.skeleton.hidden_size, weights.dtype)
    outside = run(network, weights, samples, states, tick=tick)
    found = []
    with torch.no_grad():
        for number, sample in enumerate(samples):
            tick()
            features = network.skeleton.end(states[number].to(weights.device), outside)
            logits = network.logits(features, weights, outside)[0, :-1].double()
            found.append(float(cross_entropy(logits, sample.tokens[1:].to(weights.device), reduction="sum")))
    return found
