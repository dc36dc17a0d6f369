"""Faults of disks, inputs and permissions under a real daemon with real workers: each job ends with a clear error or
with the bytes of an undisturbed run, and the daemon goes on."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.commands import retry_command
from service.config import WORKER_COMMAND
from service.status import JobStatus
from tests.models import LLAMA, llama, moved, write_model
from tests.service_support import DaemonProcess, running_daemon, wait_until

GATED = """
import sys, time
from pathlib import Path
import mergecore.output.lanes as lanes
import service.worker as worker

lanes.CHECKPOINT_SECONDS = 0.0  # what was finished before the gate is in the journal, as after 5 s of a real merge
gate = Path(sys.argv[sys.argv.index("--outputs") + 1]).parent / "go"
report = worker.Reporter.progress

def progress(self, now):
    report(self, now)
    while now.tensors_done >= 5 and not gate.exists():
        time.sleep(0.01)

worker.Reporter.progress = progress
sys.exit(worker.main())
"""
"""A real worker that waits in the middle of its merge for the file `go` beside the outputs folder."""

OBEYS_PERMISSIONS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""Before a command: permissions hold for root, too."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small homologous models."""
    tensors = llama(layers=4, hidden=64)
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        write_model(root / name, moved(tensors, 1e-3, seed), {**LLAMA, "num_hidden_layers": 4})
    return root


@pytest.fixture
def own_models(tmp_path: Path, models: Path) -> Path:
    """A copy of the models, to be damaged."""
    return Path(shutil.copytree(models, tmp_path / "models"))


def linear(output: str, *names: str) -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": 0.25 + i}} for i, name in enumerate(names)]
    return {"merge_method": "linear", "models": entries, "dtype": "bfloat16", "run": {"output": output}}


def digest(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")}


def gated(folder: Path) -> list[str]:
    """The command of a worker that waits at the gate."""
    folder.mkdir(exist_ok=True)
    program = folder / "gated_worker.py"
    program.write_text(GATED)
    return [sys.executable, "-P", str(program)]


def in_the_middle(daemon: DaemonProcess, spec: str) -> JobStatus:
    """Wait until the worker waits at the gate."""

    def half_way() -> JobStatus | None:
        status = daemon.jobs("running").get(spec)
        return status if status is not None and status.progress.get("tensors_done", 0) >= 5 else None

    return wait_until(half_way, "five tensors")


def open_gate(daemon: DaemonProcess) -> None:
    (daemon.outputs.parent / "go").touch()


def failure(daemon: DaemonProcess, spec: str) -> str:
    """Wait until the job has failed; the paragraph in its error.txt, which its status repeats."""
    status = daemon.wait_for("failed", spec)[spec]
    paragraph = (daemon.spool.failed / status.job / "error.txt").read_text().split("\n\n")[0]
    assert " ".join(paragraph.split())[:100] == status.error[:100]
    assert daemon.process.poll() is None
    return paragraph


def undisturbed(folder: Path, models: Path, *names: str) -> dict[str, str]:
    """The digests of a merge of these models that nothing disturbs."""
    with running_daemon(folder / "undisturbed", worker_command=WORKER_COMMAND, models=[str(models)]) as daemon:
        daemon.drop("a.yaml", **linear("out", *names))
        daemon.wait_for("done", "a.yaml")
        return digest(daemon.outputs / "out")


# --- disks ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(folder: Path) -> None:
    """Leave no block free where `folder` lies, as another tenant of the disk does."""
    with (folder / "others").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def test_a_disk_that_fills_up_in_the_middle_fails_the_job_and_a_retry_finishes_it(
    tmp_path: Path, own_models: Path, small_disk: Path
) -> None:
    folder = tmp_path / "d"
    for name in "ab":
        (own_models / name / "tokenizer_config.json").write_text('{"chat_template": "' + "x" * 100_000 + '"}')
    with running_daemon(
        folder, worker_command=gated(folder), models=[str(own_models)], outputs=str(small_disk / "outputs")
    ) as daemon:
        daemon.outputs, gate = small_disk / "outputs", small_disk / "go"
        daemon.drop("a.yaml", **linear("out", "a", "b"))
        in_the_middle(daemon, "a.yaml")
        fill(small_disk)
        gate.touch()
        error = failure(daemon, "a.yaml")
        assert "No space left on device" in error
        assert str(daemon.outputs) in error
        assert list(daemon.outputs.iterdir()) == [], "nothing is left, neither whole nor half"

        fill(small_disk)
        daemon.drop("b.yaml", **linear("out", "a", "b"))
        assert "space" in failure(daemon, "b.yaml")

        (small_disk / "others").unlink()
        retry_command(daemon.spool.root, "a.yaml")
        daemon.wait_for("done", "a.yaml")
        assert digest(daemon.outputs / "out") == undisturbed(tmp_path, own_models, "a", "b")


# --- inputs ---


def test_an_input_that_is_truncated_while_it_is_mapped_fails_its_job_and_no_other(
    tmp_path: Path, own_models: Path
) -> None:
    folder = tmp_path / "d"
    with running_daemon(folder, worker_command=gated(folder), models=[str(own_models)]) as daemon:
        daemon.drop("a.yaml", **linear("out", "a", "b"))
        in_the_middle(daemon, "a.yaml")
        weights = own_models / "b" / "model.safetensors"
        os.truncate(weights, 4096)
        open_gate(daemon)
        error = failure(daemon, "a.yaml")
        assert str(weights) in error
        assert "truncated" in error
        assert list(daemon.outputs.iterdir()) == []
        daemon.drop("next.yaml", **linear("next", "a", "c"))
        daemon.wait_for("done", "next.yaml")


@pytest.mark.parametrize("changed", [False, True])
def test_after_kill_9_of_daemon_and_worker_the_output_is_that_of_the_inputs_as_they_are_then(
    tmp_path: Path, own_models: Path, changed: bool
) -> None:
    folder = tmp_path / "d"
    options: dict[str, Any] = {"worker_command": gated(folder), "models": [str(own_models)], "rescan": 0.1}
    with running_daemon(folder, **options) as daemon:
        daemon.drop("a.yaml", **linear("out", "a", "b"))
        in_the_middle(daemon, "a.yaml")
        worker = daemon.worker("a.yaml")
        daemon.stop(signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        assert [path.name for path in daemon.outputs.iterdir()] == [".out.partial"]
    if changed:
        shutil.copy(own_models / "c" / "model.safetensors", own_models / "b")
    with running_daemon(folder, **options) as daemon:
        open_gate(daemon)
        status = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert status.attempts == 2
        assert status.result["resumed"] is not changed
        log = (daemon.spool.done / status.job / "log").read_text()
        assert ("started from zero" in log) is changed
        assert digest(daemon.outputs / "out") == undisturbed(tmp_path, own_models, "a", "b")
        assert [path.name for path in daemon.outputs.iterdir()] == ["out"]


# --- permissions ---


def test_folders_without_permission_are_named_and_the_jobs_are_done_once_they_have_it(
    tmp_path: Path, own_models: Path
) -> None:
    command = [*OBEYS_PERMISSIONS, *WORKER_COMMAND]
    with running_daemon(tmp_path / "d", worker_command=command, models=[str(own_models)]) as daemon:
        (own_models / "b").chmod(0)
        daemon.drop("model.yaml", **linear("model", "a", "b"))
        error = failure(daemon, "model.yaml")
        assert str(own_models / "b") in error
        assert "Permission denied" in error
        (own_models / "b").chmod(0o755)

        daemon.outputs.chmod(0o555)
        daemon.drop("output.yaml", **linear("output", "a", "c"))
        error = failure(daemon, "output.yaml")
        assert str(daemon.outputs) in error
        assert "Permission denied" in error
        daemon.outputs.chmod(0o755)

        for name in ("model.yaml", "output.yaml"):
            retry_command(daemon.spool.root, name)
        daemon.wait_for("done", "model.yaml", "output.yaml")
