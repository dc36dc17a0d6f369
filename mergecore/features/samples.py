"""Samples of text that models are run on: drawn from JSONL or plain text files by a seed, and tokenised.

Files are untrusted: only what is drawn is read, and what is malformed is a SpecError that says where.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mergecore.confined import open_input
from mergecore.errors import CheckpointError, SpecError
from mergecore.small_files import read_bytes
from mergecore.tokenizer import ModelTokenizer, read_tokenizer

BYTES_PER_TOKEN = 16
"""What is read of a text for one token that is wanted: more than tokenizers make of it in any language."""
LONGEST_LINE = 8 << 20
"""Bytes of one JSONL record."""


@dataclass(frozen=True)
class Sample:
    """One text: its token ids, int64 (n,), and how many bytes of text the tokens after the first stand for."""

    tokens: Tensor
    nbytes: int


def tokenizer_in(folder: Path | None, files: Mapping[str, bytes | Path]) -> ModelTokenizer:
    """The tokenizer of a folder, or of `files` that are yet to be written. CheckpointError if there is none."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            for name, content in files.items():
                (Path(place) / name).write_bytes(content if isinstance(content, bytes) else read_bytes(content))
            found = read_tokenizer(Path(place))
    else:
        found = read_tokenizer(folder)
    if found is None:
        raise CheckpointError(f"{folder or 'the output'} has no tokenizer, which samples of text need")
    found.backend.no_truncation()
    found.backend.no_padding()
    return found


def read_samples(
    path: Path, tokenizer: ModelTokenizer, *, count: int, length: int, field: str = "text", seed: int = 0
) -> list[Sample]:
    """`count` samples of at most `length` tokens from a file, drawn without replacement; the same for one seed.

    A `.jsonl` file has one text per line: a JSON string, or an object with the text under `field`. Of any other file
    samples are stretches that begin after a line break. Fewer samples than asked for if the file has no more.
    SpecError for a file that is missing, no plain file, not UTF-8, or has no text.
    """
    samples: list[Sample] = []
    try:
        with os.fdopen(open_input(path), "rb") as file:
            if path.suffix == ".jsonl":
                texts = _records(file, path, field, random.Random(seed))
            else:
                texts = _stretches(file, path, length * BYTES_PER_TOKEN, random.Random(seed))
            for text in texts:
                sample = _tokenised(text, tokenizer, length)
                if len(sample.tokens) > 1:
                    samples.append(sample)
                if len(samples) == count:
                    break
    except CheckpointError as error:
        raise SpecError(f"{error}; expected a JSONL or text file with samples") from error
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}; expected a JSONL or text file") from error
    if not samples:
        raise SpecError(f"{path} has no text of two or more tokens")
    return samples


def _records(file: BinaryIO, path: Path, field: str, chance: random.Random) -> Iterator[str]:
    """The texts of a JSONL file in random order. Only places of lines are held."""
    places = [0]
    while chunk := file.readline(LONGEST_LINE + 1):
        if len(chunk) > LONGEST_LINE:
            raise SpecError(f"{path}:{len(places)}: a line of more than {LONGEST_LINE >> 20} MiB")
        places.append(places[-1] + len(chunk))
    numbers = list(range(len(places) - 1))
    chance.shuffle(numbers)
    for number in numbers:
        file.seek(places[number])
        line = file.read(places[number + 1] - places[number])
        if not line.strip():
            continue
        where = f"{path}:{number + 1}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{where}: not a line of JSON: {error}") from None
        text = record.get(field) if isinstance(record, dict) else record
        if not isinstance(text, str):
            found = sorted(record)[:8] if isinstance(record, dict) else type(record).__name__
            raise SpecError(f"{where}: found {found}, expected a text under {field!r} (or name its key in 'field')")
        yield text


def _stretches(file: BinaryIO, path: Path, nbytes: int, chance: random.Random) -> Iterator[str]:
    """Stretches of a text file in random order, each from the beginning of a line where there is one."""
    size = os.fstat(file.fileno()).st_size
    numbers = list(range(-(-size // nbytes)))
    chance.shuffle(numbers)
    for number in numbers:
        file.seek(number * nbytes)
        raw = file.read(nbytes)
        if number > 0:
            raw = raw[raw.find(b"\n") + 1 :]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            # Only the ends of a stretch may cut a character.
            if 4 <= error.start < len(raw) - 4:
                raise SpecError(f"{path}: not UTF-8 at byte {number * nbytes + error.start}") from None
            text = raw.decode("utf-8", errors="ignore")
        yield text


def _tokenised(text: str, tokenizer: ModelTokenizer, length: int) -> Sample:
    encoding = tokenizer.backend.encode(text[: length * BYTES_PER_TOKEN])
    ids, offsets = encoding.ids[:length], encoding.offsets[:length]
    start, end = (offsets[1][0], max(last for _, last in offsets)) if len(ids) > 1 else (0, 0)
    return Sample(torch.tensor(ids, dtype=torch.int64), len(text[start:end].encode(errors="replace")))


def total_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of all samples together."""
    return sum(len(sample.tokens) for sample in samples)
