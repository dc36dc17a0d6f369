"""Methods that are fitted on samples, in the daemon: progress by layer and step, cancel and retry, confined data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mergecore
from service.commands import cancel_command, retry_command
from service.config import WORKER_COMMAND
from tests.models import tensor_bytes
from tests.running import checkpoints, texts
from tests.service_support import running_daemon, wait_until


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models and of their samples."""
    folder = tmp_path_factory.mktemp("models")
    checkpoints(folder, "qwen2", 3)
    texts(folder)
    return folder


def spec_of(method: str, folder: Path | None = None, **parameters: Any) -> dict[str, Any]:
    """Names as a dropped spec has them, or paths below `folder`."""
    names = ["m0", "m1", "m2", "plain.txt", "records.jsonl"]
    base, one, two, plain, records = [str(folder / name) if folder else name for name in names]
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": one, "data": plain}, {"model": two, "data": records}],
        "parameters": parameters,
        "calibration": {"samples": 4, "length": 40},
        "run": {"output": "out"},
    }


def options(models: Path) -> dict[str, Any]:
    return {"worker_command": list(WORKER_COMMAND), "models": [str(models)]}


LONG: dict[str, Any] = {"epochs": 12, "learning_rate": 0.01}


def test_a_fit_is_cancelled_and_a_retry_goes_on_to_the_same_bytes(models: Path, tmp_path: Path) -> None:
    mergecore.merge(mergecore.load_spec(spec_of("dam", models, **LONG)), tmp_path / "undisturbed")

    def steps() -> int:
        running = daemon.spool.running_jobs()
        return running[0].progress.get("steps_done", 0) if running else 0

    with running_daemon(tmp_path / "d", **options(models)) as daemon:
        daemon.drop("dam.json", **spec_of("dam", **LONG))
        wait_until(lambda: steps() > 12, f"steps; log:\n{daemon.log()}")
        status = daemon.spool.running_jobs()[0]
        assert status.progress["steps_total"] == 2 * 2 + 12 * 8  # layers of two models, then steps
        assert 0 < status.progress["ratio"] < 0.5
        cancel_command(daemon.spool.root, "dam.json")
        daemon.wait_for("cancelled", "dam.json")
        retry_command(daemon.spool.root, "dam.json")
        wait_until(lambda: steps() > 30, "the retry")
        daemon.kill_worker("dam.json")
        job = daemon.wait_for("done", "dam.json")["dam.json"]
        assert daemon.metric('mergecore_jobs_total{method="dam",state="done"}') == 1
    assert job.progress["ratio"] == 1
    assert tensor_bytes(Path(job.output)) == tensor_bytes(tmp_path / "undisturbed")


def test_samples_are_read_below_the_model_folders_only(models: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret\n" * 100)
    with running_daemon(tmp_path / "d", **options(models)) as daemon:
        for name, path in (("absolute", str(secret)), ("above", f"../../{secret}"), ("missing", "none.txt")):
            spec = spec_of("slta")
            spec["models"][0]["data"] = path
            daemon.drop(f"{name}.json", **spec)
        daemon.drop("slta.json", **spec_of("slta"))
        failed = daemon.wait_for("failed", "absolute.json", "above.json", "missing.json")
        daemon.wait_for("done", "slta.json")
    assert "does not lie below a model folder" in failed["absolute.json"].error
    assert "does not lie below a model folder" in failed["above.json"].error
    assert "models[0].data" in failed["missing.json"].error
