"""Workers that die or hang: how often a job is tried again, and what the last failure says."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from service.commands import cancel_command, retry_command
from service.config import WORKER_COMMAND
from tests.service_support import DaemonProcess, running_daemon, wait_until
from tests.test_service_control import states


def starts(daemon: DaemonProcess) -> int:
    return sum(line.startswith("start") for line in daemon.record())


def test_a_worker_that_dies_twice_is_started_a_third_time_and_the_job_is_done(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", steps=2, signal=9, deaths=2)
        status = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert (status.attempts, status.error) == (3, "")
        assert daemon.metric('mergecore_jobs_total{method="linear",state="interrupted"}') == 2


def test_after_the_last_attempt_the_job_fails_and_says_how_its_worker_died(tmp_path: Path) -> None:
    with running_daemon(tmp_path, attempts=2) as daemon:
        daemon.drop("a.yaml", signal=9)
        status = daemon.wait_for("failed", "a.yaml")["a.yaml"]
        assert starts(daemon) == 2
        assert status.error == (
            "worker was killed by signal 9: likely out of memory; see dmesg; attempt 2 of 2, the last; "
            f"what was finished is kept: mergecore retry {status.job}"
        )
        retry_command(daemon.spool.root, "a.yaml")
        wait_until(lambda: starts(daemon) == 4, "two more attempts")
        daemon.wait_for("failed", "a.yaml")


@pytest.mark.parametrize(("spec", "attempts"), [({"exit": 1}, 1), ({"exit": 2}, 1), ({"exit": 7}, 1), ({"exit": 3}, 3)])
def test_a_worker_that_reports_a_failure_is_not_started_again(
    tmp_path: Path, spec: dict[str, int], attempts: int
) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", **spec)
        assert daemon.wait_for("failed", "a.yaml")["a.yaml"].attempts == attempts


def test_while_a_job_waits_for_its_next_attempt_others_run_and_each_wait_is_twice_as_long(tmp_path: Path) -> None:
    with running_daemon(tmp_path, retry_delay=0.4) as daemon:
        begun = time.monotonic()
        daemon.drop("a.yaml", signal=11)
        wait_until(lambda: "attempt 1 of 3" in daemon.log(), "the first death")
        wait_until(lambda: states(daemon.spool.root)["a.yaml"] == "interrupted", "the pause")
        daemon.drop("b.yaml")
        daemon.wait_for("failed", "a.yaml")
        assert time.monotonic() - begun >= 1.2
        daemon.wait_for("done", "b.yaml")
        order = [line.split()[1] for line in daemon.record() if line.startswith("start")]
        assert order.index("b.yaml") < len(order) - 1


def test_a_job_that_waits_for_its_next_attempt_can_be_cancelled_and_outlives_the_daemon(tmp_path: Path) -> None:
    with running_daemon(tmp_path, retry_delay=1000, rescan=0.1) as daemon:
        daemon.drop("a.yaml", signal=9)
        daemon.drop("b.yaml", signal=9, deaths=1)
        wait_until(lambda: daemon.log().count("attempt 1 of 3") == 2, "both deaths")
        cancel_command(daemon.spool.root, "a.yaml")
        daemon.wait_for("cancelled", "a.yaml")
        assert daemon.stop() == 0
    with running_daemon(tmp_path) as daemon:
        assert daemon.wait_for("done", "b.yaml")["b.yaml"].deaths == 1


def test_stopping_the_daemon_is_no_death(tmp_path: Path) -> None:
    for _ in range(3):
        with running_daemon(tmp_path, attempts=1) as daemon:
            if not daemon.record():
                daemon.drop("a.yaml", gate="go")
            wait_until(lambda: (daemon.record() or [""])[-1].startswith("start"), "a worker")
            assert daemon.stop() == 0
            assert states(daemon.spool.root) == {"a.yaml": "interrupted"}
    with running_daemon(tmp_path, attempts=1) as daemon:
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml")


# --- hanging ---


def test_a_worker_that_hangs_is_aborted_with_its_traceback_in_the_log_and_started_again(tmp_path: Path) -> None:
    with running_daemon(tmp_path, stall_seconds=1.0) as daemon:
        daemon.drop("a.yaml", gate="go", hang=True, deaths=1)
        wait_until(lambda: "worker hangs: no progress" in daemon.log(), "the watchdog")
        daemon.open_gate()
        job = daemon.wait_for("done", "a.yaml")["a.yaml"].job
        text = (daemon.spool.done / job / "log").read_text()
        assert "Fatal Python error: Aborted" in text
        assert "stand_in_worker.py" in text
        assert "the worker hung (no progress and no CPU time)" in daemon.log()


def test_a_worker_that_not_even_an_abort_ends_is_killed(tmp_path: Path) -> None:
    prelude = "import service.process; service.process.ABORT_TIME = 0.2"
    with running_daemon(tmp_path, prelude=prelude, stall_seconds=0.5, attempts=1) as daemon:
        daemon.drop("a.yaml", gate="never", hang=True)
        daemon.wait_started("a.yaml")
        daemon.kill_worker("a.yaml", signal.SIGSTOP)
        assert "the worker hung" in daemon.wait_for("failed", "a.yaml")["a.yaml"].error


def test_a_worker_that_computes_or_advances_is_left_alone_however_long_it_takes(tmp_path: Path) -> None:
    with running_daemon(tmp_path, stall_seconds=0.5, jobs=2) as daemon:
        daemon.drop("computes.yaml", gate="go", spin=True)
        daemon.wait_started("computes.yaml")
        time.sleep(2.5)
        daemon.open_gate()
        daemon.wait_for("done", "computes.yaml")
        assert "hangs" not in daemon.log()


def test_a_real_worker_that_sleeps_is_found_though_its_heartbeat_goes_on(tmp_path: Path) -> None:
    slow = tmp_path / "slow_worker.py"
    slow.write_text(
        "import sys, time, service.worker as worker\n"
        "def run(*_): time.sleep(1000)\n"
        "worker.run = run\n"
        "sys.exit(worker.main())\n"
    )
    command = [*WORKER_COMMAND[:2], str(slow)]
    with running_daemon(tmp_path / "d", worker_command=command, stall_seconds=2.0, attempts=1) as daemon:
        daemon.drop("a.yaml")
        status = daemon.wait_for("failed", "a.yaml")["a.yaml"]
        assert "the worker hung" in status.error
        assert "line 2 in run" in (daemon.spool.failed / status.job / "log").read_text()
