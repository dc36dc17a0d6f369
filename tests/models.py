"""Small real checkpoints for tests: written by safetensors, with the deltas that a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import deserialize
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore._stream import WindowStream
from mergecore.sources import Source

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def write_model(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, shards: int = 1
) -> Path:
    """A model directory with these tensors, in one or several shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number::shards]
            save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama(
    layers: int = 2, hidden: int = 48, vocabulary: int = 80, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of a small Llama."""
    random = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return (0.05 * torch.randn(shape, generator=random)).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {prefix + f"self_attn.{name}_proj.weight": weight(hidden, hidden) for name in "qkvo"}
        tensors |= {prefix + f"mlp.{name}_proj.weight": weight(2 * hidden, hidden) for name in ("gate", "up")}
        tensors[prefix + "mlp.down_proj.weight"] = weight(hidden, 2 * hidden)
        tensors |= {prefix + f"{name}_layernorm.weight": 1 + weight(hidden) for name in ("input", "post_attention")}
    tensors["model.norm.weight"] = 1 + weight(hidden)
    return tensors if tied else tensors | {"lm_head.weight": weight(vocabulary, hidden)}


def moved(tensors: Mapping[str, Tensor], std: float, seed: int) -> dict[str, Tensor]:
    """A homologous model: every floating-point tensor plus noise of this standard deviation, in its own dtype."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.double() + std * torch.randn(tensor.shape, generator=random, dtype=torch.float64)).to(
            tensor.dtype
        )
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in tensors.items()
    }


def write_trio(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = LLAMA, *, shards: int = 1
) -> list[Path]:
    """folder/base, folder/near (a fine-tune: small deltas) and folder/far (further pre-trained: large ones)."""
    return [
        write_model(folder / "base", tensors, config, shards=shards),
        write_model(folder / "near", moved(tensors, 3e-4, 2), config, shards=shards),
        write_model(folder / "far", moved(tensors, 4e-3, 3), config, shards=shards),
    ]


def spec_dict(
    method: str, base: Path | None, *models: Path | tuple[Path, Mapping[str, Any]], **keys: Any
) -> dict[str, Any]:
    """A spec; a model with parameters of its own is a pair."""
    listed = [model if isinstance(model, tuple) else (model, {}) for model in models]
    entries = [{"model": str(path), "parameters": dict(own)} for path, own in listed]
    return {"merge_method": method, "base_model": None if base is None else str(base), "models": entries, **keys}


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor of a model directory, by name, whatever file it is in."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in deserialize(file.read_bytes())
    }


def streamed(source: Source, entries: int) -> Tensor:
    """The whole tensor through the stream that merges read with, in windows of `entries`."""
    size = prod(source.shape)
    windows = [(first, min(entries, size - first)) for first in range(0, size, entries)]
    files = sorted({path for path, _, _ in source.pieces(0, size)})
    parts = []
    with WindowStream(files) as stream:
        for first, count in windows:
            pieces = [(files.index(path), offset, nbytes) for path, offset, nbytes in source.pieces(first, count)]
            stream.submit(pieces)
            parts.append(source.window(first, count, iter(stream.next())).clone())
    return torch.cat(parts).view(source.shape)
