"""LoRA adapters: peft's own merge_and_unload is the oracle, on real small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore.adapters import adapted, open_adapter
from mergecore.checkpoint import open_checkpoint
from mergecore.errors import CheckpointError, InputFault
from mergecore.quantised import dequantised
from mergecore.sources import Source, Stored
from tests.models import LLAMA, llama, streamed, write_model

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def qwen2(**config: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": False} | config
    return Qwen2ForCausalLM(Qwen2Config(**config))


def gpt2(**config: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8, **config))


def streamed_model(base: Path, adapter: Path) -> dict[str, Source]:
    checkpoint = open_checkpoint(base)
    return adapted(dequantised(checkpoint), open_adapter(adapter), checkpoint.config)


def train(model: Any, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Saves the model and an adapter on it whose trained tensors are random; returns peft's own merge of them."""
    peft = pytest.importorskip("peft", reason="peft is not installed (it is in the test extra)")
    model.save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    wrapped.save_pretrained(folder / "adapter")
    return dict(wrapped.merge_and_unload().state_dict())


def check_merged(folder: Path, merged: dict[str, Tensor], tolerance: float, prefix: str = "") -> int:
    """Every tensor is what peft merged; returns how many the adapter changed."""
    sources = streamed_model(folder / "base", folder / "adapter")
    stored = open_checkpoint(folder / "base").tensors
    assert set(sources) == set(stored)
    for name, source in sources.items():
        values = streamed(source, 37).double()
        torch.testing.assert_close(values, merged[prefix + name].double(), rtol=tolerance, atol=tolerance)
    return sum(not isinstance(source, Stored) or source.info != stored[name] for name, source in sources.items())


ATTENTION = ["q_proj", "v_proj"]


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out is set to", "ignore:Model (has|with) `tie_word"
)
@pytest.mark.parametrize(
    ("make", "settings", "changed"),
    [
        (qwen2, {"r": 3, "target_modules": ATTENTION}, 4),
        (qwen2, {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"}, 14),
        (
            qwen2,
            {
                "r": 3,
                "target_modules": [*ATTENTION, "gate_proj"],
                "rank_pattern": {"layers.0.self_attn.q_proj": 2, "gate_proj": 5},
                "alpha_pattern": {"v_proj": 3, ".*layers.1.mlp.gate_proj": 11},
            },
            6,
        ),
        (qwen2, {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        (qwen2, {"r": 2, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}, 4),
        (qwen2, {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}, 10),
        (qwen2, {"r": 2, "target_modules": ATTENTION, "bias": "lora_only"}, 8),
        (qwen2, {"r": 2, "target_modules": ATTENTION, "bias": "all"}, 10),
        (qwen2, {"r": 2, "target_modules": ATTENTION, "init_lora_weights": "gaussian"}, 4),
        (partial(qwen2, tie_word_embeddings=True), {"r": 2, "target_modules": ["embed_tokens"]}, 1),
        (gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, 8),
        (gpt2, {"r": 2, "target_modules": ["attn.c_proj", "wte"], "fan_in_fan_out": False}, 3),
    ],
)
def test_an_adapter_is_applied_as_peft_merges_it(
    tmp_path: Path, make: Callable[..., Any], settings: dict[str, Any], changed: int
) -> None:
    merged = train(make().double(), tmp_path, **settings)
    assert check_merged(tmp_path, merged, 1e-12) == changed


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_in_the_dtypes_that_models_have(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    merged = train(qwen2().to(dtype), tmp_path, r=3, target_modules=ATTENTION)
    assert check_merged(tmp_path, merged, tolerance) == 4


def test_adapters_that_torch_saved_are_the_same(tmp_path: Path) -> None:
    merged = train(qwen2().double(), tmp_path, r=3, target_modules=ATTENTION)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert check_merged(tmp_path, merged, 1e-12) == 4


def test_a_checkpoint_may_leave_out_the_first_part_of_its_names(tmp_path: Path) -> None:
    merged = train(gpt2().double(), tmp_path, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    weights = tmp_path / "base" / "model.safetensors"
    prefix = "transformer."
    save_file({name.removeprefix(prefix): tensor for name, tensor in load_file(weights).items()}, weights)
    assert check_merged(tmp_path, merged, 1e-12, prefix) == 2


# ---- adapters by hand

TENSORS = llama(layers=1, hidden=8, vocabulary=12, dtype=torch.float32)
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = {f"{QUERY}.lora_A.weight": torch.ones(2, 8), f"{QUERY}.lora_B.weight": torch.ones(8, 2)}
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def written(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", TENSORS, LLAMA)


def test_the_order_of_a_model_stays(base: Path, tmp_path: Path) -> None:
    sources = streamed_model(base, written(tmp_path / "a", PAIR))
    assert list(sources) == list(open_checkpoint(base).tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(streamed(sources[name], 5), TENSORS[name].double() + 2 * 2)


def test_an_adapter_applies_to_fp8_weights(tmp_path: Path) -> None:
    weight = TENSORS["model.layers.0.self_attn.q_proj.weight"].to(torch.float8_e4m3fn)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = write_model(tmp_path / "m", {name: weight, f"{name}_scale": torch.tensor(0.5)}, LLAMA)
    sources = streamed_model(base, written(tmp_path / "a", PAIR))
    assert torch.equal(streamed(sources[name], 5), weight.double() / 2 + 4)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, r"peft_type is IA3, and only LORA"),
        ({"peft_type": None}, r"peft_type is None"),
        ({"use_dora": True}, r"sets use_dora, which cannot be applied"),
        ({"lora_bias": True, "alora_invocation_tokens": [1]}, r"sets alora_invocation_tokens, lora_bias"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, r"sets target_parameters"),
        ({"invented_tomorrow": 1}, r"sets invented_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4', which may have changed the model's own weights"),
        ({"r": "8"}, r"r must be a number"),
        ({"lora_alpha": None}, r"lora_alpha must be a number"),
        ({"rank_pattern": [1]}, r"rank_pattern must map patterns to numbers"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no regular expression"),
    ],
)
def test_settings_that_factors_cannot_say_are_errors(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        open_adapter(written(tmp_path / "a", PAIR, **config))


A, B = PAIR
OTHER = {"base_model.model.lm_head.weight": torch.ones(12, 8)}


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({A: PAIR[A]}, {}, r"q_proj has A instead of both A and B"),
        (PAIR | {f"{QUERY}.lora_embedding_A": torch.ones(2, 8)}, {}, r"q_proj has A and A of an embedding"),
        (PAIR, {"r": 3}, r"are not of rank 3, which adapter_config\.json says"),
        (PAIR, {"rank_pattern": {"q_proj": 0}}, r"q_proj has rank 0"),
        (PAIR | {A: torch.ones(2, 7)}, {}, r"do not fit .*\.q_proj\.weight \[8, 8\]"),
        (PAIR | {A: torch.ones(2, 8, 1)}, {}, r"are not two matrices"),
        (PAIR | {A: torch.ones(2, 8).to(torch.int32)}, {}, r"are no plain floats"),
        (PAIR | {f"{QUERY}.lora_magnitude_vector": torch.ones(8)}, {}, r"lora_magnitude_vector is of a kind"),
        (PAIR | {f"{QUERY}.lora_B.bias": torch.ones(8)}, {}, r"lora_B\.bias is of a kind"),
        (OTHER | {"base_model.model.lm_head.bias": torch.ones(3)}, {}, r"the model has none of that name"),
        ({"base_model.model.lm_head.weight": torch.ones(13, 8)}, {}, r"\[13, 8\] does not fit .* lm_head\.weight"),
        (OTHER | {"base_model.model.lm_head.base_layer.weight": torch.ones(12, 8)}, {}, r"are both lm_head\.weight"),
        ({"base_model.model.weight": torch.ones(2)}, {}, r"several that end so"),
        ({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, {}, r"x\.weight, and the model has none"),
        (PAIR | {name.replace("model.model.", "model."): 2 * part for name, part in PAIR.items()}, {}, r"another pair"),
        ({}, {}, r"holds no tensors"),
    ],
)  # fmt: skip
def test_every_tensor_is_used_or_an_error(
    base: Path, tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        streamed_model(base, written(tmp_path / "a", tensors, **config))


def test_an_incomplete_folder_says_what_is_missing(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", PAIR)
    with pytest.raises(CheckpointError, match=r"is not the folder of an adapter"):
        open_adapter(tmp_path / "absent")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        open_adapter(folder)
    (written(folder, PAIR) / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors or adapter_model\.bin is missing"):
        open_adapter(folder)


def test_an_adapter_has_a_fingerprint_and_is_noticed_when_it_changes(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", PAIR)
    adapter = open_adapter(folder)
    first = adapter.fingerprint()
    assert json.loads(json.dumps(first)) == first
    adapter.check_unchanged()
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | {"lora_alpha": 5}))
    assert open_adapter(folder).fingerprint() != first
    written(folder, PAIR)
    assert open_adapter(folder).fingerprint() != first
    with pytest.raises(InputFault, match="replaced or modified"):
        adapter.check_unchanged()
