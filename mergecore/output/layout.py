"""Where every output byte goes, fixed before the first one is written: safetensors shards, their headers and the index.

Only arithmetic: nothing here touches the disk (writer.py does) or knows what the tensors hold.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

INDEX_NAME = "model.safetensors.index.json"

# Tensor data starts on a page of its own (safetensors asks for 8, SIMD loads for 64): large matrices then begin on page
# boundaries, so that readers drop and the kernel writes back whole pages. It costs at most 4095 spaces per shard.
DATA_ALIGNMENT = 4096

# safetensors refuses longer headers.
LONGEST_HEADER = 100_000_000

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSlot:
    """The place of one tensor: shard number, absolute offset in the shard file, size in bytes."""

    name: str
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header (with the 8-byte length in front) and the size of the whole file in bytes."""

    filename: str
    header: bytes
    size: int


@dataclass(frozen=True)
class OutputLayout:
    """All shards, the slot of every tensor (in the order given), and the index file's bytes (None for one shard)."""

    shards: tuple[Shard, ...]
    slots: dict[str, TensorSlot]
    index: bytes | None

    @property
    def nbytes(self) -> int:
        """Bytes of all shard files together, headers included."""
        return sum(shard.size for shard in self.shards)

    def digest(self) -> str:
        """xxh3_128 over file names and headers: equal exactly when every byte has the same place."""
        state = xxhash.xxh3_128()
        for shard in self.shards:
            state.update(f"{shard.filename}\n{shard.size}\n".encode())
            state.update(shard.header)
        return state.hexdigest()


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def plan_layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]], shard_size: int) -> OutputLayout:
    """Lays (name, dtype such as "BF16", shape) out in shards of at most `shard_size` bytes of tensor data each.

    Tensors keep their order: a shard is closed when the next tensor would exceed it; a tensor larger than `shard_size`
    has a shard of its own. Within a shard wider dtypes come first, as safetensors' own writer places them, because the
    format allows no gaps and a float32 behind an odd number of bfloat16 would lie off its alignment.
    Raises ValueError for a repeated or reserved name, an unknown dtype, a negative dimension, or shard_size < 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; it must be at least 1 byte")
    groups: list[list[_Tensor]] = [[]]
    names: list[str] = []
    room = shard_size
    for name, dtype, shape in tensors:
        tensor = _checked(name, dtype, shape)
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = shard_size
        groups[-1].append(tensor)
        names.append(name)
        room -= tensor.nbytes
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tensor {repeated!r} is given twice")

    shards: list[Shard] = []
    placed: dict[str, TensorSlot] = {}
    for number, group in enumerate(groups):
        group.sort(key=lambda tensor: -ITEM_BYTES[tensor.dtype])  # stable: equal widths keep their order
        header = _header(group)
        offset = len(header)
        for tensor in group:
            placed[tensor.name] = TensorSlot(tensor.name, number, offset, tensor.nbytes)
            offset += tensor.nbytes
        shards.append(Shard(_filename(number, len(groups)), header, offset))
    slots = {name: placed[name] for name in names}
    return OutputLayout(tuple(shards), slots, _index(shards, slots) if len(shards) > 1 else None)


def _checked(name: str, dtype: str, shape: tuple[int, ...]) -> _Tensor:
    if name == "__metadata__":
        raise ValueError("a tensor cannot be named '__metadata__': safetensors reserves that name")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}; safetensors files hold {', '.join(ITEM_BYTES)}")
    if any(size < 0 for size in shape):
        raise ValueError(f"tensor {name!r} has shape {list(shape)}; dimensions cannot be negative")
    return _Tensor(name, dtype, tuple(shape), math.prod(shape) * ITEM_BYTES[dtype])


def _header(group: list[_Tensor]) -> bytes:
    """The first bytes of a shard: length (little-endian uint64), JSON, spaces up to the next multiple of 4096."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in group:
        end = begin + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    # Not ensure_ascii: a lone surrogate must fail here, not in whoever loads the model.
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    if len(text) > LONGEST_HEADER:
        raise ValueError(
            f"the header of a shard with {len(group):,} tensors takes {len(text):,} bytes; safetensors reads at most "
            f"{LONGEST_HEADER:,}: choose a smaller shard_size"
        )
    return struct.pack("<Q", len(text)) + text


def _filename(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _index(shards: list[Shard], slots: dict[str, TensorSlot]) -> bytes:
    content = {
        "metadata": {"total_size": sum(slot.nbytes for slot in slots.values())},
        "weight_map": {name: shards[slots[name].shard].filename for name in sorted(slots)},
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
