"""Several merges in one file: planned together, run as one job, resumed where they were, nothing left behind."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

import mergecore
from mergecore.cli import main
from mergecore.errors import CheckpointError, InputFault, Interrupted, OutputError
from mergecore.output.stages import Stages
from mergecore.progress import Progress
from mergecore.spec import parse_spec
from tests.models import LLAMA, llama, load_tensors, moved, tensor_bytes, write_model

TEXT = """\
name: mean
merge_method: linear
models: [{model: near}, {model: far}]
dtype: float32
---
name: moved
merge_method: task_arithmetic
base_model: base
models: [{model: mean, parameters: {weight: 0.5}}]
dtype: float32
run: {shard_size: 20KB}
---
merge_method: slerp
base_model: moved
models: [{model: near}]
parameters: {t: [0, 0.7]}
dtype: bfloat16
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = llama(layers=2, hidden=16, vocabulary=40)
    for name, tensors in {"base": base, "near": moved(base, 3e-4, 2), "far": moved(base, 4e-3, 3)}.items():
        write_model(tmp_path / name, tensors, LLAMA)
    (tmp_path / "several.yaml").write_text(TEXT)
    return tmp_path


def by_hand(folder: Path) -> Path:
    """The same, one merge after the other with the results kept."""
    for number, text in enumerate(TEXT.split("---\n")):
        name = ("mean", "moved", "result")[number]
        (folder / f"{name}.yaml").write_text("\n".join(line for line in text.splitlines() if "name:" not in line))
        mergecore.merge(folder / f"{name}.yaml", folder / name, device="cpu")
    return folder / "result"


def test_merges_that_read_each_other_run_as_one(folder: Path) -> None:
    shown: list[Progress] = []
    result = mergecore.merge(folder / "several.yaml", folder / "out", device="cpu", progress=shown.append)
    assert sorted(path.name for path in folder.iterdir()) == ["base", "far", "near", "out", "several.yaml"]
    last = shown[-1]
    assert (last.tensors_done, last.bytes_read) == (last.tensors_total, last.bytes_read_total)
    assert all(a.bytes_read <= b.bytes_read for a, b in itertools.pairwise(shown))
    assert result.tensors == last.tensors_total == 3 * len(load_tensors(folder / "base"))
    manifest = json.loads((folder / "out" / "mergecore_manifest.json").read_text())
    assert manifest["inputs"][0]["merge"]
    assert tensor_bytes(folder / "out") == tensor_bytes(by_hand(folder))


def test_all_merges_are_planned_before_the_first_tensor_is_read(folder: Path) -> None:
    planned = mergecore.plan(mergecore.load_spec(folder / "several.yaml"))
    assert [path.name for path, _ in planned.earlier] == ["mean", "moved"]
    text = TEXT.replace("models: [{model: near}]", "models: [{model: nowhere}]")
    with pytest.raises(CheckpointError, match=r"models\[0\].model: nowhere does not exist"):
        mergecore.plan(parse_spec(text, path=folder / "several.yaml"))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("after", [1, 20, 45])
def test_an_interrupted_job_goes_on_where_it_was(folder: Path, after: int) -> None:
    seen = 0

    def stop() -> bool:
        nonlocal seen
        seen += 1
        return seen > after

    with pytest.raises(Interrupted):
        mergecore.merge(folder / "several.yaml", folder / "out", device="cpu", should_stop=stop)
    assert (folder / ".out.stages").is_dir() or after == 1
    result = mergecore.merge(folder / "several.yaml", folder / "out", device="cpu", resume=True)
    assert result.resumed
    assert not list(folder.glob(".*"))
    assert tensor_bytes(folder / "out") == tensor_bytes(by_hand(folder))


def test_a_changed_input_makes_earlier_results_worthless(folder: Path) -> None:
    seen = 0

    def stop() -> bool:
        nonlocal seen
        seen += 1
        return seen > 60

    with pytest.raises(Interrupted):
        mergecore.merge(folder / "several.yaml", folder / "out", device="cpu", should_stop=stop)
    write_model(folder / "far", moved(load_tensors(folder / "far"), 1e-2, 8), LLAMA)
    mergecore.merge(folder / "several.yaml", folder / "out", device="cpu", resume=True)
    assert tensor_bytes(folder / "out") == tensor_bytes(by_hand(folder))


def test_a_failed_job_leaves_nothing(folder: Path) -> None:
    shard = folder / "near" / "model.safetensors"

    def cut(now: Progress) -> None:
        if now.tensors_done == 30:
            shard.write_bytes(shard.read_bytes())

    with pytest.raises(InputFault):
        mergecore.merge(folder / "several.yaml", folder / "out", device="cpu", progress=cut)
    assert sorted(path.name for path in folder.iterdir()) == ["base", "far", "near", "several.yaml"]


def test_two_jobs_do_not_share_their_stages(folder: Path) -> None:
    with Stages(folder / "out", resume=False), pytest.raises(OutputError, match="another merge is using"):
        mergecore.merge(folder / "several.yaml", folder / "out", device="cpu")


def test_a_disk_that_is_too_small_for_all_is_found_before_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold the largest of the merges, but not all of them together."""
    planned = mergecore.plan(mergecore.load_spec(folder / "several.yaml"))
    sizes = [merge.bytes_to_write for merge in (*(earlier for _, earlier in planned.earlier), planned)]
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=max(sizes) + 1))
    with pytest.raises(OutputError, match=f"need {sum(sizes):,} bytes together, {max(sizes) + 1:,} are free"):
        mergecore.merge(folder / "several.yaml", folder / "out", device="cpu")
    assert not list(folder.glob(".*"))


def test_the_plan_tells_earlier_merges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder / "several.yaml")]) == 0
    told = capsys.readouterr().out
    assert "before    mean by linear: read" in told
    assert "before    moved by task_arithmetic: read" in told
    assert main(["plan", str(folder / "several.yaml"), "--json"]) == 0
    assert [merge["name"] for merge in json.loads(capsys.readouterr().out)["earlier"]] == ["mean", "moved"]
