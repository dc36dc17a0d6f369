"""The power goes under a real daemon and its workers: after the next start the job is done, with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergecore.output.verify import verify_output
from service.commands import submit_command
from service.config import WORKER_COMMAND
from service.errors import ServiceError
from service.spool import Spool
from tests.faulty_disk import FaultyDisk, faulty_disk
from tests.models import LLAMA, llama, spec_dict, tensor_bytes, write_trio
from tests.service_support import STAND_IN, DaemonProcess, running_daemon, wait_until
from tests.test_power_loss import places

NAME = "a.yaml"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path / "disk") as disk:
        yield disk


def submit(folder: Path, spool: Spool, **spec: Any) -> bool:
    """Whether the spec was submitted, as the command says."""
    path = folder / NAME
    path.write_text(json.dumps(spec))
    try:
        submit_command(path, spool.root)
    except ServiceError:
        return False
    return True


def lose_power(
    disk: FaultyDisk, folder: Path, after: int, survives: int | None, spec: dict[str, Any], **config: Any
) -> Spool:
    """A daemon gets a spec; the disk loses power; the spool as it is found then. The spec lies in one place, if that
    was promised."""
    disk.format()
    daemon = DaemonProcess(folder, spool=str(disk.mount / "spool"), **config)
    try:
        daemon.wait_ready()
        disk.cut_power(after, survives)
        promised = submit(folder, daemon.spool, **spec)
        wait_until(lambda: disk.is_off, f"a power loss after {after} operations of {disk.operations}; {daemon.log()}")
    finally:
        daemon.die()
        assert daemon.process.stdout is not None
        daemon.process.stdout.close()
    disk.reboot()
    found = places(daemon.spool)
    assert len(found) == 1 or (found == [] and not promised), found
    if not found:
        submit(folder, daemon.spool, **spec)
    return daemon.spool


def undisturbed(disk: FaultyDisk, folder: Path, spec: dict[str, Any], **config: Any) -> int:
    """How many operations on the disk a job takes from its submission to its end."""
    with running_daemon(folder, spool=str(disk.mount / "spool"), **config) as daemon:
        disk.cut_power(1_000_000)
        submit(folder, daemon.spool, **spec)
        daemon.wait_for("done", NAME)
        return disk.operations


def test_a_job_that_the_power_takes_from_its_daemon_at_any_moment_is_done_by_the_next(
    tmp_path: Path, disk: FaultyDisk
) -> None:
    config = {"worker_command": STAND_IN, "rescan": 0.1}
    for after in range(0, undisturbed(disk, tmp_path / "first", {"steps": 3}, **config), 4):
        folder = tmp_path / f"after {after}"
        spool = lose_power(disk, folder, after, None if after % 8 else after, {"steps": 3}, **config)
        with running_daemon(folder, spool=str(spool.root), **config) as daemon:
            job = daemon.wait_for("done", NAME)[NAME].job
        assert places(spool) == [f"done/{job}"], after


def test_a_merge_whose_power_goes_is_resumed_and_has_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, disk: FaultyDisk
) -> None:
    trio = write_trio(tmp_path / "models", llama(layers=2), LLAMA)
    spec = spec_dict("task_arithmetic", *trio, run={"output": "out", "shard_size": 30_000})
    out = disk.mount / "outputs" / "out"
    config = {"worker_command": WORKER_COMMAND, "outputs": str(out.parent), "rescan": 0.1}
    operations = undisturbed(disk, tmp_path / "d", spec, **config)
    expected = tensor_bytes(out)
    for share, survives in ((0.4, None), (0.8, 8)):
        spool = lose_power(disk, tmp_path / "d", int(share * operations), survives, spec, **config)
        assert not out.exists() or verify_output(out) == []
        with running_daemon(tmp_path / "d", spool=str(spool.root), **config) as daemon:
            daemon.wait_for("done", NAME)
            assert tensor_bytes(out) == expected
            assert [path.name for path in daemon.outputs.iterdir()] == ["out"]
