"""Warm workers: what a job gets that starts on one, when there are how many, and what becomes of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import mergecore
from service.commands import cancel_command, drain_command, pause_command
from service.config import WORKER_COMMAND
from service.handover import channel, hand_over, has_greeted
from service.resources import WORKER_BYTES
from tests import searches
from tests.models import llama, spec_dict, write_trio
from tests.service_support import ROOT, DaemonProcess, running_daemon, wait_until

GIB = 1 << 30
SO_SNDBUFFORCE = 32


def children(daemon: DaemonProcess) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [one for one in psutil.Process(daemon.process.pid).children() if is_alive(one)]
    return []


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def is_waiting(process: psutil.Process) -> bool:
    """Whether it has taken its socket from standard input and sleeps."""
    with contextlib.suppress(OSError, psutil.NoSuchProcess):
        return os.readlink(f"/proc/{process.pid}/fd/0") == os.devnull and process.status() == psutil.STATUS_SLEEPING
    return False


def idle(daemon: DaemonProcess, count: int = 1) -> list[psutil.Process]:
    """Wait until there are exactly so many idle workers and no others, and they wait."""
    (found,) = wait_until(
        lambda: (found,) if len(found := children(daemon)) == count and all(map(is_waiting, found)) else None,
        f"{count} idle workers; log:\n{daemon.log()}",
    )
    return list(found)


def has_torch(process: psutil.Process) -> bool:
    with contextlib.suppress(OSError):
        return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    return False


def starts(daemon: DaemonProcess) -> dict[str, float | None]:
    return {kind: daemon.metric(f'mergecore_worker_starts_total{{worker="{kind}"}}') for kind in ("warm", "cold")}


# --- what a job gets ---

DESCRIBING = """
import ctypes, json, os, subprocess, sys
from pathlib import Path
import service.worker as worker

def described(options):
    status = dict(line.split(":\\t") for line in Path("/proc/self/status").read_text().splitlines())
    environment = os.fsdecode(subprocess.check_output(["env", "-0"]))
    died_with = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(died_with))
    return {
        "options": {key: str(value) for key, value in vars(options).items()},
        "environment": dict(os.environ),
        "exec": dict(item.split("=", 1) for item in environment[:-1].split("\\0")),
        "open": sorted(os.readlink(f"/proc/self/fd/{n}") for n in range(100) if os.path.exists(f"/proc/self/fd/{n}")),
        "streams": [os.readlink(f"/proc/self/fd/{n}") for n in (0, 1, 2)],
        "signals": [status[key] for key in ("SigBlk", "SigIgn", "SigCgt")],
        "leads": [os.getpgrp() == os.getpid(), os.getsid(0) == os.getpid()],
        "daemon": os.getppid() == int(os.environ["MERGECORE_DAEMON_PID"]),
        "limits": Path("/proc/self/limits").read_text(),
        "niceness": os.nice(0),
        "folder": os.getcwd(),
        "umask": status["Umask"],
        "first to be killed": Path("/proc/self/oom_score_adj").read_text(),
        "dies with": died_with.value,
    }

def run(options, reporter, stop, tenancy):
    (options.outputs / reporter.spec_name).write_text(json.dumps(described(options)))
    print("said")
    print("said in error", file=sys.stderr)
    os.system("echo said by a child")
    reporter.record(result={"described": True})
    return 0

worker.run = run
worker.load_merging = lambda: None
sys.exit(worker.main())
"""


@pytest.mark.parametrize("ownership", ["locks", "leases"])
def test_a_job_on_a_warm_worker_has_all_that_a_process_of_its_own_gives_it(tmp_path: Path, ownership: str) -> None:
    describing = tmp_path / "describing.py"
    describing.write_text(DESCRIBING)
    options: dict[str, Any] = {"threads": 8, "jobs": 2, "devices": ["cuda:0"], "models": [str(tmp_path)]}
    options["environment"] = {"IN_NO_ENCODING": os.fsdecode(b"caf\xe9")}
    specs: dict[str, dict[str, Any]] = {
        "silent.yaml": {},
        "told.yaml": {"run": {"threads": 3, "device": "cpu", "memory": "2GiB"}},
    }
    found: dict[str, dict[int, str]] = {name: {} for name in specs}
    for warm in (0, 1):
        command = [sys.executable, "-P", str(describing)]
        where = {"spool": str(tmp_path / f"spool{warm}"), "outputs": str(tmp_path / "outputs")}
        with running_daemon(
            tmp_path, worker_command=command, warm_workers=warm, ownership=ownership, **where, **options
        ) as daemon:
            for name, spec in specs.items():
                idle(daemon, warm)
                daemon.drop(name, **spec)
                job = daemon.wait_for("done", name)[name]
                folder = daemon.spool.done / job.job
                log = re.sub(r"(?m)^\d{4}-.*\n", "", (folder / "log").read_text())
                assert log == "said\nsaid in error\nsaid by a child\n"
                text = (daemon.outputs / name).read_text()
                described = json.loads(text)
                assert described["daemon"] is True
                assert described["environment"] == described["exec"]
                text = re.sub(rf"{job.job}(@\w+)?", "JOB", text).replace(str(daemon.spool.root), "SPOOL")
                found[name][warm] = text.replace(str(daemon.process.pid), "DAEMON")
            assert starts(daemon) == {"warm": 2.0 * warm, "cold": 2.0 - 2 * warm}
            assert daemon.log().count("said") == 0
    for name, by_warmth in found.items():
        cold, warm_one = (json.loads(by_warmth[warm]) for warm in (0, 1))
        assert warm_one == cold, name
    silent = json.loads(found["silent.yaml"][1])["environment"]
    assert (silent["OMP_NUM_THREADS"], silent["CUDA_VISIBLE_DEVICES"]) == ("4", "0")
    told = json.loads(found["told.yaml"][1])
    assert told["environment"].get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")
    assert (told["environment"]["CUDA_VISIBLE_DEVICES"], told["options"]["memory"]) == ("", str(2 * GIB))


MERGING = """
import os, sys
import service.worker as worker

def run(options, reporter, stop, tenancy):
    import torch
    import mergecore.merging as merging
    merged, before = merging._merge, torch.get_num_threads()
    def noted(*arguments):
        print("threads", before, torch.get_num_threads(), flush=True)
        return merged(*arguments)
    merging._merge = noted
    return ran(options, reporter, stop, tenancy)

ran, worker.run = worker.run, run
sys.exit(worker.main())
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny models with the scorer of a search."""
    folder = tmp_path_factory.mktemp("warm")
    write_trio(folder / "models", llama(layers=2))
    searches.write_search(folder)
    return folder


def test_merges_sweeps_and_searches_on_warm_workers_give_the_bytes_of_cold_ones(tmp_path: Path, models: Path) -> None:
    merging = tmp_path / "merging.py"
    merging.write_text(MERGING)
    trio = [models / "models" / name for name in ("base", "near", "far")]
    specs: dict[str, dict[str, Any]] = {
        "widen": {**spec_dict("widen", *trio), "run": {"threads": 1}},
        "sweep": {**spec_dict("task_arithmetic", *trio), "sweep": {"parameters": {"parameters.lambda": [0.5, 1.0]}}},
        "search": searches.search_dict(models, population=4, generations=1),
    }
    for name, spec in specs.items():
        mergecore.merge(mergecore.load_spec(spec), tmp_path / "cold" / name)
    options: dict[str, Any] = {"models": [str(models)], "allow_commands": True, "threads": 2, "jobs": 1}
    command = [sys.executable, "-P", str(merging)]
    with running_daemon(tmp_path / "d", worker_command=command, warm_workers=1, **options) as daemon:
        threads = {}
        for name, spec in specs.items():
            wait_until(lambda: any(map(has_torch, children(daemon))), "an idle worker")
            daemon.drop(f"{name}.json", **{**spec, "run": {**spec.get("run", {}), "output": name}})
            job = daemon.wait_for("done", f"{name}.json")[f"{name}.json"]
            log = (daemon.spool.done / job.job / "log").read_text()
            threads[name] = re.findall(r"^threads \d+ (\d+)$", log, re.MULTILINE)[0]
        assert starts(daemon) == {"warm": 3, "cold": 0}
        assert threads == {"widen": "1", "sweep": "2", "search": "1"}
        assert "torch" not in Path(f"/proc/{daemon.process.pid}/maps").read_text()
        assert weights(daemon.outputs) == weights(tmp_path / "cold")
        assert len(weights(daemon.outputs)) == 4


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_an_idle_worker_has_loaded_torch_and_sees_no_gpu(tmp_path: Path) -> None:
    with running_daemon(tmp_path, worker_command=WORKER_COMMAND, warm_workers=1, devices=["cuda:0"]) as daemon:
        worker = wait_until(lambda: [one for one in children(daemon) if has_torch(one)], "its imports")[0]
        assert worker.environ()["CUDA_VISIBLE_DEVICES"] == ""
        assert not [name for name in os.listdir(f"/proc/{worker.pid}/fd") if "nvidia" in _target(worker.pid, name)]


def test_a_job_on_a_warm_worker_uses_the_gpu_that_it_was_granted(tmp_path: Path, models: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: none is visible to torch")
    spec = spec_dict("widen", *(models / "models" / name for name in ("base", "near", "far")))
    mergecore.merge(mergecore.load_spec(spec), tmp_path / "cpu" / "out", device="cpu")
    with running_daemon(tmp_path, worker_command=WORKER_COMMAND, warm_workers=1, models=[str(models)]) as daemon:
        wait_until(lambda: any(map(has_torch, children(daemon))), "an idle worker")
        daemon.drop("a.json", **{**spec, "run": {"device": "cuda", "output": "out"}})
        daemon.wait_for("done", "a.json")
        assert starts(daemon) == {"warm": 1, "cold": 0}
        assert weights(daemon.outputs) == weights(tmp_path / "cpu")


def _target(pid: int, descriptor: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{descriptor}")
    return ""


def test_what_cannot_be_loaded_is_the_jobs_to_tell(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "torch").mkdir(parents=True)
    (broken / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    environment = {"PYTHONPATH": f"{broken}{os.pathsep}{ROOT}"}
    code = f"import sys; sys.path.insert(0, {str(broken)!r}); import service.worker as w; sys.exit(w.main())"
    command = [sys.executable, "-P", "-c", code]
    with running_daemon(tmp_path, worker_command=command, warm_workers=1, environment=environment) as daemon:
        idle(daemon)
        daemon.drop("a.yaml", merge_method="linear", models=[{"model": "/nowhere", "parameters": {"weight": 1}}])
        assert "libtorch.so: cannot open" in daemon.wait_for("failed", "a.yaml")["a.yaml"].error
        assert starts(daemon) == {"warm": 1, "cold": 0}
        assert "a worker that waits cannot load what it needs: OSError: libtorch.so" in daemon.log()


# --- how many there are ---


def test_there_are_none_unless_configured(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml")
        daemon.wait_for("done", "a.yaml")
        assert children(daemon) == []
        assert starts(daemon) == {"warm": 0, "cold": 1}


def test_each_runs_one_job_and_is_replaced(tmp_path: Path) -> None:
    with running_daemon(tmp_path, warm_workers=2, jobs=3) as daemon:
        first = {one.pid for one in idle(daemon, 2)}
        for name in ("a.yaml", "b.yaml", "c.yaml"):
            daemon.drop(name, gate="go")
        daemon.wait_for("running", "a.yaml", "b.yaml", "c.yaml")
        wait_until(lambda: len(daemon.record()) == 3, "their start")
        pids = {job.pid for job in daemon.jobs("running").values()}
        assert first <= pids
        wait_until(lambda: len(children(daemon)) == 5, "two new ones")
        wait_until(lambda: daemon.metric("mergecore_warm_workers") == 2, "they are counted")
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml", "b.yaml", "c.yaml")
        assert not pids & {one.pid for one in idle(daemon, 2)}
        assert starts(daemon) in ({"warm": 2, "cold": 1}, {"warm": 3, "cold": 0})  # the third may get a new one


def test_they_hold_what_jobs_leave_of_the_memory(tmp_path: Path) -> None:
    with running_daemon(tmp_path, warm_workers=3, jobs=2, memory=3 * WORKER_BYTES) as daemon:
        idle(daemon, 3)
        wait_until(lambda: (daemon.metric("mergecore_worker_resident_bytes") or 0) > 1e6, "their memory")
        daemon.drop("a.yaml", gate="go", run={"memory": WORKER_BYTES})
        daemon.wait_started("a.yaml")
        job = daemon.jobs("running")["a.yaml"].pid
        wait_until(lambda: len(children(daemon)) == 2, "one beside the job")
        daemon.drop("b.yaml", gate="go2", run={"memory": "16MiB"})
        wait_until(lambda: daemon.metric("mergecore_queue_jobs") == 1, "b waits for the job, not for idle workers")
        daemon.open_gate()
        daemon.wait_started("b.yaml")
        wait_until(lambda: len(children(daemon)) == 2, "one beside the smaller job")
        assert job not in {one.pid for one in children(daemon)}
        daemon.open_gate("go2")
        daemon.wait_for("done", "a.yaml", "b.yaml")
        idle(daemon, 3)


def test_a_job_that_fits_only_without_them_is_started_at_once(tmp_path: Path) -> None:
    with running_daemon(tmp_path, warm_workers=2, memory=2 * WORKER_BYTES) as daemon:
        idle(daemon, 2)
        daemon.drop("a.yaml", gate="go", run={"memory": WORKER_BYTES})
        daemon.wait_started("a.yaml")
        wait_until(lambda: len(children(daemon)) == 1, "the job alone")
        assert starts(daemon) == {"warm": 1, "cold": 0}
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml")


def test_a_new_configuration_replaces_them_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    file = tmp_path / "mergecore.toml"
    file.write_text("warm_workers = 2\n")
    with running_daemon(tmp_path / "d", config_file=file, threads=4) as daemon:
        old = idle(daemon, 2)
        file.write_text("warm_workers = -1\n")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "warm_workers is -1, but must be a whole number, at least 0" in daemon.log(), "an error")
        assert idle(daemon, 2) == old
        file.write_text("warm_workers = 1\njobs = 4\n")
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "configuration reloaded" in daemon.log(), "a reload")
        new = idle(daemon)[0]
        assert new not in old
        assert [one.environ()["OMP_NUM_THREADS"] for one in (new,)] == ["1"]
        file.write_text("")
        daemon.process.send_signal(signal.SIGHUP)
        idle(daemon, 0)


def test_a_job_gets_no_worker_whose_code_has_changed_on_disk(tmp_path: Path) -> None:
    code = tmp_path / "code"
    for package in ("mergecore", "service"):
        shutil.copytree(ROOT / package, code / package)
    stand_in = [sys.executable, "-P", str(ROOT / "tests" / "stand_in_worker.py")]
    environment = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    prelude = f"assert service.daemon.__file__.startswith({str(code)!r})"
    with running_daemon(
        tmp_path, warm_workers=1, worker_command=stand_in, environment=environment, prelude=prelude
    ) as daemon:
        old = idle(daemon)[0]
        (code / "service" / "worker.py").write_text((ROOT / "service" / "worker.py").read_text() + "\n# newer\n")
        daemon.drop("a.yaml")
        daemon.wait_for("done", "a.yaml")
        assert starts(daemon) == {"warm": 0, "cold": 1}
        assert "has loaded code that has changed since" in daemon.log()
        assert idle(daemon)[0] != old
        daemon.drop("b.yaml")
        daemon.wait_for("done", "b.yaml")
        assert starts(daemon) == {"warm": 1, "cold": 1}


def test_a_paused_daemon_starts_none_and_one_that_drains_or_stops_has_none(tmp_path: Path) -> None:
    with running_daemon(tmp_path, warm_workers=1, rescan=0.1, jobs=2) as daemon:
        (one,) = idle(daemon)
        pause_command(daemon.spool.root)
        wait_until(lambda: daemon.metric("mergecore_paused") == 1, "the pause")
        one.kill()
        wait_until(lambda: "an idle worker ended" in daemon.log(), "its end")
        time.sleep(1.5)  # longer than the pause before another would be started
        assert children(daemon) == []
        daemon.spool.paused.unlink()
        idle(daemon)
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        wait_until(lambda: len(children(daemon)) == 2, "an idle one")
        drain_command(daemon.spool.root)
        wait_until(lambda: len(children(daemon)) == 1, "the job alone")
        daemon.open_gate()
        assert daemon.process.wait(60) == 0
        assert daemon.jobs("done")
    with running_daemon(tmp_path / "other", warm_workers=2) as daemon:
        both = idle(daemon, 2)
        assert daemon.stop() == 0
        assert not any(map(is_alive, both))


# --- what dies ---


def test_an_idle_one_that_is_killed_is_counted_and_replaced(tmp_path: Path) -> None:
    with running_daemon(tmp_path, warm_workers=1) as daemon:
        (old,) = idle(daemon)
        assert daemon.metric("mergecore_warm_worker_deaths_total") == 0
        old.kill()
        wait_until(lambda: daemon.metric("mergecore_warm_worker_deaths_total") == 1, "the count")
        (new,) = idle(daemon)
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        job = daemon.jobs("running")["a.yaml"]
        assert job.pid == new.pid
        daemon.open_gate()
        assert daemon.wait_for("done", "a.yaml")["a.yaml"].attempts == 1


def test_one_that_cannot_live_is_tried_less_and_less_often_and_jobs_run_all_the_same(tmp_path: Path) -> None:
    strange = tmp_path / "strange.py"  # a program that knows nothing of --wait
    strange.write_text(
        "import sys\n"
        "if '--wait' in sys.argv:\n"
        "    open(sys.argv[0] + '.tried', 'a').write('.')\n"
        "    sys.exit('what is --wait?')\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests import stand_in_worker\nsys.exit(stand_in_worker.main())\n"
    )
    with running_daemon(
        tmp_path, warm_workers=1, worker_command=[sys.executable, "-P", str(strange)], rescan=0.05
    ) as daemon:
        wait_until(lambda: "the next one is started in 2 s" in daemon.log(), "its second death")
        for number in range(6):
            daemon.drop(f"{number}.yaml")
        daemon.wait_for("done", *(f"{number}.yaml" for number in range(6)))
        assert starts(daemon) == {"warm": 0, "cold": 6}
        assert all(job.attempts == 1 for job in daemon.jobs("done").values())
        wait_until(lambda: "the next one is started in 4 s" in daemon.log(), "its third death")
        assert strange.with_suffix(".py.tried").stat().st_size == 3
        assert "an idle worker ended: exit code 1; the next one is started in 1 s" in daemon.log()


def test_a_program_that_waits_and_does_not_know_for_what_gets_no_job(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf.py"
    deaf.write_text(
        "import sys, time\n"
        "if '--wait' in sys.argv: time.sleep(1000)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests import stand_in_worker\nsys.exit(stand_in_worker.main())\n"
    )
    with running_daemon(tmp_path, warm_workers=1, worker_command=[sys.executable, "-P", str(deaf)]) as daemon:
        wait_until(lambda: len(children(daemon)) == 1, "the program")
        daemon.drop("a.yaml")
        daemon.wait_for("done", "a.yaml")
        assert starts(daemon) == {"warm": 0, "cold": 1}


def test_a_warm_one_that_is_killed_with_its_job_is_a_death_of_the_job(tmp_path: Path) -> None:
    with running_daemon(tmp_path, warm_workers=1) as daemon:
        (worker,) = idle(daemon)
        daemon.drop("a.yaml", gate="go", steps=3)
        daemon.wait_started("a.yaml")
        worker.kill()
        daemon.wait_started("a.yaml", times=2)
        daemon.open_gate()
        done = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert (done.attempts, done.deaths) == (2, 1)
        assert daemon.metric("mergecore_warm_worker_deaths_total") == 0


def test_a_warm_ones_job_can_be_cancelled(tmp_path: Path) -> None:
    with running_daemon(tmp_path, warm_workers=1) as daemon:
        idle(daemon)
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        cancel_command(daemon.spool.root, "a.yaml")
        daemon.wait_for("cancelled", "a.yaml")
        assert any(line.startswith("stop a.yaml") for line in daemon.record())
        assert starts(daemon) == {"warm": 1, "cold": 0}


@pytest.mark.parametrize("ownership", ["locks", "leases"])
def test_when_the_daemon_is_killed_no_worker_stays_and_the_next_one_goes_on(tmp_path: Path, ownership: str) -> None:
    options: dict[str, Any] = {"ownership": ownership, "lease_seconds": 1.0}
    with running_daemon(tmp_path, warm_workers=2, **options) as daemon:
        idle(daemon, 2)
        daemon.drop("a.yaml", gate="go", steps=3)
        daemon.wait_started("a.yaml")
        wait_until(lambda: len(children(daemon)) == 3, "two idle ones beside the job")
        workers = children(daemon)
        daemon.process.kill()
        daemon.process.wait(60)
        wait_until(lambda: not any(map(is_alive, workers)), "the end of all workers")
    with running_daemon(tmp_path, warm_workers=1, **options) as daemon:
        daemon.wait_started("a.yaml", times=2)
        daemon.open_gate()
        assert daemon.wait_for("done", "a.yaml")["a.yaml"].attempts == 2


def test_a_real_one_that_still_loads_ends_with_the_daemon(tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\nimport service.worker as worker\n"
        "worker.load_merging = lambda: time.sleep(1000)\nsys.exit(worker.main())\n"
    )
    command = [sys.executable, "-P", str(slow)]
    with running_daemon(tmp_path, warm_workers=1, worker_command=command) as daemon:
        (worker,) = idle(daemon)
        daemon.process.kill()
        daemon.process.wait(60)
        wait_until(lambda: not is_alive(worker), "its end")


def test_one_that_follows_nobody_ends_when_its_socket_does(tmp_path: Path) -> None:
    ours, theirs = channel()
    program = "import sys; from service.handover import *; sys.exit(7 if wait_for_job(lambda: None) is None else 0)"
    with theirs:
        worker = subprocess.Popen([sys.executable, "-c", program], stdin=theirs.fileno(), cwd=ROOT)
    wait_until(lambda: has_greeted(ours), "its greeting")
    ours.close()
    assert worker.wait(60) == 7


def test_a_message_that_does_not_fit_is_an_error_and_nothing_is_sent(tmp_path: Path) -> None:
    ours, theirs = channel()
    theirs.setblocking(False)
    with ours, theirs, (tmp_path / "log").open("wb") as output:
        with contextlib.suppress(PermissionError):  # a system whose sockets take more than the worker does
            ours.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)
        for size in (1 << 20, 16 << 20):
            with pytest.raises(OSError, match="Message too long"):
                hand_over(ours, ["x" * size], {}, output.fileno(), ())
        with pytest.raises(BlockingIOError):
            theirs.recv(1)


def test_waiting_by_hand_is_refused_in_one_line() -> None:
    ended = subprocess.run(
        [*WORKER_COMMAND, "--wait"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("--wait is for the daemon, whose socket is standard input: ")
