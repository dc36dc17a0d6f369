"""Samples of text: drawn by a seed, cut to length, and clear about what a file has wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo_models import byte_tokenizer
from mergecore.errors import CheckpointError, SpecError
from mergecore.features.samples import BYTES_PER_TOKEN, LONGEST_LINE, read_samples, tokenizer_in
from mergecore.tokenizer import ModelTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return tokenizer_in(folder, {})


def written(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def decoded(samples: list, tokenizer: ModelTokenizer) -> list[str]:
    return [bytes(sample.tokens.tolist()).decode() for sample in samples]


def test_records_are_drawn_once_each_and_the_same_for_one_seed(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    lines = [f"number {i:02d}" for i in range(20)]
    path = written(tmp_path, "a.jsonl", *(json.dumps({"text": line}) for line in lines))
    drawn = [decoded(read_samples(path, tokenizer, count=15, length=100, seed=s), tokenizer) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(each)) == 15 and set(each) <= set(lines) for each in drawn)
    everything = read_samples(path, tokenizer, count=50, length=100)
    assert sorted(decoded(everything, tokenizer)) == lines
    assert all(sample.nbytes == len("number 00") - 1 for sample in everything)


def test_texts_are_cut_to_length_and_short_ones_left_out(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    path = written(tmp_path, "a.jsonl", '"x"', '""', '"0123456789"', "", '{"body": "abc"}')
    with pytest.raises(SpecError, match=r"a\.jsonl:5: found \['body'\], expected a text under 'text'"):
        read_samples(path, tokenizer, count=9, length=4)
    path = written(tmp_path, "b.jsonl", '{"body": "x"}', '{"body": "0123456789"}')
    (sample,) = read_samples(path, tokenizer, count=9, length=4, field="body")
    assert decoded([sample], tokenizer) == ["0123"]
    assert sample.nbytes == 3


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=40, max_size=3000), st.integers(2, 12))
def test_stretches_of_any_text_are_parts_of_it(text: str, length: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer().save_pretrained(folder)
        tokenizer = tokenizer_in(Path(folder), {})
        path = Path(folder, "a.txt")
        path.write_bytes(text.encode())
        samples = read_samples(path, tokenizer, count=1000, length=length)
    found = [bytes(sample.tokens.tolist()) for sample in samples]
    assert all(each in text.encode() for each in found)
    assert len(found) <= -(-len(text.encode()) // (length * BYTES_PER_TOKEN))
    assert all(2 <= len(each) <= length for each in found)


def test_what_a_file_has_wrong_is_said(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    def error_of(path: Path) -> str:
        with pytest.raises(SpecError) as caught:
            read_samples(path, tokenizer, count=3, length=8)
        return str(caught.value)

    assert "a.jsonl:1: not a line of JSON" in error_of(written(tmp_path, "a.jsonl", "{"))
    assert "not a line of JSON" in error_of(written(tmp_path, "deep.jsonl", "[" * 200_000))
    assert "expected a text" in error_of(written(tmp_path, "b.jsonl", "[1]"))
    assert "has no text" in error_of(written(tmp_path, "empty.txt"))
    assert "cannot be read: No such file" in error_of(tmp_path / "none.txt")
    assert "cannot be read: Is a directory" in error_of(tmp_path)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1").join([b"abcdefgh"] * 40))
    assert "not UTF-8 at byte" in error_of(latin)
    endless = tmp_path / "endless.jsonl"
    with endless.open("wb") as file:
        file.truncate(LONGEST_LINE + 2)
    assert "a line of more than 8 MiB" in error_of(endless)


def test_a_pipe_is_no_file_of_samples(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(SpecError, match="not a plain file"):
        read_samples(tmp_path / "pipe.txt", tokenizer, count=3, length=8)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        tokenizer_in(tmp_path, {})
