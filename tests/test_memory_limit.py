"""Merges and daemons under a memory limit of the kernel's (MemoryMax= of systemd): what fits, and who is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from mergecore import load_spec, plan
from mergecore.output.verify import verify_output
from service.config import WORKER_COMMAND
from tests.memory_limit import memory_limit
from tests.models import LLAMA, spec_dict, write_model
from tests.service_support import running_daemon

GREEDY = """
import sys
import service.worker as worker

worker.run = lambda *_: bytearray(1 << 30) and 0
sys.exit(worker.main())
"""


def test_the_kernel_kills_the_worker_not_the_daemon_and_the_job_fails_after_its_attempts(tmp_path: Path) -> None:
    program = tmp_path / "greedy_worker.py"
    program.write_text(GREEDY)
    command = [*WORKER_COMMAND[:2], str(program)]
    with (
        memory_limit(200 << 20) as limit,
        running_daemon(tmp_path / "d", worker_command=command, attempts=2) as daemon,
    ):
        limit.add(daemon.process.pid)
        daemon.drop("a.yaml")
        status = daemon.wait_for("failed", "a.yaml")["a.yaml"]
        assert limit.kills == 2
        assert (
            "worker was killed by signal 9: likely out of memory; see dmesg; attempt 2 of 2, the last" in status.error
        )
        assert (daemon.spool.failed / status.job / "error.txt").read_text().startswith(status.error)
        assert "likely out of memory; see dmesg; attempt 1 of 2" in daemon.log()


def test_a_merge_of_four_times_the_limit_runs_within_it(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    tensors = {
        f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(64, 4096, generator=random).bfloat16().repeat(128, 1)
        for layer in range(4)
    }
    base = write_model(tmp_path / "models" / "0", tensors, LLAMA)
    near, far = (Path(shutil.copytree(base, tmp_path / "models" / name)) for name in "12")
    spec = spec_dict("task_arithmetic", base, near, far, run={"memory": "64MiB"})
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    planned = plan(load_spec(spec))
    nbytes = 256 << 20
    assert planned.bytes_to_read + planned.bytes_to_write >= 4 * nbytes
    command = [sys.executable, "-m", "mergecore.cli", "merge", str(tmp_path / "spec.yaml"), str(tmp_path / "out")]
    with memory_limit(nbytes) as limit:
        done = subprocess.run([*limit.command, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert limit.kills == 0
    assert verify_output(tmp_path / "out") == []
