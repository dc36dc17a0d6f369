"""Checks a finished output against its manifest: files, headers, and the checksum of every tensor.

Not for inputs (checkpoint.py). Nothing is changed; what is wrong is told in sentences.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from mergecore.checkpoint import TensorInfo, read_header
from mergecore.errors import CheckpointError
from mergecore.output.layout import INDEX_NAME

MANIFEST_NAME = "mergecore_manifest.json"
READ_STEP = 8 << 20
ENTRY_KEYS = ("offset", "bytes", "dtype", "shape", "xxh3_128")


def verify_output(out: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """What is wrong with the output directory `out`, one sentence each; empty if all is as the manifest says.

    Reads all tensor bytes in pieces of 8 MiB; `progress` is called after each with (bytes checked, bytes to check).
    """
    out = Path(out)
    try:
        manifest = json.loads((out / MANIFEST_NAME).read_bytes())
        if "points" in manifest:
            return _verify_sweep(out, [point["name"] for point in manifest["points"]], progress)
        tensors: dict[str, dict[str, Any]] = manifest["tensors"]
        by_file: dict[str, dict[str, dict[str, Any]]] = {}
        for name, entry in tensors.items():
            by_file.setdefault(entry["file"], {})[name] = {key: entry[key] for key in ENTRY_KEYS}
        if any(Path(file).name != file for file in by_file):
            raise ValueError("a weight file is named with a path")
        total = sum(entry["bytes"] for entry in tensors.values())
    except OSError as error:
        return [f"{out / MANIFEST_NAME} cannot be read ({error.strerror}); this is no complete output of mergecore"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{out / MANIFEST_NAME} is damaged ({type(error).__name__}: {error}); nothing can be checked"]

    problems = _check_index(out, {name: entry["file"] for name, entry in tensors.items()})
    present = {path.name for path in out.glob("*.safetensors")}
    problems += [f"{file} is in the folder, but not in the manifest" for file in sorted(present - by_file.keys())]
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    for file in sorted(by_file):
        if file in present:
            problems += _check_shard(out / file, by_file[file], advance)
        else:
            problems.append(f"{file} is missing ({len(by_file[file])} tensors)")
    return problems


def _verify_sweep(out: Path, names: list[str], progress: Callable[[int, int], None] | None) -> list[str]:
    """What is wrong with the models of a sweep; progress is that of each of them."""
    if any(Path(name).name != name for name in names):
        raise ValueError("a point is named with a path")
    return [f"{name}: {problem}" for name in names for problem in verify_output(out / name, progress)]


def _check_index(out: Path, expected: dict[str, str]) -> list[str]:
    path = out / INDEX_NAME
    if not path.exists():
        if set(expected.values()) <= {"model.safetensors"}:
            return []
        return [f"{INDEX_NAME} is missing; the model cannot be loaded without it"]
    try:
        found = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{INDEX_NAME} is damaged: {type(error).__name__}: {error}"]
    return [] if found == expected else [f"{INDEX_NAME} does not place the tensors in the files that the manifest says"]


def _check_shard(path: Path, expected: dict[str, dict[str, Any]], advance: Callable[[int], None]) -> list[str]:
    try:
        found = {name: _entry(info) for name, info in read_header(path).items()}
    except CheckpointError as error:
        return [str(error)]
    problems = [f"{path.name} has tensor {name!r}, the manifest does not" for name in found if name not in expected]
    buffer = memoryview(bytearray(READ_STEP))
    for name, entry in expected.items():
        if name not in found:
            problems.append(f"{path.name} has no tensor {name!r}")
            continue
        differing = [key for key, value in found[name].items() if value != entry[key]]
        problems += [
            f"{path.name}: tensor {name!r} has {key} {found[name][key]}, the manifest says {entry[key]}"
            for key in differing
        ]
        if differing:
            continue
        try:
            checksum = _checksum(path, entry["offset"], entry["bytes"], buffer, advance)
        except OSError as error:
            problems.append(f"{path.name}: tensor {name!r} cannot be read: {error.strerror or error}")
            continue
        if checksum != entry["xxh3_128"]:
            problems.append(
                f"{path.name}: the bytes of tensor {name!r} have changed: their checksum is {checksum}, the manifest "
                f"says {entry['xxh3_128']}"
            )
    return problems


def _entry(info: TensorInfo) -> dict[str, Any]:
    return {"offset": info.offset, "bytes": info.nbytes, "dtype": info.dtype, "shape": list(info.shape)}


def _checksum(path: Path, offset: int, nbytes: int, buffer: memoryview, advance: Callable[[int], None]) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while nbytes:
            count = file.readinto(buffer[:nbytes])
            if not count:
                raise OSError("the file has become shorter")
            state.update(buffer[:count])
            nbytes -= count
            advance(count)
    return state.hexdigest()
