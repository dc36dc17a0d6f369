"""Searches for parameters: the known optimum is found, nothing is scored twice, and wrong sections are told first."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mergecore
from mergecore import evolve
from mergecore.cli import main
from mergecore.confined import OutputFolder
from mergecore.errors import InputFault, Interrupted, MergecoreError, OutputError, OutputExistsError
from mergecore.output.staging import Journal
from mergecore.progress import Progress
from mergecore.spec import load_spec, parse_spec
from tests.models import load_tensors, moved, tensor_bytes, write_model
from tests.searches import OPTIMUM, WEIGHTS, calls, exists, history, hold, release, search_dict, write_search
from tests.service_support import ROOT, wait_until

LARGE: dict[str, Any] = {"population": 6, "generations": 8}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search and its result `out`."""
    folder = tmp_path_factory.mktemp("found")
    shown: list[Progress] = []
    mergecore.merge(write_search(folder, **LARGE), folder / "out", progress=shown.append)
    (folder / "shown.json").write_text(json.dumps([[str(now), now.ratio] for now in shown]))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a smaller search, undisturbed."""
    folder = tmp_path_factory.mktemp("small")
    mergecore.merge(write_search(folder), folder / "out")
    return folder


@pytest.fixture
def folder(tmp_path: Path, small: Path) -> Path:
    """A search like `small`, in the same place as far as its spec can tell, not begun yet."""
    for name in ("calls", "hold", "held"):
        (small / name).unlink(missing_ok=True)
    return small


def trials(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(history(out).decode())))


# ---- What a search finds


def test_the_optimum_is_found(found: Path) -> None:
    told = json.loads((found / "out" / "evolve.json").read_text())
    assert list(told["parameters"]) == list(WEIGHTS)
    assert list(told["parameters"].values()) == pytest.approx(OPTIMUM, abs=0.05)
    rows = trials(found / "out")
    assert len(rows) == len(told["trials"]) == len(calls(found)) == 48
    assert [float(row["score"]) for row in rows] == calls(found)
    assert told["score"] == min(calls(found))
    assert all(0 <= float(row[path]) <= 1.5 for row in rows for path in WEIGHTS)
    assert os.listdir(found / "out" / "..").count("out") == 1
    assert not list(found.glob(".*"))


def test_the_result_is_that_of_a_plain_merge_with_the_parameters_found(found: Path, tmp_path: Path) -> None:
    manifest = json.loads((found / "out" / "mergecore_manifest.json").read_text())
    assert "evolve" not in manifest["spec_text"]
    mergecore.merge(parse_spec(manifest["spec_text"]), tmp_path / "plain")
    plain = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    ours = {path.name: path.read_bytes() for path in (found / "out").iterdir()}
    assert set(ours) - set(plain) == {"evolve.json", "evolve.csv", "evolve.svg"}
    assert {name for name in plain if ours[name] != plain[name]} == {"README.md", "mergecore_manifest.json"}
    assert json.loads(plain["mergecore_manifest.json"])["identity"] == manifest["identity"]


def test_manifest_and_model_card_tell_what_was_searched_and_found(found: Path) -> None:
    told = json.loads((found / "out" / "evolve.json").read_text())
    manifest = json.loads((found / "out" / "mergecore_manifest.json").read_text())
    assert manifest["evolve"]["parameters"] == told["parameters"]
    assert manifest["evolve"]["score"] == told["score"]
    assert manifest["evolve"]["spec_text"] == (found / "search.json").read_text()
    assert [entry["parameters"]["weight"] for entry in manifest["spec"]["models"]] == list(told["parameters"].values())
    card = (found / "out" / "README.md").read_text()
    assert "among 48 candidates" in card
    for path, value in told["parameters"].items():
        assert f"| `{path}` | {value!r} |" in card
    assert (found / "out" / "evolve.svg").read_bytes().startswith(b"<?xml")


def test_progress_counts_generations_candidates_and_the_bytes_of_all_merges(found: Path) -> None:
    shown = json.loads((found / "shown.json").read_text())
    assert shown[0][0].startswith("generation 1/8, candidate 1/6, ")
    assert shown[-1][0].startswith("generation 8/8, the best, ")
    assert len({text.rpartition(",")[0] for text, _ in shown}) == 49
    assert all(before <= after for (_, before), (_, after) in itertools.pairwise(shown))
    assert shown[-1][1] == pytest.approx(1, abs=0.01)  # headers are written, but not counted


def test_a_seed_gives_the_same_search_and_another_one_another(folder: Path, tmp_path: Path) -> None:
    mergecore.merge(folder / "search.json", tmp_path / "again")
    assert history(tmp_path / "again") == history(folder / "out")
    assert (tmp_path / "again" / "evolve.json").read_bytes() == (folder / "out" / "evolve.json").read_bytes()
    other = load_spec(search_dict(folder, seed=1, generations=1))
    mergecore.merge(other, tmp_path / "other")
    assert trials(tmp_path / "other")[0] != trials(folder / "out")[0]


def test_the_highest_score_wins_where_it_is_to_be_maximised(folder: Path, tmp_path: Path) -> None:
    spec = search_dict(folder, parameters={WEIGHTS[0]: [0.0, 1.5]}, generations=3)
    spec["evolve"]["score"]["direction"] = "maximise"
    mergecore.merge(load_spec(spec), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "evolve.json").read_text())
    assert told["score"] == max(calls(folder))
    assert not 0.2 < told["parameters"][WEIGHTS[0]] < 1.3


def test_a_search_begins_at_the_values_of_the_spec(folder: Path, tmp_path: Path) -> None:
    spec = search_dict(folder, generations=1, sigma=1e-4)
    spec["models"][0]["parameters"] = {"weight": 0.25}
    mergecore.merge(load_spec(spec), tmp_path / "out")
    for row in trials(tmp_path / "out"):
        assert float(row[WEIGHTS[0]]) == pytest.approx(0.25, abs=1e-3)
        assert float(row[WEIGHTS[1]]) == pytest.approx(0.75, abs=1e-3)  # absent: the middle of its range


def test_a_search_over_merges_that_read_each_other(folder: Path, tmp_path: Path) -> None:
    spec = search_dict(folder, generations=1, population=3)
    mean = {"name": "mean", "merge_method": "linear", "models": spec["models"], "parameters": {"weight": 0.5}}
    spec["models"] = [{"model": "mean"}, spec["models"][1]]
    (tmp_path / "spec.yaml").write_text(f"{json.dumps(mean)}\n---\n{json.dumps(spec)}\n")
    result = mergecore.merge(tmp_path / "spec.yaml", tmp_path / "out")
    assert result.tensors == 4 * 2 * len(load_tensors(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["out", "spec.yaml"]


# ---- What is not scored twice

KILLED = """
import os, signal, sys
from mergecore import cli, engine, evolve
from mergecore.output import staging
owner, name, left = sys.argv[1].split(":")
owner, left = {"merge": engine.Merge, "search": evolve._Search, "staging": staging.Staging}[owner], int(left)
original = getattr(owner, name)
def counted(*arguments, **named):
    global left
    result = original(*arguments, **named)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, counted)
sys.exit(cli.main(sys.argv[2:]))
"""


def begin(point: str, spec: Path, out: Path) -> subprocess.Popen[bytes]:
    """A search in a process of its own that is killed at this point: OWNER:METHOD:CALLS."""
    command = [sys.executable, "-c", KILLED, point, "evolve", str(spec), str(out)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("point", "scored"),
    [
        ("merge:count:20", 4),  # the second generation is merged
        ("search:_try:7", 7),  # the seventh has a score, which is nowhere yet
        (f"merge:count:{3 * 12 + 5}", 12),  # the best one is merged
    ],
)
def test_a_search_that_is_killed_goes_on_where_it_was(folder: Path, tmp_path: Path, point: str, scored: int) -> None:
    out = tmp_path / "out"
    assert begin(point, folder / "search.json", out).wait(60) == -signal.SIGKILL
    assert len(calls(folder)) == scored
    assert os.listdir(tmp_path).count(".out.evolve") == 1
    assert main(["evolve", str(folder / "search.json"), str(out), "--resume"]) == 0
    again = 1 if point.startswith("search") else 0
    assert len(calls(folder)) == 12 + again
    assert history(out) == history(folder / "out")
    assert tensor_bytes(out) == tensor_bytes(folder / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_scorer_dies_with_the_search_that_is_killed(folder: Path, tmp_path: Path) -> None:
    held = hold(folder)
    search = begin("search:_try:100", folder / "search.json", tmp_path / "out")
    wait_until(held.exists, "the scorer")
    scorer = int(held.read_text())
    assert exists(scorer)
    search.kill()
    search.wait()
    wait_until(lambda: not exists(scorer), "its end")
    release(folder)
    mergecore.merge(folder / "search.json", tmp_path / "out", resume=True)
    assert history(tmp_path / "out") == history(folder / "out")


def test_a_result_whose_search_died_right_after_is_left_alone_and_what_remains_goes(
    folder: Path, tmp_path: Path
) -> None:
    assert begin("staging:publish:13", folder / "search.json", tmp_path / "out").wait(60) == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == [".out.evolve", ".out.partial", "out"]
    with pytest.raises(OutputExistsError):
        mergecore.merge(folder / "search.json", tmp_path / "out", resume=True)
    assert os.listdir(tmp_path) == ["out"]
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(folder / "out")


def test_a_stop_ends_a_scorer_at_once_with_what_it_has_started(folder: Path, tmp_path: Path) -> None:
    held = hold(folder)
    with pytest.raises(Interrupted, match="the scores so far are kept"):
        mergecore.merge(folder / "search.json", tmp_path / "out", should_stop=held.exists)
    assert not exists(int(held.read_text()))
    assert os.listdir(tmp_path) == [".out.evolve"]
    release(folder)
    mergecore.merge(folder / "search.json", tmp_path / "out", resume=True)
    assert history(tmp_path / "out") == history(folder / "out")


@pytest.mark.parametrize("change", ["spec", "input", "no resume"])
def test_another_spec_or_input_is_searched_from_zero(small: Path, tmp_path: Path, change: str) -> None:
    spec = write_search(tmp_path, generations=2)
    with pytest.raises(Interrupted):
        mergecore.merge(spec, tmp_path / "out", should_stop=lambda: len(calls(tmp_path)) > 2)
    before = len(calls(tmp_path))
    assert before == 3
    if change == "spec":
        spec.write_text(json.dumps(search_dict(tmp_path, generations=2, sigma=0.2)))
    if change == "input":
        path = tmp_path / "models" / "far"
        write_model(path, moved(load_tensors(path), 1e-3, 8), json.loads((path / "config.json").read_text()))
    mergecore.merge(spec, tmp_path / "out", resume=change != "no resume")
    assert len(calls(tmp_path)) == before + 8


def test_an_input_that_changes_while_a_candidate_is_scored_ends_the_search(tmp_path: Path) -> None:
    spec = write_search(tmp_path)
    far = tmp_path / "models" / "far" / "model.safetensors"

    def change() -> bool:
        if len(calls(tmp_path)) == 2 and (tmp_path / ".out.evolve" / "candidate-3").exists():
            far.write_bytes(far.read_bytes())
        return False

    with pytest.raises(InputFault, match="far"):
        mergecore.merge(spec, tmp_path / "out", should_stop=change)
    assert len(calls(tmp_path)) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("room", "together"), [(1.5, 1), (3.5, 2), (4.5, 3), (100, 4)])
def test_candidates_are_merged_together_as_far_as_the_disk_has_room_and_the_result_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float, together: int
) -> None:
    one = mergecore.plan(load_spec(search_dict(folder)))
    usage = shutil.disk_usage(tmp_path)._replace(free=int(room * one.bytes_to_write))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    seen = set()

    def look(now: Progress) -> None:
        seen.add(len(list((tmp_path / ".out.evolve").glob("candidate-*"))))

    result = mergecore.merge(folder / "search.json", tmp_path / "out", progress=look)
    assert max(seen) == (together if together > 1 else 0)  # nothing is reported while a single one is there
    assert history(tmp_path / "out") == history(folder / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(folder / "out")
    reads = 3 * -(-4 // together) + 1
    assert result.bytes_read == reads * one.bytes_to_read
    assert os.listdir(tmp_path) == ["out"]


def test_candidates_that_fail_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_search(tmp_path, generations=2)
    given = json.loads(spec.read_text())
    given["out_dtype"] = "float16"
    given["evolve"]["parameters"] = {WEIGHTS[0]: [0.0, 3e6]}  # some of them overflow
    given["evolve"]["score"]["command"] = f"{sys.executable} -c 'import os; print(len(os.listdir(\"{{model}}\")))'"
    mergecore.merge(load_spec(given), tmp_path / "together")
    found = trials(tmp_path / "together")
    assert {bool(row["error"]) for row in found} == {False, True}
    assert all("overflow float16" in row["error"] for row in found if row["error"])
    monkeypatch.setattr(evolve, "MOST_TOGETHER", 1)
    mergecore.merge(load_spec(given), tmp_path / "alone")
    assert history(tmp_path / "together") == history(tmp_path / "alone")


def test_candidates_that_are_merged_when_a_search_is_stopped_are_not_merged_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        mergecore.merge(folder / "search.json", tmp_path / "out", should_stop=lambda: len(calls(folder)) > 1)
    left = {path.name for path in (tmp_path / ".out.evolve").iterdir()}
    assert left == {"journal.jsonl", "candidate-3", "candidate-4"} | (left & {"candidate-2"})
    result = mergecore.merge(folder / "search.json", tmp_path / "out", resume=True)
    one = mergecore.plan(load_spec(search_dict(folder)))
    known = 1 if "candidate-2" in left else 2
    assert result.bytes_read == (known + 3) * one.bytes_to_read
    assert history(tmp_path / "out") == history(folder / "out")


def test_what_another_machine_has_scored_counts_where_it_lies(folder: Path, tmp_path: Path) -> None:
    """Its processor may have asked for other candidates; the search goes on from theirs."""
    with pytest.raises(Interrupted):
        mergecore.merge(folder / "search.json", tmp_path / "out", should_stop=lambda: len(calls(folder)) > 5)
    journal = tmp_path / ".out.evolve" / "journal.jsonl"
    own = Journal(journal)
    own.folder = OutputFolder.at(journal.parent, [])
    records = own.read()
    assert len(records) == 6
    for record in records[1:]:
        record["values"] = {path: value * 0.5 for path, value in record["values"].items()}
    other = Journal(journal)
    other.folder = own.folder
    other.start(records[0])
    other.append(records[1:])
    other.close()
    mergecore.merge(folder / "search.json", tmp_path / "out", resume=True)
    rows, undisturbed = trials(tmp_path / "out"), trials(folder / "out")
    assert [float(row[WEIGHTS[0]]) for row in rows[:5]] == [record["values"][WEIGHTS[0]] for record in records[1:]]
    assert rows[5] != undisturbed[5]
    assert len(rows) == 12


# ---- What fails


def test_a_candidate_that_fails_is_the_worst_and_not_the_end(tmp_path: Path) -> None:
    spec = write_search(tmp_path, score='score if score < 0.012 else sys.exit("too far away")', generations=3)
    mergecore.merge(spec, tmp_path / "out")
    rows = trials(tmp_path / "out")
    failed = [row for row in rows if not row["score"]]
    assert 0 < len(failed) < 12
    assert all("ended with exit code 1: too far away" in row["error"] for row in failed)
    assert len(failed) == sum(score >= 0.012 for score in calls(tmp_path))


def test_a_candidate_that_overflows_is_the_worst_and_not_the_end(folder: Path, tmp_path: Path) -> None:
    spec = search_dict(folder, parameters={"parameters.lambda": [0.0, 4e6]}, generations=1, population=8)
    spec["out_dtype"] = "float16"
    spec["evolve"]["score"]["command"] = "echo 1 {model}/2"
    mergecore.merge(load_spec(spec), tmp_path / "out")
    rows = trials(tmp_path / "out")
    assert {bool(row["score"]) for row in rows} == {True, False}
    assert all("overflow float16" in row["error"] for row in rows if not row["score"])


def test_a_generation_of_failures_ends_the_search_and_keeps_the_scores_before(tmp_path: Path) -> None:
    spec = write_search(tmp_path, score="score if len(open(here + '/calls').readlines()) <= 4 else 'nan'")
    with pytest.raises(
        MergecoreError, match=r"no candidate of generation 2 .*the score is nan, expected a finite number"
    ):
        mergecore.merge(spec, tmp_path / "out")
    assert len(calls(tmp_path)) == 8
    (tmp_path / "score.py").write_text((tmp_path / "score.py").read_text().replace("<= 4", "<= 400"))
    mergecore.merge(spec, tmp_path / "out", resume=True)
    assert len(calls(tmp_path)) == 8 + 8
    assert not list(tmp_path.glob(".*"))


def test_a_search_without_any_score_leaves_nothing(tmp_path: Path) -> None:
    spec = write_search(tmp_path, score="'no number'")
    with pytest.raises(MergecoreError, match=r"no candidate of generation 1 .* printed no number"):
        mergecore.merge(spec, tmp_path / "new" / "out")
    assert sorted(os.listdir(tmp_path)) == ["calls", "models", "new", "score.py", "search.json"]
    assert os.listdir(tmp_path / "new") == []


def test_a_full_disk_is_found_before_the_first_candidate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OutputError, match="not enough disk space"):
        mergecore.merge(folder / "search.json", tmp_path / "out")
    assert calls(folder) == []
    assert os.listdir(tmp_path) == []


def test_an_output_that_exists_is_refused_before_the_search(folder: Path) -> None:
    with pytest.raises(OutputExistsError):
        mergecore.merge(folder / "search.json", folder / "out")
    assert calls(folder) == []


def test_a_missing_library_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MergecoreError, match=r"pip install 'mergecore\[evolve\]'"):
        mergecore.merge(folder / "search.json", tmp_path / "out")
    assert os.listdir(tmp_path) == []
