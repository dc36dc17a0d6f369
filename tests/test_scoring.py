"""Scores of candidates: the last number that a program prints, and bits per byte of texts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mergecore.scoring import ScoreError, run_command
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
