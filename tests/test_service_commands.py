"""The commands serve, submit and status: which settings count, which are refused, and what users see of jobs."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import socket
import sys
from pathlib import Path

import pytest

from service.commands import list_jobs, status_command, submit_command
from service.config import WORKER_COMMAND, ServeConfig, load_config
from service.errors import ServiceError
from service.spool import Spool
from tests.service_support import DaemonProcess, running_daemon, wait_until

EXAMPLE = Path(__file__).parent.parent / "service" / "deploy" / "mergecore.toml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# --- what it refuses to start with ---


def start_and_fail(folder: Path, **config: object) -> str:
    """Start a daemon that must end with exit code 2; what it says."""
    daemon = DaemonProcess(folder, **config)  # type: ignore[arg-type]
    out, _ = daemon.process.communicate(timeout=60)
    assert daemon.process.returncode == 2, daemon.log()
    assert out == b""
    assert "Traceback" not in daemon.log()
    return daemon.log().splitlines()[-1]


def test_a_port_in_use_is_a_clear_error(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert start_and_fail(folder, port=port) == (
            f"mergecore serve: cannot serve metrics on 127.0.0.1 port {port}: Address already in use; "
            "choose another address with --host and --port (port 0: any free one)"
        )


def test_unusable_folders_are_a_clear_error(folder: Path) -> None:
    (folder / "file").write_text("")
    assert f"spool {folder}/file: cannot be used" in start_and_fail(folder, spool=str(folder / "file"))
    assert "cannot be written: Not a directory" in start_and_fail(folder, outputs=str(folder / "file" / "outputs"))


def test_a_worker_that_is_no_program_is_a_clear_error(folder: Path) -> None:
    assert "nowhere/worker is not a program" in start_and_fail(folder, worker_command=["/nowhere/worker"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prot", 1, "command line: unknown key prot; did you mean port?"),
        ("port", 70000, "port is 70000, but must be a port number from 0 to 65535"),
        ("port", "x", "port is 'x', but must be"),
        ("port", True, "port is True, but must be"),
        ("jobs", 0, "jobs is 0, but must be a whole number, at least 1"),
        ("jobs", 1.5, "jobs is 1.5, but must be"),
        ("warm_workers", -1, "warm_workers is -1, but must be a whole number, at least 0"),
        ("warm_workers", True, "warm_workers is True, but must be"),
        ("rescan", 0, "rescan is 0, but must be a number of seconds above 0"),
        ("settle", -1, "settle is -1, but must be"),
        ("attempts", 0, "attempts is 0, but must be a whole number, at least 1"),
        ("retry_delay", -1, "retry_delay is -1, but must be a number of seconds, at least 0"),
        ("stall_seconds", 0, "stall_seconds is 0, but must be a number of seconds above 0"),
        ("stop_timeout", float("inf"), "stop_timeout is inf, but must be"),
        ("models", "/m", "models is '/m', but must be a list of paths"),
        ("worker_command", [], "worker_command is [], but must be a list of strings"),
        ("spool", "", "spool is '', but must be a path"),
        ("host", "", "host is '', but must be a host name or address"),
        ("wildly", 1, "unknown key wildly; known are spool, outputs,"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(key: str, value: object, message: str) -> None:
    with pytest.raises(ServiceError, match=re.escape(message)):
        load_config(None, {"spool": "s", "outputs": "o", key: value})


def test_a_number_that_is_no_port_may_be_large() -> None:
    assert load_config(None, {"spool": "s", "outputs": "o", "attempts": 1_000_000}).attempts == 1_000_000


def test_the_configuration_file_is_overridden_by_the_command_line(folder: Path) -> None:
    file = folder / "mergecore.toml"
    file.write_text('spool = "spool"\noutputs = "/o"\nmodels = ["m", "/n"]\nport = 1\nrescan = 2\n')
    config = load_config(file, {"port": 0, "jobs": None})
    assert config == ServeConfig(
        spool=folder / "spool", outputs=Path("/o"), models=(folder / "m", Path("/n")), port=0, rescan=2.0
    )
    assert config.worker_command == WORKER_COMMAND


def test_environment_variables_lie_between_the_file_and_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "mergecore.toml"
    file.write_text('spool = "spool"\noutputs = "/o"\nport = 1\njobs = 2\nrescan = 3\n')
    monkeypatch.setenv("MERGECORE_PORT", "7")
    monkeypatch.setenv("MERGECORE_JOBS", "5")
    monkeypatch.setenv("MERGECORE_OUTPUTS", "/elsewhere")
    monkeypatch.setenv("MERGECORE_MODELS", '["/m", "/n"]')
    monkeypatch.setenv("MERGECORE_KEEP_DONE", "30d")
    config = load_config(file, {"jobs": 4})
    assert (config.port, config.jobs, config.rescan) == (7, 4, 3)
    assert (config.outputs, config.models) == (Path("/elsewhere"), (Path("/m"), Path("/n")))
    assert str(config.keep_done) == "30d"
    monkeypatch.setenv("MERGECORE_JOBS", "many")
    with pytest.raises(ServiceError, match="environment variable MERGECORE_JOBS: jobs is 'many', but must be"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spool = ", "not valid TOML"),
        ("port = 1", r"no spool folder: give --spool DIR or write spool = \"...\" into"),
        ("[serve]\nport = 1", "unknown key serve"),
        (None, "No such file"),
    ],
)
def test_a_wrong_configuration_file_is_named(folder: Path, text: str | None, message: str) -> None:
    file = folder / "mergecore.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ServiceError, match=message) as raised:
        load_config(file)
    assert str(file) in str(raised.value)


def test_the_example_configuration_is_valid_and_shows_every_setting() -> None:
    config = load_config(EXAMPLE)
    assert config.spool == Path("/var/lib/mergecore/spool")
    text = EXAMPLE.read_text()
    for key in ServeConfig.__dataclass_fields__:
        assert re.search(rf"^#? ?{key} = ", text, re.MULTILINE), key


# --- submit and status ---


def test_a_submitted_spec_is_run_at_once_under_its_name(folder: Path) -> None:
    spec = folder / "mine.yaml"
    spec.write_text('{"method": "widen"}')
    with running_daemon(folder, rescan=30, settle=30) as daemon:
        assert submit_command(spec, daemon.spool.root) == "mine.yaml"
        assert daemon.wait_for("done", "mine.yaml")["mine.yaml"].method == "widen"
        assert list(daemon.spool.incoming.iterdir()) == []


def test_submit_refuses_to_replace_a_waiting_spec_and_what_is_none(folder: Path) -> None:
    spool = Spool(folder / "spool")
    spec = folder / "a.yaml"
    spec.write_text("1")
    with pytest.raises(ServiceError, match="is not a spool"):
        submit_command(spec, spool.root)
    spool.prepare()
    submit_command(spec, spool.root)
    spec.write_text("2")
    with pytest.raises(ServiceError, match=r"a\.yaml still waits"):
        submit_command(spec, spool.root)
    assert (spool.incoming / "a.yaml").read_text() == "1"
    with pytest.raises(ServiceError, match="specs are files named"):
        submit_command(folder / "a.txt", spool.root)
    with pytest.raises(ServiceError, match="No such file"):
        submit_command(folder / "absent.yaml", spool.root)
    assert [path.name for path in spool.incoming.iterdir()] == ["a.yaml"]


def test_status_shows_every_job_as_a_table_and_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_daemon(folder) as daemon:
        daemon.drop("bad.yaml", exit=2)
        daemon.wait_for("failed", "bad.yaml")
        daemon.drop("good.yaml", method="widen")
        daemon.wait_for("done", "good.yaml")
        daemon.drop("now.yaml", gate="go", steps=2)
        daemon.wait_started("now.yaml")
        wait_until(lambda: daemon.jobs("running")["now.yaml"].progress.get("ratio") == 0.5, "half of it")
        daemon.drop("later.yaml")
        root = daemon.spool.root

        assert [(one.spec, one.state) for one in list_jobs(root)] == [
            ("now.yaml", "running"),
            ("later.yaml", "queued"),
            ("good.yaml", "done"),
            ("bad.yaml", "failed"),
        ]
        assert status_command(root) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[:6] == ["job", "state", "progress", "method", "time", "output,"]
        assert re.match(r"now-\S+ +running +50% +linear", lines[1])
        assert re.match(r"later.yaml +queued", lines[2])
        assert re.match(r"good-\S+ +done +100% +widen", lines[3])
        assert "the spec asks for a failure" in lines[4]

        assert status_command(root, as_json=True) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["counts"] == {"running": 1, "queued": 1, "done": 1, "failed": 1}
        assert [one["state"] for one in shown["jobs"]] == ["running", "queued", "done", "failed"]

        assert status_command(root, job="bad", as_json=True) == 0
        assert json.loads(capsys.readouterr().out)["error"] == "the spec asks for a failure"
        assert status_command(root, job="bad.yaml") == 0
        assert capsys.readouterr().out.endswith("\nthe spec asks for a failure\n")
        with pytest.raises(ServiceError, match="no job nothing"):
            status_command(root, job="nothing")
        daemon.open_gate()


def test_status_on_a_terminal_shows_names_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(folder)
    spool.prepare()
    (spool.incoming / "[red]\x1b[2Jx.yaml").write_text("")
    parent, child = pty.openpty()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, parent)
        with open(child, "w") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            monkeypatch.setenv("COLUMNS", "160")
            assert status_command(folder) == 0
        shown = os.read(parent, 65536).decode()
    assert "[red]\\x1b[2Jx.yaml" in shown
    assert "\x1b[2J" not in shown
