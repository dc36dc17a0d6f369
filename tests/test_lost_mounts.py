"""A mount goes away under a running daemon and comes back: jobs fail and say what is missing, or wait; all are done."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from service.commands import retry_command, submit_command
from tests.models import LLAMA, llama, write_trio
from tests.service_support import running_daemon, wait_until
from tests.test_service_faults import failure, gated, in_the_middle, linear, open_gate


class Mount:
    """A folder that is mounted at `place`, as a network file system would be."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place
        for path in (folder, place):
            path.mkdir(exist_ok=True)
        self.come_back()

    def come_back(self) -> None:
        command = ["mount", "--bind", str(self.folder), str(self.place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")

    def vanish(self) -> None:
        subprocess.run(["umount", "--lazy", self.place], check=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    return tmp_path / "mount"


def test_models_that_vanish_fail_their_jobs_until_they_are_back(tmp_path: Path, place: Path) -> None:
    write_trio(tmp_path / "models", llama(layers=4, hidden=64), {**LLAMA, "num_hidden_layers": 4})
    mount, folder = Mount(tmp_path / "models", place), tmp_path / "d"
    try:
        with running_daemon(folder, worker_command=gated(folder), models=[str(place)]) as daemon:
            daemon.drop("a.yaml", **linear("out", "base", "near"))
            in_the_middle(daemon, "a.yaml")
            mount.vanish()
            open_gate(daemon)
            assert str(place) in failure(daemon, "a.yaml")
            daemon.drop("b.yaml", **linear("other", "base", "near"))
            assert str(place) in failure(daemon, "b.yaml")
            assert list(daemon.outputs.iterdir()) == []
            mount.come_back()
            for name in ("a.yaml", "b.yaml"):
                retry_command(daemon.spool.root, name)
            daemon.wait_for("done", "a.yaml", "b.yaml")
    finally:
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def test_outputs_that_vanish_fail_the_job_and_a_retry_finishes_it(tmp_path: Path, place: Path) -> None:
    write_trio(tmp_path / "models", llama(layers=4, hidden=64), {**LLAMA, "num_hidden_layers": 4})
    mount, folder = Mount(tmp_path / "disk", place), tmp_path / "d"
    try:
        options = {"models": [str(tmp_path / "models")], "outputs": str(place / "outputs")}
        with running_daemon(folder, worker_command=gated(folder), **options) as daemon:
            daemon.drop("a.yaml", **linear("out", "base", "near"))
            in_the_middle(daemon, "a.yaml")
            mount.vanish()
            (place / "go").touch()  # the gate, beside the outputs folder
            assert str(place) in failure(daemon, "a.yaml")
            mount.come_back()
            assert not (daemon.outputs / "out").exists()
            (place / "go").touch()  # on the disk, for the retry
            retry_command(daemon.spool.root, "a.yaml")
            daemon.wait_for("done", "a.yaml")
    finally:
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def test_a_spool_that_vanishes_stops_no_daemon_and_its_jobs_are_done_when_it_is_back(
    tmp_path: Path, place: Path
) -> None:
    mount = Mount(tmp_path / "disk", place)
    try:
        with running_daemon(tmp_path / "d", spool=str(place / "spool"), rescan=0.1) as daemon:
            daemon.drop("running.yaml", gate="go")
            daemon.wait_started("running.yaml")
            mount.vanish()
            daemon.open_gate()
            wait_until(lambda: f"cannot list {daemon.spool.incoming}" in daemon.log(), "a complaint")
            assert daemon.process.poll() is None
            mount.come_back()
            spec = tmp_path / "later.yaml"
            spec.write_text("{}")
            submit_command(spec, daemon.spool.root)
            found = wait_until(
                lambda: {**daemon.jobs("done"), **daemon.jobs("failed")}.get("running.yaml"), "the end of the first"
            )
            if found.state == "failed":  # its worker could not say that it was done
                retry_command(daemon.spool.root, "running.yaml")
            daemon.wait_for("done", "running.yaml", "later.yaml")
    finally:
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
