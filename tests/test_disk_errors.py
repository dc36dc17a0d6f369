"""The disk answers with I/O errors: jobs fail and name the file, nothing is half written, the daemon goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mergecore.output.lanes as lanes
from mergecore import load_spec, merge
from mergecore.errors import OutputError
from service.commands import retry_command, submit_command
from service.config import WORKER_COMMAND
from service.errors import ServiceError
from service.status import JobStatus
from tests.faulty_disk import FaultyDisk, faulty_disk
from tests.models import LLAMA, llama, spec_dict, tensor_bytes, write_trio
from tests.service_support import STAND_IN, DaemonProcess, running_daemon, wait_until

CHANGES = "create|write|truncate|fallocate|fsync|mkdir|rename|unlink|rmdir|link"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path_factory.mktemp("errors") / "disk") as disk:
        yield disk


def drop(daemon: DaemonProcess, name: str, spec: dict[str, Any]) -> None:
    path = daemon.log_path.with_name(name)
    path.write_text(json.dumps(spec))
    submit_command(path, daemon.spool.root)


def error_of(action: Callable[[], object]) -> str | None:
    """What the error says that an action ends with."""
    try:
        action()
    except OutputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("read", ["map", "pread"])
def test_an_input_that_cannot_be_read_fails_its_job_and_is_named(disk: FaultyDisk, tmp_path: Path, read: str) -> None:
    disk.format()
    trio = write_trio(disk.mount / "models", llama(layers=2, hidden=128), LLAMA)
    weights = disk.mount / "models" / "near" / "model.safetensors"
    with running_daemon(tmp_path, worker_command=WORKER_COMMAND) as daemon:
        disk.fail("read", "near/model.safetensors", beyond=weights.stat().st_size // 2)
        drop(daemon, "a.yaml", spec_dict("task_arithmetic", *trio, run={"output": "out", "read": read}))
        job = daemon.wait_for("failed", "a.yaml")["a.yaml"]
        assert str(weights) in job.error
        assert disk.failures > 0
        assert list(daemon.outputs.iterdir()) == []
        disk.mend()
        retry_command(daemon.spool.root, "a.yaml")
        daemon.wait_for("done", "a.yaml")


def test_an_output_that_cannot_be_synced_fails_its_job_and_is_named(disk: FaultyDisk, tmp_path: Path) -> None:
    disk.format()
    trio = write_trio(tmp_path / "models", llama(layers=1), LLAMA)
    outputs = disk.mount / "outputs"
    with running_daemon(tmp_path, worker_command=WORKER_COMMAND, outputs=str(outputs), jobs=2) as daemon:
        disk.fail("fsync", "data.partial/output/model")
        disk.fail("fsync", "journal.partial/journal")
        for name in ("data", "journal"):
            drop(daemon, f"{name}.yaml", spec_dict("task_arithmetic", *trio, run={"output": name}))
        failed = daemon.wait_for("failed", "data.yaml", "journal.yaml")
        assert f"{outputs}/.data.partial/output/model.safetensors: Input/output error" in failed["data.yaml"].error
        assert f"{outputs}/.journal.partial/journal.jsonl: Input/output error" in failed["journal.yaml"].error
        assert list(outputs.iterdir()) == []


def test_an_output_that_cannot_be_written_at_any_operation_is_an_error_that_names_it_and_leaves_nothing(
    disk: FaultyDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "CHECKPOINT_SECONDS", 0.0)
    disk.format()
    trio = write_trio(tmp_path / "models", dict(list(llama(layers=1).items())[:4]))
    spec = load_spec(spec_dict("task_arithmetic", *trio, run={"shard_size": 14_000}))
    merge(spec, tmp_path / "out")
    expected = tensor_bytes(tmp_path / "out")
    out = disk.mount / "out"
    for after in range(200):
        disk.fail(CHANGES, "", after=after)
        error = error_of(lambda: merge(spec, out))
        if error is None:
            break  # all that follows is the removal of what is left beside a finished output
        assert disk.failures > 0
        assert str(disk.mount) in error, after
        assert "Input/output error" in error, after
        published = out.exists()  # by a rename that could not be made durable
        disk.mend()
        if not published:
            assert merge(spec, out).resumed is False
        assert tensor_bytes(out) == expected, after
        disk.format()
    assert after > 30
    assert tensor_bytes(out) == expected


def ended(daemon: DaemonProcess, name: str) -> JobStatus | None:
    return {**daemon.jobs("done"), **daemon.jobs("failed")}.get(name)


def failed_or_ended(daemon: DaemonProcess, name: str, disk: FaultyDisk) -> bool:
    return disk.failures > 0 or ended(daemon, name) is not None


def test_a_spool_that_cannot_be_written_for_a_while_stops_no_daemon_and_loses_no_job(
    disk: FaultyDisk, tmp_path: Path
) -> None:
    disk.format()
    config = {"worker_command": STAND_IN, "spool": str(disk.mount / "spool"), "rescan": 0.1, "keep_done": 1000}
    with running_daemon(tmp_path, **config) as daemon:
        for after in range(0, 56, 3):
            name = f"{after}.yaml"
            disk.fail(CHANGES, "^/spool", after=after)
            try:
                drop(daemon, name, {"steps": 2})
            except ServiceError:
                disk.mend()
                if name not in os.listdir(daemon.spool.incoming):
                    drop(daemon, name, {"steps": 2})
            wait_until(partial(failed_or_ended, daemon, name, disk), f"an error, or the end of {name}")
            disk.mend()
            found = wait_until(partial(ended, daemon, name), f"the end of {name}: {daemon.log()}")
            assert daemon.process.poll() is None
            if found.state == "failed":
                retry_command(daemon.spool.root, name)
            daemon.wait_for("done", name)
        assert "Input/output error" in daemon.log()


def test_folders_and_files_of_the_spool_that_cannot_be_read_are_reported_and_wait(
    disk: FaultyDisk, tmp_path: Path
) -> None:
    disk.format()
    config = {"worker_command": STAND_IN, "spool": str(disk.mount / "spool"), "rescan": 0.1}
    with running_daemon(tmp_path, **config) as daemon:
        disk.fail("readdir|open", "spool/incoming")
        wait_until(lambda: f"cannot list {daemon.spool.incoming}: Input/output error" in daemon.log(), "a complaint")
        disk.mend()
        disk.fail("getattr|read|open", "spool/running/.*/(spec|status)")
        drop(daemon, "a.yaml", {"steps": 2})
        wait_until(lambda: "a-" in daemon.log() and "Input/output error" in daemon.log().split("job a-")[-1], "another")
        disk.mend()
        status = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert status.created != ""
