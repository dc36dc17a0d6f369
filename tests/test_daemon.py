"""The daemon as a real process, with real signals: how specs arrive, how jobs end, what dies and is resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from service.config import ServeConfig
from service.daemon import serve
from service.spool import Spool
from service.status import read_status
from tests.service_support import STAND_IN, running_daemon, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# --- how specs arrive ---


def test_specs_dropped_by_cp_by_mv_and_over_a_hidden_name_are_each_run_once(folder: Path) -> None:
    with running_daemon(folder, rescan=30, settle=30) as daemon:  # so that it is events that bring them
        for name in ("copied.yaml", "moved.yaml", "synced.yaml"):
            (folder / name).write_text("{}")
        subprocess.run(["cp", folder / "copied.yaml", daemon.spool.incoming], check=True)
        subprocess.run(["mv", folder / "moved.yaml", daemon.spool.incoming], check=True)
        shutil.copy(folder / "synced.yaml", daemon.spool.incoming / ".synced.yaml.Xy12")
        os.rename(daemon.spool.incoming / ".synced.yaml.Xy12", daemon.spool.incoming / "synced.yaml")
        daemon.wait_for("done", "copied.yaml", "moved.yaml", "synced.yaml")
        assert len(daemon.record()) == 6
        assert list(daemon.spool.incoming.iterdir()) == []


def test_a_name_in_no_encoding_runs_like_any_other(folder: Path) -> None:
    with running_daemon(folder) as daemon:
        daemon.drop(os.fsdecode(b"caf\xe9 \x1b[31m.yaml"), exit=2)
        daemon.wait_for("failed", "caf\\udce9 \\x1b[31m.yaml")
        assert "\x1b" not in daemon.log()


def test_a_slowly_written_spec_is_not_read_before_its_writer_closes_it(folder: Path) -> None:
    with running_daemon(folder, rescan=0.05, settle=0.1) as daemon:
        with (daemon.spool.incoming / "slow.yaml").open("w") as file:
            for part in ('{"met', 'hod": "wi', 'den"'):
                file.write(part)
                file.flush()
                daemon.drop(
                    f"other{len(part)}.yaml"
                )  # while a whole other job comes and goes, far over the settle time
                daemon.wait_for("done", f"other{len(part)}.yaml")
                assert (daemon.spool.incoming / "slow.yaml").exists()
            file.write("}")
        status = daemon.wait_for("done", "slow.yaml")["slow.yaml"]
        assert status.method == "widen"


def test_temporary_and_foreign_names_stay_where_they_are(folder: Path) -> None:
    names = [".hidden.yaml", "a.yaml.tmp", "a.yaml.part", "a.yaml~", "a.yaml.swp", "README.txt"]
    with running_daemon(folder, rescan=0.05, settle=0) as daemon:
        for name in names:
            daemon.drop(name)
        (daemon.spool.incoming / "folder.yaml").mkdir()
        daemon.drop("zz-last.yaml")
        daemon.wait_for("done", "zz-last.yaml")
        assert sorted(path.name for path in daemon.spool.incoming.iterdir()) == sorted([*names, "folder.yaml"])
        assert daemon.log().count("README.txt") == 1
        assert ".hidden" not in daemon.log()


def test_specs_that_were_there_before_the_daemon_run_in_the_order_of_priority_and_arrival(folder: Path) -> None:
    spool = Spool(folder / "spool")
    spool.prepare()
    for name, priority, age in [("new", 0, 10), ("old", 0, 500), ("urgent", 5, 1), ("idle", -5, 900)]:
        path = spool.incoming / f"{name}.yaml"
        path.write_text(json.dumps({"run": {"priority": priority}}))
        os.utime(path, (time.time() - age,) * 2)
    with running_daemon(folder) as daemon:
        daemon.wait_for("done", "new.yaml", "old.yaml", "urgent.yaml", "idle.yaml")
        started = [line.split()[1] for line in daemon.record() if line.startswith("start")]
        assert started == ["urgent.yaml", "old.yaml", "new.yaml", "idle.yaml"]


def test_without_inotify_specs_are_found_by_looking(folder: Path) -> None:
    prelude = (
        "def fail(**_): raise OSError(24, 'inotify instance limit reached')\nservice.daemon.InotifyObserver = fail"
    )
    with running_daemon(folder, prelude=prelude, rescan=0.1, settle=0.2) as daemon:
        daemon.drop("a.yaml")
        daemon.wait_for("done", "a.yaml")
        assert "no events from" in daemon.log()


def test_a_spec_that_comes_while_the_folder_is_away_is_run_when_it_is_back(folder: Path) -> None:
    with running_daemon(folder, rescan=0.05) as daemon:
        os.rename(daemon.spool.incoming, folder / "away")
        wait_until(lambda: "cannot list" in daemon.log(), "a complaint")
        (folder / "away" / "a.yaml").write_text("{}")
        os.rename(folder / "away", daemon.spool.incoming)
        daemon.wait_for("done", "a.yaml")
        assert daemon.log().count("cannot list") == 1


# --- how jobs end ---


def test_a_bad_spec_fails_with_a_clear_error_and_the_next_one_runs(folder: Path) -> None:
    with running_daemon(folder) as daemon:
        daemon.drop("bad.yaml", exit=2)
        daemon.drop("good.yaml")
        daemon.wait_for("done", "good.yaml")
        status = daemon.wait_for("failed", "bad.yaml")["bad.yaml"]
        assert status.error == "the spec asks for a failure"
        assert (
            (daemon.spool.failed / status.job / "error.txt").read_text().startswith("the spec asks for a failure\n\n")
        )
        assert sorted(path.name for path in (daemon.spool.failed / status.job).iterdir()) == [
            "error.txt",
            "log",
            "spec.yaml",
            "status.json",
        ]


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"signal": 9}, "worker was killed by signal 9: likely out of memory; see dmesg"),
        ({"signal": 11}, "worker was killed by signal 11 (SIGSEGV)"),
        ({"exit": 7}, "worker ended with exit code 7 and no report"),
    ],
)
def test_a_worker_that_dies_without_a_word_leaves_a_clear_error(folder: Path, spec: dict[str, int], error: str) -> None:
    with running_daemon(folder) as daemon:
        daemon.drop("a.yaml", **spec)
        daemon.drop("next.yaml")
        status = daemon.wait_for("failed", "a.yaml")["a.yaml"]
        assert status.error.startswith(error)
        assert (daemon.spool.failed / status.job / "error.txt").read_text().startswith(f"{status.error}\n\n")
        daemon.wait_for("done", "next.yaml")


def test_kill_9_of_a_worker_fails_its_job_and_the_next_one_runs(folder: Path) -> None:
    with running_daemon(folder, attempts=1) as daemon:
        daemon.drop("a.yaml", gate="never")
        daemon.wait_started("a.yaml")
        daemon.kill_worker("a.yaml")
        daemon.drop("next.yaml")
        daemon.wait_for("done", "next.yaml")
        assert "killed by signal 9" in daemon.wait_for("failed", "a.yaml")["a.yaml"].error


def test_a_worker_that_cannot_be_started_is_tried_again(folder: Path) -> None:
    program = folder / "worker"
    shutil.copy("/bin/true", program)
    with running_daemon(folder, worker_command=[str(program)], rescan=0.05) as daemon:
        program.chmod(0o600)
        daemon.drop("a.yaml")
        wait_until(lambda: "cannot start a worker" in daemon.log(), "a complaint")
        program.chmod(0o700)
        daemon.wait_for("done", "a.yaml")


def test_a_job_that_cannot_be_moved_yet_is_moved_later_and_not_run_again(folder: Path) -> None:
    with running_daemon(folder, rescan=0.05) as daemon:
        os.rename(daemon.spool.done, folder / "away")
        daemon.drop("a.yaml")
        wait_until(lambda: "cannot move it to done/" in daemon.log(), "a complaint")
        assert daemon.process.poll() is None
        os.rename(folder / "away", daemon.spool.done)
        daemon.wait_for("done", "a.yaml")
        assert len(daemon.record()) == 2


def test_a_job_whose_folder_somebody_removed_does_not_trouble_the_daemon(folder: Path) -> None:
    with running_daemon(folder, rescan=0.05) as daemon:
        daemon.drop("a.yaml", gate="never")
        daemon.wait_started("a.yaml")
        worker = daemon.worker("a.yaml")
        shutil.rmtree(daemon.spool.running / daemon.jobs("running")["a.yaml"].job)
        os.kill(worker, signal.SIGKILL)
        daemon.drop("next.yaml")
        daemon.wait_for("done", "next.yaml")
        assert "somebody removed its folder" in daemon.log()
        assert "trying again" not in daemon.log()


def test_no_more_jobs_run_at_once_than_allowed(folder: Path) -> None:
    with running_daemon(folder, jobs=2) as daemon:
        for name in "abcd":
            daemon.drop(f"{name}.yaml", gate="go")
        wait_until(lambda: len(daemon.record()) == 2, "two starts")
        wait_until(lambda: daemon.metric("mergecore_queue_jobs") == 2, "two that wait")
        assert len(daemon.record()) == 2
        daemon.open_gate()
        daemon.wait_for("done", *(f"{name}.yaml" for name in "abcd"))
        running = most = 0
        for line in daemon.record():
            running += 1 if line.startswith("start") else -1
            most = max(most, running)
        assert most == 2


def test_the_daemon_loads_no_torch_and_stays_small(folder: Path) -> None:
    with running_daemon(folder) as daemon:
        daemon.drop("a.yaml")
        daemon.wait_for("done", "a.yaml")
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
        assert "torch" not in maps
        assert "pydantic" not in maps
        assert psutil.Process(daemon.process.pid).memory_info().rss < 80 << 20


def test_a_worker_sees_nothing_of_what_systemd_tells_the_daemon(folder: Path) -> None:
    with running_daemon(folder, environment={"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "60000000"}) as daemon:
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        environment = psutil.Process(daemon.worker("a.yaml")).environ()
        assert {"NOTIFY_SOCKET", "WATCHDOG_USEC"}.isdisjoint(environment)
        assert environment["MERGECORE_DAEMON_PID"] == str(daemon.process.pid)
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml")


# --- two daemons ---


def test_two_daemons_on_one_spool_run_each_of_20_jobs_exactly_once(folder: Path) -> None:
    with running_daemon(folder, jobs=2) as one, running_daemon(folder, jobs=2) as two:
        names = [f"{i:02}.yaml" for i in range(20)]
        for name in names:
            one.drop(name)
        one.wait_for("done", *names)
        ended = [line.split()[1] for line in one.record() if line.startswith("end")]
        assert sorted(ended) == names
        assert len(one.record()) == 40
        ran = [daemon.metric('mergecore_jobs_total{method="linear",state="done"}') for daemon in (one, two)]
        assert sum(count or 0 for count in ran) == 20
        assert list(one.spool.running.iterdir()) == []


def test_a_second_daemon_takes_over_what_a_stopped_one_left(folder: Path) -> None:
    with running_daemon(folder) as one:
        one.drop("a.yaml", steps=3, gate="go")
        one.wait_started("a.yaml")
        with running_daemon(folder, rescan=0.1) as two:
            assert one.stop() == 0
            two.wait_started("a.yaml", times=2)
            two.open_gate()
            status = two.wait_for("done", "a.yaml")["a.yaml"]
            assert status.attempts == 2


# --- stopping and starting again ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_interrupts_the_job_and_the_next_start_resumes_it(folder: Path, number: int) -> None:
    with running_daemon(folder) as daemon:
        daemon.drop("a.yaml", steps=4, gate="go")
        daemon.wait_started("a.yaml")
        daemon.drop("b.yaml")
        wait_until(lambda: (daemon.outputs / "a.yaml.steps").stat().st_size == 3, "three steps")
        assert daemon.stop(number) == 0
        status = daemon.jobs("interrupted")["a.yaml"]
        assert read_status(daemon.spool.running / status.job).state == "interrupted"
        assert (daemon.spool.incoming / "b.yaml").exists(), "nothing was claimed while stopping"
    with running_daemon(folder) as daemon:
        daemon.open_gate()
        done = daemon.wait_for("done", "a.yaml", "b.yaml")
        assert done["a.yaml"].job == status.job
        assert done["a.yaml"].attempts == 2
        assert done["a.yaml"].seconds > status.seconds
        assert (daemon.outputs / "a.yaml.steps").stat().st_size == 4
        assert [line.split()[:2] for line in daemon.record()][:4] == [
            ["start", "a.yaml"],
            ["stop", "a.yaml"],
            ["start", "a.yaml"],
            ["end", "a.yaml"],
        ]


def test_a_deaf_worker_is_killed_after_the_stop_timeout_and_its_job_is_resumed(folder: Path) -> None:
    with running_daemon(folder, stop_timeout=0.3) as daemon:
        daemon.drop("a.yaml", gate="go", deaf=True)
        daemon.wait_started("a.yaml")
        assert daemon.stop() == 0
        assert "killing it" in daemon.log()
        assert set(daemon.jobs("interrupted")) == {"a.yaml"}
    with running_daemon(folder) as daemon:
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml")


def test_a_second_signal_kills_at_once(folder: Path) -> None:
    with running_daemon(folder, stop_timeout=1000) as daemon:
        daemon.drop("a.yaml", gate="go", deaf=True)
        daemon.wait_started("a.yaml")
        daemon.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping: waiting" in daemon.log(), "the first signal")
        assert daemon.stop(signal.SIGINT) == 0
        assert set(daemon.jobs("interrupted")) == {"a.yaml"}


def test_a_worker_that_was_told_to_stop_by_somebody_else_is_resumed(folder: Path) -> None:
    with running_daemon(folder, rescan=0.1) as daemon:
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        daemon.kill_worker("a.yaml", signal.SIGTERM)
        daemon.wait_started("a.yaml", times=2)
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml")


def test_after_kill_9_of_the_daemon_a_living_worker_keeps_its_job(folder: Path) -> None:
    with running_daemon(folder) as daemon:
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        daemon.stop(signal.SIGKILL)
    with running_daemon(folder, rescan=0.05) as daemon:
        daemon.drop("b.yaml")
        daemon.wait_for("done", "b.yaml")  # so it has looked into running/ meanwhile
        assert set(daemon.jobs("running")) == {"a.yaml"}
        daemon.open_gate()
        status = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert status.attempts == 1, "its result was taken over, it was not run again"
        assert sum(line.startswith("start a.yaml") for line in daemon.record()) == 1


def test_after_kill_9_of_daemon_and_worker_the_job_is_run_again(folder: Path) -> None:
    with running_daemon(folder) as daemon:
        daemon.drop("a.yaml", steps=3, gate="go")
        daemon.wait_started("a.yaml")
        worker = daemon.worker("a.yaml")
        daemon.stop(signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
    with running_daemon(folder, rescan=0.1) as daemon:
        daemon.open_gate()
        assert daemon.wait_for("done", "a.yaml")["a.yaml"].attempts == 2


def test_several_interrupted_jobs_are_resumed_before_new_ones_begin(folder: Path) -> None:
    names = ["a.yaml", "b.yaml", "c.yaml"]
    with running_daemon(folder, jobs=3) as daemon:
        for name in names:
            daemon.drop(name, gate="go")
            daemon.wait_started(name)
        daemon.drop("new.yaml")
        assert daemon.stop() == 0
        assert set(daemon.jobs("interrupted")) == set(names)
        daemon.open_gate()
        seen = len(daemon.record())
    with running_daemon(folder, jobs=1, rescan=30) as daemon:
        daemon.wait_for("done", *names, "new.yaml")
        started = [line.split()[1] for line in daemon.record()[seen:] if line.startswith("start")]
        assert started == [*names, "new.yaml"]


def test_serving_in_this_process_gives_the_signal_handlers_back(folder: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    descriptors = len(os.listdir("/proc/self/fd"))
    config = ServeConfig(folder / "spool", folder / "outputs", port=0, worker_command=STAND_IN)

    def stop_when_ready() -> None:
        wait_until(lambda: signal.getsignal(signal.SIGTERM) != before[0], "the daemon's handlers")
        os.kill(os.getpid(), signal.SIGTERM)

    other = threading.Thread(target=stop_when_ready)
    other.start()
    assert serve(config) == 0
    other.join()
    assert [signal.getsignal(number) for number in numbers] == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
