"""Tiny models that are run: checkpoints with a tokenizer of bytes, their transformers twins, and texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.demo_models import byte_tokenizer
from tests.architectures import TINY

CAUSAL = [name for name, tiny in TINY.items() if tiny.model.endswith(("ForCausalLM", "LMHeadModel"))]
EAGER = {"mixtral", "qwen3_moe", "gpt_oss"}
"""The fused products of experts know no float64."""


def checkpoints(folder: Path, kind: str, count: int, *, scale: float = 0.1) -> list[Path]:
    """Models m0, m1 ... of a kind, bfloat16: m0 is what the others were moved from, by `scale` of its deviation."""
    tiny = TINY[kind]
    tiny = dataclasses.replace(tiny, arguments=tiny.arguments | {"vocab_size": 257})
    folders = []
    for number in range(count):
        model = tiny.make()
        torch.manual_seed(number)
        for parameter in model.parameters() if number else ():
            noise = torch.randn(parameter.shape) * parameter.data.float().std().nan_to_num(0.0).clamp(min=0.1)
            parameter.data += (scale * noise).to(parameter.dtype)
        folders.append(folder / f"m{number}")
        model.save_pretrained(folders[-1])
        byte_tokenizer().save_pretrained(folders[-1])
    return folders


def twin(folder: Path, kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """The model as transformers loads it."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = model.to(dtype).eval()
    if kind in EAGER and dtype == torch.float64:
        model.set_experts_implementation("eager")
    # Buffers that were computed stay float32 where a config's dtype is converted by `to`.
    fresh = type(model)(model.config)
    for (name, buffer), (_, computed) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
        del name
        buffer.data = computed.data.clone()
    return model.requires_grad_(False)


def texts(folder: Path) -> tuple[Path, Path]:
    """A text file and a JSONL file."""
    plain, records = folder / "plain.txt", folder / "records.jsonl"
    plain.write_text("".join(f"The quick brown fox {i} jumps over the lazy dog.\n" for i in range(400)))
    records.write_text("".join(json.dumps({"text": f"Lorem ipsum dolor {i * i} sit amet"}) + "\n" for i in range(50)))
    return plain, records


def ids(*lengths: int) -> list[Tensor]:
    """Token ids that are no text."""
    return [torch.arange(3, 3 + 7 * length, 7, dtype=torch.int64) % 250 for length in lengths]


def logits_of(model: Any, tokens: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(each.unsqueeze(0)).logits for each in tokens]
