"""What jobs hold while they run: memory, threads, GPUs; who waits for them, and how that is told."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergecore.spec.tables import Run
from service import resources
from service.commands import list_jobs, status_command
from service.config import ServeConfig
from service.resources import DECLARED_BYTES, WORKER_BYTES, Grant, Needs, NeverFits, Room, read_needs
from tests.running import checkpoints, texts
from tests.service_support import DaemonProcess, running_daemon, wait_until

GIB = 1 << 30


def room(**config: Any) -> Room:
    settings = {"jobs": 9, "memory": 100 * GIB, "devices": (), **config}
    return Room(ServeConfig(spool=Path("/s"), outputs=Path("/o"), **settings))


def hold(room: Room, name: str, needs: Needs) -> Grant:
    granted = room.ask(needs)
    assert isinstance(granted, Grant), granted
    room.held[name] = granted
    return granted


# --- what a spec declares ---


@given(
    st.sampled_from(["16MiB", "1 GiB", "2.5GB", "64 GiB", 1 << 30]),
    st.integers(0, 64),
    st.sampled_from(["auto", "cpu", "cuda", "cuda:3", "cuda:0+11"]),
    st.sampled_from(["block", "flow", "json"]),
)
def test_what_a_spec_declares_is_what_a_yaml_reader_finds(
    tmp_path_factory: pytest.TempPathFactory, memory: str | int, threads: int, device: str, style: str
) -> None:
    run = {"output": "memory", "memory": memory, "threads": threads, "device": device, "priority": 3}
    spec = {"merge_method": "linear", "models": [{"model": "/device/threads"}], "run": run}
    text = {
        "block": "# memory: 7GB\n" + yaml.safe_dump(spec),
        "flow": yaml.safe_dump(spec, default_flow_style=True),
        "json": json.dumps(spec, indent=2),
    }[style]
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(text)
    declared = Run.model_validate(run)
    assert read_needs(path) == Needs(declared.memory, declared.threads, declared.device)


@given(st.binary(max_size=300))
def test_anything_else_declares_the_defaults_or_something_that_can_be_held(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_bytes(content)
    needs = read_needs(path)
    assert needs.memory > 0
    assert needs.threads >= 0
    assert read_needs(path.with_name("absent")) == Needs()
    assert Run().memory == DECLARED_BYTES == Needs().memory


# --- what fits ---


def test_memory_is_what_was_declared_and_something_for_each_worker() -> None:
    here = room(memory=4 * GIB)
    hold(here, "a", Needs(memory=2 * GIB))
    assert here.reserved == 2 * GIB + WORKER_BYTES
    assert here.ask(Needs(memory=1 * GIB + WORKER_BYTES)) == "needs 2.0 GiB of memory, 1.5 GiB of 4.0 GiB are free"
    hold(here, "b", Needs(memory=1 * GIB))
    assert here.reserved == 4 * GIB
    del here.held["a"]
    assert isinstance(here.ask(Needs(memory=2 * GIB)), Grant)
    with pytest.raises(NeverFits, match=r"needs 4.0 GiB of memory .* and 0.5 GiB for .* may hold only 4.0 GiB"):
        here.ask(Needs(memory=4 * GIB))


def test_the_budget_is_that_of_the_host_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory_limit", lambda: 3 * GIB)
    assert room(memory=None).memory == 3 * GIB


def test_each_job_that_may_use_a_gpu_holds_one_and_sees_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = room(devices=("cuda:0", "cuda:1"))
    first = hold(here, "a", Needs(device="auto"))
    assert (first.devices, first.environment) == (("cuda:0",), {"CUDA_VISIBLE_DEVICES": "0"})
    assert here.ask(Needs(device="cuda:0")) == "needs cuda:0, which other jobs hold"
    cpu = hold(here, "c", Needs(device="cpu"))
    assert (cpu.devices, cpu.environment) == ((), {"CUDA_VISIBLE_DEVICES": ""})
    second = hold(here, "b", Needs(device="cuda"))
    assert (second.devices, second.environment) == (("cuda:1",), {"CUDA_VISIBLE_DEVICES": "1"})
    assert here.ask(Needs()) == "needs cuda:0 or cuda:1, which other jobs hold"
    assert (here.places, here.places_held) == (2, 2)
    del here.held["a"], here.held["b"]
    named = hold(here, "d", Needs(device="cuda:1"))
    assert (named.devices, named.environment) == (("cuda:1",), {}), "it says which of them all it means"
    with pytest.raises(NeverFits, match=r"run.device cuda:1\+2: jobs of this server get cuda:0, cuda:1"):
        here.ask(Needs(device="cuda:1+2"))
    with pytest.raises(NeverFits, match=r"run.device cuda:2: jobs of this server get cuda:0, cuda:1"):
        here.ask(Needs(device="cuda:2"))


def test_a_gpu_takes_as_many_jobs_as_configured_the_least_busy_one_first() -> None:
    here = room(devices=("cuda:0", "cuda:1"), jobs_per_device=2)
    assert [hold(here, name, Needs()).devices[0] for name in "abcd"] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert here.ask(Needs(device="cuda")) == "needs cuda:0 or cuda:1, which other jobs hold"
    assert (here.places, here.places_held) == (4, 4)


def test_a_job_on_several_gpus_holds_a_place_on_each() -> None:
    here = room(devices=("cuda:0", "cuda:1", "cuda:2"))
    one = hold(here, "a", Needs(device="cuda:1"))
    assert here.ask(Needs(device="cuda:0+1")) == "needs cuda:0 and cuda:1, which other jobs hold"
    both = hold(here, "b", Needs(device="cuda:0+2"))
    assert (one.devices, both.devices, both.environment) == (("cuda:1",), ("cuda:0", "cuda:2"), {})
    assert (here.places, here.places_held) == (3, 3)
    assert here.ask(Needs(device="auto")) == "needs cuda:0 or cuda:1 or cuda:2, which other jobs hold"
    twice = room(devices=("cuda:0",))
    assert hold(twice, "c", Needs(device="cuda:0+0")).devices == ("cuda:0",), "the worker refuses it"


def test_devices_that_are_visible_to_the_daemon_are_counted_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(resources, "build_versions", lambda: {"cuda": "12.8"})
    here = room(devices=None)
    assert here.devices == ("cuda:0", "cuda:1")
    assert hold(here, "a", Needs(device="auto")).environment == {"CUDA_VISIBLE_DEVICES": "5"}
    assert hold(here, "b", Needs(device="auto")).environment == {"CUDA_VISIBLE_DEVICES": "7"}


def test_without_gpus_nothing_is_held_and_with_none_allowed_none_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "build_versions", lambda: {"cuda": "none"})
    found_none, allowed_none = room(devices=None), room(devices=())
    assert found_none.ask(Needs(device="cuda")) == Grant(GIB, 0, (), {}), "the worker says what is wrong"
    assert allowed_none.ask(Needs(device="auto")) == Grant(GIB, 0, (), {"CUDA_VISIBLE_DEVICES": ""})
    with pytest.raises(NeverFits, match="jobs of this server get no GPU"):
        allowed_none.ask(Needs(device="cuda"))


def test_threads_are_counted_if_configured_and_shared_by_those_that_say_nothing() -> None:
    assert room().ask(Needs(threads=64)) == Grant(GIB, 0, (), {"CUDA_VISIBLE_DEVICES": ""})
    here = room(threads=8, jobs=2)
    granted = hold(here, "a", Needs(device="cpu"))
    assert (granted.threads, granted.environment["OMP_NUM_THREADS"]) == (4, "4")
    assert here.ask(Needs(threads=5)) == "needs 5 threads, 4 of 8 are free"
    assert "OMP_NUM_THREADS" not in hold(here, "b", Needs(threads=4)).environment, "its spec says it"
    with pytest.raises(NeverFits, match=r"run.threads 9 is more than the 8"):
        here.ask(Needs(threads=9))


# --- the daemon ---


def waits(daemon: DaemonProcess) -> dict[str, str]:
    return {one.spec: one.waits_for for one in list_jobs(daemon.spool.root) if one.waits_for}


def test_a_big_job_waits_for_memory_holds_up_those_behind_it_and_then_runs_in_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_daemon(tmp_path, jobs=4, memory="4GiB") as daemon:
        daemon.drop("small.yaml", gate="go", run={"memory": "1GiB"})
        daemon.wait_started("small.yaml")
        for number, name in enumerate(("big.yaml", "behind.yaml")):
            daemon.drop(name, gate="go", run={"memory": "3GiB" if number == 0 else "16MiB"})
            os.utime(daemon.spool.incoming / name, (1e9 + number,) * 2)
        told = "needs 3.5 GiB of memory, 2.5 GiB of 4.0 GiB are free"
        wait_until(lambda: waits(daemon) == {"big.yaml": told, "behind.yaml": "waits for its turn"}, str(waits(daemon)))
        assert len(daemon.record()) == 1, "what is small does not overtake it"
        assert daemon.metric("mergecore_memory_budget_bytes") == 4 * GIB
        assert daemon.metric("mergecore_memory_reserved_bytes") == GIB + WORKER_BYTES

        assert status_command(daemon.spool.root) == 0
        assert f"  {told}\n" in capsys.readouterr().out
        assert status_command(daemon.spool.root, as_json=True) == 0
        assert [one["waits_for"] for one in json.loads(capsys.readouterr().out)["jobs"]][1] == told

        daemon.open_gate()
        daemon.wait_for("done", "small.yaml", "big.yaml", "behind.yaml")
        assert [line.split()[1] for line in daemon.record() if line.startswith("start")][:2] == [
            "small.yaml",
            "big.yaml",
        ]
        wait_until(lambda: daemon.metric("mergecore_memory_reserved_bytes") == 0, "nothing held")
        wait_until(lambda: not daemon.spool.waiting.exists(), "nothing waits")


def test_a_job_that_can_never_fit_fails_with_a_clear_error_and_holds_up_nobody(tmp_path: Path) -> None:
    with running_daemon(tmp_path, memory="2GiB") as daemon:
        daemon.drop("huge.yaml", run={"memory": "64GiB", "priority": 9})
        daemon.drop("next.yaml")
        failed = daemon.wait_for("failed", "huge.yaml")["huge.yaml"]
        assert failed.error.startswith(
            "the job needs 64.0 GiB of memory (run.memory, or what its plan says) and 0.5 GiB for"
        )
        assert (daemon.spool.failed / failed.job / "error.txt").read_text().startswith(failed.error)
        daemon.wait_for("done", "next.yaml")
        assert failed.attempts == 0


def test_an_interrupted_job_that_does_not_fit_yet_comes_before_those_that_have_not_begun(tmp_path: Path) -> None:
    with running_daemon(tmp_path, memory="4GiB") as daemon:
        daemon.drop("big.yaml", gate="go", run={"memory": "3GiB"})
        daemon.wait_started("big.yaml")
        assert daemon.stop() == 0
    with running_daemon(tmp_path, memory="3.9GiB", jobs=3, rescan=0.1) as daemon:
        daemon.wait_started("big.yaml", times=2)
        daemon.kill_worker("big.yaml", signal.SIGTERM)  # by somebody: it rests, and begins again
        daemon.wait_started("big.yaml", times=3)
        daemon.drop("small.yaml", gate="go")
        wait_until(lambda: "small.yaml" in waits(daemon), "the small one waits")
        daemon.open_gate()
        daemon.wait_for("done", "big.yaml", "small.yaml")


def test_a_job_that_rests_and_then_does_not_fit_holds_up_those_that_have_not_begun(tmp_path: Path) -> None:
    with running_daemon(tmp_path, memory="4GiB", jobs=4, retry_delay=3.0) as daemon:
        daemon.drop("big.yaml", gate="go", run={"memory": "3GiB"})
        daemon.wait_started("big.yaml")
        daemon.kill_worker("big.yaml")
        wait_until(lambda: "attempt 1 of" in daemon.log(), "its rest")
        daemon.drop("meanwhile.yaml", gate="go", run={"memory": "1GiB"})
        daemon.wait_started("meanwhile.yaml")
        told = "needs 3.5 GiB of memory, 2.5 GiB of 4.0 GiB are free"
        wait_until(
            lambda: daemon.spool.waiting.exists() and told in daemon.spool.waiting.read_text(), "its time to come"
        )
        daemon.drop("small.yaml", gate="go", run={"memory": "16MiB"})
        wait_until(lambda: waits(daemon) == {"big.yaml": told, "small.yaml": "waits for its turn"}, str(waits(daemon)))
        time.sleep(0.5)
        assert not any("small.yaml" in line for line in daemon.record())
        daemon.open_gate()
        daemon.wait_for("done", "big.yaml", "meanwhile.yaml", "small.yaml")


@pytest.mark.parametrize("ownership", ["locks", "leases"])
def test_a_job_left_in_running_that_does_not_fit_holds_up_the_queue_and_says_why(
    tmp_path: Path, ownership: str
) -> None:
    with running_daemon(tmp_path, jobs=2, memory="8GiB", ownership=ownership) as daemon:
        for name in ("a.yaml", "b.yaml"):
            daemon.drop(name, gate="go", run={"memory": "3GiB"})
            daemon.wait_started(name)
        assert daemon.stop() == 0
    with running_daemon(tmp_path, jobs=4, memory="4.5GiB", rescan=0.1) as daemon:
        daemon.wait_started("a.yaml", times=2)
        daemon.drop("new.yaml", gate="go", run={"memory": "16MiB"})
        told = {"b.yaml": "needs 3.5 GiB of memory, 1.0 GiB of 4.5 GiB are free", "new.yaml": "waits for its turn"}
        wait_until(lambda: waits(daemon) == told, f"{told}; {waits(daemon)}")
        (left,) = daemon.spool.running.glob("b-*")
        inode = left.stat().st_ino
        time.sleep(0.5)
        assert left.stat().st_ino == inode, "it is not taken and given back again and again"
        assert not any("new.yaml" in line for line in daemon.record())
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml", "b.yaml", "new.yaml")


def test_the_worker_is_told_its_device_its_threads_and_its_memory(tmp_path: Path) -> None:
    options: dict[str, Any] = {"devices": ["cuda:1"], "threads": 6, "jobs": 3, "memory": "64GiB"}
    with running_daemon(tmp_path, environment={"CUDA_VISIBLE_DEVICES": "4,6"}, **options) as daemon:
        daemon.drop("a.yaml", gate="go", run={"memory": "2GiB"})
        daemon.wait_started("a.yaml")
        worker = psutil.Process(daemon.worker("a.yaml"))
        environment = worker.environ()
        assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("6", "2")
        assert worker.cmdline()[-2:] == ["--memory", str(2 * GIB)]
        assert [daemon.metric(f"mergecore_device_jobs{what}") for what in ("", "_reserved")] == [1, 1]
        daemon.drop("b.yaml")
        wait_until(lambda: waits(daemon) == {"b.yaml": "needs cuda:1, which other jobs hold"}, "the GPU")
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml", "b.yaml")


def test_a_worker_holds_no_more_than_it_was_granted_whatever_its_spec_says(tmp_path: Path) -> None:
    from service.config import WORKER_COMMAND
    from service.spool import Spool
    from tests.models import LLAMA, llama, write_model

    write_model(tmp_path / "models" / "a", llama(hidden=64, vocabulary=100_000), {**LLAMA, "num_hidden_layers": 2})
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    # Spelled so that the daemon cannot see it: it grants what a spec gets that says nothing.
    text = 'merge_method: linear\nmodels: [{model: a, parameters: {weight: 1.0}}]\nrun: {"mem\\u006fry": 64GiB}\n'
    (spool.incoming / "a.yaml").write_text(text)
    assert read_needs(spool.incoming / "a.yaml") == Needs()
    seen = tmp_path / "seen.py"
    seen.write_text(
        "import sys, mergecore, service.worker as worker\n"
        "class Seen(Exception): pass\n"
        "def merge(spec, out, *, memory, **_):\n"
        "    raise Seen(f'{spec.run.memory} asked, {memory} granted')\n"
        "mergecore.merge = merge\nsys.exit(worker.main())\n"
    )
    command = [*WORKER_COMMAND[:2], str(seen)]
    with running_daemon(tmp_path, worker_command=command, models=[str(tmp_path / "models")]) as daemon:
        error = daemon.wait_for("failed", "a.yaml")["a.yaml"].error
        assert f"{64 * GIB} asked, {GIB} granted" in error


PLANNED = """
import sys
import mergecore, mergecore.features.fitting as fitting, service.worker as worker
from pathlib import Path
fitting.held_bytes = lambda plan: 3 << 30
outputs = Path(sys.argv[sys.argv.index("--outputs") + 1])

class Merged:
    def as_dict(self):
        return {"granted": int(sys.argv[sys.argv.index("--memory") + 1])}

mergecore.merge = lambda *_, **__: Merged()
sys.exit(worker.main())
"""


def test_a_fit_gets_the_memory_that_its_plan_says_or_waits_for_it_or_fails(tmp_path: Path) -> None:
    checkpoints(tmp_path / "models", "qwen2", 3)
    texts(tmp_path / "models")
    planned = tmp_path / "planned.py"
    planned.write_text(PLANNED)
    spec = {
        "merge_method": "slta",
        "base_model": "m0",
        "models": [{"model": "m1", "data": "plain.txt"}, {"model": "m2", "data": "records.jsonl"}],
        "calibration": {"samples": 2, "length": 16},
    }
    options: dict[str, Any] = {
        "worker_command": [sys.executable, "-P", str(planned)], "models": [str(tmp_path / "models")], "rescan": 0.2
    }  # fmt: skip
    with running_daemon(tmp_path / "d", memory="4GiB", **options) as daemon:
        daemon.drop("fit.json", **spec)
        done = daemon.wait_for("done", "fit.json")["fit.json"]
        assert (done.memory, done.result, done.attempts, done.deaths) == (3 * GIB, {"granted": 3 * GIB}, 2, 0)
    with running_daemon(tmp_path / "e", memory="3GiB", **options) as daemon:
        daemon.drop("fit.json", **spec)
        daemon.drop("next.json", **spec)
        error = daemon.wait_for("failed", "fit.json", "next.json")["fit.json"].error
        assert error.startswith("the job needs 3.0 GiB of memory (run.memory, or what its plan says) and 0.5 GiB for")


def test_a_worker_that_asks_for_memory_that_it_has_fails(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", exit=4)
        assert "exit code 4 and no report" in daemon.wait_for("failed", "a.yaml")["a.yaml"].error
