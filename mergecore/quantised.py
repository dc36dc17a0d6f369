"""Checkpoints with float8 weights: which tensors are weights, which are their scales, and what they are together.

Sources that do the arithmetic are in sources.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergecore.architecture import is_buffer
from mergecore.checkpoint import Checkpoint, TensorInfo
from mergecore.errors import CheckpointError
from mergecore.sources import FLOATS, Scaled, Source, Stored

_FP8 = ("F8_E4M3", "F8_E5M2")
_ACTIVATION_SCALE = re.compile(r"(?:.*_)?(?:input|output|activation)_scale(?:_ub)?|(?:q|k|v|kv)_scale")


def dequantised(checkpoint: Checkpoint) -> dict[str, Source]:
    """A checkpoint's tensors as sources, in its order: fp8 weights times their scales, others as they are stored.

    Scales of weights and of activations are used or dropped and are not among the result. Known are weights
    W with a tensor `W_scale_inv` (DeepSeek-V3: blocks of quantization_config.weight_block_size) or `W_scale`
    (compressed-tensors, FBGEMM: one per tensor, per row or per column), which both multiply, and, where the config
    names no quantisation, without a scale. CheckpointError names tensors quantised in any other way.
    """
    tensors = checkpoint.tensors
    quantisation = _quantisation(checkpoint.config)
    if not quantisation and not any(info.dtype in _FP8 for info in tensors.values()):
        return {name: Stored(info) for name, info in tensors.items()}
    method = quantisation.get("quant_method", "no quant_method in config.json")
    if quantisation.get("transform_config"):
        raise CheckpointError(
            f"{checkpoint.path}: the weights are stored rotated ({method}, transform_config), which cannot be undone "
            "here; convert the model to bfloat16 first"
        )
    scale_of = {
        name: scale
        for name, info in tensors.items()
        if info.dtype in _FP8
        for scale in (f"{name}_scale_inv", f"{name}_scale")
        if scale in tensors
    }
    scales = set(scale_of.values())
    narrow_modules = {name.rpartition(".")[0] for name, info in tensors.items() if info.dtype in _FP8}
    sources: dict[str, Source] = {}
    for name, info in tensors.items():
        module, _, last = name.rpartition(".")
        if name in scales or _ACTIVATION_SCALE.fullmatch(last):
            continue
        if info.dtype in _FP8 and (name in scale_of or not quantisation):
            sources[name] = _scaled(checkpoint, info, scale_of.get(name), quantisation)
        elif _is_foreign(info) or (module in narrow_modules and "scale" in last):
            raise CheckpointError(
                f"{checkpoint.path}: {name} ({info.dtype}) is quantised in a way that cannot be undone here "
                f"({method}); fp8 weights with scales are read as they are: convert the model to bfloat16 first"
            )
        else:
            sources[name] = Stored(info)
    return sources


def _quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """quantization_config of the model or of its text part; {} without one."""
    for owner in (config, config.get("text_config")):
        if isinstance(owner, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(owner.get(key), dict) and owner[key]:
                    return dict(owner[key])
    return {}


def _is_foreign(info: TensorInfo) -> bool:
    """Whether a tensor of a quantised model is no plain weight: integers, narrow floats, zero points."""
    if is_buffer(info.name, info.shape) or info.name.endswith("num_batches_tracked"):
        return False
    return info.dtype not in FLOATS or info.name.endswith("zero_point")


def _scaled(checkpoint: Checkpoint, info: TensorInfo, scale_name: str | None, quantisation: dict[str, Any]) -> Scaled:
    if scale_name is None:
        return Scaled(Stored(info))
    scale = checkpoint.tensors[scale_name]
    block = _block(info.shape, scale.shape, _configured_blocks(quantisation))
    if block is None or scale.dtype not in FLOATS | {"F8_E8M0"}:
        raise CheckpointError(
            f"{checkpoint.path}: {scale_name} ({scale.dtype} {list(scale.shape)}) does not fit "
            f"{info.name} {list(info.shape)}: expected one scale per tensor, per row, per column, or per block as "
            "quantization_config says"
        )
    return Scaled(Stored(info), Stored(scale), block)


def _configured_blocks(quantisation: dict[str, Any]) -> list[tuple[int, int]]:
    """The (rows, columns) that one scale covers, as the config may say it: per block, or per group of a row."""
    found = [quantisation.get("weight_block_size")]
    groups = quantisation.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            found += [weights.get("block_structure"), [1, weights.get("group_size")]]
    sizes = [block for block in found if isinstance(block, list) and len(block) == 2]
    return [(rows, columns) for rows, columns in sizes if all(isinstance(n, int) and n > 0 for n in (rows, columns))]


def _block(
    shape: tuple[int, ...], scales: tuple[int, ...], configured: list[tuple[int, int]]
) -> tuple[int, int] | None:
    """How much of a weight (..., rows, columns) one scale covers; None when these scales do not fit."""
    if len(shape) < 2:
        return None
    rows, columns = shape[-2:]
    if len(shape) == 2 and scales in ((), (1,), (rows,)):
        scales = (scales[0] if scales else 1, 1)
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return None
    if scales[-2] in (1, rows) and scales[-1] in (1, columns):
        return (rows if scales[-2] == 1 else 1, columns if scales[-1] == 1 else 1)
    fitting = (block for block in configured if (-(-rows // block[0]), -(-columns // block[1])) == scales[-2:])
    return next(fitting, None)
