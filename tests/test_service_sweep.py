"""Sweeps in the daemon: one job with its progress, cancel and retry, workers that die, and where its models may lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import mergecore
from service.commands import cancel_command, retry_command
from tests.models import llama, load_tensors, spec_dict, write_trio
from tests.service_support import DaemonProcess, running_daemon, wait_until

NAMES = {"lambda-0.5", "lambda-1.0", "widen"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and what a sweep makes of them without a daemon."""
    folder = tmp_path_factory.mktemp("sweep")
    write_trio(folder / "models", llama(layers=8))
    mergecore.merge(mergecore.load_spec(sweep(folder)), folder / "out")
    return folder


def sweep(folder: Path) -> dict[str, Any]:
    spec = spec_dict("task_arithmetic", *(folder / "models" / name for name in ("base", "near", "far")))
    spec["sweep"] = {"parameters": {"parameters.lambda": [0.5, 1.0]}, "points": [{"merge_method": "widen"}]}
    return {**spec, "run": {"device": "cpu", "threads": 1}}


def options(folder: Path) -> dict[str, Any]:
    """Workers that wait in the middle of a merge while there is a file `hold` beside the models."""
    code = (
        "import os, sys, time\n"
        "import service.worker as worker\n"
        "from mergecore import engine\n"
        "from mergecore.output import lanes\n"
        "lanes.CHECKPOINT_SECONDS = 0\n"
        "count, seen = engine.Merge.count, 0\n"
        "def counted(merge, *nbytes):\n"
        "    global seen\n"
        "    count(merge, *nbytes)\n"
        "    seen += 1\n"
        f"    while seen == 60 and os.path.exists({str(folder / 'hold')!r}):\n"
        "        [output.writer.sync() for output in merge.outputs]\n"
        f"        open({str(folder / 'held')!r}, 'w').close()\n"
        "        time.sleep(0.02)\n"
        "        if merge.is_stopping(): break\n"
        "engine.Merge.count = counted\n"
        "sys.exit(worker.main())\n"
    )
    command = [sys.executable, "-c", code]
    return {"worker_command": command, "models": [str(folder / "models")]}


def wait_held(daemon: DaemonProcess, folder: Path) -> None:
    wait_until((folder / "held").exists, f"a worker in the middle; log:\n{daemon.log()}")


def hold(folder: Path) -> None:
    (folder / "held").unlink(missing_ok=True)
    (folder / "hold").touch()


def release(folder: Path) -> None:
    (folder / "hold").unlink()


def assert_as(folder: Path, out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {*NAMES, "README.md", "mergecore_manifest.json"}
    for name in NAMES:
        for file in ("model.safetensors", "config.json"):
            assert (out / name / file).read_bytes() == (folder / "out" / name / file).read_bytes()


def test_a_dropped_sweep_is_one_job_and_the_same_spec_is_not_run_again(folder: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "d", **options(folder)) as daemon:
        daemon.drop("first.json", **sweep(folder))
        job = daemon.wait_for("done", "first.json")["first.json"]
        assert os.listdir(daemon.outputs) == [Path(job.output).name]
        assert_as(folder, Path(job.output))
        tensors = 3 * len(load_tensors(folder / "models" / "base"))
        assert (job.progress["tensors_done"], job.progress["tensors_total"]) == (tensors, tensors)
        assert daemon.metric("mergecore_tensors_total") == tensors
        daemon.drop("second.json", **sweep(folder))
        again = daemon.wait_for("duplicate", "second.json")["second.json"]
        assert again.result["duplicate_of"] == job.job


def test_a_sweep_that_is_cancelled_goes_on_at_a_retry(folder: Path, tmp_path: Path) -> None:
    hold(folder)
    with running_daemon(tmp_path / "d", **options(folder)) as daemon:
        daemon.drop("sweep.json", **sweep(folder))
        wait_held(daemon, folder)
        assert 0 < wait_until(lambda: daemon.jobs("running")["sweep.json"].progress.get("ratio"), "progress") < 1
        cancel_command(daemon.spool.root, "sweep.json")
        daemon.wait_for("cancelled", "sweep.json")
        assert all(name.startswith(".") for name in os.listdir(daemon.outputs))
        release(folder)
        retry_command(daemon.spool.root, "sweep.json")
        job = daemon.wait_for("done", "sweep.json")["sweep.json"]
        assert job.result["resumed"]
        assert_as(folder, Path(job.output))
        assert os.listdir(daemon.outputs) == [Path(job.output).name]


def test_a_worker_that_is_killed_is_replaced_and_the_sweep_goes_on(folder: Path, tmp_path: Path) -> None:
    hold(folder)
    with running_daemon(tmp_path / "d", **options(folder)) as daemon:
        daemon.drop("sweep.json", **sweep(folder))
        wait_held(daemon, folder)
        daemon.kill_worker("sweep.json")
        release(folder)
        job = daemon.wait_for("done", "sweep.json")["sweep.json"]
        assert job.attempts == 2
        assert job.result["resumed"]
        assert_as(folder, Path(job.output))
        assert os.listdir(daemon.outputs) == [Path(job.output).name]


def test_a_sweep_published_by_a_worker_that_died_right_after_is_done(folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "import service.worker as worker\n"
        "record = worker.Reporter.record\n"
        "def dying(self, **changes):\n"
        f"    if 'result' in changes and not os.path.exists({str(tmp_path / 'died')!r}):\n"
        f"        open({str(tmp_path / 'died')!r}, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    record(self, **changes)\n"
        "worker.Reporter.record = dying\n"
        "sys.exit(worker.main())\n"
    )
    command = [sys.executable, "-c", code]
    with running_daemon(tmp_path / "d", worker_command=command, models=[str(folder / "models")]) as daemon:
        daemon.drop("sweep.json", **sweep(folder))
        job = daemon.wait_for("done", "sweep.json")["sweep.json"]
        assert job.attempts == 2
        assert job.result["tensors"] == 3 * len(load_tensors(folder / "models" / "base"))
        assert_as(folder, Path(job.output))


def test_a_sweep_reads_and_writes_only_where_it_may(folder: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "d", **options(folder)) as daemon:
        outside = sweep(folder)
        outside["models"][0]["model"] = str(tmp_path / "elsewhere")
        daemon.drop("outside.json", **outside)
        up = sweep(folder)
        up["run"]["output"] = "../up"
        daemon.drop("up.json", **up)
        slashes = sweep(folder)
        slashes["sweep"] = {"points": [{"models.0.parameters./../../x": "../../y"}]}
        daemon.drop("slashes.json", **slashes)
        jobs = daemon.wait_for("failed", "outside.json", "up.json", "slashes.json")
        assert "does not lie below a model folder" in jobs["outside.json"].error
        assert "not a name below the outputs folder" in jobs["up.json"].error
        assert os.listdir(daemon.outputs) == []
    assert not (tmp_path / "up").exists()
