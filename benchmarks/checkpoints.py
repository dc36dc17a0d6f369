"""Large checkpoints with real shapes and realistic deltas, made on the spot: nothing is downloaded.

    python -m benchmarks.checkpoints DIR --geometry 1.8b      writes DIR/base, DIR/tuned, DIR/pretrained

Weights have a standard deviation of 0.02; the fine-tuned model's deltas 3e-4, the further pre-trained
one's 4e-3, as in table 9 of the WIDEN paper. Numbers repeat from a pool: fast to make, and no kernel
can tell.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WEIGHT_STD = 0.02
DELTA_STDS = {"base": 0.0, "tuned": 3e-4, "pretrained": 4e-3}
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Qwen-like model (bf16)."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 151_936
    tied: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, in stored order."""
        h, i = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name in ("q", "k", "v"):
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (h, h)
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (h,)
            shapes[f"{prefix}self_attn.o_proj.weight"] = (h, h)
            shapes[f"{prefix}mlp.gate_proj.weight"] = (i, h)
            shapes[f"{prefix}mlp.up_proj.weight"] = (i, h)
            shapes[f"{prefix}mlp.down_proj.weight"] = (h, i)
            shapes[f"{prefix}input_layernorm.weight"] = (h,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (h,)
        shapes["model.norm.weight"] = (h,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, h)
        return shapes

    def config(self) -> dict[str, object]:
        """A config.json that transformers and other mergers read."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


GEOMETRIES = {
    "tiny": Geometry(256, 688, 4, vocabulary=4096),
    "0.5b": Geometry(1024, 2816, 24, tied=True),
    "1.8b": Geometry(2048, 5504, 24),
    # Tensors four times as large, in few layers.
    "1.8b-wide": Geometry(4096, 11008, 2, vocabulary=303_872),
    "7b": Geometry(4096, 11008, 32),
    "14b": Geometry(5120, 13696, 40),
}


class _Pool:
    """Normal numbers, handed out from changing places of one block."""

    def __init__(self, seed: int, size: int = 1 << 24) -> None:
        self.numbers = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        self.place = 0

    def take(self, shape: tuple[int, ...]) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        out = torch.empty(count)
        filled = 0
        while filled < count:
            step = min(count - filled, self.numbers.numel() - self.place)
            out[filled : filled + step] = self.numbers[self.place : self.place + step]
            filled += step
            # A step that shares no factor with the size: rows do not repeat in phase.
            self.place = (self.place + step + 12_347) % self.numbers.numel()
        return out.view(shape)


class _Shards:
    """Writes tensors to files of about SHARD_BYTES, and at the end their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: dict[str, Tensor] = {}
        self.weight_map: dict[str, str] = {}
        self.files = self.total = self.held = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor
        self.held += tensor.numel() * tensor.element_size()
        if self.held >= SHARD_BYTES:
            self.write()

    def write(self) -> None:
        if not self.waiting:
            return
        self.files += 1
        file = f"model-{self.files:05d}.safetensors"
        save_file(self.waiting, self.folder / file, {"format": "pt"})
        self.weight_map.update(dict.fromkeys(self.waiting, file))
        self.total += self.held
        self.waiting, self.held = {}, 0

    def finish(self) -> None:
        self.write()
        index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def names() -> list[str]:
    """Of the three checkpoints: a base and two models."""
    return list(DELTA_STDS)


def make_one(folder: Path, geometry: Geometry, name: str) -> Path:
    """Writes one of them under `folder` unless it is there; returns its path."""
    target, std = folder / name, DELTA_STDS[name]
    if (target / "config.json").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weights, deltas, shards = _Pool(0), _Pool(names().index(name) + 1), _Shards(target)
    for tensor_name, shape in geometry.shapes().items():
        tensor = weights.take(shape).mul_(WEIGHT_STD)
        if std:
            tensor += deltas.take(shape).mul_(std)
        shards.add(tensor_name, tensor.to(torch.bfloat16))
    shards.finish()
    (target / "config.json").write_text(json.dumps(geometry.config()))  # last: it marks a whole model
    return target


def make(folder: Path, geometry: Geometry) -> list[Path]:
    """Writes base, tuned and pretrained under `folder` unless they are there; returns their paths."""
    return [make_one(folder, geometry, name) for name in names()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="1.8b")
    options = parser.parse_args()
    for path in make(options.folder, GEOMETRIES[options.geometry]):
        print(path)
