"""What strangers drop, as operators see it: names and texts that want to be commands, models that want the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.config import WORKER_COMMAND
from tests.conftest import require_tool
from tests.fuzz.spool import fuzz
from tests.models import LLAMA, llama, write_model
from tests.service_support import ROOT, running_daemon, wait_until

ESCAPES = "\x1b]0;title\x07\x1b[31mred\x9b2J"
NAMES = [
    b"new\nline.yaml", ESCAPES.encode() + b".yaml", b"not-\xff\xfe-text.yaml", b"a..%2f..%2fetc.yaml",
    b"x" * 250 + b".yaml",
    b"<script>\"'&.yaml", "\u202eleft\u200b.yaml".encode(), b'" {job="x"} 1.yaml', b"$(touch run) `touch run`;.yaml",
]  # fmt: skip


def plain(text: bytes) -> bool:
    """Whether a terminal shows it as it is: text of whole lines and no control characters."""
    return all(c.isprintable() or c == "\n" for c in text.decode())


def mergecore(*arguments: object) -> bytes:
    command = [sys.executable, "-m", "mergecore.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return done.stdout + done.stderr


def test_no_name_and_no_text_of_a_spec_reaches_a_terminal_as_a_command(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    models = [str(tmp_path / "models")]
    with running_daemon(tmp_path / "d", worker_command=WORKER_COMMAND, models=models, jobs=3) as daemon:
        for i, name in enumerate(NAMES):
            value = json.dumps(ESCAPES)
            # The last one ends when models are looked for, the others when the spec is read.
            text = f"merge_method: {value}\n{value}: {value}\n"
            if i == len(NAMES) - 1:
                text = f"merge_method: linear\nmodels: [{{model: {value}}}]\nparameters: {{weight: 1}}\n"
            (Path(os.fsdecode(os.fsencode(daemon.spool.incoming) + b"/" + name))).write_text(text)
        (daemon.spool.incoming / f"{ESCAPES}.txt").write_text("no spec")
        wait_until(lambda: len(daemon.jobs("failed")) == len(NAMES), "all failures", 200)
        assert plain(daemon.scrape().encode())
        jobs = [one.job for one in daemon.spool.jobs()]
        shown = [mergecore("status", "--spool", daemon.spool.root)]
        shown += [mergecore("status", job, "--spool", daemon.spool.root) for job in (jobs[0], jobs[-1])]
        shown.append(mergecore("status", "--json", "--spool", daemon.spool.root))
        shown.append(mergecore("cancel", ESCAPES, "--spool", daemon.spool.root))
        assert all(map(plain, shown)), shown
        assert b"failed" in shown[0]
        for job in jobs:
            folder = daemon.spool.failed / job
            assert job.isascii()
            assert len(job) < 100
            for file in ("error.txt", "status.json", "log"):
                content = (folder / file).read_bytes()
                assert plain(content), content
            assert "red" in (folder / "error.txt").read_text()
        assert plain(daemon.log_path.read_bytes())
    assert not list(tmp_path.rglob("run"))


def test_a_model_s_tensor_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    write_model(tmp_path / "model", {ESCAPES: llama(1, 8, 8)["lm_head.weight"]}, LLAMA)
    spec = tmp_path / "spec.json"
    entries = [{"model": str(tmp_path / "model"), "parameters": {"weight": 1.0}}]
    spec.write_text(json.dumps({"merge_method": "linear", "models": entries}))
    for command in (["inspect", tmp_path / "model"], ["plan", spec], ["merge", spec, tmp_path / "out"]):
        assert plain(mergecore(*command))


def test_a_job_opens_no_connection(tmp_path: Path) -> None:
    strace = require_tool("strace", package="strace")
    models = tmp_path / "models"
    write_model(models / "a", llama(1, 8, 8), LLAMA)
    write_model(models / "b", llama(1, 8, 8), {**LLAMA, "auto_map": {"AutoModel": "own--repo.Own"}})
    for name in "ab":  # of an older format: converted by transformers
        (models / name / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one"]))
        config = {"tokenizer_class": "BertTokenizer", "auto_map": {"AutoTokenizer": ["own--repo.Own", None]}}
        (models / name / "tokenizer_config.json").write_text(json.dumps(config))
    jobs = {
        "done": [{"model": "a"}, {"model": "b"}],
        "absent": [{"model": "organisation/name@main"}, {"model": "b+organisation/adapter"}],
    }
    for name, entries in jobs.items():
        job = tmp_path / "spool" / "running" / name
        for place in ("running", "done", "failed", "incoming"):
            (tmp_path / "spool" / place).mkdir(parents=True, exist_ok=True)
        job.mkdir()
        spec = {"merge_method": "linear", "models": entries, "parameters": {"weight": 1}, "tokenizer_source": "union"}
        (job / "spec.yaml").write_text(json.dumps(spec))
        trace = tmp_path / f"{name}.trace"
        worker = [*WORKER_COMMAND, str(job), "--outputs", str(tmp_path / "outputs"), "--models", str(models)]
        command = [strace, "-f", "-qq", "-e", "trace=network", "-o", str(trace), *worker]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if "Operation not permitted" in ended.stderr:
            pytest.skip("processes may not be traced here")
        assert (ended.returncode == 0) is (name == "done"), ended.stdout + ended.stderr
        assert "AF_INET" not in trace.read_text()
    control = [sys.executable, "-c", "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"]
    subprocess.run([strace, "-f", "-e", "trace=network", "-o", str(tmp_path / "control"), *control], check=True)
    assert "AF_INET" in (tmp_path / "control").read_text()


def test_mutated_specs_and_models_end_with_a_clear_error_or_well(tmp_path: Path) -> None:
    assert sum(fuzz(tmp_path, 8, seed=1, deadline=200).values()) == 8
