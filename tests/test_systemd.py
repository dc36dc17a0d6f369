"""The systemd unit as systemd's own tools see it, and what the daemon tells its service manager."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.config import load_config
from service.spool import FOLDERS
from service.systemd import notify, watchdog_interval
from tests.conftest import require_tool
from tests.service_support import DEADLINE, running_daemon, wait_until

DEPLOY = Path(__file__).parent.parent / "service" / "deploy"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists on every machine."""
    text = (DEPLOY / "mergecore.service").read_text()
    assert "/opt/mergecore/bin/mergecore serve" in text
    path = tmp_path / "mergecore.service"
    path.write_text(text.replace("/opt/mergecore/bin/mergecore", "/bin/true"))
    return path


def settings() -> dict[str, str]:
    lines = (DEPLOY / "mergecore.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line))


# --- the unit ---


def test_systemd_accepts_the_unit_without_a_word(unit: Path) -> None:
    analyze = require_tool("systemd-analyze", package="systemd")
    checked = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_systemd_rates_the_exposure_of_the_unit_below_2(unit: Path) -> None:
    analyze = require_tool("systemd-analyze", package="systemd")
    rated = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", unit], capture_output=True, text=True, check=False
    )
    found = re.search(r"Overall exposure level for mergecore.service: ([\d.]+)", rated.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze rates no unit files: {rated.stderr.strip()}")
    assert float(found[1]) < 2.0


def test_the_unit_and_the_example_configuration_fit_each_other() -> None:
    unit, config = settings(), load_config(DEPLOY / "mergecore.toml")
    assert unit["Type"] == "notify"
    assert unit["ExecStart"].endswith("--config /etc/mergecore/mergecore.toml")
    state = Path("/var/lib") / unit["StateDirectory"]
    assert unit["ReadWritePaths"] == str(state)
    assert config.spool.parent == config.outputs.parent == state
    assert float(unit["TimeoutStopSec"]) > config.stop_timeout + 10
    assert float(unit["WatchdogSec"]) > 10 * config.rescan
    assert unit["KillMode"] == "mixed", "the workers' stop is the daemon's to ask for"


# --- what is installed ---


def make(target: str, root: Path) -> None:
    subprocess.run(
        [require_tool("make", package="make"), target, f"DESTDIR={root}"], cwd=DEPLOY.parent.parent, check=True
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A root in which `make install-service` was run."""
    require_tool("systemd-sysusers", package="systemd")
    require_tool("systemd-tmpfiles", package="systemd")
    root = tmp_path / "root"
    make("install-service", root)
    return root


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_installing_twice_keeps_the_configuration_and_uninstalling_keeps_every_file_of_the_operator(
    installed: Path,
) -> None:
    ours = {
        "usr/lib/systemd/system/mergecore.service",
        "usr/lib/sysusers.d/mergecore.conf",
        "usr/lib/tmpfiles.d/mergecore.conf",
        "usr/share/mergecore/rules.yml",
        "usr/share/mergecore/dashboard.json",
    }
    config, output = installed / "etc/mergecore/mergecore.toml", installed / "var/lib/mergecore/outputs/model/weights"
    assert ours | {str(config.relative_to(installed))} <= files(installed)
    config.write_text(config.read_text() + "# mine\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    make("install-service", installed)
    assert config.read_text().endswith("# mine\n")
    before = files(installed)
    make("uninstall-service", installed)
    assert files(installed) == before - ours
    assert not (installed / "usr/share/mergecore").exists()
    make("uninstall-service", installed)


def test_systemd_makes_the_folders_that_the_example_configuration_names(installed: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give folders to another user")
    config = load_config(DEPLOY / "mergecore.toml")
    passwd = dict(line.split(":")[0:3:2] for line in (installed / "etc/passwd").read_text().splitlines())
    folders = [config.spool / name for name in FOLDERS]
    for folder in (*folders, config.spool, config.spool.parent, config.outputs):
        found = (installed / folder.relative_to("/")).stat()
        assert stat.S_ISDIR(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o755
        assert str(found.st_uid) == passwd["mergecore"], folder
    again = subprocess.run(
        ["systemd-tmpfiles", f"--root={installed}", "--create", "mergecore.conf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (again.returncode, again.stdout + again.stderr) == (0, "")


# --- messages ---


class Manager:
    """A service manager's side of the notification socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.messages: list[str] = []

    def collect(self, wait: float = 0.0) -> list[str]:
        """Everything that was sent so far."""
        while select.select([self.socket], [], [], wait)[0]:
            self.messages += self.socket.recv(4096).decode().split("\n")
        return self.messages

    def wait_for(self, message: str, times: int = 1) -> None:
        """Wait until a message has come so often."""
        wait_until(lambda: self.collect().count(message) >= times, f"{message} in {self.messages}", DEADLINE)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Manager, str]]:
    shown = str(tmp_path / "notify") if request.param == "path" else f"@mergecore-test-{os.getpid()}"
    manager = Manager(shown.replace("@", "\0", 1) if shown.startswith("@") else shown)
    with contextlib.closing(manager.socket):
        yield manager, shown


def test_the_daemon_tells_that_it_is_ready_what_it_does_and_that_it_stops(
    tmp_path: Path, manager: tuple[Manager, str]
) -> None:
    receiver, address = manager
    with running_daemon(tmp_path / "d", environment={"NOTIFY_SOCKET": address}) as daemon:
        receiver.wait_for("READY=1")
        receiver.wait_for("STATUS=0 running, 0 waiting")
        daemon.drop("a.yaml", gate="go")
        daemon.drop("b.yaml", gate="go")
        receiver.wait_for("STATUS=1 running, 1 waiting")
        daemon.open_gate()
        daemon.wait_for("done", "a.yaml", "b.yaml")
        receiver.wait_for("STATUS=0 running, 0 waiting", times=2)
        assert daemon.stop() == 0
        receiver.wait_for("STOPPING=1")
        assert receiver.messages[0] == "READY=1"
        assert "WATCHDOG=1" not in receiver.messages


def test_nothing_is_ready_before_the_port_is_open(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with contextlib.closing(manager.socket), socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(AssertionError, match="Address already in use"),
            running_daemon(tmp_path / "d", port=port, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}),
        ):
            pass
        assert manager.collect() == []


def test_the_watchdog_hears_from_the_daemon_only_while_its_loop_turns(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    prelude = (
        "import time\n"
        "adopt = service.daemon.Daemon._adopt\n"
        "def _adopt(self):\n"
        "    while (self.config.outputs / 'stuck').exists():\n"
        "        (self.config.outputs / 'is-stuck').touch()\n"
        "        time.sleep(0.01)\n"
        "    adopt(self)\n"
        "service.daemon.Daemon._adopt = _adopt\n"
    )
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    with (
        contextlib.closing(manager.socket),
        running_daemon(tmp_path / "d", prelude=prelude, environment=environment, rescan=0.1) as daemon,
    ):
        manager.wait_for("WATCHDOG=1", times=3)
        (daemon.outputs / "stuck").touch()
        wait_until((daemon.outputs / "is-stuck").exists, "the loop to be stuck")
        manager.collect()
        heard = len(manager.messages)
        assert len(manager.collect(wait=0.6)) == heard
        (daemon.outputs / "stuck").unlink()
        manager.wait_for("WATCHDOG=1", times=manager.messages.count("WATCHDOG=1") + 1)


def test_the_watchdog_hears_from_a_daemon_that_waits_for_its_workers_to_stop(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    with contextlib.closing(manager.socket), running_daemon(tmp_path / "d", environment=environment) as daemon:
        daemon.drop("a.yaml", gate="go", deaf=True)
        daemon.wait_started("a.yaml")
        daemon.process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        manager.wait_for("WATCHDOG=1", times=manager.messages.count("WATCHDOG=1") + 3)
        daemon.open_gate()
        assert daemon.process.wait(DEADLINE) == 0
        assert set(daemon.jobs("done")) == {"a.yaml"}, "it had ended by itself in time"


@pytest.mark.parametrize("address", [None, "", "relative/path", "/nowhere/notify"])
def test_without_a_service_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify("READY=1") is False


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("120000000", None, 60),
        ("120000000", str(os.getpid()), 60),
        ("120000000", "1", None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_the_watchdog_interval_is_half_of_what_systemd_allows(
    monkeypatch: pytest.MonkeyPatch, microseconds: str | None, pid: str | None, seconds: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog_interval() == seconds
