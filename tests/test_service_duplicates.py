"""The same spec dropped twice runs once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergecore.spec import load_spec
from service.commands import submit_command
from service.config import WORKER_COMMAND
from service.duplicates import UNLIKE_ANY, done_before, fingerprint, forced, running_before
from service.errors import ServiceError
from service.fingerprints import KNOWN
from service.retention import apply, parse_keep
from service.spool import Job, Spool
from service.status import JobStatus
from service.worker import find_model
from tests.models import LLAMA, llama, moved, write_model
from tests.service_support import running_daemon, wait_until


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tensors = llama(hidden=16, vocabulary=24)
    for i, name in enumerate("ab"):
        write_model(tmp_path / "models" / name, moved(tensors, 1e-3, i), {**LLAMA, "num_hidden_layers": 2})
    return tmp_path / "models"


def linear(**changes: Any) -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    return {"merge_method": "linear", "models": entries, "run": {"output": "out"}, **changes}


def test_a_spec_that_is_dropped_again_is_a_duplicate_unless_it_is_forced(tmp_path: Path, models: Path) -> None:
    with running_daemon(tmp_path / "d", worker_command=WORKER_COMMAND, models=[str(models)], jobs=2) as daemon:
        for name in ("one.yaml", "two.yaml"):  # at the same time: the second waits for the first
            daemon.drop(name, **linear())
        wait_until(lambda: not list(daemon.spool.running.iterdir()) and len(daemon.spool.jobs()) == 2, "both")
        (first,), (second,) = daemon.jobs("done").values(), daemon.jobs("duplicate").values()
        assert second.result == {"duplicate_of": first.job, "output": str(daemon.outputs / "out")}
        assert second.output == first.output
        assert first.fingerprint == second.fingerprint != ""
        assert daemon.metric('mergecore_jobs_total{method="linear",state="duplicate"}') == 1

        (tmp_path / "three.yaml").write_text(json.dumps(linear()))
        submit_command(tmp_path / "three.yaml", daemon.spool.root, force=True)
        assert "exists already" in daemon.wait_for("failed", "three.yaml")["three.yaml"].error

        shutil.rmtree(daemon.outputs / "out")
        daemon.drop("four.yaml", **linear())
        daemon.wait_for("done", "four.yaml")
        assert (daemon.outputs / "out" / "config.json").exists()


# --- what is the same ---


def fingerprint_of(spec: dict[str, Any], models: Path) -> str:
    return fingerprint(load_spec(spec), partial(find_model, roots=[models]))


def touch(models: Path) -> None:
    os.utime(models / "a" / "model.safetensors", (1, 1))


def grow(models: Path) -> None:
    with (models / "b" / "config.json").open("a") as file:
        file.write(" ")


def add(models: Path) -> None:
    (models / "b" / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("change", [touch, grow, add])
def test_any_change_of_a_models_files_makes_another_job(models: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint_of(linear(), models)
    assert fingerprint_of(linear(), models) == before
    change(models)
    assert fingerprint_of(linear(), models) != before


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"run": {"output": "out", "priority": 9, "threads": 1, "memory": "64MiB"}}, True),
        ({"run": {"output": "other"}}, False),
        ({"run": {"output": "out", "shard_size": "1GB"}}, False),
        ({"dtype": "float32"}, False),
        ({"seed": 1}, False),
        ({"models": list(reversed(linear()["models"]))}, False),
        ({"tokenizer_source": "a"}, False),
    ],
)
def test_what_changes_the_result_or_its_place_makes_another_job(
    models: Path, changes: dict[str, Any], same: bool
) -> None:
    assert (fingerprint_of(linear(), models) == fingerprint_of(linear(**changes), models)) is same


def test_only_a_done_job_whose_output_is_there_counts(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    output = tmp_path / "out"
    output.mkdir()

    def ended(state: str, **changes: Any) -> None:
        (spool.incoming / "a.yaml").write_text("{}")
        job = spool.claim("a.yaml")
        assert job is not None
        job.finish(state, **{"fingerprint": "f" * 32, "output": str(output), **changes})

    ended("failed")
    ended("done")
    ended("done", fingerprint="0" * 32)
    assert done_before(spool, "f" * 32) is None, "without a manifest it is no output"
    (output / "mergecore_manifest.json").write_text("{}")
    found = done_before(spool, "f" * 32)
    assert found is not None
    assert found.state == "done"
    ended("duplicate", fingerprint="d" * 32, result={"duplicate_of": found.job})
    assert done_before(spool, "d" * 32) is None
    assert done_before(spool, "e" * 32) is None
    (spool.root / KNOWN / ("e" * 32)).write_text(f"../done/{found.job}")
    assert done_before(spool, "e" * 32) is None, "a note is not believed"
    (spool.root / KNOWN / ("e" * 32)).write_text(found.job)
    assert done_before(spool, "e" * 32) is None
    note = spool.root / KNOWN / ("f" * 32)
    note.rename(tmp_path / "note")
    note.symlink_to(tmp_path / "note")
    assert done_before(spool, "f" * 32) is None, "a link is no note"
    (tmp_path / "note").rename(note)
    assert done_before(spool, "f" * 32) is not None
    assert {one.state for one in spool.jobs()} == {"done", "failed", "duplicate"}, "notes are no jobs"
    assert apply(spool, parse_keep(0), parse_keep("all"), datetime.now(UTC))
    assert done_before(spool, "f" * 32) is None
    assert not (spool.root / KNOWN / ("f" * 32)).exists(), "nor do notes of removed jobs stay"


def test_the_older_of_two_running_jobs_waits_for_none_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.prepare()
    jobs: list[tuple[Job, JobStatus]] = []
    for _ in range(2):
        (spool.incoming / "a.yaml").write_text("{}")
        job = spool.claim("a.yaml")
        assert job is not None
        jobs.append((job, job.update(fingerprint="f", created=f"2026-01-01T00:00:0{len(jobs)}.000Z")))
    (old_job, old), (_, new) = jobs
    assert running_before(spool, old) is None
    assert (running_before(spool, new) or JobStatus()).job == old.job
    for other, waits in (("", True), (UNLIKE_ANY, False), ("g", False), ("f", True)):
        old_job.update(fingerprint=other)
        assert (running_before(spool, new) is not None) is waits
    old_job.release()
    assert running_before(spool, new) is None
    jobs[1][0].release()


# --- submit --force ---


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels: []\n",
        "# a comment\n\nmerge_method: linear  # why\nrun:\n  output: out   # place\n  threads: 1\n",
        "run: {output: out}\nx: 1\n",
        "run: {}\nx: 1",
        "run:\nx: 1\n",
        "run: {force: false, output: a}\n",
        "run:\n    output: a\n    force: no\n",
        '{"merge_method": "linear", "run": {"output": "out"}}',
        '{"merge_method": "linear"}',
        "name: one\nx: 1\n---\nname: two\nrun: {output: b}\n",
        "---\na: é\n...\n",
    ],
)
def test_forcing_changes_nothing_of_a_spec_but_run_force(text: str) -> None:
    before, after = list(yaml.safe_load_all(text)), list(yaml.safe_load_all(forced(text)))
    for one in before:
        one["run"] = {**(one.get("run") or {}), "force": True}
    assert after == before
    assert all(line in forced(text) for line in text.splitlines() if line.startswith("#"))
    assert forced(forced(text)) == forced(text)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "just words", "run: 7\n", "a: b: c"])
def test_what_is_no_spec_cannot_be_forced(text: str) -> None:
    with pytest.raises(ServiceError, match=r"cannot set run\.force"):
        forced(text)
