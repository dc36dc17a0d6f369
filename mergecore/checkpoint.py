"""A model directory -> names, dtypes, shapes and places on disk of its tensors.

Reads headers, the index and config.json; never tensor data, and no torch but for what torch.save wrote (pickled.py).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from mergecore.confined import names_in, open_input
from mergecore.errors import CheckpointError, InputFault
from mergecore.small_files import LARGEST_CONFIG, LARGEST_INDEX, parse_object, read_bytes, read_if_there

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_PICKLED = (".bin", ".pt", ".pth")

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: `nbytes` bytes at `offset` (from the start) of `file`; dtype as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class WeightFile:
    """A weight file as it was when its header was read."""

    path: Path
    bytes: int
    mtime_ns: int
    header_xxh3_128: str
    tensors: tuple[TensorInfo, ...]

    def changed(self) -> bool:
        """Whether the path now names a file of another size or age, or none."""
        try:
            status = self.path.stat()
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (self.bytes, self.mtime_ns)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. `tensors` is in the order of file and offset; `config` is {} without a config.json."""

    path: Path
    config: dict[str, Any]
    weights: tuple[WeightFile, ...]
    config_xxh3_128: str | None = None
    tensors: dict[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        """Collects `tensors`; CheckpointError when two files hold a tensor of the same name."""
        tensors: dict[str, TensorInfo] = {}
        for weight in self.weights:
            # Empty tensors share an offset, and the library lists those in no fixed order.
            for info in sorted(weight.tensors, key=lambda info: (info.offset, info.nbytes, info.name)):
                if info.name in tensors:
                    raise CheckpointError(
                        f"{self.path}: tensor {info.name} is in both {tensors[info.name].file.name} and "
                        f"{info.file.name}; keep the files of one model in the folder"
                    )
                tensors[info.name] = info
        object.__setattr__(self, "tensors", tensors)

    @property
    def folder(self) -> Path:
        """Where config.json and the tokenizer lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return [weight.path for weight in self.weights]

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this input, as it was at opening; JSON-serialisable."""
        return {
            "files": [
                {
                    "name": weight.path.name,
                    "bytes": weight.bytes,
                    "mtime_ns": weight.mtime_ns,
                    "header_xxh3_128": weight.header_xxh3_128,
                }
                for weight in self.weights
            ],
            "config_xxh3_128": self.config_xxh3_128,
        }

    def check_unchanged(self) -> None:
        """InputFault when a weight file was replaced or modified since it was opened."""
        for weight in self.weights:
            if weight.changed():
                raise InputFault(f"{weight.path} was replaced or modified while in use; merge again when it is settled")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The model in a local folder, or in one file: .safetensors, or what torch.save wrote (.bin, .pt, .pth).

    A folder holds model.safetensors.index.json with its shards, or model.safetensors, or any *.safetensors; without
    any of these pytorch_model.bin.index.json with its shards, or pytorch_model.bin.
    CheckpointError says what is missing, malformed or contradictory.
    """
    path = Path(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(_not_found(path)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {reason(error)}") from None
    if not is_folder:
        if path.suffix not in (".safetensors", *_PICKLED):
            raise CheckpointError(f"{path} is neither a model folder nor a .safetensors or {', '.join(_PICKLED)} file")
        weights = [read_weights(path)]
    else:
        try:
            names = names_in(path)
        except OSError as error:
            raise CheckpointError(f"{path}: the folder cannot be listed: {reason(error)}") from None
        weights = _folder_weights(path, names)
    config, config_hash = read_config((path if is_folder else path.parent) / "config.json")
    return Checkpoint(path, config, tuple(weights), config_hash)


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of one .safetensors file in the order of their offsets; accepts and rejects what safetensors does.

    CheckpointError names the file, what is wrong and what to do.
    """
    return {info.name: info for info in _read_safetensors(Path(path)).tensors}


# ---- one file


def read_weights(path: Path) -> WeightFile:
    """The tensors of a .safetensors file, or of a .bin, .pt or .pth file that torch.save wrote."""
    if path.suffix in _PICKLED:
        from mergecore.pickled import read_pickled

        return read_pickled(path)
    return _read_safetensors(path)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file that stays as it is while it is open; CheckpointError otherwise."""
    try:
        fd = open_input(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {reason(error)}") from None
    try:
        before = os.fstat(fd)
        yield fd
        after = os.fstat(fd)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{path} changed while its header was read; try again when it is complete")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    finally:
        os.close(fd)


def _read_safetensors(path: Path) -> WeightFile:
    with opened(path) as fd:
        status = os.fstat(fd)
        layout = _library_layout(path, fd)
        header = os.pread(fd, 8, 0)
        header += os.pread(fd, int.from_bytes(header, "little"), 8)

    # safetensors allows no holes and no overlaps: in the order of offsets, each tensor starts where the one before
    # ends. So names, dtypes, shapes and order are the library's own, and there is no second reading of the JSON that
    # could disagree with it.
    tensors = []
    offset = len(header)
    for name, dtype, shape in layout:
        if dtype not in _BITS:
            raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}, which this version does not know")
        nbytes = prod(shape) * _BITS[dtype] // 8
        tensors.append(TensorInfo(name, dtype, shape, path, offset, nbytes))
        offset += nbytes
    if offset != status.st_size:
        raise CheckpointError(f"{path} changed while its header was read; try again when it is complete")
    return WeightFile(path, status.st_size, status.st_mtime_ns, xxhash.xxh3_128_hexdigest(header), tuple(tensors))


def _library_layout(path: Path, fd: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor in the order of offsets, as safetensors reads them."""
    try:
        # Through the descriptor, so that it is the same file even if the path is replaced now; with pread, so that a
        # file that shrinks now is an error and not a SIGBUS.
        with safe_open(f"/proc/self/fd/{fd}", framework="np", backend="pread") as opened:
            slices = ((name, opened.get_slice(name)) for name in opened.offset_keys())
            return [(name, view.get_dtype(), tuple(view.get_shape())) for name, view in slices]
    except SafetensorError as error:
        if os.pread(fd, 40, 0).startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{path} is a Git LFS pointer and not the weights; run `git lfs pull` in its folder"
            ) from None
        cause = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{path} is not a valid safetensors file: {cause}. It may be incomplete: copy or download it again"
        ) from None


# ---- a folder


def _folder_weights(folder: Path, names: list[str]) -> list[WeightFile]:
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith((".", "adapter_"))]
    if INDEX in names:
        return _indexed_weights(folder, INDEX, SINGLE if SINGLE in weights else None)
    if SINGLE in weights:
        weights = [SINGLE]
    elif not weights and PICKLED_INDEX in names:
        return _indexed_weights(folder, PICKLED_INDEX, PICKLED_SINGLE if PICKLED_SINGLE in names else None)
    elif not weights and PICKLED_SINGLE in names:
        weights = [PICKLED_SINGLE]
    if not weights:
        raise CheckpointError(_no_weights(folder, names))
    return [read_weights(folder / name) for name in weights]


def _indexed_weights(folder: Path, index_name: str, single: str | None) -> list[WeightFile]:
    """The shards that the index names; the index and the shards' headers must tell the same.

    `single` is the whole model's file, if it is there too.
    """
    index = folder / index_name
    weight_map = parse_object(index, read_bytes(index, LARGEST_INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty; it must map tensor names to file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.isprintable():
            raise CheckpointError(
                f"{index}: weight_map puts {name} into {str(shard)[:300]!r}, which is not a file name"
            )
    shards = sorted(set(weight_map.values()))
    if single is not None and single not in shards:
        raise CheckpointError(
            f"{folder} holds {single} and also {index_name}, which does not name it: two models, or a leftover; "
            "remove one"
        )
    missing = [shard for shard in shards if not os.access(folder / shard, os.F_OK)]
    if missing:
        raise CheckpointError(
            f"{folder}: {some(missing)} missing, of {len(shards)} files that {index_name} names; copy or download again"
        )
    weights = [read_weights(folder / shard) for shard in shards]
    for weight in weights:
        stored = {info.name for info in weight.tensors}
        named = {name for name, shard in weight_map.items() if shard == weight.path.name}
        if named - stored:
            raise CheckpointError(f"{weight.path} lacks {some(named - stored)}, which {index_name} puts into it")
        if stored - named:
            raise CheckpointError(
                f"{weight.path} holds {some(stored - named)}, which {index_name} does not put into it"
            )
    return weights


def _no_weights(folder: Path, names: list[str]) -> str:
    if any(name.startswith("adapter_") for name in names):
        return f"{folder} holds an adapter (LoRA) and no model; name it after its model: MODEL+{folder}"
    old = [name for name in names if name.endswith((*_PICKLED, ".gguf")) and name != "training_args.bin"]
    if old:
        return (
            f"{folder} holds {some(old)} and neither safetensors files nor {PICKLED_SINGLE}; convert it first (load it "
            "with transformers and save_pretrained, which writes safetensors)"
        )
    return (
        f"{folder} holds no weights: expected {INDEX} with its shards, {SINGLE}, other .safetensors files, or "
        f"{PICKLED_SINGLE}"
    )


def _not_found(path: Path) -> str:
    text = str(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not path.parent.exists():
        return (
            f"{text} does not exist. It looks like the name of a model on a hub; models are read from local folders: "
            "download it and give the folder"
        )
    return f"{text} does not exist" + ("" if path.is_absolute() else f" (looked for {path.absolute()})")


# ---- JSON beside the weights


def read_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """A JSON object and the hash of its file; {} and None where there is no file."""
    content = read_if_there(path, LARGEST_CONFIG)
    if content is None:
        return {}, None
    return parse_object(path, content), xxhash.xxh3_128_hexdigest(content)


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
