"""`mergecore doctor`: what it says about hosts that are ready, and about those that are not."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergecore.cli import main
from service import doctor
from service.config import ServeConfig
from service.doctor import Finding
from service.spool import FOLDERS, Spool
from tests.service_support import ROOT, running_daemon


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    for name in ("spool", "outputs", "models"):
        (tmp_path / name).mkdir()
    return ServeConfig(tmp_path / "spool", tmp_path / "outputs", models=(tmp_path / "models",), port=0)


def found(check: Any, config: ServeConfig, name: str = "") -> Finding:
    (one,) = [one for one in check(config) if not name or one.check == name]
    assert "\n" not in str(one)
    assert (one.state == "ok") <= (one.mend == "")
    return one


def changed(config: ServeConfig, **changes: Any) -> ServeConfig:
    from dataclasses import replace

    return replace(config, **changes)


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# --- the whole ---


def test_a_host_that_is_ready_gets_one_ok_per_check_and_nothing_stays_behind(
    tmp_path: Path, config: ServeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mergecore.toml"
    file.write_text('spool = "spool"\noutputs = "outputs"\nmodels = ["models"]\nport = 0\n')
    before = files_below(tmp_path)
    assert main(["doctor", "--config", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = [line.split()[1] for line in lines]
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    assert set(checks) == {
        *("config", "user", "spool", "outputs", "models", "space", "memory", "limits"),
        *("home", "port", "disk", "kernels", "devices"),
    }
    assert next(line for line in lines if "kernels" in line).startswith("ok")
    assert files_below(tmp_path) == before


def test_a_wrong_one_is_an_exit_code_and_json_has_every_finding(
    tmp_path: Path, config: ServeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_folders, doctor.check_memory))
    options = ["--spool", str(config.spool), "--outputs", str(config.outputs), "--models", str(tmp_path / "absent")]
    assert main(["doctor", *options, "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [one["check"] for one in findings] == ["config", "spool", "outputs", "models", "memory"]
    assert findings[3] == {
        "check": "models",
        "state": "wrong",
        "message": f"{tmp_path}/absent: No such file or directory",
        "mend": "mount it, or let the daemon's user read it",
    }
    assert main(["doctor", *options[:-2]]) == 0
    assert "warning  models" in capsys.readouterr().out


def test_a_configuration_that_cannot_be_read_is_the_only_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mergecore.toml"
    file.write_text("prot = 1")
    assert main(["doctor", "--config", str(file)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("wrong    config")
    assert "did you mean port?" in out
    assert len(out.splitlines()) == 1


def test_the_doctor_itself_loads_no_torch() -> None:
    code = "import sys, service.doctor; sys.exit(bool({'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- folders ---


def test_a_spool_that_works_is_rehearsed_and_left_as_it_was(config: ServeConfig) -> None:
    Spool(config.spool).prepare()
    before = files_below(config.spool)
    assert found(doctor.check_folders, config, "spool").message.endswith("jobs can be moved and locked")
    assert files_below(config.spool) == before
    (config.spool / "ownership").unlink()
    leased = found(doctor.check_folders, changed(config, ownership="leases"), "spool")
    assert leased.message.endswith("jobs can be moved and leased")
    assert not (config.spool / "ownership").exists(), "that is for the daemon to write"


def test_folders_that_are_not_there_yet_are_not_made_by_the_doctor(tmp_path: Path, config: ServeConfig) -> None:
    new = changed(config, spool=tmp_path / "new" / "spool", outputs=tmp_path / "new" / "outputs")
    assert "can be made (the daemon makes the folders)" in found(doctor.check_folders, new, "spool").message
    assert "can be made" in found(doctor.check_folders, new, "outputs").message
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_written_are_wrong(tmp_path: Path, config: ServeConfig) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x", Path("/proc/nowhere")):
        wrong = changed(config, spool=place, outputs=place)
        for name in ("spool", "outputs"):
            one = found(doctor.check_folders, wrong, name)
            assert one.state == "wrong"
            assert "cannot be written" in one.message
            assert "ReadWritePaths=" in one.mend


def test_a_spool_on_two_file_systems_is_wrong(config: ServeConfig) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == config.spool.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    place = other / f"mergecore-doctor-{os.getpid()}"
    place.mkdir()
    try:
        for name in FOLDERS[:-1]:
            (config.spool / name).mkdir()
        (config.spool / FOLDERS[-1]).symlink_to(place)
        one = found(doctor.check_folders, config, "spool")
        assert one.state == "wrong"
        assert "must lie on one filesystem" in one.message
    finally:
        place.rmdir()


def test_another_user_than_the_folders_owner_is_warned(config: ServeConfig) -> None:
    assert found(doctor.check_user, config).state == "ok"
    if os.getuid() != 0:
        pytest.skip("only root can give folders away")
    os.chown(config.spool, 12345, -1)
    one = found(doctor.check_user, config)
    assert (one.state, one.mend) == ("warning", "run this as the daemon's user: sudo -u 12345 mergecore doctor")


# --- the host ---


@pytest.mark.parametrize(
    ("free", "state"), [(10**12, ["ok", "ok"]), (5 * 10**9, ["ok", "warning"]), (10**7, ["wrong", "wrong"])]
)
def test_little_space_is_told(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch, free: int, state: list[str]
) -> None:
    monkeypatch.setattr(doctor, "free_and_size", lambda folder: (free, 10**12))
    assert [one.state for one in doctor.check_space(config)] == state


def test_little_memory_for_many_jobs_is_told(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_limit", lambda: 4 << 30)
    assert found(doctor.check_memory, config).state == "ok"
    mend = "lower jobs or warm_workers, or raise MemoryMax= of the unit"
    assert found(doctor.check_memory, changed(config, jobs=2)).mend == mend


def test_idle_workers_count_with_the_memory(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_limit", lambda: 4 << 30)
    two, three = (found(doctor.check_memory, changed(config, warm_workers=count)) for count in (2, 3))
    assert (two.state, two.message) == ("ok", "4.0 GiB for 1 job(s) at a time and 2 idle worker(s)")
    assert three.state == "warning"


def test_few_open_files_are_told(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, state in ((256, "warning"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")):
        monkeypatch.setattr(resource, "getrlimit", lambda what, soft=soft: (soft, soft))
        assert found(doctor.check_limits, config).state == state


def test_a_home_that_cannot_be_read_is_told_unless_the_cache_lies_elsewhere(
    tmp_path: Path, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found(doctor.check_home, config).state == "ok"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "absent"))
    assert found(doctor.check_home, config).state == "warning"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert found(doctor.check_home, config).state == "ok"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "set HF_HUB_CACHE" in found(doctor.check_home, config).mend


def test_the_speed_of_the_disk_is_measured_without_a_trace(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 4 << 20)
    assert "MB/s written" in found(doctor.check_disk, config).message
    monkeypatch.setattr(doctor, "SLOW", 1e15)
    assert found(doctor.check_disk, config).state == "warning"
    assert list(config.outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("probe", "says"),
    [
        ("import json; print(json.dumps({'error': 'ImportError: no _C'}))", "do not load: ImportError: no _C"),
        ("import os; os.abort()", "do not load: Python ended with -6"),
        ("print('nonsense')", "torch cannot be tried"),
    ],
)
def test_kernels_that_do_not_load_are_wrong(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch, probe: str, says: str
) -> None:
    monkeypatch.setattr(doctor, "_PROBE", probe)
    one = next(one for one in doctor.check_devices(config) if one.check == "kernels")
    assert one.state == "wrong"
    assert says in one.message
    assert "reinstall" in one.mend


# --- the port ---


def test_a_port_that_something_else_uses_is_wrong_and_one_that_a_daemon_uses_is_not(
    tmp_path: Path, config: ServeConfig
) -> None:
    assert found(doctor.check_port, config).state == "ok"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        taken.settimeout(0)
        one = found(doctor.check_port, changed(config, port=port, host="127.0.0.1"))
        assert (one.state, one.mend) == ("wrong", "choose another port, or end what uses it")
    secret = tmp_path / "password"
    secret.write_text("a:b")
    secret.chmod(0o600)
    with running_daemon(tmp_path / "d", password_file=str(secret)) as daemon:
        port = int(daemon.url.rpartition(":")[2])
        assert "a daemon answers" in found(doctor.check_port, changed(config, port=port)).message


def test_a_certificate_that_is_not_there_is_wrong(tmp_path: Path, config: ServeConfig) -> None:
    one = found(doctor.check_port, changed(config, certfile=tmp_path / "absent.crt"))
    assert one.state == "wrong"
    assert "absent.crt: No such file" in one.message
