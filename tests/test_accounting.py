"""The manifest says of every tensor of every input what became of it, and the numbers add up."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mergecore
from mergecore.accounting import Account
from mergecore.planning import MergePlan, plan
from mergecore.spec import parse_spec
from tests.models import LLAMA, llama, moved, spec_dict, write_model

BASE = llama(layers=3, hidden=8, vocabulary=12)
PARAMETERS = sum(tensor.numel() for tensor in BASE.values())
UP = "model.layers.0.mlp.up_proj.weight"


def planned(spec: dict[str, Any]) -> MergePlan:
    return plan(parse_spec(json.dumps(spec)))


def accounts(spec: dict[str, Any]) -> dict[str, Account]:
    """By the model's name; every stored tensor is listed once, whatever becomes of it."""
    found = planned(spec).accounts
    for account in found:
        listed = [name for names in account.kinds.values() for name in names]
        assert sorted(listed) == sorted(account.shapes)
    return {account.model.path.name: account for account in found}


def numbers(account: Account) -> dict[str, int]:
    return {kind: len(names) for kind, names in account.kinds.items()}


def write(folder: Path, name: str, tensors: dict[str, Tensor], **config: Any) -> Path:
    return write_model(folder / name, tensors, LLAMA | config)


def test_an_ordinary_merge_merges_everything(tmp_path: Path) -> None:
    base, near = write(tmp_path, "base", BASE), write(tmp_path, "near", moved(BASE, 1e-3, 2))
    found = accounts(spec_dict("task_arithmetic", base, near))
    assert numbers(found["base"]) == numbers(found["near"]) == {"merged": len(BASE)}


def test_the_manifest_has_tensors_and_parameters_of_every_input_and_of_the_output(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    base = write(tmp_path, "base", BASE | constant)
    near = write(tmp_path, "near", moved(BASE, 1e-3, 2) | {bias: torch.ones(8).bfloat16()} | constant)
    mergecore.merge(parse_spec(json.dumps(spec_dict("task_arithmetic", base, near))), tmp_path / "out", device="cpu")
    manifest = json.loads((tmp_path / "out" / "mergecore_manifest.json").read_text())
    whole = {"tensors": len(BASE), "parameters": PARAMETERS}
    more = {"tensors": len(BASE) + 1, "parameters": PARAMETERS + 8}
    none, one = {"tensors": 0, "parameters": 0}, {"tensors": 1, "parameters": 4}
    assert [entry["tensors"] for entry in manifest["inputs"]] == [
        {
            "stored": {"tensors": len(BASE) + 1, "parameters": PARAMETERS + 4},
            "merged": whole,
            "copied": one,
            "folded": none,
            "left_out": {},
            "zeros": {"tensors": 1},
        },
        {
            "stored": {"tensors": len(BASE) + 2, "parameters": PARAMETERS + 12},
            "merged": more,
            "copied": none,
            "folded": none,
            "left_out": {"constants": one},
            "zeros": {"tensors": 0},
        },
    ]
    assert manifest["tensors_out"] == {
        "stored": {"tensors": len(BASE) + 2, "parameters": PARAMETERS + 12},
        "merged": more,
        "copied": one,
    }
    entries = manifest["tensors"].values()
    assert sum(entry["merged"] for entry in entries) == more["tensors"]
    assert sum(prod(entry["shape"]) for entry in entries) == manifest["tensors_out"]["stored"]["parameters"]


def test_tied_heads_and_constants_are_left_out(tmp_path: Path) -> None:
    base = write(tmp_path, "base", llama(layers=3, hidden=8, vocabulary=12, tied=True), tie_word_embeddings=True)
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    near = write(tmp_path, "near", moved(BASE, 1e-3, 2) | constant, tie_word_embeddings=True)
    found = accounts(spec_dict("task_arithmetic", base, near))
    assert numbers(found["near"]) == {"merged": len(BASE) - 1, "tied": 1, "constants": 1}
    assert numbers(found["base"]) == {"merged": len(BASE) - 1}


def test_scales_go_into_the_weights_they_belong_to(tmp_path: Path) -> None:
    base, stored = write(tmp_path, "base", BASE), moved(BASE, 1e-3, 2)
    stored[UP] = stored[UP].to(torch.float8_e4m3fn)
    module = UP.removesuffix(".weight")
    stored |= {f"{UP}_scale_inv": torch.ones(1), f"{module}.input_scale": torch.ones(1)}
    near = write(tmp_path, "near", stored, quantization_config={"quant_method": "fp8"})
    found = accounts(spec_dict("task_arithmetic", base, near))
    assert numbers(found["near"]) == {"merged": len(BASE), "folded": 1, "scales and adapters": 1}


def test_whole_numbers_come_from_one_model(tmp_path: Path) -> None:
    counter = {"model.steps": torch.ones(3, dtype=torch.int64)}
    base, near = write(tmp_path, "base", BASE | counter), write(tmp_path, "near", moved(BASE, 1e-3, 2) | counter)
    found = accounts(spec_dict("task_arithmetic", base, near))
    assert numbers(found["base"]) == {"merged": len(BASE), "copied": 1}
    assert numbers(found["near"]) == {"merged": len(BASE), "whole numbers": 1}


def test_layers_that_no_slice_takes_are_not_in_a_slice(tmp_path: Path) -> None:
    base, near = write(tmp_path, "base", BASE), write(tmp_path, "near", moved(BASE, 1e-3, 2))
    slices = [
        {"sources": [{"model": str(base), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(near), "layer_range": [2, 3]}]},
    ]
    found = accounts({"merge_method": "passthrough", "slices": slices})
    layer = (len(BASE) - 3) // 3
    assert numbers(found["base"]) == {"merged": 2 * layer + 1, "not in a slice": layer + 2}
    assert numbers(found["near"]) == {"merged": layer + 2, "not in a slice": 2 * layer + 1}
    assert "model.embed_tokens.weight" in found["near"].kinds["not in a slice"]


def test_a_base_that_only_names_the_tensors_is_not_read(tmp_path: Path) -> None:
    base, near, far = (write(tmp_path, name, moved(BASE, 1e-3, 2)) for name in ("base", "near", "far"))
    found = accounts(spec_dict("linear", base, near, far))
    assert numbers(found["near"]) == {"merged": len(BASE)}
    assert numbers(found["base"]) == {"names and config only": len(BASE)}


def test_experts_are_counted_like_other_tensors(tmp_path: Path) -> None:
    apart = {
        f"model.layers.0.mlp.experts.{number}.up_proj.weight": torch.ones(4, 8).bfloat16() * number
        for number in range(4)
    }
    base, near = write(tmp_path, "base", BASE | apart), write(tmp_path, "near", moved(BASE | apart, 1e-3, 2))
    found = accounts(spec_dict("widen", base, near))
    assert numbers(found["near"]) == {"merged": len(BASE) + 4}


TOWER = {f"vision_tower.layers.{number}.fc.weight": torch.ones(8, 4).bfloat16() for number in range(2)}


def test_a_tower_that_one_model_has_is_copied(tmp_path: Path) -> None:
    base, near = write(tmp_path, "base", BASE | TOWER), write(tmp_path, "near", moved(BASE, 1e-3, 2))
    found = accounts(spec_dict("task_arithmetic", base, near))
    assert numbers(found["base"]) == {"merged": len(BASE), "copied": 2}
    assert numbers(found["near"]) == {"merged": len(BASE)}


def test_what_ends_up_in_nothing_is_named(tmp_path: Path) -> None:
    """A method of two models cannot merge the tower of one: the base's is taken, and that model's is lost."""
    base, near = write(tmp_path, "base", BASE | TOWER), write(tmp_path, "near", moved(BASE | TOWER, 1e-3, 2))
    far = write(tmp_path, "far", moved(BASE, 1e-2, 3))
    spec = spec_dict("model_stock", base, near, far)
    assert numbers(accounts(spec)["near"]) == {"merged": len(BASE), "not used": 2}
    (warning,) = [warning for warning in planned(spec).warnings if "end up in nothing" in warning]
    assert warning == f"{near}: 2 tensors end up in nothing: {', '.join(TOWER)}"
