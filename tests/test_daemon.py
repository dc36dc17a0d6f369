"""The daemon as a real process, with real signals: how specs arrive, how jobs end, what dies and is resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.commands import list_jobs, status_command, submit_command
from service.config import WORKER_COMMAND, ServeConfig, load_config
from service.daemon import serve
from service.errors import ServiceError
from service.spool import Spool
from service.status import read_status
from tests.service_support import STAND_IN, DaemonProcess, running_daemon, wait_until

EXAMPLE = Path(__file__).parent.parent / "service" / "deploy" / "mergecore.toml"


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


# --- whole merges of real checkpoints ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny homologous Qwen2 models: base, a, b."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("models")
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(config)
    model.to(dtype=torch.bfloat16)
    for name, scale in (("base", 0.0), ("a", 1e-3), ("b", 1e-2)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(scale * torch.randn(weight.shape))
        model.save_pretrained(root / name)
    return root


def merge_spec(output: str | None = None, **changes: object) -> dict[str, object]:
    """A small merge; models by names relative to the model folder."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.5}}],
        "dtype": "bfloat16",
        **({"run": {"output": output}} if output else {}),
        **changes,
    }


def merged(spec: dict[str, object] | Path, out: Path, models: Path) -> Path:
    """The merge without any daemon."""
    from mergecore import load_spec, merge

    return merge(load_spec(spec), out, resolve=lambda name, revision: models / name).output


def digest(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")}


def test_a_dropped_spec_becomes_a_model_that_transformers_loads(folder: Path, models: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with running_daemon(folder, worker_command=WORKER_COMMAND, models=[str(models)]) as daemon:
        daemon.drop("widen.yaml", **merge_spec("out", merge_method="widen", models=[{"model": "a"}, {"model": "b"}]))
        daemon.drop("bad.yaml", merge_method="widden", models=[{"model": "a"}])
        daemon.drop("unnamed.yaml", **merge_spec())
        done = daemon.wait_for("done", "widen.yaml", "unnamed.yaml")
        bad = daemon.wait_for("failed", "bad.yaml")["bad.yaml"]

        status = done["widen.yaml"]
        assert status.output == str(daemon.outputs / "out")
        assert status.result["output"] == status.output
        assert status.method == "widen"
        assert status.progress["ratio"] == 1
        model = AutoModelForCausalLM.from_pretrained(daemon.outputs / "out")
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
        assert (daemon.outputs / done["unnamed.yaml"].job / "config.json").exists()
        assert "widden" in bad.error
        assert "bad.yaml" in bad.error
        text = (daemon.spool.failed / bad.job / "error.txt").read_text()
        assert text.split("\n\n")[0].startswith("bad.yaml")
        assert "Traceback" in text
        wait_until(lambda: (daemon.metric("mergecore_tensors_total") or 0) > 0, "counted tensors")
        assert (daemon.metric("mergecore_written_bytes_total") or 0) >= status.result["bytes_written"]
        assert "torch" not in Path(f"/proc/{daemon.process.pid}/maps").read_text()


def test_a_merge_stopped_in_the_middle_goes_on_to_the_same_bytes(folder: Path, models: Path) -> None:
    spec = merge_spec("out", merge_method="widen", models=[{"model": "a"}, {"model": "b"}])
    expected = digest(merged(spec, folder / "whole", models))

    # The worker is slowed down by a gate in the progress callback, to be stopped for certain in the middle.
    slow = folder / "slow_worker.py"
    slow.write_text(
        "import sys, time\nfrom pathlib import Path\nimport service.worker as worker\n"
        "gate = Path(sys.argv[sys.argv.index('--outputs') + 1]) / 'go'\n"
        "report, stop = worker.Reporter.progress, None\n"
        "def progress(self, now):\n"
        "    report(self, now)\n"
        "    while now.tensors_done >= 5 and not gate.exists() and not worker.Stop.requested_anywhere():\n"
        "        time.sleep(0.01)\n"
        "seen = []\n"
        "worker.Stop.requested_anywhere = staticmethod(lambda: any(one.requested for one in seen))\n"
        "install = worker.Stop.install\n"
        "worker.Stop.install = lambda self: (seen.append(self), install(self))\n"
        "worker.Reporter.progress = progress\n"
        "sys.exit(worker.main())\n"
    )
    interrupted = folder / "interrupted"
    command = [sys.executable, "-P", str(slow)]
    with running_daemon(interrupted, worker_command=command, models=[str(models)]) as daemon:
        daemon.drop("a.yaml", **spec)
        wait_until(
            lambda: (status := daemon.jobs("running").get("a.yaml")) and status.progress.get("tensors_done", 0) >= 5,
            "five tensors",
        )
        assert daemon.stop() == 0
        assert set(daemon.jobs("interrupted")) == {"a.yaml"}
        assert not (daemon.outputs / "out").exists()
    with running_daemon(interrupted, worker_command=command, models=[str(models)]) as daemon:
        daemon.open_gate()
        status = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert status.result["resumed"] is True
        assert digest(daemon.outputs / "out") == expected
        counted = daemon.metric("mergecore_tensors_total")
        assert counted is not None
        assert counted <= status.result["tensors"] - 5, "only what this daemon's worker did is counted"


def test_kill_9_of_the_daemon_stops_its_worker_and_the_next_daemon_finishes_the_job(folder: Path, models: Path) -> None:
    slow = folder / "slow_worker.py"
    slow.write_text(
        "import sys, time\nfrom pathlib import Path\nimport service.worker as worker\n"
        "gate = Path(sys.argv[sys.argv.index('--outputs') + 1]) / 'go'\n"
        "class Stop(worker.Stop):\n"
        "    def check(self):\n"
        "        while not gate.exists() and not self.requested: time.sleep(0.01)\n"
        "        super().check()\n"
        "worker.Stop = Stop\n"
        "sys.exit(worker.main())\n"
    )
    command = [sys.executable, "-P", str(slow)]
    with running_daemon(folder, worker_command=command, models=[str(models)]) as daemon:
        daemon.drop("a.yaml", **merge_spec("out"))
        worker = wait_until(
            lambda: (status := daemon.jobs("running").get("a.yaml")) and status.method and status.pid, "the worker"
        )
        daemon.stop(signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(worker), "the worker's end")
    with running_daemon(folder, worker_command=command, models=[str(models)], rescan=0.1) as daemon:
        daemon.open_gate()
        assert daemon.wait_for("done", "a.yaml")["a.yaml"].attempts == 2


def run_worker(folder: Path, spec: dict[str, object], *options: object) -> tuple[int, str, Path]:
    """Run a real worker on a job made for it; its exit code, the first paragraph of error.txt, the outputs folder."""
    spool = Spool(folder / "spool")
    spool.prepare()
    (spool.incoming / "a.yaml").write_text(json.dumps(spec))
    job = spool.claim("a.yaml")
    assert job is not None
    outputs = folder / "outputs"
    outputs.mkdir(exist_ok=True)
    command = [*WORKER_COMMAND, str(job.folder), "--outputs", str(outputs), *map(str, options)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, check=False)
    error = job.folder / "error.txt"
    job.release()
    return done.returncode, error.read_text().split("\n\n")[0] if error.exists() else "", outputs


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "a/../../evil", "link/evil", "loop/evil", ".hidden", "a\nb", "."]
)
def test_an_output_that_leads_out_of_the_outputs_folder_is_refused(folder: Path, name: str) -> None:
    (folder / "outputs").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "outputs" / "link").symlink_to(folder / "elsewhere")
    (folder / "outputs" / "loop").symlink_to("loop")
    code, error, outputs = run_worker(folder, merge_spec(name))
    assert code == 2
    assert "run.output" in error
    assert "outputs folder" in error or "cannot be looked up" in error
    assert sorted(path.name for path in outputs.iterdir()) == ["link", "loop"]
    assert list((folder / "elsewhere").iterdir()) == []


def test_models_outside_the_model_folders_are_refused(folder: Path, models: Path) -> None:
    allowed = folder / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(models / "a")
    for i, (name, message) in enumerate(
        [
            (str(models / "a"), "does not lie below a model folder"),
            ("link", "does not lie below a model folder"),
            ("../../secret", "does not lie below a model folder"),
            ("absent", "was not found; the model folders of this server are"),
            ("long" * 100, "cannot be looked up: File name too long"),
        ]
    ):
        code, error, _ = run_worker(
            folder / str(i), {"merge_method": "linear", "models": [{"model": name}]}, "--models", allowed
        )
        assert code == 2
        assert message in error
        assert "models[0].model" in error


def test_a_link_in_place_of_the_spec_is_not_followed(folder: Path) -> None:
    job = folder / "job"
    job.mkdir()
    secret = folder / "secret"
    secret.write_text("password: 123\n")
    (job / "spec.yaml").symlink_to(secret)
    done = subprocess.run(
        [*WORKER_COMMAND, job, "--outputs", folder],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert "links are not followed" in (job / "error.txt").read_text()
    assert "123" not in (job / "error.txt").read_text()


def test_an_output_that_an_earlier_attempt_published_is_taken_for_done(folder: Path, models: Path) -> None:
    # As if worker and daemon had died between the rename of the output and the note about it.
    spec, out = merge_spec("out"), folder / "outputs" / "out"
    spool = Spool(folder / "spool")
    spool.prepare()
    (spool.incoming / "a.yaml").write_text(json.dumps(spec))
    expected = digest(merged(spool.incoming / "a.yaml", out, models))
    job = spool.claim("a.yaml")
    assert job is not None
    job.update(attempts=1, output=str(out))
    job.release()
    with running_daemon(folder, worker_command=WORKER_COMMAND, models=[str(models)]) as daemon:
        again = daemon.wait_for("done", "a.yaml")["a.yaml"]
        assert again.attempts == 2
        assert again.result["output"] == str(out)
        assert digest(out) == expected

        daemon.drop("other.yaml", **merge_spec("out"))
        error = daemon.wait_for("failed", "other.yaml")["other.yaml"].error
        assert str(out) in error
