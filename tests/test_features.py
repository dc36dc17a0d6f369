"""Streamed passes: layer by layer they give what transformers gives with the whole model, forwards and backwards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergecore.errors import CheckpointError, InputFault, OutputError
from mergecore.features import passes
from mergecore.features.backward import value_and_gradient
from mergecore.features.passes import Network, States, Tensors, run
from mergecore.features.perplexity import bits_per_byte, of_model
from mergecore.features.samples import Sample, read_samples, tokenizer_in
from mergecore.features.skeleton import Skeleton
from mergecore.features.weights import Combined, Reader, Stored
from mergecore.inputs import Inputs
from tests.running import CAUSAL, checkpoints, ids, logits_of, texts, twin

CPU = torch.device("cpu")


@pytest.fixture
def reader() -> Iterator[Any]:
    """Opens models' weights; closes what it opened."""
    opened: list[Reader] = []

    def open_weights(folder: Path, dtype: torch.dtype) -> tuple[Stored, dict[str, Any]]:
        model = Inputs(lambda path, revision: Path(path), Path()).open(str(folder))
        opened.append(Reader(list(model.tensors.values()), "map"))
        return of_model(model, opened[-1], dtype, CPU), model.config

    yield open_weights
    for each in opened:
        each.__exit__()


def streamed(network: Network, weights: Any, tokens: list[Tensor]) -> list[Tensor]:
    samples = [Sample(each, 0) for each in tokens]
    states = States([len(each) for each in tokens], network.skeleton.hidden_size, weights.dtype)
    outside = run(network, weights, samples, states)
    with torch.no_grad():
        ends = [network.skeleton.end(states[i], outside) for i in range(len(tokens))]
        return [network.logits(end, weights, outside) for end in ends]


@pytest.mark.parametrize("kind", CAUSAL)
def test_streamed_logits_are_those_of_the_whole_model(
    kind: str, tmp_path: Path, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "HEAD_BYTES", 5000)  # several windows of the head
    (folder,) = checkpoints(tmp_path, kind, 1)
    weights, config = reader(folder, torch.float64)
    tokens = ids(9, 4, 9)
    found = streamed(Network(config, weights.shapes, torch.float64), weights, tokens)
    for ours, theirs in zip(found, logits_of(twin(folder, kind), tokens), strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=2e-6 if kind == "gemma3" else 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_other_dtypes_differ_by_their_rounding(
    dtype: torch.dtype, tolerance: float, tmp_path: Path, reader: Any
) -> None:
    (folder,) = checkpoints(tmp_path, "qwen2", 1)
    weights, config = reader(folder, dtype)
    found = streamed(Network(config, weights.shapes, dtype), weights, ids(12))
    (expected,) = logits_of(twin(folder, "qwen2"), ids(12))
    assert 0 < (found[0].double() - expected).abs().max() < tolerance


class Leaves:
    """Every stored tensor a leaf, made anew each time it is asked for."""

    def __init__(self, network: Network, tensors: Tensors) -> None:
        self.network, self.tensors = network, tensors

    def stored(self, group: int) -> Tensors:
        return {name: self.tensors[name] * 1.0 for name in self.network.groups[group]}

    def embedding_rows(self, numbers: Tensor) -> Tensor:
        return self.tensors[self.network.embedding][numbers]

    def head_windows(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, 257, 100):
            yield first, (self.tensors[self.network.head] * 1.0)[first : first + 100]

    def head_bias(self) -> Tensor | None:
        return None if self.network.head_bias is None else self.tensors[self.network.head_bias] * 1.0


@pytest.mark.parametrize("kind", CAUSAL)
def test_streamed_gradients_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    (folder,) = checkpoints(tmp_path, kind, 1)
    stored = load_file(folder / "model.safetensors")
    tensors = {name: tensor.double().requires_grad_() for name, tensor in stored.items()}
    config = json.loads((folder / "config.json").read_text())
    network = Network(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, torch.float64)
    batch = ids(9, 5)

    def loss(number: int, logits: Tensor) -> Tensor:
        return cross_entropy(logits[0, :-1], batch[number][1:])

    found = value_and_gradient(network, Leaves(network, tensors), batch, loss)
    whole = twin(folder, kind).requires_grad_(True)
    losses = [loss(number, whole(tokens.unsqueeze(0)).logits) for number, tokens in enumerate(batch)]
    sum(losses).backward()  # type: ignore[union-attr]
    assert found == pytest.approx([float(one.detach()) for one in losses], abs=1e-6)
    for parameter in whole.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    whole.save_pretrained(tmp_path / "gradients")
    expected = load_file(tmp_path / "gradients" / "model.safetensors")
    assert set(expected) == set(tensors)
    for name, gradient in expected.items():
        ours = tensors[name].grad
        ours = torch.zeros_like(gradient) if ours is None else ours
        torch.testing.assert_close(ours.double(), gradient.double(), rtol=1e-5, atol=1e-9, msg=name)


def test_combined_weights_are_base_plus_weighted_deltas(tmp_path: Path, reader: Any) -> None:
    first, *others = [reader(folder, torch.float64)[0] for folder in checkpoints(tmp_path, "llama", 3)]
    combined = Combined(first, others, lambda name: (0.5, 0.0) if "mlp" in name else (0.25, 2.0))
    for name in first.shapes:
        base, one, two = (each.rows(name, 1, 3) for each in (first, *others))
        expected = base + 0.5 * (one - base) if "mlp" in name else base + 0.25 * (one - base) + 2 * (two - base)
        torch.testing.assert_close(combined.rows(name, 1, 3), expected, rtol=1e-14, atol=0)


def test_states_in_a_scratch_file_are_the_same(tmp_path: Path) -> None:
    lengths = [3, 1, 5]
    stores = [States(lengths, 4, torch.float32, scratch) for scratch in (None, tmp_path)]
    for store in stores:
        for i, length in enumerate(lengths):
            store[i] = torch.full((1, length, 4), float(i))
    assert all(torch.equal(stores[0][i], stores[1][i]) and len(stores[0][i][0]) == n for i, n in enumerate(lengths))
    assert list(tmp_path.iterdir()) == []  # its space goes back to the disk, whatever happens


def test_states_that_do_not_fit_the_disk_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot make room in"):
        States([1 << 30] * 64, 1 << 14, torch.float64, tmp_path)


def test_bits_per_byte_is_the_cross_entropy_of_the_text(tmp_path: Path) -> None:
    (folder,) = checkpoints(tmp_path, "qwen2, tied", 1)
    plain, records = texts(tmp_path)
    found = bits_per_byte(folder, [plain, records], samples=5, length=40, dtype=torch.float64)
    tokenizer, model = tokenizer_in(folder, {}), twin(folder, "qwen2")
    for seed, (path, bits) in enumerate(zip([plain, records], found, strict=True)):
        nats = nbytes = 0.0
        for sample in read_samples(path, tokenizer, count=5, length=40, seed=seed):
            loss = cross_entropy(logits_of(model, [sample.tokens])[0][0, :-1], sample.tokens[1:], reduction="sum")
            nats, nbytes = nats + float(loss), nbytes + len(sample.tokens) - 1  # one byte, one token
        assert bits == pytest.approx(nats / math.log(2) / nbytes, rel=1e-6)


def test_a_model_that_transformers_does_not_have_is_named() -> None:
    with pytest.raises(CheckpointError, match="no model of type 'mystery'"):
        Skeleton({"model_type": "mystery"})
    with pytest.raises(CheckpointError, match="no causal language model of type 'clip'"):
        Skeleton({"model_type": "clip"})


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    (folder,) = checkpoints(tmp_path, "llama", 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')\n")
    config["auto_map"] = {"AutoModelForCausalLM": f"{folder}--modeling_evil.Evil"}
    assert type(Skeleton(config).model).__name__ == "LlamaForCausalLM"


def test_tensors_that_a_layer_lacks_or_that_do_not_fit_are_named(tmp_path: Path, reader: Any) -> None:
    (folder,) = checkpoints(tmp_path, "llama", 1)
    weights, config = reader(folder, torch.float32)
    shapes = dict(weights.shapes)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layer 1 of LlamaForCausalLM lacks mlp\.up_proj\.weight"):
        Network(config, shapes).layer(weights, 1)
    with pytest.raises(CheckpointError, match="expected"):
        Network(config | {"intermediate_size": 25}, weights.shapes).layer(weights, 0)
    with pytest.raises(CheckpointError, match="has no list of"):
        Network({"model_type": "mamba", "num_hidden_layers": 0}, weights.shapes)


def test_a_file_that_shrinks_is_an_input_fault(tmp_path: Path, reader: Any) -> None:
    (folder,) = checkpoints(tmp_path, "llama", 1)
    weights, config = reader(folder, torch.float32)
    network = Network(config, weights.shapes)
    network.layer(weights, 0)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(InputFault, match=r"model\.safetensors"):
        network.layer(weights, 1)
