"""Slices and modules: output layers from layers of models, with their own parameters, base and place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecore
from mergecore.errors import CheckpointError, SpecError
from mergecore.spec import parse_spec
from tests.models import LLAMA, llama, load_tensors, moved, write_model

LAYERS = 4
CONFIG = LLAMA | {"num_hidden_layers": LAYERS, "layer_types": ["a", "b", "c", "d"], "hidden_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = llama(layers=LAYERS, hidden=8, vocabulary=12)
    for name, tensors in {"base": base, "near": moved(base, 3e-4, 2), "far": moved(base, 4e-3, 3)}.items():
        write_model(folder / name, tensors, CONFIG)
    return folder


def merged(folder: Path, text: str, out: Path) -> dict[str, Tensor]:
    file = folder / "slices.yaml"
    file.write_text(text)
    mergecore.merge(file, out, device="cpu")
    return load_tensors(out)


def config_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())
    return found


def layer(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    start = f"model.layers.{number}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FRANKEN = """
merge_method: passthrough
slices:
  - sources: [{model: near, layer_range: [0, 3]}]
  - sources: [{model: far, layer_range: [1, 4]}]
"""


def test_a_frankenmerge_stacks_layers_of_models(folder: Path, tmp_path: Path) -> None:
    near, far = load_tensors(folder / "near"), load_tensors(folder / "far")
    out = merged(folder, FRANKEN, tmp_path / "out")
    for number, (model, source) in enumerate([(near, 0), (near, 1), (near, 2), (far, 1), (far, 2), (far, 3)]):
        assert equal(layer(out, number), layer(model, source))
    assert layer(out, 6) == {}
    assert torch.equal(out["model.embed_tokens.weight"], near["model.embed_tokens.weight"])
    for last in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(out[last], far[last])
    config = config_of(tmp_path / "out")
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["a", "b", "c", "b", "c", "d"]


def test_passthrough_scales_what_a_filter_names(folder: Path, tmp_path: Path) -> None:
    text = FRANKEN + "parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}\n"
    out = merged(folder, text, tmp_path / "out")
    assert not out["model.layers.5.self_attn.o_proj.weight"].any()
    assert torch.equal(out["model.norm.weight"], load_tensors(folder / "far")["model.norm.weight"])


def test_layers_of_a_slice_are_merged_with_its_own_parameters_from_its_own_place(folder: Path, tmp_path: Path) -> None:
    """The gradient runs over the slice, and the base gives the layers that it lists."""
    text = """
merge_method: task_arithmetic
base_model: base
dtype: float32
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: near, layer_range: [2, 4], parameters: {weight: [0, 1]}}
  - sources:
      - {model: base, layer_range: [1, 4]}
      - {model: far, layer_range: [0, 3]}
    parameters: {weight: 0.5}
parameters: {weight: 1}
"""
    base, near, far = (load_tensors(folder / name) for name in ("base", "near", "far"))
    out = merged(folder, text, tmp_path / "out")
    rest = "mlp.up_proj.weight"
    for number, (weight, model, source, own) in enumerate(
        [(0, near, 2, 0), (1, near, 3, 1), (0.5, far, 0, 1), (0.5, far, 1, 2), (0.5, far, 2, 3)]
    ):
        before, after = layer(base, own)[rest].double(), layer(model, source)[rest].double()
        assert torch.equal(layer(out, number)[rest], (before + weight * (after - before)).float())
    embedding = "model.embed_tokens.weight"  # of the first slice, at its first layer's place
    assert torch.equal(out[embedding], base[embedding].float())


def test_one_slice_of_all_layers_is_the_same_as_whole_models(folder: Path, tmp_path: Path) -> None:
    common = "merge_method: slerp\nbase_model: base\nparameters: {t: [0, 0.3, 1]}\n"
    sources = ", ".join(f"{{model: {name}, layer_range: [0, {LAYERS}]}}" for name in ("base", "far"))
    sliced = merged(folder, common + f"slices: [{{sources: [{sources}]}}]\n", tmp_path / "sliced")
    assert equal(sliced, merged(folder, common + "models: [{model: base}, {model: far}]\n", tmp_path / "whole"))


def test_a_slice_may_merge_layers_of_one_model(folder: Path, tmp_path: Path) -> None:
    sources = "{model: near, layer_range: [0, 1]}, {model: near, layer_range: [3, 4]}"
    text = f"merge_method: linear\ndtype: float32\nslices: [{{sources: [{sources}]}}]\n"
    near, out = load_tensors(folder / "near"), merged(folder, text, tmp_path / "out")
    name = "mlp.up_proj.weight"
    mean = (layer(near, 0)[name].double() + layer(near, 3)[name].double()) / 2
    assert torch.equal(layer(out, 0)[name], mean.float())
    assert torch.equal(out["model.norm.weight"], near["model.norm.weight"].float())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "merge_method: passthrough\nslices: [{sources: [{model: near, layer_range: [2, 5]}]}]\n",
            CheckpointError,
            "slices.yaml:2: slices[0].sources[0].model: {folder}/near has no layer 4: it has 4, counted from 0",
        ),
        (
            "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"
            "slices: [{sources: [{model: near, layer_range: [0, 2]}, {model: far, layer_range: [0, 2]}]}]\n",
            SpecError,
            "slices.yaml:4: slices[0]: the base base must be among the sources, with the layers that it gives",
        ),
        (
            "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"
            "slices: [{sources: [{model: base, layer_range: [0, 2]}]}]\n",
            SpecError,
            "slices.yaml:4: slices[0]: every model listed is the base itself: there is nothing to merge",
        ),
        (
            "merge_method: linear\nslices:\n- sources: [{model: near, layer_range: [0, 2], parameters: {wieght: 1}}]\n",
            SpecError,
            "slices.yaml:3: slices[0].sources[0].parameters.wieght: linear has no such parameter; "
            "did you mean 'weight'?",
        ),
        (
            "merge_method: linear\nslices:\n- sources: [{model: near, layer_range: [0, 2], parameters: {weight: x}}]\n",
            SpecError,
            "slices.yaml:3: slices[0].sources[0].parameters.weight: found 'x', expected a number",
        ),
        (
            "merge_method: linear\nmodules: {encoder: {models: [{model: near}]}}\n",
            SpecError,
            "slices.yaml:2: modules.encoder: {folder}/near has no tensors below 'encoder'; it has lm_head, model",
        ),
    ],
)
def test_slices_that_do_not_fit_are_told(folder: Path, text: str, error: type[Exception], message: str) -> None:
    spec = parse_spec(text, "slices.yaml", path=folder / "slices.yaml")
    with pytest.raises(error) as caught:
        mergecore.plan(spec)
    assert str(caught.value) == message.format(folder=folder)


# Several stacks of layers


def vision(layers: int = 2) -> dict[str, Tensor]:
    """A small model with a tower for images beside its language model."""
    random = torch.Generator().manual_seed(7)
    found = {
        f"vision_tower.encoder.layers.{i}.fc.weight": torch.randn(4, 6, generator=random).bfloat16() for i in range(2)
    }
    found["multi_modal_projector.linear.weight"] = torch.randn(8, 4, generator=random).bfloat16()
    return found | {f"language_model.{name}": tensor for name, tensor in llama(layers, 8, 12).items()}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    config = {
        "model_type": "seeing",
        "text_config": {"num_hidden_layers": 2},
        "vision_config": {"num_hidden_layers": 2},
    }
    write_model(folder / "base", vision(), config)
    write_model(folder / "near", moved(vision(), 3e-4, 2), config)
    text = {name: tensor for name, tensor in vision().items() if name.startswith("language_model.")}
    write_model(folder / "chat", {k.removeprefix("language_model."): v for k, v in moved(text, 1e-3, 4).items()}, LLAMA)
    return folder


def test_modules_are_merged_in_their_own_ways(seeing: Path, tmp_path: Path) -> None:
    text = """
merge_method: linear
dtype: float32
modules:
  text_decoder:
    slices:
      - sources: [{model: near, layer_range: [0, 2]}]
      - sources: [{model: base, layer_range: [1, 2]}]
  vision_tower: {models: [{model: base}, {model: near}], parameters: {weight: 0.5}}
  multi_modal_projector: {models: [{model: base}]}
"""
    base, near = load_tensors(seeing / "base"), load_tensors(seeing / "near")
    out = merged(seeing, text, tmp_path / "out")
    name = "vision_tower.encoder.layers.1.fc.weight"
    assert torch.equal(out[name], ((base[name].double() + near[name].double()) / 2).float())
    name = "mlp.up_proj.weight"
    for number, (model, source) in enumerate([(near, 0), (near, 1), (base, 1)]):
        start = "language_model.model.layers"
        assert torch.equal(out[f"{start}.{number}.{name}"], model[f"{start}.{source}.{name}"].float())
    name = "multi_modal_projector.linear.weight"
    assert torch.equal(out[name], base[name].float())
    config = config_of(tmp_path / "out")
    assert (config["text_config"]["num_hidden_layers"], config["vision_config"]["num_hidden_layers"]) == (3, 2)


def test_an_encoder_and_a_decoder_count_their_own_layers(tmp_path: Path) -> None:
    tensors = {f"{stack}.block.{i}.wi.weight": torch.ones(4, 6) * i for stack in ("encoder", "decoder") for i in (0, 1)}
    write_model(tmp_path / "base", tensors, {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 2})
    text = """
merge_method: passthrough
modules:
  encoder: {models: [{model: base}]}
  decoder: {slices: [{sources: [{model: base, layer_range: [0, 2]}]}, {sources: [{model: base, layer_range: [1, 2]}]}]}
"""
    out = merged(tmp_path, text, tmp_path / "out")
    assert [float(out[f"decoder.block.{i}.wi.weight"].max()) for i in range(3)] == [0, 1, 1]
    config = config_of(tmp_path / "out")
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 3)


def test_slices_of_a_model_with_several_stacks_need_modules(seeing: Path) -> None:
    text = "merge_method: passthrough\nslices: [{sources: [{model: near, layer_range: [0, 2]}]}]\n"
    with pytest.raises(SpecError, match=r"has 2 stacks of layers .*; slices need one: describe each .* 'modules'"):
        mergecore.plan(parse_spec(text, path=seeing / "slices.yaml"))


@pytest.mark.parametrize("method", ["task_arithmetic", "widen", "slerp", "linear", "karcher", "ties"])
def test_a_text_model_merges_with_the_text_part_of_a_larger_one(method: str, seeing: Path, tmp_path: Path) -> None:
    """The tower stays the larger model's, and a warning says so."""
    text = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: chat}}]\nparameters: {{T}}\n"
    given = {"slerp": "t: 1.0", "linear": "weight: 1.0", "ties": "density: 0.5"}.get(method, "")
    file = seeing / "text.yaml"
    file.write_text(text.replace("{T}", "{" + given + "}"))
    result = mergecore.merge(file, tmp_path / "out", device="cpu")
    base, chat, out = load_tensors(seeing / "base"), load_tensors(seeing / "chat"), load_tensors(tmp_path / "out")
    assert out.keys() == base.keys()
    for name in base:
        if not name.startswith("language_model."):
            assert torch.equal(out[name], base[name]), name
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(out[f"language_model.{name}"], base[f"language_model.{name}"])
    if method == "slerp":
        assert torch.equal(out[f"language_model.{name}"], chat[name])
    (warning,) = [warning for warning in result.warnings if "lacks" in warning]
    assert "chat lacks 3 tensors, taken from the models that have them: multi_modal_projector." in warning


def test_a_text_base_lends_its_layers_to_a_larger_model(seeing: Path, tmp_path: Path) -> None:
    text = "merge_method: task_arithmetic\nbase_model: chat\nmodels: [{model: near}]\n"
    near, out = load_tensors(seeing / "near"), merged(seeing, text, tmp_path / "out")
    assert equal(out, near)
    assert config_of(tmp_path / "out")["model_type"] == "seeing"


def test_a_tower_that_the_base_lacks_cannot_be_merged_from_several_models(seeing: Path) -> None:
    text = "merge_method: task_arithmetic\nbase_model: chat\nmodels: [{model: near}, {model: base}]\n"
    with pytest.raises(CheckpointError, match=r"chat lacks multi_modal_.*, which 2 models have: there is no base"):
        mergecore.plan(parse_spec(text, path=seeing / "slices.yaml"))
