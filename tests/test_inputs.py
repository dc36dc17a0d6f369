"""Models as specs name them, merged: adapters while streaming, names of the local hub cache, revisions, identity."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mergecore
from mergecore.errors import CheckpointError, InputFault
from tests.models import LLAMA, llama, load_tensors, moved, spec_dict, tensor_bytes, write_model
from tests.test_references import hub_cache

RANK, ALPHA = 3, 6
TARGET = "model.layers.{}.mlp.up_proj"


def write_adapter(folder: Path, seed: int = 5, hidden: int = 16) -> Path:
    """A LoRA adapter on one projection of both layers."""
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        module = f"base_model.model.{TARGET.format(layer)}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, hidden, generator=random)
        tensors[f"{module}.lora_B.weight"] = torch.randn(2 * hidden, RANK, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = llama(2, 16, 40)
    for seed, name in enumerate(("base", "near", "far")):
        write_model(tmp_path / name, moved(base, 1e-3 * seed, seed), LLAMA)
    write_adapter(tmp_path / "lora")
    return tmp_path


def applied(folder: Path, model: str) -> dict[str, torch.Tensor]:
    """The model with the adapter merged in, in float64."""
    tensors = {name: tensor.double() for name, tensor in load_tensors(folder / model).items()}
    lora = load_tensors(folder / "lora")
    for layer in range(2):
        module = f"base_model.model.{TARGET.format(layer)}"
        update = lora[f"{module}.lora_B.weight"].double() @ lora[f"{module}.lora_A.weight"].double()
        tensors[TARGET.format(layer) + ".weight"] += ALPHA / RANK * update
    return tensors


@pytest.mark.parametrize("method", ["widen", "task_arithmetic", "ties", "model_stock"])
@pytest.mark.parametrize("read", ["map", "pread"])
def test_a_model_with_an_adapter_merges_like_the_model_it_makes(
    method: str, read: str, folder: Path, tmp_path: Path
) -> None:
    write_model(folder / "made", applied(folder, "near"), LLAMA)  # stored in float64: nothing is lost
    run = {"read": read, "memory": "64MiB"}
    for name, model in (("streamed", f"{folder}/near+{folder}/lora"), ("stored", str(folder / "made"))):
        spec = spec_dict(method, folder / "base", Path(model), folder / "far", dtype="float32", run=run)
        mergecore.merge(mergecore.load_spec(spec), tmp_path / name, device="cpu")
    streamed, stored = load_tensors(tmp_path / "streamed"), load_tensors(tmp_path / "stored")
    for name, tensor in stored.items():
        assert torch.allclose(streamed[name], tensor, rtol=2**-22, atol=1e-9), name


def test_an_adapter_gives_the_dtype_of_its_model(folder: Path, tmp_path: Path) -> None:
    spec = spec_dict("passthrough", None, Path(f"{folder}/near+{folder}/lora"))
    mergecore.merge(mergecore.load_spec(spec), tmp_path / "out", device="cpu")
    expected = applied(folder, "near")
    for name, tensor in load_tensors(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_a_base_with_an_adapter_is_another_model_than_the_base(folder: Path, tmp_path: Path) -> None:
    spec = spec_dict("task_arithmetic", folder / "base", Path(f"{folder}/base+{folder}/lora"), dtype="float32")
    mergecore.merge(mergecore.load_spec(spec), tmp_path / "out", device="cpu")
    expected = applied(folder, "base")
    for name, tensor in load_tensors(tmp_path / "out").items():
        assert torch.allclose(tensor.double(), expected[name], rtol=2**-23, atol=0), name


def test_the_adapter_is_part_of_the_merge_s_identity(folder: Path) -> None:
    def identity() -> str:
        spec = spec_dict("linear", None, Path(f"{folder}/near+{folder}/lora"), folder / "far")
        return mergecore.plan(mergecore.load_spec(spec)).identity()

    first = identity()
    assert identity() == first
    weights = folder / "lora" / "adapter_model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert identity() != first


def test_an_adapter_that_changes_while_it_is_read_is_told(folder: Path, tmp_path: Path) -> None:
    weights = folder / "lora" / "adapter_model.safetensors"
    spec = spec_dict("linear", None, Path(f"{folder}/near+{folder}/lora"), folder / "far")
    with pytest.raises(InputFault, match=r"adapter_model\.safetensors.* modified"):
        mergecore.merge(
            mergecore.load_spec(spec), tmp_path / "out", device="cpu", progress=lambda now: os.utime(weights)
        )
    assert not (tmp_path / "out").exists()


def test_models_are_found_in_the_local_hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name in ("near", "far"):
        write_model(hub_cache(cache, f"organisation/{name}"), load_tensors(folder / name), LLAMA)
    out = {}
    for place, names in (("cache", ["organisation/near", "organisation/far@main"]), ("folder", ["near", "far"])):
        text = json.dumps({"merge_method": "linear", "models": [{"model": name} for name in names]})
        (folder / "spec.json").write_text(text)
        mergecore.merge(folder / "spec.json", tmp_path / place, device="cpu")
        out[place] = tensor_bytes(tmp_path / place)
    assert out["cache"] == out["folder"]
    spec: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "organisation/near@older"}]}
    with pytest.raises(CheckpointError, match=r"models\[0\].model: organisation/near does not exist .*revision older"):
        mergecore.plan(mergecore.load_spec(spec))
