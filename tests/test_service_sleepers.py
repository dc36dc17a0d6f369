"""Hosts that die, hang or sleep while they own a job through a lease: of two real daemons on a spool one is stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from mergecore import load_spec, merge
from service.config import WORKER_COMMAND
from tests.leases import SECONDS, digest, gated, leased_daemon, process_of, spec, write_models
from tests.searches import calls, history, hold, release, search_dict, write_search
from tests.service_support import wait_until


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return write_models(tmp_path)


@pytest.mark.parametrize("sleeps", ["daemon and worker", "daemon"])
def test_the_job_of_a_host_that_hangs_is_finished_once_by_another_and_the_woken_one_publishes_nothing(
    tmp_path: Path, models: Path, sleeps: str
) -> None:
    expected = digest(merge(load_spec(spec()), tmp_path / "whole", resolve=lambda name, revision: models / name).output)
    options = gated(tmp_path, models)
    with leased_daemon(tmp_path / "d", **options) as one:
        one.drop("a.yaml", **spec())
        worker = process_of(one)
        log = next(one.spool.running.iterdir()).name
        os.kill(one.process.pid, signal.SIGSTOP)
        if sleeps != "daemon":
            worker.suspend()
        with leased_daemon(tmp_path / "d", **options) as two:
            wait_until(lambda: "taken over; resuming" in two.log(), "the other daemon")
            assert log not in os.listdir(one.spool.running)
            if sleeps == "daemon":
                # It gets on by itself at the gate, and finds that nobody renews its lease.
                two.open_gate()
                wait_until(lambda: worker.status() == psutil.STATUS_ZOMBIE, "the end of the first worker")
            else:
                process_of(two, attempt=2)
                os.kill(one.process.pid, signal.SIGCONT)
                worker.resume()
                wait_until(lambda: "no longer ours" in one.log(), f"the woken one; log: {one.log()}")
                assert not (one.outputs / "out").exists()
                two.open_gate()
            done = two.wait_for("done", "a.yaml")["a.yaml"]
            os.kill(one.process.pid, signal.SIGCONT)
            wait_until(lambda: "no longer ours" in one.log(), f"the woken one; log: {one.log()}")
            assert done.attempts == 2
            assert done.result["resumed"] is False, "what the other one may still write into is not gone on with"
            assert digest(one.outputs / "out") == expected
            text = (one.spool.done / done.job / "log").read_text()
            assert text.count(" INFO done: ") == 1
            assert "mergecore_jobs_total{" in two.scrape()
            assert two.metric('mergecore_jobs_total{method="linear",state="done"}') == 1
            assert one.metric('mergecore_jobs_total{method="linear",state="done"}') == 0
            assert sorted(os.listdir(one.outputs)) == ["go", "out"]
            assert os.listdir(one.spool.running) == []
            one.drop("b.yaml", **spec("other"))
            one.wait_for("done", "b.yaml")


SLEEPY = """
import os, signal, sys, time
from pathlib import Path
import service.publishing as publishing, service.worker as worker
folder, outputs = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outputs") + 1])
rename = os.rename

def sleeping(source, target, **places):
    if target == "out":
        if not (outputs.parent / "slept").exists():
            (outputs.parent / "slept").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            (outputs.parent / "second").touch()
            while not (outputs.parent / "go").exists():
                time.sleep(0.01)
    rename(source, target, **places)

publishing.os = type("os", (), {**vars(os), "rename": staticmethod(sleeping)})
sys.exit(worker.main())
"""


def test_a_worker_that_wakes_in_the_moment_of_publishing_publishes_nothing(tmp_path: Path, models: Path) -> None:
    # It sleeps between its last look at the lease and the rename: no look can help, only that its folder has gone.
    options = gated(tmp_path, models, SLEEPY)
    with leased_daemon(tmp_path / "d", **options) as one:
        one.drop("a.yaml", **spec())

        def asleep() -> int:
            pid = status.pid if (status := one.jobs("running").get("a.yaml")) else 0
            return pid if pid and psutil.Process(pid).status() == psutil.STATUS_STOPPED else 0

        pid = wait_until(asleep, f"the worker to sleep; log: {one.log()}")
        os.kill(one.process.pid, signal.SIGSTOP)
        with leased_daemon(tmp_path / "d", **options) as two:
            wait_until((tmp_path / "d" / "second").exists, "the second worker")
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "the end of the woken worker")
            assert not (two.outputs / "out").exists()
            os.kill(one.process.pid, signal.SIGCONT)
            wait_until(lambda: "no longer ours" in one.log(), "the woken daemon")
            (tmp_path / "d" / "go").touch()
            done = two.wait_for("done", "a.yaml")["a.yaml"]
            assert os.listdir(two.outputs) == ["out"]
            text = (two.spool.done / done.job / "log").read_text()
            assert text.count(" INFO done: ") == 1
            assert os.listdir(two.spool.running) == []


def test_a_host_that_dies_loses_its_job_to_another_one_after_its_lease(tmp_path: Path, models: Path) -> None:
    expected = digest(merge(load_spec(spec()), tmp_path / "whole", resolve=lambda name, revision: models / name).output)
    options = gated(tmp_path, models)
    with leased_daemon(tmp_path / "d", **options) as one:
        one.drop("a.yaml", **spec())
        process_of(one)
        (left,) = one.outputs.glob(".*@*")
        one.die()
        died = time.monotonic()
        with leased_daemon(tmp_path / "d", **options) as two:
            process_of(two, attempt=2)
            assert time.monotonic() - died >= SECONDS, "not before"
            assert not left.exists()
            two.open_gate()
            done = two.wait_for("done", "a.yaml")["a.yaml"]
            assert (done.attempts, list(done.former_leases.values())) == (2, ["expired"])
            assert digest(two.outputs / "out") == expected
            assert sorted(os.listdir(two.outputs)) == ["go", "out"]


def test_a_search_of_a_host_that_died_goes_on_without_scoring_anything_twice(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    folder.mkdir()
    merge(write_search(folder), folder / "out")
    (folder / "calls").unlink()
    options = {"worker_command": list(WORKER_COMMAND), "models": [str(folder / "models")], "allow_commands": True}
    with leased_daemon(tmp_path / "d", **options) as one:
        one.drop("search.json", **search_dict(folder))
        wait_until(lambda: len(calls(folder)) >= 5, f"some scores; log: {one.log()}")
        held = hold(folder)
        wait_until(lambda: held.exists() and held.read_text(), "the scorer")
        one.die()
        release(folder)
        with leased_daemon(tmp_path / "d", **options) as two:
            out = Path(two.wait_for("done", "search.json")["search.json"].output)
            assert os.listdir(two.outputs) == [out.name]
    assert len(calls(folder)) == 12 + 1, "and the one at which it died"
    assert history(out) == history(folder / "out")


def test_a_daemon_that_wakes_kills_its_worker_though_that_knows_nothing_of_leases(tmp_path: Path) -> None:
    with leased_daemon(tmp_path) as one:
        one.drop("a.yaml", gate="never", deaf=True)
        one.wait_started("a.yaml")
        worker = psutil.Process(one.worker("a.yaml"))
        os.kill(one.process.pid, signal.SIGSTOP)
        with leased_daemon(tmp_path, stop_timeout=0.1) as two:
            two.wait_started("a.yaml", times=2)
            assert worker.is_running()
            os.kill(one.process.pid, signal.SIGCONT)
            wait_until(lambda: "no longer ours" in one.log(), f"the woken one; log: {one.log()}")
            assert not worker.is_running()
            assert two.jobs("running")["a.yaml"].attempts == 2
