"""Steering a spool: cancel, retry, pause, resume and drain, with real daemons and workers."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from mergecore.cli import main
from service.commands import (
    cancel_command,
    drain_command,
    list_jobs,
    pause_command,
    resume_command,
    retry_command,
)
from service.errors import ServiceError
from service.spool import Spool
from tests.service_support import running_daemon, wait_until


def states(root: Path) -> dict[str, str]:
    return {one.spec: one.state for one in list_jobs(root)}


def folders_with(spool: Spool, job: str) -> list[str]:
    return [folder.name for folder in (spool.running, spool.done, spool.failed) if (folder / job).exists()]


# --- cancel ---


def test_a_running_job_is_stopped_and_lies_cancelled_in_failed(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", steps=3, gate="never")
        daemon.wait_started("a.yaml")
        worker = daemon.worker("a.yaml")
        job = daemon.jobs("running")["a.yaml"].job
        assert cancel_command(daemon.spool.root, "a.yaml") == f"{job}: its daemon stops it"
        status = daemon.wait_for("cancelled", "a.yaml")["a.yaml"]
        assert not psutil.pid_exists(worker)
        assert daemon.record()[-1].startswith("stop a.yaml"), "it was asked, not killed"
        assert re.match(r"cancelled by \S+ on \S+ at 20\d\d-", status.error)
        assert folders_with(daemon.spool, job) == ["failed"]
        left = {"spec.yaml", "status.json", "log", "error.txt"}
        # The lock and the request go right after the move.
        wait_until(
            lambda: {path.name for path in (daemon.spool.failed / job).iterdir()} == left, "the files of the job"
        )
        assert "mergecore retry" in (daemon.spool.failed / job / "error.txt").read_text()
        assert daemon.metric('mergecore_jobs_total{method="linear",state="cancelled"}') == 1
        daemon.drop("next.yaml")
        daemon.wait_for("done", "next.yaml")


def test_a_worker_that_does_not_stop_for_a_cancellation_is_killed(tmp_path: Path) -> None:
    with running_daemon(tmp_path, stop_timeout=0.2) as daemon:
        daemon.drop("a.yaml", gate="never", deaf=True)
        daemon.wait_started("a.yaml")
        cancel_command(daemon.spool.root, "a.yaml")
        wait_until(lambda: states(daemon.spool.root)["a.yaml"] in ("cancelling", "cancelled"), "the request is seen")
        daemon.wait_for("cancelled", "a.yaml")
        assert "killing it" in daemon.log()


def test_a_waiting_spec_is_cancelled_without_ever_being_run(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("first.yaml", gate="go")
        daemon.wait_started("first.yaml")
        daemon.drop("a.yaml")
        assert cancel_command(daemon.spool.root, "a.yaml").endswith(": cancelled")
        daemon.open_gate()
        daemon.wait_for("done", "first.yaml")
        assert states(daemon.spool.root) == {"first.yaml": "done", "a.yaml": "cancelled"}
        assert not any("a.yaml" in line for line in daemon.record())


def test_an_interrupted_job_is_cancelled_also_without_a_daemon(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", gate="never")
        daemon.wait_started("a.yaml")
        assert daemon.stop() == 0
        assert cancel_command(daemon.spool.root, "a.yaml").endswith(": cancelled")
        assert states(daemon.spool.root) == {"a.yaml": "cancelled"}
    with running_daemon(tmp_path) as daemon:
        daemon.drop("b.yaml")
        daemon.wait_for("done", "b.yaml")
        assert states(daemon.spool.root) == {"b.yaml": "done", "a.yaml": "cancelled"}


def test_a_cancellation_outlives_the_daemon_that_should_have_seen_it(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", gate="never")
        daemon.wait_started("a.yaml")
        worker = daemon.worker("a.yaml")
        daemon.process.send_signal(signal.SIGSTOP)
        cancel_command(daemon.spool.root, "a.yaml")
        assert states(daemon.spool.root) == {"a.yaml": "cancelling"}
        daemon.stop(signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
    with running_daemon(tmp_path) as daemon:
        daemon.wait_for("cancelled", "a.yaml")
        assert len(daemon.record()) == 1


def test_of_two_daemons_the_one_that_runs_the_job_cancels_it(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as one, running_daemon(tmp_path) as two:
        one.drop("a.yaml", gate="never")
        one.wait_started("a.yaml")
        one.drop("b.yaml", gate="never")
        one.wait_started("b.yaml")
        cancel_command(one.spool.root, "a.yaml")
        cancel_command(one.spool.root, "b.yaml")
        one.wait_for("cancelled", "a.yaml", "b.yaml")
        said = [daemon.log().count("stopping its worker") for daemon in (one, two)]
        assert said == [1, 1]


def test_a_job_that_has_ended_cannot_be_cancelled(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml")
        daemon.wait_for("done", "a.yaml")
        with pytest.raises(ServiceError, match="cannot be cancelled: it is done"):
            cancel_command(daemon.spool.root, "a.yaml")
        with pytest.raises(ServiceError, match="no job nothing"):
            cancel_command(daemon.spool.root, "nothing")
        with pytest.raises(ServiceError, match="is not a spool"):
            cancel_command(tmp_path, "a.yaml")


# --- retry ---


def test_a_cancelled_job_goes_on_from_what_it_had_finished(tmp_path: Path) -> None:
    with running_daemon(tmp_path, rescan=0.1) as daemon:
        daemon.drop("a.yaml", steps=3, gate="go")
        daemon.wait_started("a.yaml")
        wait_until(lambda: (daemon.outputs / "a.yaml.steps").stat().st_size == 2, "two steps")
        cancel_command(daemon.spool.root, "a.yaml")
        job = daemon.wait_for("cancelled", "a.yaml")["a.yaml"].job
        daemon.open_gate()
        assert retry_command(daemon.spool.root, "a.yaml") == job
        status = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert (status.job, status.attempts, status.error) == (job, 2, "")
        assert (daemon.outputs / "a.yaml.steps").stat().st_size == 3
        assert folders_with(daemon.spool, job) == ["done"]
        assert not (daemon.spool.done / job / "error.txt").exists()


def test_a_failed_job_is_retried_by_whatever_daemon_comes(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", exit=2)
        job = daemon.wait_for("failed", "a.yaml")["a.yaml"].job
        assert daemon.stop() == 0
    retry_command(daemon.spool.root, job)
    assert states(daemon.spool.root) == {"a.yaml": "interrupted"}
    with pytest.raises(ServiceError, match="cannot be retried: it is interrupted"):
        retry_command(daemon.spool.root, job)
    with running_daemon(tmp_path) as daemon:
        assert daemon.wait_for("failed", "a.yaml")["a.yaml"].attempts == 2


def test_a_spool_that_cannot_be_written_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "spool")
    spool.prepare()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/spool/paused")

    monkeypatch.setattr("service.commands.write_atomic", refuse)
    with pytest.raises(ServiceError, match=r"cannot pause .*: Permission denied: /spool/paused .*daemon's user"):
        pause_command(spool.root)


# --- pause, resume, drain ---


def test_while_paused_nothing_starts_and_what_runs_goes_on(tmp_path: Path) -> None:
    with running_daemon(tmp_path, jobs=2, rescan=30) as daemon:  # so that it is events that tell
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        pause_command(daemon.spool.root)
        daemon.drop("b.yaml")
        wait_until(lambda: daemon.metric("mergecore_queue_jobs") == 1, "it is seen")
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml")
        time.sleep(0.3)
        assert states(daemon.spool.root) == {"b.yaml": "queued", "a.yaml": "done"}
        resume_command(daemon.spool.root)
        daemon.wait_for("done", "b.yaml")
        resume_command(daemon.spool.root)


def test_a_paused_spool_stays_so_over_restarts_and_interrupted_jobs_wait_too(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        assert daemon.stop() == 0
    pause_command(daemon.spool.root)
    daemon.open_gate()
    with running_daemon(tmp_path, rescan=0.05) as daemon:
        wait_until(lambda: "paused" in daemon.log(), "it is seen")
        time.sleep(0.2)
        assert states(daemon.spool.root) == {"a.yaml": "interrupted"}
        resume_command(daemon.spool.root)
        daemon.wait_for("done", "a.yaml")


def test_a_drained_daemon_finishes_what_runs_and_ends_well(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as one, running_daemon(tmp_path) as two:
        one.drop("a.yaml", gate="go")
        one.wait_started("a.yaml")
        drain_command(one.spool.root)
        wait_until(lambda: sum("draining: 1" in daemon.log() for daemon in (one, two)), "the busy one knows")
        one.drop("b.yaml")
        idle = one if "draining: 0" in one.log() else two
        assert idle.process.wait(30) == 0
        one.open_gate()
        assert {one.process.wait(30), two.process.wait(30)} == {0}
        assert states(one.spool.root) == {"b.yaml": "queued", "a.yaml": "done"}
    with running_daemon(tmp_path) as later:  # one that starts afterwards is not meant
        later.wait_for("done", "b.yaml")
        drain_command(later.spool.root)
        assert later.process.wait(30) == 0


def test_a_spool_whose_mount_has_gone_does_not_end_the_daemon(tmp_path: Path) -> None:
    prelude = (
        "import errno, os\n"
        "stat = os.stat\n"
        "def stale(path, *arguments, **options):\n"
        "    if str(path).endswith('/paused'):\n"
        "        raise OSError(errno.ESTALE, 'Stale file handle')\n"
        "    return stat(path, *arguments, **options)\n"
        "os.stat = stale\n"
    )
    with running_daemon(tmp_path, prelude=prelude, rescan=0.1) as daemon:
        daemon.drop("a.yaml")
        daemon.wait_for("done", "a.yaml")


# --- the command line ---


def test_the_commands_work_from_the_command_line_and_status_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    (spool.incoming / "a.yaml").write_text("{}")
    config = tmp_path / "mergecore.toml"
    config.write_text('spool = "spool"\noutputs = "outputs"\n')
    chosen = ["--config", str(config)]
    assert main(["pause", *chosen]) == 0
    assert main(["drain", *chosen]) == 0
    assert main(["cancel", "a.yaml", *chosen]) == 0
    assert capsys.readouterr().out.endswith(": cancelled\n")
    assert main(["status", *chosen]) == 0
    out = capsys.readouterr().out
    assert re.match(r"paused by .*: nothing is started before `mergecore resume`\ndrained by .*\n", out)
    assert " cancelled " in out
    assert main(["status", "--json", *chosen]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["counts"] == {"cancelled": 1}
    assert shown["paused"]
    assert main(["status", "a.yaml", *chosen]) == 0
    assert "goes on from what was finished" in capsys.readouterr().out
    assert main(["retry", "a.yaml", *chosen]) == 0
    assert main(["resume", *chosen]) == 0
    capsys.readouterr()
    assert main(["status", "--json", *chosen]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["paused"], shown["counts"]) == (None, {"interrupted": 1})
    assert main(["retry", "nothing", *chosen]) == 2
    assert "no job nothing" in capsys.readouterr().err
