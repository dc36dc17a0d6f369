"""Every command and every piece of code in README.md runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import require_tool
from tests.models import write_model

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def block(kind: str, containing: str) -> str:
    """The one fenced block of this kind that has this text in it."""
    (text,) = [text for found, text in BLOCKS if found == kind and containing in text]
    return text


TESTED = [
    ("sh", "make demo"),
    ("yaml", "merge_method: widen"),
    ("yaml", "sweep:"),
    ("sh", "mergecore plan"),
    ("sh", "mergecore serve"),
]
TESTED += [("sh", "install-service"), ("sh", "curl"), ("python", "import mergecore")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the README assumes it: three models and the spec."""
    generator = torch.Generator().manual_seed(0)
    base = {"model.embed_tokens.weight": torch.randn(50, 16, generator=generator)}
    base["model.layers.0.mlp.up_proj.weight"] = torch.randn(24, 16, generator=generator)
    for name, std in (("base", 0.0), ("chat", 0.001), ("multilingual", 0.02)):
        tensors = {
            key: (tensor + std * torch.randn(tensor.shape, generator=generator)).bfloat16()
            for key, tensor in base.items()
        }
        write_model(tmp_path / "models" / name, tensors, {"model_type": "qwen2"})
    (tmp_path / "my-merge.yaml").write_text(block("yaml", "merge_method: widen"))
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more}


def shell(script: str, folder: Path, **more: str) -> str:
    """Runs a block as a reader would, stopping at the first command that fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_no_block_is_left_out() -> None:
    assert sorted(text for _, text in BLOCKS) == sorted(block(*which) for which in TESTED)


def test_the_make_targets_exist() -> None:
    for line in [*block("sh", "make demo").splitlines(), "make lint", "make bench", "make setup"]:
        assert line.split()[0] == "make"
        subprocess.run([*line.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_the_commands_on_a_spec(folder: Path) -> None:
    shell(block("sh", "mergecore plan"), folder)
    assert (folder / "merged" / "model.safetensors").is_file()
    assert "properties" in json.loads((folder / "spec.schema.json").read_text())


def test_the_sweep(folder: Path) -> None:
    (folder / "sweep.yaml").write_text(block("yaml", "sweep:"))
    shell("mergecore merge sweep.yaml swept", folder)
    assert (folder / "swept" / "ties_density-0.2" / "model.safetensors").is_file()


def test_the_python_code(folder: Path) -> None:
    code = block("python", "import mergecore")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "merged-by-python" / "config.json").is_file()


def test_the_spool_and_the_metrics(folder: Path) -> None:
    require_tool("curl", "curl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    lines = block("sh", "mergecore serve").replace("9417", port).splitlines()
    (serve,) = [line for line in lines if line.startswith("mergecore serve")]
    assert serve.endswith(" &")
    setup, after = lines[: lines.index(serve)], lines[lines.index(serve) + 1 :]
    shell("\n".join(setup), folder)
    with (folder / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            ["bash", "-c", f"exec {serve.removesuffix(' &')}"], cwd=folder, env=environment(), stdout=log, stderr=log
        )
    try:
        wait_for(folder / "daemon.log", lambda: "listening on" in (folder / "daemon.log").read_text())
        shell("\n".join(after), folder)
        wait_for(folder / "daemon.log", lambda: any((folder / "spool" / "done").iterdir()))
        metrics = shell(block("sh", "curl").replace("9417", port), folder)
        assert 'mergecore_jobs_total{method="widen",state="done"} 1.0' in metrics
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=60) == 0


def wait_for(log: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_the_service_installs(tmp_path: Path) -> None:
    require_tool("systemctl", "systemd")
    require_tool("systemd-sysusers", "systemd")
    shell(block("sh", "install-service"), ROOT, DESTDIR=str(tmp_path))
    assert (tmp_path / "etc/systemd/system/multi-user.target.wants/mergecore.service").is_symlink()
    assert "mergecore" in (tmp_path / "etc/passwd").read_text()
    assert (tmp_path / "etc/mergecore/mergecore.toml").is_file()
