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
import threading
from pathlib import Path
from typing import Any

import pytest

import mergecore
from mergecore.cli import main
from mergecore.errors import Interrupted, MergecoreError, OutputError, OutputExistsError, SpecError
from mergecore.output.staging import Journal
from mergecore.progress import Progress
from mergecore.scoring import ScoreError, run_command
from mergecore.spec import filled, load_spec, parse_spec
from tests.models import load_tensors, moved, tensor_bytes, write_model
from tests.searches import OPTIMUM, WEIGHTS, calls, exists, history, hold, release, search_dict, write_search
from tests.service_support import ROOT, wait_until

LARGE = {"population": 6, "generations": 8}


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
    assert told["parameters"][WEIGHTS[0]] in (0.0, pytest.approx(1.5, abs=0.3))


def test_a_search_begins_at_the_values_of_the_spec(folder: Path, tmp_path: Path) -> None:
    spec = search_dict(folder, generations=1, sigma=1e-4)
    spec["models"][0]["parameters"] = {"weight": 0.25}
    mergecore.merge(load_spec(spec), tmp_path / "out")
    for row in trials(tmp_path / "out"):
        assert float(row[WEIGHTS[0]]) == pytest.approx(0.25, abs=1e-3)
        assert float(row[WEIGHTS[1]]) == pytest.approx(0.75, abs=1e-3)  # absent: the middle of its range


def test_entries_of_gradients_and_of_filters_are_parameters_too(folder: Path) -> None:
    spec = search_dict(folder)
    spec["models"][0]["parameters"] = {"weight": [0.1, 0.2]}
    spec["parameters"] = {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": "1"}]}
    spec["sparsify"] = {"method": "dare", "drop_rate": 0.1}
    values = {
        "models.0.parameters.weight.1": 0.9,
        "parameters.lambda.1.value": 0.7,
        "sparsify.drop_rate": 0.3,
        "models.1.parameters.weight": 0.6,
    }
    made = filled(load_spec(spec), values)
    assert made.evolve is None
    assert made.models is not None
    assert [entry.parameters["weight"] for entry in made.models] == [[0.1, 0.9], 0.6]
    assert made.parameters == {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": 0.7}]}
    assert made.sparsify is not None
    assert made.sparsify.drop_rate == 0.3


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
        ("merge:_count:20", 1),  # the second candidate is merged
        ("search:_try:7", 7),  # the seventh has a score, which is nowhere yet
        (f"merge:_count:{12 * 12 + 5}", 12),  # the best one is merged
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
    wait_until(lambda: held.exists() and held.read_text(), "the scorer")
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
    held, stop = hold(folder), threading.Event()
    waiting = threading.Thread(
        target=lambda: (wait_until(lambda: held.exists() and held.read_text(), "the scorer"), stop.set())
    )
    waiting.start()
    with pytest.raises(Interrupted, match="the scores so far are kept"):
        mergecore.merge(folder / "search.json", tmp_path / "out", should_stop=stop.is_set)
    waiting.join()
    assert not exists(int(held.read_text()))
    assert os.listdir(tmp_path) == [".out.evolve"]
    release(folder)
    mergecore.merge(folder / "search.json", tmp_path / "out", resume=True)
    assert history(tmp_path / "out") == history(folder / "out")


@pytest.mark.parametrize("change", ["spec", "input", "no resume"])
def test_another_spec_or_input_is_searched_from_zero(small: Path, tmp_path: Path, change: str) -> None:
    spec = write_search(tmp_path, generations=2)
    seen = 0

    def stop() -> bool:
        nonlocal seen
        seen += 1
        return seen > 60

    with pytest.raises(Interrupted):
        mergecore.merge(spec, tmp_path / "out", should_stop=stop)
    before = len(calls(tmp_path))
    assert before > 2
    if change == "spec":
        spec.write_text(json.dumps(search_dict(tmp_path, generations=2, sigma=0.2)))
    if change == "input":
        path = tmp_path / "models" / "far"
        write_model(path, moved(load_tensors(path), 1e-3, 8), json.loads((path / "config.json").read_text()))
    mergecore.merge(spec, tmp_path / "out", resume=change != "no resume")
    assert len(calls(tmp_path)) == before + 8


def test_an_input_that_changes_meanwhile_ends_the_search(tmp_path: Path) -> None:
    spec = write_search(tmp_path)
    far = tmp_path / "models" / "far" / "model.safetensors"

    def change(now: Progress) -> None:
        if now.search is not None and now.search.candidate == 3:
            far.write_bytes(far.read_bytes())

    with pytest.raises(MergecoreError, match="far"):
        mergecore.merge(spec, tmp_path / "out", progress=change)
    assert len(calls(tmp_path)) <= 3


def test_what_another_machine_has_scored_counts_where_it_lies(folder: Path, tmp_path: Path) -> None:
    """Its processor may have asked for other candidates; the search goes on from theirs."""
    with pytest.raises(Interrupted):
        mergecore.merge(folder / "search.json", tmp_path / "out", should_stop=lambda: len(calls(folder)) > 5)
    journal = tmp_path / ".out.evolve" / "journal.jsonl"
    records = Journal(journal).read()
    assert len(records) == 6
    for record in records[1:]:
        record["values"] = {path: value * 0.5 for path, value in record["values"].items()}
    other = Journal(journal)
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
    with pytest.raises(MergecoreError, match="no candidate of generation 1 .* printed no number"):
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


# ---- Commands


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


# ---- What is wrong is told before the first merge

TEXT = """\
merge_method: task_arithmetic
base_model: {folder}/models/base
models:
  - model: {folder}/models/near
    parameters: {{weight: [0.1, 0.5]}}
  - model: {folder}/models/far
parameters: {{lambda: 1}}
sparsify: {{method: dare, drop_rate: 0.1}}
evolve:
  parameters:
    parameters.lambda: [0.0, 2.0]
  score: {{command: "true {{model}}"}}
  generations: 2
"""
PATH = "parameters.lambda: [0.0, 2.0]"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (PATH, "parameters.lamda: [0, 1]", ":11: evolve.parameters['parameters.lamda']: at 0: task_arithmetic"),
        (PATH, "parameters.lambda: [2, 0]", ":11: evolve.parameters['parameters.lambda']: found [2, 0], expected"),
        (PATH, "parameters.lambda: [0, .nan]", "expected [lower bound, upper bound]"),
        (PATH, "parameters.lambda: 1", ":11: evolve.parameters['parameters.lambda']: found 1, expected [lower bound"),
        ("  parameters:\n    parameters.lambda: [0.0, 2.0]", "  parameters: {{}}", "found an empty mapping, expected at least one"),
        (PATH, "models.2.parameters.weight: [0, 1]", "models is a list: found '2', expected a number from 0 to 1"),
        (PATH, "models.00.parameters.weight: [0, 1]", "models is a list: found '00'"),
        (PATH, "models.-1.parameters.weight: [0, 1]", "models is a list: found '-1'"),
        (PATH, "models.0.parameters.weight: [0, 1]", "found a list there, expected a number"),
        (PATH, "models.0.parameters.weight.2: [0, 1]", "models.0.parameters.weight is a list: found '2'"),
        (PATH, "models.0.parameters.weight.1.x: [0, 1]", "weight.1 is 0.5, which has nothing below it"),
        (PATH, "model.0.parameters.weight: [0, 1]", "the spec has no 'model'; did you mean 'models'?"),
        (PATH, "parameters.: [0, 1]", "parameters has no ''"),
        (PATH, "parameters.weights: [0, 1]", "at 0: task_arithmetic has no such parameter; did you mean 'weight'?"),
        (PATH, "seed: [0, 1]", "not the place of a method parameter"),
        (PATH, "run.threads: [0, 1]", "not the place of a method parameter"),
        (PATH, "run.parameters.threads: [0, 1]", "the spec has no 'run'"),
        (PATH, "evolve.parameters.lambda: [0, 1]", "the spec has no 'evolve'"),
        (PATH, "sparsify.method: [0, 1]", "['sparsify.method']: found 'dare' there, expected a number"),
        (PATH, "sparsify.drop_rate: [0.5, 1.0]", ":11: evolve.parameters['sparsify.drop_rate']: at 1: found 1.0"),
        ("task_arithmetic", "task_arithmetik", "unknown method 'task_arithmetik'"),
        ("{{model}}", "model", "the command does not say where the model goes: write {model} in it"),
        ("true {{model}}", "nosuchprogram {{model}}", ":12: evolve.score.command: nosuchprogram is not a program"),
        ("true {{model}}", "./search.json {{model}}", "./search.json is not a program that can be run"),
        ("true {{model}}", "true '{{model}}", "evolve.score.command: cannot be split into words: No closing quotation"),
        ('command: "true {{model}}"', "text: [models]", "evolve.score.text[0]: "),
        ('command: "true {{model}}"', "text: nowhere.txt", ":12: evolve.score.text[0]: nowhere.txt does not exist"),
        ('command: "true {{model}}"', "text: []", "found an empty list, expected a list of text files"),
        ('command: "true {{model}}"', "", "expected one of text and command, found none"),
        ('command: "true {{model}}"', 'command: "true {{model}}", text: a', "found both"),
        ('command: "true {{model}}"', 'command: "true {{model}}", samples: 3', "samples has no meaning for command"),
        ('command: "true {{model}}"', "text: a, direction: maximise", "direction has no meaning for text"),
        ('command: "true {{model}}"', 'command: "true {{model}}", direction: up', "expected minimise or maximise"),
        ("generations: 2", "generation: 2", "evolve.generation: unknown key; did you mean 'generations'?"),
        ("generations: 2", "population: 4", "evolve.generations: missing, expected a value such as 10"),
        ("generations: 2", "generations: 2\n  population: 2", "found 2, expected a whole number from 3"),
        ("generations: 2", "generations: 1000000\n  population: 9", "are more than 1000000 merges"),
        ("generations: 2", "generations: 2\n  sigma: 0", "evolve.sigma: found 0, expected a number above 0"),
        ("generations: 2", "generations: 2\n  seed: -1", "evolve.seed: found -1, expected a whole number from 0"),
    ],
)  # fmt: skip
def test_a_wrong_section_is_told_with_its_line_before_the_first_merge(
    folder: Path, tmp_path: Path, old: str, new: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in TEXT
    (tmp_path / "spec.yaml").write_text(TEXT.replace(old, new, 1).format(folder=folder))
    assert main(["evolve", str(tmp_path / "spec.yaml"), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert f"mergecore: {tmp_path}/spec.yaml:" in shown
    assert told in shown
    assert os.listdir(tmp_path) == ["spec.yaml"]


def test_a_whole_number_cannot_be_searched_for(folder: Path, tmp_path: Path) -> None:
    spec = search_dict(folder, parameters={"parameters.max_iter": [1, 10]})
    spec["merge_method"] = "karcher"
    del spec["base_model"]
    with pytest.raises(SpecError, match=r"evolve.parameters\['parameters.max_iter'\]: at 4.4.*expected a whole number"):
        mergecore.merge(load_spec(spec), tmp_path / "out")


def test_only_the_last_merge_of_a_file_can_search(folder: Path, tmp_path: Path) -> None:
    first = {**search_dict(folder), "name": "first"}
    second = {"merge_method": "linear", "models": [{"model": "first"}]}
    (tmp_path / "spec.yaml").write_text(f"{json.dumps(first)}\n---\n{json.dumps(second)}\n")
    with pytest.raises(SpecError, match="evolve: only the last merge of a file can search"):
        mergecore.merge(tmp_path / "spec.yaml", tmp_path / "out")


def test_a_search_over_merges_that_read_each_other(folder: Path, tmp_path: Path) -> None:
    spec = search_dict(folder, generations=1, population=3)
    mean = {"name": "mean", "merge_method": "linear", "models": spec["models"], "parameters": {"weight": 0.5}}
    spec["models"] = [{"model": "mean"}, spec["models"][1]]
    (tmp_path / "spec.yaml").write_text(f"{json.dumps(mean)}\n---\n{json.dumps(spec)}\n")
    result = mergecore.merge(tmp_path / "spec.yaml", tmp_path / "out")
    assert result.tensors == 4 * 2 * len(load_tensors(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["out", "spec.yaml"]


def test_a_spec_without_the_section_is_no_search(folder: Path, tmp_path: Path, capsys: Any) -> None:
    spec = search_dict(folder)
    del spec["evolve"]
    (tmp_path / "plain.json").write_text(json.dumps(spec))
    assert main(["evolve", str(tmp_path / "plain.json"), str(tmp_path / "out")]) == 2
    assert "has no section evolve" in capsys.readouterr().err


def test_the_plan_tells_how_many_merges_a_search_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder / "search.json")]) == 0
    assert "search    3 generations of 4 candidates; one merge is:" in capsys.readouterr().out
    assert main(["plan", str(folder / "search.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidates"] == 12


def test_a_missing_library_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MergecoreError, match=r"pip install 'mergecore\[evolve\]'"):
        mergecore.merge(folder / "search.json", tmp_path / "out")
    assert os.listdir(tmp_path) == []
