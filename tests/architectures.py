"""Tiny models of many architectures, made by transformers from configs with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEEING = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
TOKENS = {"image_token_id": 36, "video_token_id": 37, "vision_start_token_id": 38, "vision_end_token_id": 39}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}


def _text() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[3, 1, 4, 15, 9, 26], [5, 35, 8, 9, 7, 9]])}


def _text_to_text() -> dict[str, Tensor]:
    return _text() | {"decoder_input_ids": torch.tensor([[2, 7, 18], [2, 8, 1]])}


def _patches(size: int) -> dict[str, Tensor]:
    """An image of 4 x 4 patches with `size` numbers each, which become four tokens."""
    ids = torch.tensor([[3, 38, 36, 36, 36, 36, 39, 5]])
    pixels = torch.linspace(-1, 1, 16 * size).reshape(16, size)
    kinds = (ids == 36).int()
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": kinds,
    }


def _image() -> dict[str, Tensor]:
    """An image of 8 x 8 pixels, which becomes four tokens."""
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    return {"input_ids": torch.tensor([[3, 39, 39, 39, 39, 7]]), "pixel_values": pixels}


@dataclass(frozen=True)
class Tiny:
    """A class of transformers, the arguments of its config, and what it is asked."""

    config: str
    model: str
    arguments: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = _text

    def make(self) -> Any:
        """The model, its parameters bfloat16; buffers stay as they are, as `from_pretrained` leaves them."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.arguments)
        model = getattr(transformers, self.model)(config).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        model.config.dtype = torch.bfloat16
        return model


def _causal(name: str, **arguments: Any) -> Tiny:
    return Tiny(f"{name}Config", f"{name}ForCausalLM", SMALL | arguments)


TINY = {
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "qwen2": _causal("Qwen2"),
    "qwen2, tied": _causal("Qwen2", tie_word_embeddings=True),
    "qwen3": _causal("Qwen3", head_dim=4),
    "gemma": _causal("Gemma", head_dim=4),
    "gemma2": _causal("Gemma2", head_dim=4),
    "gemma3": Tiny("Gemma3TextConfig", "Gemma3ForCausalLM", SMALL | {"head_dim": 4}),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3"),
    "gpt2": Tiny(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32, "bos_token_id": 1},
    ),
    "gpt_neox": _causal("GPTNeoX"),
    "mixtral": _causal("Mixtral", num_local_experts=4),
    "qwen3_moe": _causal("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=4),
    "gpt_oss": _causal("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=4),
    "bert": Tiny("BertConfig", "BertForMaskedLM", SMALL),
    "t5": Tiny(
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 40},
        _text_to_text,
    ),
    "qwen2_vl": Tiny(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": SMALL | {"rope_parameters": MROPE},
            "vision_config": SEEING | {"embed_dim": 16, "mlp_ratio": 2},
            **TOKENS,
        },
        lambda: _patches(96),
    ),
    "qwen3_vl": Tiny(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": SMALL | {"head_dim": 4, "rope_parameters": MROPE},
            "vision_config": SEEING
            | {
                "intermediate_size": 24,
                "out_hidden_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [1],
            },
            **TOKENS,
        },
        lambda: _patches(96),
    ),
    "llava": Tiny(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": SMALL | {"model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            "image_token_index": 39,
        },
        _image,
    ),
}
