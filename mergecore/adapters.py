"""LoRA adapters as PEFT saves them, applied to a model's tensors while they stream; no merged copy is made.

An adapter is a folder with adapter_config.json and adapter_model.safetensors (or .bin). Every tensor in it is
used, or it is an error: low-rank factors add to a weight, others (modules_to_save, trained biases, trained
embeddings) take the place of the model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any
from warnings import catch_warnings

from mergecore.architecture import Architecture, is_embedding
from mergecore.checkpoint import Checkpoint, TensorInfo, read_config, read_weights
from mergecore.errors import CheckpointError
from mergecore.sources import FLOATS, Adapted, Source, Stored

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?:\.weight)?")
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
_HARMLESS = {
    # What was trained, as the tensors themselves say.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    # How it was trained.
    "lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying", "qalora_group_size", "runtime_config", "megatron_core", "inference_mode",
    # Where it comes from.
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
}  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Starting points of training that leave the model's own weights as they are."""


MOST_REPEATS = 3
"""Of a pattern for names: with each, matching takes another power of the name's length."""
LONGEST_NAME = 256
"""Characters of a name that patterns are tried on."""
_COSTLY = re.compile(r"\)[*+{?]|\\[1-9]")
"""A repeated group, whose matching can take time exponential in the name's length; a back reference."""


def open_adapter(path: str | Path) -> Checkpoint:
    """The adapter in a local folder: its tensors, and adapter_config.json as `config`.

    CheckpointError for what is missing, and for settings that change more than low-rank factors can say (DoRA,
    PiSSA's changed base, other PEFT types).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not the folder of an adapter ({CONFIG} and {WEIGHTS[0]})")
    config, config_hash = read_config(folder / CONFIG)
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if config_hash is None or file is None:
        missing = CONFIG if config_hash is None else " or ".join(WEIGHTS)
        raise CheckpointError(f"{folder} is not a complete adapter: {missing} is missing")
    _check_config(folder / CONFIG, config)
    return Checkpoint(folder, config, (read_weights(file),), config_hash)


def adapted(sources: Mapping[str, Source], adapter: Checkpoint, config: Mapping[str, Any]) -> dict[str, Source]:
    """The tensors of a model under an adapter: `sources` and `config` are the model's, as is the order of the result.

    W + scaling B A for each pair of factors, with scaling = alpha / r, or alpha / sqrt(r) with use_rslora. What
    PEFT's merge_and_unload computes, in float64. CheckpointError for tensors of the adapter that the model has
    not, or that do not fit. The model must not be under an adapter already.
    """
    result = dict(sources)
    factors: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, str] = {}
    for name, info in adapter.tensors.items():
        factor = _FACTOR.fullmatch(name.removeprefix("base_model.model."))
        if factor is not None:
            which = factor["which"] + (" of an embedding" if factor["embedding"] else "")
            factors.setdefault(factor["module"], {})[which] = info
            continue
        if re.search(r"\.lora_|\.token_adapter\.|\.parametrizations\.", name):
            raise CheckpointError(f"{adapter.path}: {name} is of a kind of adapter that cannot be applied; {_MERGE}")
        target = _target(sources, adapter, re.sub(r"^base_model\.model\.|\.base_layer(?=\.)", "", name), name)
        if info.shape != sources[target].shape:
            raise CheckpointError(
                f"{adapter.path}: {name} {list(info.shape)} does not fit the model's {target} "
                f"{list(sources[target].shape)}; {_MERGE}"
            )
        if target in replaced:
            raise CheckpointError(f"{adapter.path}: {replaced[target]} and {name} are both {target}")
        replaced[target] = name
        result[target] = Stored(info)
    if not factors and not replaced:
        raise CheckpointError(f"{adapter.path} holds no tensors")
    architecture = Architecture.of(config, (), {})
    for module, pair in factors.items():
        name = next(iter(pair.values())).name
        target = _target(sources, adapter, f"{module}.weight", name)
        if isinstance(result[target], Adapted):
            raise CheckpointError(f"{adapter.path}: {name} is for {target}, which another pair of factors is for too")
        result[target] = _adapted(adapter, architecture, module, pair, target, result[target])
    return result


_MERGE = "merge it into its model with peft first (merge_and_unload)"


def _adapted(
    adapter: Checkpoint,
    architecture: Architecture,
    module: str,
    pair: Mapping[str, TensorInfo],
    target: str,
    weight: Source,
) -> Adapted:
    embedding = "A of an embedding" in pair or "B of an embedding" in pair
    names = ["A of an embedding", "B of an embedding"] if embedding else ["A", "B"]
    if sorted(pair) != names:
        raise CheckpointError(f"{adapter.path}: {module} has {' and '.join(sorted(pair))} instead of both A and B")
    a, b = (pair[name] for name in names)
    rank, scaling = _rank_and_scaling(adapter, module)
    shapes = f"A {a.dtype} {list(a.shape)} and B {b.dtype} {list(b.shape)} of {module}"
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in (*a.shape, *b.shape):
        raise CheckpointError(f"{adapter.path}: {shapes} are not two matrices; {_MERGE}")
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(f"{adapter.path}: {shapes} are not of rank {rank}, which {CONFIG} says")
    straight, transposed = (b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])
    if weight.shape not in ((transposed,) if embedding else (straight, transposed)):
        raise CheckpointError(f"{adapter.path}: {shapes} do not fit the model's {target} {list(weight.shape)}")
    if not {a.dtype, b.dtype, weight.dtype} <= FLOATS:
        raise CheckpointError(f"{adapter.path}: {shapes} or the model's {target} ({weight.dtype}) are no plain floats")
    if weight.shape == straight == transposed and not embedding:
        # Only the name tells whether a square weight is stored (in, out). The config's flag is that of the last
        # module that PEFT wrapped.
        conv1d = not is_embedding(target, weight.shape) and architecture.orientation(target, weight.shape) == "rows"
        flipped = conv1d or bool(adapter.config.get("fan_in_fan_out"))
    else:
        flipped = weight.shape == transposed
    return Adapted(weight, Stored(a), Stored(b), scaling, transposed=flipped)


def _rank_and_scaling(adapter: Checkpoint, module: str) -> tuple[int, float]:
    config = adapter.config
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if (
        not isinstance(rank, int)
        or not 1 <= rank < 1 << 31
        or not isinstance(alpha, int | float)
        or not abs(alpha) < 1e30
    ):
        raise CheckpointError(f"{adapter.path / CONFIG}: {module} has rank {rank!r} and alpha {alpha!r}")
    return rank, alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, from a dot on, as PEFT does."""
    if patterns and len(module) > LONGEST_NAME:
        raise CheckpointError(
            f"a name of {len(module)} characters is too long for the adapter's patterns: {module[:60]}..."
        )
    for pattern, value in (patterns or {}).items():
        if _ending(pattern).match(module):
            return value
    return otherwise


@cache
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _target(sources: Mapping[str, Source], adapter: Checkpoint, name: str, of: str) -> str:
    """The model's tensor of this name; checkpoints may leave out, or add, the first parts of it."""
    if name in sources:
        return name
    near = [known for known in sources if known.endswith(f".{name}") or name.endswith(f".{known}")]
    if len(near) == 1:
        return near[0]
    found = f"several that end so ({', '.join(near[:3])})" if near else "none of that name"
    raise CheckpointError(
        f"{adapter.path}: {of} is for {name}, and the model has {found}; is it the model that the adapter was made for?"
    )


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind}, and only LORA can be applied; {_MERGE}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, which may have changed the model's own weights; save the adapter "
            "with path_initial_model_for_weight_conversion (peft), or merge it into its model first"
        )
    other = sorted(key for key in config if config[key] and key not in _USED | _HARMLESS)
    if other:
        raise CheckpointError(f"{file} sets {', '.join(other)}, which cannot be applied here; {_MERGE}")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or isinstance(config[key], bool):
            raise CheckpointError(f"{file}: {key} must be a number, found {config.get(key)!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key), dict | None):
            raise CheckpointError(f"{file}: {key} must map patterns to numbers, found {config[key]!r}")
        for pattern in config.get(key) or ():
            try:
                with catch_warnings(action="ignore"):
                    _ending(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"{file}: {key}: {pattern!r} is no regular expression: {error}") from None
            if _COSTLY.search(pattern) or sum(map(pattern.count, "*+{")) > MOST_REPEATS:
                raise CheckpointError(
                    f"{file}: {key}: {pattern!r} could take for ever: at most {MOST_REPEATS} repeats, none of a group"
                )
