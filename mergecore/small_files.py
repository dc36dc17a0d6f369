"""The JSON and text files of a model folder, which may be anything: bounded, regular, and clear errors.

Not for weights (checkpoint.py).
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergecore.confined import names_in, open_input
from mergecore.errors import CheckpointError

LARGEST_FILE = 128 << 20
"""Bytes. The largest tokenizers in use have some 40 MB."""
LARGEST_CONFIG = 16 << 20
"""Bytes of a config. Those of models have kilobytes."""
LARGEST_INDEX = 64 << 20
"""Bytes of an index of shards. Those of 100,000 tensors have some 10 MB."""


def files_in(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The regular files of a folder whose names match one of the patterns, sorted; none if there is no folder."""
    try:
        names = names_in(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: the folder cannot be listed: {error.strerror}") from None
    found = [folder / name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return [path for path in found if path.is_file()]


def read_if_there(path: Path, limit: int = LARGEST_FILE) -> bytes | None:
    """The content of a regular file, None where there is none; CheckpointError if it is another thing or too large."""
    try:
        with os.fdopen(open_input(path), "rb") as file:
            content = file.read(limit + 1)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise CheckpointError(f"{path} has {size:,} bytes; such files have at most {limit:,}. Is it another file?")
    return content


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """As `read_if_there`, for a file that must be there."""
    content = read_if_there(path, limit)
    if content is None:
        raise CheckpointError(f"{path} does not exist")
    return content


def read_text(path: Path) -> str:
    """The UTF-8 text in a file; CheckpointError if it is none."""
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from None
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer; run `git lfs pull` in its folder")
    return text


def read_object(path: Path, limit: int = LARGEST_FILE) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file; CheckpointError if it is malformed or too large."""
    content = read_if_there(path, limit)
    return {} if content is None else parse_object(path, content)


def parse_object(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in the content of a file; CheckpointError if it is malformed."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8, nesting without end
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, found {type(value).__name__}")
    return value
