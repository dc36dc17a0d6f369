"""Small outputs and what their files must hold."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import xxhash

from mergecore.output.layout import INDEX_NAME, OutputLayout, plan_layout
from mergecore.output.writer import OutputWriter

TENSORS = [
    ("embed", "BF16", (64, 33)),
    ("layers.0.a", "F32", (17, 5)),
    ("layers.0.b", "BF16", (0, 4)),
    ("layers.1.a", "BF16", (50, 100)),
    ("scale", "F32", ()),
    ("layers.1.b", "BF16", (31, 7)),
]


def layout_of(tensors: list[tuple[str, str, tuple[int, ...]]] = TENSORS, shard_size: int = 8000) -> OutputLayout:
    return plan_layout(tensors, shard_size)


def content(name: str, nbytes: int) -> bytes:
    """What the tests write into a tensor: bytes that tell the tensor and the position."""
    seed = xxhash.xxh3_64_digest(name.encode())
    return b"".join(xxhash.xxh3_128_digest(seed + bytes([i & 255, i >> 8])) for i in range(nbytes // 16 + 1))[:nbytes]


def put(writer: OutputWriter, name: str, window: int = 1000, ring: int = 0) -> None:
    """Writes one whole tensor in windows."""
    data = content(name, writer.layout.slots[name].nbytes)
    for begin in range(0, len(data), window):
        piece = data[begin : begin + window]
        buffer = writer.acquire(name, begin, len(piece), ring)
        buffer[:] = piece
        writer.write(name, begin, buffer)
    writer.finish(name)


def put_rest(writer: OutputWriter) -> None:
    for name in writer.layout.slots:
        if name not in writer.finished:
            put(writer, name)


def expected_files(layout: OutputLayout) -> dict[str, bytes]:
    files = {shard.filename: bytearray(shard.header.ljust(shard.size)) for shard in layout.shards}
    for slot in layout.slots.values():
        data = content(slot.name, slot.nbytes)
        files[layout.shards[slot.shard].filename][slot.offset : slot.offset + slot.nbytes] = data
    result = {name: bytes(data) for name, data in files.items()}
    return result if layout.index is None else result | {INDEX_NAME: layout.index}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process and returns its number; the process ends with 0, or with 1 if `work` raised."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
