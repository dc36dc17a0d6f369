"""Scores of candidates: the last number that a program prints, and bits per byte of texts."""

from __future__ import annotations

import csv
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import mergecore
from mergecore.errors import CheckpointError, Interrupted, SpecError
from mergecore.features.samples import read_samples, tokenizer_in
from mergecore.scoring import ScoreError, run_command
from mergecore.spec import filled, load_spec
from tests.models import spec_dict
from tests.running import checkpoints, texts, twin
from tests.searches import exists
from tests.service_support import wait_until


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("print('loss 3.5 after', 2, 'steps:', -1.25e-3)", -1.25e-3),
        ("print('0.5%\\n')", 0.5),
        ("print('x' * 300_000, 7)", 7),
        ("import sys; print(1); print(2, file=sys.stderr)", 1),
        ("import os, sys; print(int(sys.argv[1] == os.environ['EXPECTED']))", 1),
        ("import os; print(1 if os.getcwd() == os.environ['PLACE'] else 0)", 1),
        ("import subprocess; subprocess.Popen(['sleep', '600']); print(4)", 4),
    ],
)
def test_the_last_number_on_standard_output_is_the_score(
    code: str, score: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "a 'model'; touch x; $(touch y) {model}"
    monkeypatch.setenv("EXPECTED", str(model))
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert run_command([sys.executable, "-S", "-c", code, "{model}"], model, tmp_path, 60, lambda: None) == score
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print(12); print('nan')", "the score is nan, expected a finite number"),
        ("print('-inf')", "the score is -inf"),
        ("print('nothing here')", "printed no number"),
        ("import sys; print(1); sys.exit('out of\\nluck')", "ended with exit code 1: out of luck"),
        ("import os; print(1, flush=True); os.kill(os.getpid(), 9)", "ended with signal 9 and said nothing"),
        ("import time; print(1, flush=True); time.sleep(600)", "was killed after 1 seconds"),
        ("import os, time; print(1, flush=True); os.close(1); os.close(2); time.sleep(600)", "killed after 1 seconds"),
    ],
)
def test_a_command_without_a_score_is_told(code: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match=told):
        run_command([sys.executable, "-S", "-c", code], tmp_path, tmp_path, 1 if "1 sec" in told else 60, lambda: None)


def test_what_a_command_leaves_behind_is_killed(tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    process = int(run_command([sys.executable, "-S", "-c", code], tmp_path, tmp_path, 60, lambda: None))
    wait_until(lambda: not exists(process), "its end")


# ---- Texts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models moved from it, with a tokenizer, and texts beside them."""
    folder = tmp_path_factory.mktemp("text")
    texts(folder)
    return checkpoints(folder, "qwen2", 3)


def text_search(models: list[Path], *files: str, **score: int) -> mergecore.MergeSpec:
    search = {
        "parameters": {"parameters.lambda": [0.0, 2.0]},
        "score": {"text": [str(models[0].parent / file) for file in files], **score},
        "population": 3,
        "generations": 1,
        "seed": 3,
    }
    return load_spec(spec_dict("task_arithmetic", *models, evolve=search, run={"device": "cpu"}))


def bits_per_byte(folder: Path, file: Path, seed: int) -> float:
    """By transformers with the whole model."""
    model = twin(folder, "qwen2", torch.float32)
    nats, nbytes = 0.0, 0
    for sample in read_samples(file, tokenizer_in(folder, {}), count=4, length=32, seed=seed):
        with torch.no_grad():
            logits = model(sample.tokens.unsqueeze(0)).logits[0, :-1].double()
        nats += float(cross_entropy(logits, sample.tokens[1:], reduction="sum"))
        nbytes += sample.nbytes
    return nats / math.log(2) / nbytes


def test_the_score_of_texts_is_their_mean_of_bits_per_byte(models: list[Path], tmp_path: Path) -> None:
    spec = text_search(models, "plain.txt", "records.jsonl", samples=4, length=32)
    mergecore.merge(spec, tmp_path / "out")
    with (tmp_path / "out" / "evolve.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 3
    for number, trial in enumerate(trials):
        merged = tmp_path / f"merged{number}"
        mergecore.merge(filled(spec, {"parameters.lambda": float(trial["parameters.lambda"])}), merged)
        found = [
            bits_per_byte(merged, models[0].parent / name, 3 + n)
            for n, name in enumerate(("plain.txt", "records.jsonl"))
        ]
        assert float(trial["score"]) == pytest.approx(sum(found) / 2, rel=1e-4)


def test_a_stop_ends_the_scoring_of_texts(models: list[Path], tmp_path: Path) -> None:
    asked_while_scoring = 0

    def stop() -> bool:
        nonlocal asked_while_scoring
        asked_while_scoring += (tmp_path / ".out.evolve" / "candidate-1").exists()
        return asked_while_scoring > 2

    with pytest.raises(Interrupted, match="the scores so far are kept"):
        mergecore.merge(text_search(models, "plain.txt", samples=4, length=32), tmp_path / "out", should_stop=stop)
    assert asked_while_scoring == 3


@pytest.mark.parametrize(
    ("content", "told"), [(b"some text \xff\xff in between", "not UTF-8"), (b"", "has no text of two or more tokens")]
)
def test_texts_that_cannot_be_read_are_told_before_the_first_merge(
    models: list[Path], tmp_path: Path, content: bytes, told: str
) -> None:
    (models[0].parent / "wrong.txt").write_bytes(content)
    with pytest.raises(SpecError, match=told):
        mergecore.merge(text_search(models, "wrong.txt"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_model_without_a_tokenizer_cannot_be_scored_by_texts(models: list[Path], tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.rename(models[0] / name, tmp_path / name)
    try:
        with pytest.raises(CheckpointError, match="no tokenizer"):
            mergecore.merge(text_search(models, "plain.txt"), tmp_path / "out")
    finally:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            os.rename(tmp_path / name, models[0] / name)
