"""The demo: training is repeatable, held-out text is held out, and all of it runs, with the real daemon."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import demo
from benchmarks.demo_models import (
    EOS,
    EOS_ID,
    QUICK,
    QUICK_RECIPES,
    Recipe,
    Text,
    byte_tokenizer,
    load_texts,
    questions,
    relative_change,
    train_models,
)

ROOT = Path(__file__).parent.parent
TINY_RECIPES = tuple(dataclasses.replace(recipe, steps=2) for recipe in QUICK_RECIPES)
TINY_TEXTS = {
    recipe.text: Text(training=f"All about {recipe.text}, at length. " * 20, held_out="Nothing.")
    for recipe in QUICK_RECIPES
}


def train_tiny(folder: Path, recipes: tuple[Recipe, ...] = TINY_RECIPES) -> tuple[dict[str, Path], str]:
    """The model directories and what was logged."""
    lines: list[str] = []
    return train_models(folder, QUICK, recipes, TINY_TEXTS, lines.append), "\n".join(lines)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_demo_runs_from_training_to_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.demo", "--quick", "--keep", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr

    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in finished.stdout.splitlines() if "│" in line
    ]
    named = {row[0].split()[0]: row[1:] for row in rows}
    assert list(named) == ["base", "ft", "pt", "average", "task_arithmetic", "widen"]
    for name, cells in named.items():
        assert all(0 < float(bits) < 10 for bits in cells[:3]), name
        if name in demo.SPECS:
            assert re.fullmatch(r"\d+\.\d\d s", cells[3])
            assert re.fullmatch(r"[1-9]\d* MiB", cells[4])
    for method in ("linear", "task_arithmetic", "widen"):
        assert f'mergecore_jobs_total{{method="{method}",state="done"}} 1\n' in finished.stdout

    (work,) = tmp_path.glob("run-*")
    assert {path.name for path in (work / "outputs").iterdir()} == set(demo.SPECS)
    assert len(list((work / "spool" / "done").iterdir())) == len(demo.SPECS)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"base", "ft", "pt"}
    assert str(tmp_path) in finished.stdout.splitlines()[-1]


def test_demo_tells_why_a_merge_failed(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with demo.running_daemon(tmp_path, models, tmp_path / "outputs") as daemon:
        demo.drop(daemon.spool, "average", demo.SPECS["average"])
        with pytest.raises(demo.DemoError, match=r"'average' failed: average\.yaml.*'ft' was not found"):
            demo.wait_for_job(daemon, "average")


def test_demo_leaves_no_daemon_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), demo.running_daemon(tmp_path, tmp_path, tmp_path / "outputs") as daemon:
        raise KeyError
    assert daemon.process.returncode == 0


def test_demo_tells_why_the_daemon_did_not_start(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where the spool should be")
    with (
        pytest.raises(demo.DemoError, match=r"(?s)ended by itself with exit code 2:.*spool"),
        demo.running_daemon(tmp_path, tmp_path, tmp_path / "outputs"),
    ):
        pass


def test_training_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, _ = train_tiny(tmp_path / "first")
    second, _ = train_tiny(tmp_path / "second")
    for name in first:
        assert contents(first[name]) == contents(second[name])
    for name in ("ft", "pt"):
        assert 0 < relative_change(first[name], first["base"]) < 1


def test_models_are_trained_again_only_when_their_recipe_or_their_origins_changes(tmp_path: Path) -> None:
    models, log = train_tiny(tmp_path)
    assert "already trained" not in log
    before = {name: contents(folder) for name, folder in models.items()}

    _, log = train_tiny(tmp_path)
    assert log.count("already trained") == 3
    assert {name: contents(folder) for name, folder in models.items()} == before

    base, ft, pt = TINY_RECIPES
    _, log = train_tiny(tmp_path, (base, dataclasses.replace(ft, seed=9), pt))
    assert log.count("already trained") == 2
    assert contents(models["ft"])["model.safetensors"] != before["ft"]["model.safetensors"]

    _, log = train_tiny(tmp_path, (dataclasses.replace(base, steps=3), ft, pt))
    assert "already trained" not in log


def test_a_folder_that_the_demo_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("dear to me")
    with pytest.raises(FileExistsError, match="is not a model of the demo"):
        train_tiny(tmp_path)
    assert (tmp_path / "base" / "mine.txt").read_text() == "dear to me"


def test_models_are_saved_in_bfloat16_with_an_untied_head(tmp_path: Path) -> None:
    models, _ = train_tiny(tmp_path)
    raw = (models["pt"] / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    del header["__metadata__"]
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(header)


def test_tokens_are_bytes() -> None:
    tokenizer = byte_tokenizer()
    text = "def f():\r\n\treturn 'é ☃ 🐍'\x00\x7f"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert bytes(tokens) == text.encode()
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode(EOS) == [EOS_ID]


def test_no_held_out_paragraph_is_trained_on() -> None:
    def paragraphs(text: str) -> set[str]:
        return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")} - {""}

    texts = load_texts()
    trained = set().union(*(paragraphs(text.training) for text in texts.values()))
    for name, text in texts.items():
        assert not paragraphs(text.held_out) & trained, name
        assert len(text.held_out) > 10_000, name
        assert len(text.training) > 10 * QUICK.window, name


def test_a_question_is_made_of_each_docstring() -> None:
    source = """
class Tree:
    "A tree.\\n\\nIt grows."
    async def fell(self):
        "Cut\\n   it."
    def bare(self): ...
"""
    assert questions("wood", source) == (
        "### Instruction:\nWhat does the class `wood.Tree` do?\n### Response:\nA tree.\n\n"
        "### Instruction:\nWhat does the function `wood.Tree.fell` do?\n### Response:\nCut it."
    )
