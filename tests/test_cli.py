"""The command line as people and scripts meet it: real processes, exit codes, signals, terminals, pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergecore import cli
from tests.models import llama, spec_dict, tensor_bytes, write_model, write_trio
from tests.service_support import wait_until

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "mergecore.cli"]


def mergecore(*arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs one command, in which warnings are errors, to its end and checks its exit code."""
    command = [*COMMAND, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended


def run_here(*arguments: object) -> int:
    """The exit code of one command, run in this process."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:  # argparse
        return int(ended.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and spec.yaml, and out, which is merged from it."""
    folder = tmp_path_factory.mktemp("cli")
    write_trio(folder, llama() | {"model.steps": torch.tensor(3)})
    (folder / "spec.yaml").write_text(
        "merge_method: widen\nbase_model: base\nmodels: [{model: near}, {model: far}]\nparameters: {t: 0.9}\n"
    )
    mergecore("merge", folder / "spec.yaml", folder / "out")
    return folder


def left_in(folder: Path) -> set[str]:
    """What lies in the folder beside models, specs and out."""
    return set(os.listdir(folder)) - {"base", "near", "far", "spec.yaml", "out"}


# ---- merge


def test_merge_writes_the_model_and_says_so_in_one_line(folder: Path, tmp_path: Path) -> None:
    ended = mergecore("merge", folder / "spec.yaml", tmp_path / "out")
    result = r"22 tensors by widen, read [\d.]+ MB, wrote [\d.]+ MB in [\d.]+ s, peak memory \d+ MiB"
    assert re.fullmatch(f"{tmp_path}/out: {result}\n", ended.stdout)
    assert ended.stderr == f"1 tensor of whole numbers copied from {folder}/base: model.steps\n"
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(folder / "out")


def test_merge_prints_its_result_as_json(folder: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--memory", "64MiB", "--threads", "1", "--json"]
    result = json.loads(mergecore("merge", folder / "spec.yaml", tmp_path / "out", *options).stdout)
    assert result["output"] == str(tmp_path / "out")
    assert (result["method"], result["tensors"], result["resumed"]) == ("widen", 22, False)
    assert result["peak_rss"] > 0
    assert result["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_progress_is_a_plain_line_now_and_then_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    seldom, often = cli._log_lines(interval=1e9), cli._log_lines(interval=0)
    for show in (seldom, often):
        show("3/22 tensors", 1_500_000_000, 4_000_000_000)
    assert caplog.messages == ["3/22 tensors, 1.50 GB of 4.00 GB"]


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Runs a command whose stderr is a pseudo-terminal: exit code, and what the terminal got."""
    terminal, inside = pty.openpty()
    wide = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    with subprocess.Popen(command, cwd=ROOT, stderr=inside, stdout=subprocess.DEVNULL, env=wide) as process:
        os.close(inside)
        shown = b""
        try:
            while data := os.read(terminal, 4096):
                shown += data
        except OSError:  # EIO: the other side is closed
            pass
    os.close(terminal)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_a_terminal_shows_a_bar_with_tensors_bytes_and_speed(folder: Path, tmp_path: Path) -> None:
    code, shown = on_a_terminal([*COMMAND, "merge", str(folder / "spec.yaml"), str(tmp_path / "out")])
    assert code == 0
    lines = re.split(r"[\r\n]+", shown)
    assert any(
        re.fullmatch(r"22/22 tensors ━+ [\d.]+/[\d.]+ [kM]B [\d.]+ [kMG]?B/s 0:00:00", line) for line in lines
    ), lines
    # A note stands on a line of its own above the bar.
    assert f"1 tensor of whole numbers copied from {folder}/base: model.steps" in lines


# ---- Exit codes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["merge"], "required"),
        (["frobnicate"], "invalid choice"),
        ([], "required"),
        (["merge", "SPEC", "OUT", "--memory", "much"], "'much' is not a size such as 256MiB"),
        (["merge", "SPEC", "OUT", "--memory", "1MB"], "memory: found 1000000, expected at least 16MiB"),
        (["merge", "SPEC", "OUT", "--threads", "-1"], "threads: found -1, expected a whole number"),
        (["merge", "SPEC", "OUT", "--device", "tpu"], "device: found 'tpu', expected auto, cpu, cuda, cuda:N or"),
        (["plan", "SPEC", "--device", "tpu"], "device: found 'tpu'"),
        (["merge", "nowhere.yaml", "OUT"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["merge", "BAD", "OUT"], "bad.yaml:1: merge_method: unknown method 'wieden'; did you mean 'widen'?"),
        (["plan", "BAD"], "bad.yaml:1: merge_method: unknown method"),
        (["merge", "SPEC", "EXISTS"], "exists already and was not touched"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["status"], "name the spool"),
    ],
)
def test_wrong_specs_and_arguments_exit_with_2_and_say_why(
    folder: Path, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text((folder / "spec.yaml").read_text().replace("widen", "wieden"))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    names = {"SPEC": folder / "spec.yaml", "BAD": bad, "OUT": tmp_path / "out", "EXISTS": taken}
    assert run_here(*(names.get(word, word) for word in arguments)) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.out == ""
    assert sorted(os.listdir(tmp_path)) == ["bad.yaml", "taken"]


def test_a_wrong_spec_ends_a_process_with_2(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("merge_metod: widen\n")
    ended = mergecore("merge", tmp_path / "bad.yaml", tmp_path / "out", code=2)
    assert ended.stderr.startswith(f"mergecore: {tmp_path}/bad.yaml:1: ")
    assert "did you mean 'merge_method'" in ended.stderr


def test_a_merge_that_fails_exits_with_1_and_leaves_nothing(tmp_path: Path) -> None:
    trio = write_trio(tmp_path, llama())
    write_model(trio[1], llama() | {"model.norm.weight": torch.full((48,), torch.nan)})
    (tmp_path / "spec.json").write_text(json.dumps(spec_dict("widen", *trio)))
    ended = mergecore("merge", tmp_path / "spec.json", tmp_path / "new" / "out", code=1)
    message = f"model.norm.weight holds NaN or Inf in {trio[1]}/model.safetensors (48 entries); "
    assert ended.stderr.startswith(f"mergecore: {message}")
    assert sorted(os.listdir(tmp_path)) == ["base", "far", "near", "spec.json"]


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    pipe = " | head -n 1; exit ${PIPESTATUS[1]}"
    for arguments in ("schema", f"inspect --json {folder}/out", f"inspect {folder}/out"):
        command = " ".join(COMMAND) + f" {arguments}{pipe}"
        ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=60, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")


# ---- Signals: real ones, to a process that waits after a certain window

HELD = """
import sys
from mergecore import cli, engine
from mergecore.output import lanes
lanes.CHECKPOINT_SECONDS = 0  # every finished tensor is in the journal at once
hold_after, count = int(sys.argv.pop(1)), engine.Merge.count
def counted(merge, *nbytes):
    global hold_after
    count(merge, *nbytes)
    hold_after -= 1
    if hold_after == 0:
        for output in merge.outputs:
            output.writer.sync()
        print("holding", flush=True)
        sys.stdin.readline()
engine.Merge.count = counted
sys.exit(cli.main(sys.argv[1:]))
"""


class Held:
    """A merge that waits when `windows` windows are done, until `go_on`."""

    def __init__(self, spec: Path, out: Path, windows: int, *arguments: str) -> None:
        command = [sys.executable, "-W", "error", "-c", HELD, str(windows), "merge", str(spec), str(out), *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        assert ready
        assert self.process.stdout.readline() == "holding\n"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def go_on(self) -> tuple[int, str]:
        """Its exit code and stderr."""
        _, errors = self.process.communicate("\n", timeout=60)
        assert "Traceback" not in errors
        return self.process.returncode, errors


@pytest.fixture
def held(folder: Path) -> Iterator[Any]:
    """Starts held merges of the folder's spec; none survives the test."""
    started: list[Held] = []

    def start(out: Path, windows: int, *arguments: str) -> Held:
        started.append(Held(folder / "spec.yaml", out, windows, *arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def resumed(folder: Path, out: Path) -> bool:
    """Finishes an interrupted merge, and checks that it is what an uninterrupted one gives."""
    assert run_here("merge", folder / "spec.yaml", out, "--resume") == 0
    assert tensor_bytes(out) == tensor_bytes(folder / "out")
    assert os.listdir(out.parent) == [out.name]
    return bool(json.loads((out / "mergecore_manifest.json").read_text())["result"]["resumed"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_merge_in_order_and_resume_finishes_it(
    folder: Path, tmp_path: Path, held: Any, number: signal.Signals
) -> None:
    merge = held(tmp_path / "out", 25)
    merge.send(number)
    code, errors = merge.go_on()
    assert code == 3
    assert errors.endswith("mergecore: stopped on request; the finished tensors are kept, --resume continues\n")
    assert os.listdir(tmp_path) == [".out.partial"]
    assert resumed(folder, tmp_path / "out")


def test_a_second_signal_ends_the_process_as_if_nobody_listened() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with cli._stop_on_signals() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_interrupt_outside_the_merge_is_no_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergecore.output.verify.verify_output", interrupt)
    assert run_here("verify", folder / "out") == 3
    assert capsys.readouterr().err == "mergecore: interrupted\n"


def test_kill_9_leaves_what_resume_finishes(folder: Path, tmp_path: Path, held: Any) -> None:
    merge = held(tmp_path / "out", 25)
    merge.send(signal.SIGKILL)
    assert merge.process.wait(60) == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.partial"]
    assert resumed(folder, tmp_path / "out")


def test_two_merges_into_one_output_exclude_each_other(
    folder: Path, tmp_path: Path, held: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = held(tmp_path / "out", 25)
    assert run_here("merge", folder / "spec.yaml", tmp_path / "out") == 1
    assert f"another merge is writing {tmp_path}/out (process {first.process.pid} on " in capsys.readouterr().err
    assert first.go_on()[0] == 0
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(folder / "out")


# ---- The other commands


def test_plan_shows_what_would_be_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("plan", folder / "spec.yaml") == 0
    text = capsys.readouterr().out
    assert re.search(rf"^method    widen, 2 models, base {folder}/base$", text, re.M)
    assert re.search(r"^read      [\d.]+ MB in 2 pass\(es\) over 22 tensors$", text, re.M)
    assert re.search(r"^write     [\d.]+ MB in 1 file\(s\)$", text, re.M)
    assert re.search(r"^hold      \d+ MiB", text, re.M)
    assert re.search(r"^compute   [\d.]+ s", text, re.M)
    assert re.search(r"^warning   1 tensor of whole numbers", text, re.M)
    assert not left_in(folder)


def test_plan_as_json_tells_every_tensor(folder: Path) -> None:
    options = ["--json", "--memory", "16MiB", "--threads", "1", "--device", "cpu"]
    planned = json.loads(mergecore("plan", folder / "spec.yaml", *options).stdout)
    stored = tensor_bytes(folder / "out")
    assert planned["tensors"] == len(planned["jobs"]) == len(stored)
    assert planned["memory_held"] <= 16 << 20
    assert planned["models"] == [str(folder / "near"), str(folder / "far")]
    jobs = {job["name"]: job for job in planned["jobs"]}
    assert {name: (job["dtype"], tuple(job["shape"])) for name, job in jobs.items()} == {
        name: entry[:2] for name, entry in stored.items()
    }
    assert jobs["model.embed_tokens.weight"]["orientation"] == "rows"
    assert jobs["model.embed_tokens.weight"]["parameters"]["t"] == 0.9
    assert jobs["model.steps"]["action"] == "copy"
    result = json.loads((folder / "out" / "mergecore_manifest.json").read_text())["result"]
    assert planned["bytes_read"] == result["bytes_read"]
    assert planned["bytes_written"] == result["bytes_written"]


def test_verify_passes_a_sound_output_and_finds_one_flipped_bit(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    assert mergecore("verify", out).stdout == f"{out}: all tensors are as the manifest says\n"
    entry = json.loads((out / "mergecore_manifest.json").read_text())["tensors"]["model.layers.1.mlp.up_proj.weight"]
    with open(out / entry["file"], "r+b") as file:
        file.seek(entry["offset"] + 100)
        byte = file.read(1)[0]
        file.seek(entry["offset"] + 100)
        file.write(bytes([byte ^ 1]))
    ended = mergecore("verify", out, code=1)
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "bytes of tensor 'model.layers.1.mlp.up_proj.weight' have changed" in ended.stderr
    assert "no complete output" in mergecore("verify", folder / "base", code=1).stderr


def test_inspect_lists_the_tensors_of_a_model(folder: Path, tmp_path: Path) -> None:
    text = mergecore("inspect", folder / "base").stdout
    assert re.search(r"model\.embed_tokens\.weight +│ BF16 +│ 80x48 +│ 7,680 +│ model\.safetensors", text)
    assert re.search(r"^22 tensors, [\d.]+ MB, 1 file\(s\)$", text, re.M)
    found = json.loads(mergecore("inspect", "--json", folder / "base" / "model.safetensors").stdout)["tensors"]
    assert {name: (entry["dtype"], tuple(entry["shape"]), entry["bytes"]) for name, entry in found.items()} == {
        name: (dtype, shape, len(data)) for name, (dtype, shape, data) in tensor_bytes(folder / "base").items()
    }
    odd = "[red]experts[0].:smile:." + "x" * 300
    assert odd in mergecore("inspect", write_model(tmp_path / "odd", {odd: torch.zeros(1)})).stdout


def test_methods_lists_every_method_with_its_parameters(folder: Path) -> None:
    from mergecore.methods import METHODS

    text = mergecore("methods").stdout
    for method in METHODS.values():
        _, _, rest = text.partition(f"{method.name}: {method.summary}\n")
        assert rest
        for parameter in method.parameters:
            row = rf"^ *{parameter.name} +{re.escape(json.dumps(parameter.default))} +.*{re.escape(parameter.meaning)}"
            assert re.search(row, rest, re.M), parameter.name


def test_schema_is_json_schema() -> None:
    schema = json.loads(mergecore("schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert "merge_method" in schema["required"]


def test_submit_and_status_work_on_a_spool_without_a_daemon(folder: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    (spool / "incoming").mkdir(parents=True)
    assert mergecore("submit", folder / "spec.yaml", "--spool", spool).stdout == "spec.yaml\n"
    assert os.listdir(spool / "incoming") == ["spec.yaml"]
    status = json.loads(mergecore("status", "--spool", spool, "--json").stdout)
    assert [job["spec"] for job in status["jobs"]] == ["spec.yaml"]
    assert "spec.yaml" in mergecore("status", "--spool", spool).stdout
    assert "spec.yaml" in mergecore("status", "spec.yaml", "--spool", spool).stdout
    assert "not a spool" in mergecore("status", "--spool", tmp_path, code=2).stderr


def test_serve_runs_what_is_submitted_until_it_is_told_to_stop(folder: Path, tmp_path: Path) -> None:
    spool, outputs = tmp_path / "spool", tmp_path / "outputs"
    (tmp_path / "spec.json").write_text(json.dumps(spec_dict("linear", None, folder / "near", folder / "far")))
    options = ["--spool", str(spool), "--outputs", str(outputs), "--models", str(folder), "--port", "0"]
    with open(tmp_path / "log", "wb") as log:
        daemon = subprocess.Popen([*COMMAND, "serve", *options], cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_until((spool / "incoming").is_dir, "the spool")
        mergecore("submit", tmp_path / "spec.json", "--spool", spool)
        wait_until(lambda: os.listdir(spool / "done"), "the job's end")
        (job,) = json.loads(mergecore("status", "--spool", spool, "--json").stdout)["jobs"]
        assert (job["state"], job["spec"]) == ("done", "spec.json")
        assert run_here("verify", job["output"]) == 0
        assert Path(job["output"]).parent == outputs
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        daemon.kill()
        daemon.wait()


def test_help_tells_every_command_and_each_command_its_options() -> None:
    text = mergecore("--help").stdout
    for command in ("merge", "plan", "verify", "inspect", "methods", "schema", "serve", "submit", "status"):
        assert re.search(rf"^ +{command} ", text, re.M)
    assert "--resume" in mergecore("merge", "--help").stdout
    for option in ("--config", "--spool", "--outputs", "--models", "--host", "--port"):
        assert option in mergecore("serve", "--help").stdout
