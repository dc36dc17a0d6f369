"""Whole merges of real checkpoints under the daemon: stopped, killed and resumed, and which paths a worker refuses."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.config import WORKER_COMMAND
from service.spool import Spool
from tests.service_support import running_daemon, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny homologous Qwen2 models: base, a, b."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("models")
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(config)
    model.to(dtype=torch.bfloat16)
    for name, scale in (("base", 0.0), ("a", 1e-3), ("b", 1e-2)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(scale * torch.randn(weight.shape))
        model.save_pretrained(root / name)
    return root


def merge_spec(output: str | None = None, **changes: object) -> dict[str, object]:
    """A small merge; models by names relative to the model folder."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.5}}],
        "dtype": "bfloat16",
        **({"run": {"output": output}} if output else {}),
        **changes,
    }


def merged(spec: dict[str, object] | Path, out: Path, models: Path) -> Path:
    """The merge without any daemon."""
    from mergecore import load_spec, merge

    return merge(load_spec(spec), out, resolve=lambda name, revision: models / name).output


def digest(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")}


def test_a_dropped_spec_becomes_a_model_that_transformers_loads(folder: Path, models: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with running_daemon(folder, worker_command=WORKER_COMMAND, models=[str(models)]) as daemon:
        daemon.drop("widen.yaml", **merge_spec("out", merge_method="widen", models=[{"model": "a"}, {"model": "b"}]))
        daemon.drop("bad.yaml", merge_method="widden", models=[{"model": "a"}])
        daemon.drop("unnamed.yaml", **merge_spec())
        done = daemon.wait_for("done", "widen.yaml", "unnamed.yaml")
        bad = daemon.wait_for("failed", "bad.yaml")["bad.yaml"]

        status = done["widen.yaml"]
        assert status.output == str(daemon.outputs / "out")
        assert status.result["output"] == status.output
        assert status.method == "widen"
        assert status.progress["ratio"] == 1
        model = AutoModelForCausalLM.from_pretrained(daemon.outputs / "out")
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
        assert (daemon.outputs / done["unnamed.yaml"].job / "config.json").exists()
        assert "widden" in bad.error
        assert "bad.yaml" in bad.error
        text = (daemon.spool.failed / bad.job / "error.txt").read_text()
        assert text.split("\n\n")[0].startswith("bad.yaml")
        assert "Traceback" in text
        wait_until(lambda: (daemon.metric("mergecore_tensors_total") or 0) > 0, "counted tensors")
        assert (daemon.metric("mergecore_written_bytes_total") or 0) >= status.result["bytes_written"]
        assert "torch" not in Path(f"/proc/{daemon.process.pid}/maps").read_text()


def test_a_merge_stopped_in_the_middle_goes_on_to_the_same_bytes(folder: Path, models: Path) -> None:
    spec = merge_spec("out", merge_method="widen", models=[{"model": "a"}, {"model": "b"}])
    expected = digest(merged(spec, folder / "whole", models))

    # The worker is slowed down by a gate in the progress callback, to be stopped for certain in the middle.
    slow = folder / "slow_worker.py"
    slow.write_text(
        "import sys, time\nfrom pathlib import Path\nimport service.worker as worker\n"
        "gate = Path(sys.argv[sys.argv.index('--outputs') + 1]) / 'go'\n"
        "report, stop = worker.Reporter.progress, None\n"
        "def progress(self, now):\n"
        "    report(self, now)\n"
        "    while now.tensors_done >= 5 and not gate.exists() and not worker.Stop.requested_anywhere():\n"
        "        time.sleep(0.01)\n"
        "seen = []\n"
        "worker.Stop.requested_anywhere = staticmethod(lambda: any(one.requested for one in seen))\n"
        "install = worker.Stop.install\n"
        "worker.Stop.install = lambda self: (seen.append(self), install(self))\n"
        "worker.Reporter.progress = progress\n"
        "sys.exit(worker.main())\n"
    )
    interrupted = folder / "interrupted"
    command = [sys.executable, "-P", str(slow)]
    with running_daemon(interrupted, worker_command=command, models=[str(models)]) as daemon:
        daemon.drop("a.yaml", **spec)
        wait_until(
            lambda: (status := daemon.jobs("running").get("a.yaml")) and status.progress.get("tensors_done", 0) >= 5,
            "five tensors",
        )
        assert daemon.stop() == 0
        assert set(daemon.jobs("interrupted")) == {"a.yaml"}
        assert not (daemon.outputs / "out").exists()
    with running_daemon(interrupted, worker_command=command, models=[str(models)]) as daemon:
        daemon.open_gate()
        status = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert status.result["resumed"] is True
        assert digest(daemon.outputs / "out") == expected
        counted = daemon.metric("mergecore_tensors_total")
        assert counted is not None
        assert counted <= status.result["tensors"] - 5, "only what this daemon's worker did is counted"


def test_kill_9_of_the_daemon_stops_its_worker_and_the_next_daemon_finishes_the_job(folder: Path, models: Path) -> None:
    slow = folder / "slow_worker.py"
    slow.write_text(
        "import sys, time\nfrom pathlib import Path\nimport service.worker as worker\n"
        "gate = Path(sys.argv[sys.argv.index('--outputs') + 1]) / 'go'\n"
        "class Stop(worker.Stop):\n"
        "    def check(self):\n"
        "        while not gate.exists() and not self.requested: time.sleep(0.01)\n"
        "        super().check()\n"
        "worker.Stop = Stop\n"
        "sys.exit(worker.main())\n"
    )
    command = [sys.executable, "-P", str(slow)]
    with running_daemon(folder, worker_command=command, models=[str(models)]) as daemon:
        daemon.drop("a.yaml", **merge_spec("out"))
        worker = wait_until(
            lambda: (status := daemon.jobs("running").get("a.yaml")) and status.method and status.pid, "the worker"
        )
        daemon.stop(signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(worker), "the worker's end")
    with running_daemon(folder, worker_command=command, models=[str(models)], rescan=0.1) as daemon:
        daemon.open_gate()
        assert daemon.wait_for("done", "a.yaml")["a.yaml"].attempts == 2


def run_worker(folder: Path, spec: dict[str, object], *options: object) -> tuple[int, str, Path]:
    """Run a real worker on a job made for it; its exit code, the first paragraph of error.txt, the outputs folder."""
    spool = Spool(folder / "spool")
    spool.prepare()
    (spool.incoming / "a.yaml").write_text(json.dumps(spec))
    job = spool.claim("a.yaml")
    assert job is not None
    outputs = folder / "outputs"
    outputs.mkdir(exist_ok=True)
    command = [*WORKER_COMMAND, str(job.folder), "--outputs", str(outputs), *map(str, options)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, check=False)
    error = job.folder / "error.txt"
    job.release()
    return done.returncode, error.read_text().split("\n\n")[0] if error.exists() else "", outputs


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "a/../../evil", "link/evil", "loop/evil", ".hidden", "a\nb", "."]
)
def test_an_output_that_leads_out_of_the_outputs_folder_is_refused(folder: Path, name: str) -> None:
    (folder / "outputs").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "outputs" / "link").symlink_to(folder / "elsewhere")
    (folder / "outputs" / "loop").symlink_to("loop")
    code, error, outputs = run_worker(folder, merge_spec(name))
    assert code == 2
    assert "run.output" in error
    assert "outputs folder" in error or "cannot be looked up" in error
    assert sorted(path.name for path in outputs.iterdir()) == ["link", "loop"]
    assert list((folder / "elsewhere").iterdir()) == []


def test_models_outside_the_model_folders_are_refused(folder: Path, models: Path) -> None:
    allowed = folder / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(models / "a")
    for i, (name, message) in enumerate(
        [
            (str(models / "a"), "does not lie below a model folder"),
            ("link", "does not lie below a model folder"),
            ("../../secret", "does not lie below a model folder"),
            ("absent", "was not found; the model folders of this server are"),
            ("long" * 100, "cannot be looked up: File name too long"),
        ]
    ):
        code, error, _ = run_worker(
            folder / str(i), {"merge_method": "linear", "models": [{"model": name}]}, "--models", allowed
        )
        assert code == 2
        assert message in error
        assert "models[0].model" in error


def test_a_link_in_place_of_the_spec_is_not_followed(folder: Path) -> None:
    job = folder / "job"
    job.mkdir()
    secret = folder / "secret"
    secret.write_text("password: 123\n")
    (job / "spec.yaml").symlink_to(secret)
    done = subprocess.run(
        [*WORKER_COMMAND, job, "--outputs", folder],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert "links are not followed" in (job / "error.txt").read_text()
    assert "123" not in (job / "error.txt").read_text()


def test_an_output_that_an_earlier_attempt_published_is_taken_for_done(folder: Path, models: Path) -> None:
    # As if worker and daemon had died between the rename of the output and the note about it.
    spec, out = merge_spec("out"), folder / "outputs" / "out"
    spool = Spool(folder / "spool")
    spool.prepare()
    (spool.incoming / "a.yaml").write_text(json.dumps(spec))
    expected = digest(merged(spool.incoming / "a.yaml", out, models))
    job = spool.claim("a.yaml")
    assert job is not None
    job.update(attempts=1, output=str(out))
    job.release()
    with running_daemon(folder, worker_command=WORKER_COMMAND, models=[str(models)]) as daemon:
        again = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert again.attempts == 2
        assert again.result["output"] == str(out)
        assert digest(out) == expected

        daemon.drop("other.yaml", **merge_spec("out"))
        error = daemon.wait_for("failed", "other.yaml")["other.yaml"].error
        assert str(out) in error
