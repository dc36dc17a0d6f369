"""The date jumps by a day or more while a real daemon and its workers run: only what people read follows it."""

from __future__ import annotations

import signal
import struct
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.clock import DOUBT, SteadyDate
from service.config import WORKER_COMMAND
from tests.conftest import require_tool
from tests.models import llama, spec_dict, write_trio
from tests.service_support import DaemonProcess, running_daemon, wait_until

DAY = 86_400


class FalseClock:
    """The wall clock of the processes that have `environment`."""

    def __init__(self, library: Path, file: Path) -> None:
        self.file = file
        self.jump(0)
        self.environment = {"LD_PRELOAD": str(library), "FALSE_CLOCK": str(file)}

    def jump(self, seconds: int) -> None:
        """From now on it is so far off."""
        with open(self.file, "r+b" if self.file.exists() else "wb") as file:  # in place: it is mapped
            file.write(struct.pack("<q", seconds))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clock") / "false_clock.so"
    source = Path(__file__).with_name("false_clock.cpp")
    subprocess.run([require_tool("c++", "g++"), "-O1", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path


@pytest.fixture
def clock(library: Path, tmp_path: Path) -> FalseClock:
    return FalseClock(library, tmp_path / "offset")


def off_by(daemon: DaemonProcess, text: str) -> timedelta:
    """How far the date in a status is from the true one."""
    return datetime.fromisoformat(text) - datetime.now(UTC)


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_healthy_worker_is_left_alone_and_a_dying_one_is_started_again_in_time(
    tmp_path: Path, clock: FalseClock, seconds: int
) -> None:
    config: dict[str, Any] = {"stall_seconds": 20.0, "retry_delay": 1.0, "attempts": 3, "jobs": 2, "rescan": 0.2}
    with running_daemon(tmp_path, environment=clock.environment, **config) as daemon:
        daemon.drop("healthy.yaml", gate="go")
        daemon.wait_started("healthy.yaml")
        clock.jump(seconds)
        begun = time.monotonic()
        daemon.drop("dies.yaml", signal=int(signal.SIGKILL))
        status = daemon.wait_for("failed", "dies.yaml")["dies.yaml"]
        assert time.monotonic() - begun >= 3.0, "1 s before the second attempt, 2 s before the third"
        assert status.deaths == 3
        assert abs(off_by(daemon, status.heartbeat) - timedelta(seconds=seconds)) < timedelta(hours=1), "it did jump"
        assert "hangs" not in daemon.log()
        daemon.open_gate()
        assert daemon.wait_for("done", "healthy.yaml")["healthy.yaml"].attempts == 1


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_file_is_taken_when_nothing_has_happened_to_it_for_long_enough_whatever_the_date(
    tmp_path: Path, clock: FalseClock, seconds: int
) -> None:
    with running_daemon(tmp_path, environment=clock.environment, settle=1.0, rescan=0.1) as daemon:
        path = daemon.spool.incoming / "slow.yaml"
        with path.open("w") as file:
            file.write('{"steps": ')
            file.flush()
            wait_until(lambda: daemon.metric("mergecore_queue_jobs") == 1, "the daemon to see it")
            clock.jump(seconds)
            time.sleep(2.0)
            assert path.exists(), "it is being written"
            file.write("2}")
        assert daemon.wait_for("done", "slow.yaml")["slow.yaml"].result == {"tensors": 2}


@pytest.mark.parametrize("seconds", [3 * DAY, -3 * DAY])
def test_no_job_is_removed_because_the_date_jumped(tmp_path: Path, clock: FalseClock, seconds: int) -> None:
    prelude = "service.daemon.RETENTION_PAUSE = 0.1"
    config: dict[str, Any] = {"prelude": prelude, "rescan": 0.1, "keep_done": "2d", "keep_failed": "2d"}
    with running_daemon(tmp_path, environment=clock.environment, **config) as daemon:
        daemon.drop("done.yaml")
        daemon.drop("failed.yaml", exit=1)
        daemon.wait_for("done", "done.yaml")
        daemon.wait_for("failed", "failed.yaml")
        clock.jump(seconds)
        wait_until(lambda: "the clock jumped by " in daemon.log(), "the daemon to see it")
        daemon.drop("later.yaml")
        daemon.wait_for("done", "later.yaml")
        time.sleep(1.0)
        clock.jump(0)
        time.sleep(1.0)
        assert set(daemon.jobs("done")) == {"done.yaml", "later.yaml"}
        assert set(daemon.jobs("failed")) == {"failed.yaml"}
        assert "INFO removed " not in daemon.log()


def test_a_merge_does_not_mind(tmp_path: Path, clock: FalseClock) -> None:
    trio = write_trio(tmp_path / "models", llama(layers=1))
    with running_daemon(tmp_path, environment=clock.environment, worker_command=WORKER_COMMAND) as daemon:
        clock.jump(DAY)
        daemon.drop("a.yaml", **spec_dict("widen", *trio, run={"output": "out"}))
        wait_until(lambda: "worker" in daemon.log(), "the start")
        clock.jump(-DAY)
        status = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert 0 < status.result["seconds"] < 3600
        assert 0 < status.seconds < 3600


def test_a_date_that_jumped_is_believed_after_a_day_and_small_corrections_at_once() -> None:
    now = {"wall": 1e9, "monotonic": 5.0}
    date = SteadyDate(lambda: now["wall"], lambda: now["monotonic"])

    def after(seconds: float, jump: float = 0.0) -> float:
        now["wall"] += seconds + jump
        now["monotonic"] += seconds
        return date.now().timestamp() - 1e9

    assert after(60, jump=2) == 62
    assert after(60, jump=-3) == 119
    assert after(60, jump=10 * DAY) == 179
    assert after(60) == 239
    assert after(60, jump=-10 * DAY) == 299, "set right again: as if it had never happened"
    assert after(60, jump=-10 * DAY) == 359
    assert after(DOUBT) == 359 + DOUBT - 10 * DAY
