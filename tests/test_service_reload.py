"""SIGHUP: a new configuration for a daemon that runs."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service_support import DaemonProcess, running_daemon, wait_until
from tests.test_systemd import Manager


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mergecore.toml"
    path.write_text("jobs = 1\n")
    return path


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    with contextlib.closing(manager.socket):
        yield manager


def reload(daemon: DaemonProcess, says: str) -> None:
    before = daemon.log().count(says)
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: daemon.log().count(says) > before, says)


def test_a_new_configuration_holds_for_what_starts_and_what_runs_goes_on(
    tmp_path: Path, file: Path, manager: Manager
) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    with running_daemon(tmp_path / "d", config_file=file, environment=environment, rescan=30) as daemon:
        daemon.drop("a.yaml", gate="go")
        daemon.wait_started("a.yaml")
        daemon.drop("b.yaml")
        wait_until(lambda: daemon.metric("mergecore_queue_jobs") == 1, "it waits")
        file.write_text("jobs = 2\n")
        begun = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        reload(daemon, "configuration reloaded: 2 job(s) at a time")
        daemon.wait_for("done", "b.yaml")
        assert set(daemon.jobs("running")) == {"a.yaml"}
        manager.wait_for("READY=1", times=2)
        at = manager.messages.index("RELOADING=1")
        name, _, microseconds = manager.messages[at + 1].partition("=")
        assert name == "MONOTONIC_USEC"
        assert begun <= int(microseconds) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert "READY=1" in manager.messages[at + 2 :]
        daemon.open_gate()
        assert daemon.wait_for("done", "a.yaml")["a.yaml"].attempts == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("jobs = 0", "jobs is 0, but must be a whole number, at least 1"),
        ("jobs = ", "not valid TOML"),
        ("jobbs = 2", "unknown key jobbs; did you mean jobs?"),
        (None, "No such file"),
        ('jobs = 2\nhost = "127.0.0.2"', "host cannot change while the daemon runs; restart it for that"),
        ('jobs = 2\nworker_command = ["/nowhere/x"]', "/nowhere/x is not a program"),
    ],
)
def test_a_wrong_one_is_told_in_one_line_and_the_old_one_holds(
    tmp_path: Path, file: Path, manager: Manager, text: str | None, says: str
) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    options: dict[str, None] = {"worker_command": None} if text and "worker" in text else {}
    with running_daemon(tmp_path / "d", config_file=file, environment=environment, **options) as daemon:
        file.unlink() if text is None else file.write_text(text)
        reload(daemon, "configuration not reloaded, the old one holds: ")
        assert [line for line in daemon.log().splitlines() if says in line and "not reloaded" in line]
        manager.wait_for("READY=1", times=2)
        if not options:
            daemon.drop("a.yaml", gate="go")
            daemon.wait_started("a.yaml")
            daemon.drop("b.yaml")
            wait_until(lambda: daemon.metric("mergecore_queue_jobs") == 1, "still one at a time")
            daemon.open_gate()
            daemon.wait_for("done", "a.yaml", "b.yaml")
