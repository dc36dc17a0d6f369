"""How long ended jobs are kept."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import load_config
from service.errors import ServiceError
from service.retention import Keep, apply, parse_keep
from service.spool import Spool
from service.status import JobStatus, write_status
from tests.service_support import running_daemon, wait_until


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    return spool


def ended(parent: Path, name: str, days_ago: float) -> Path:
    folder = parent / name
    folder.mkdir()
    when = datetime.now(UTC) - timedelta(days=days_ago)
    write_status(folder, JobStatus(job=name, finished=when.isoformat().replace("+00:00", "Z")))
    return folder


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_everything_is_kept_unless_something_else_is_configured(spool: Spool) -> None:
    ended(spool.done, "old", 10_000)
    assert apply(spool, Keep(), Keep(), datetime.now(UTC)) == []
    assert names(spool.done) == ["old"]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(Keep(jobs=0), []), (Keep(jobs=2), ["a", "b"]), (Keep(jobs=9), ["a", "b", "c", "d"]), (Keep(days=5), ["a", "b"])],
)
def test_the_oldest_go_by_number_or_by_age(spool: Spool, keep: Keep, kept: list[str]) -> None:
    for name, days in (("d", 30), ("b", 2), ("a", 1), ("c", 20)):
        ended(spool.done, name, days)
        ended(spool.failed, name, days)
    removed = apply(spool, keep, Keep(), datetime.now(UTC))
    assert names(spool.done) == kept
    assert names(spool.failed) == ["a", "b", "c", "d"]
    assert len(removed) == 4 - len(kept)
    apply(spool, Keep(), keep, datetime.now(UTC))
    assert names(spool.failed) == kept


def test_a_removal_that_died_in_the_middle_is_finished_and_a_job_without_a_date_goes_by_its_mtime(spool: Spool) -> None:
    (spool.done / ".removing-x").mkdir()
    (spool.done / "undated").mkdir()
    os.utime(spool.done / "undated", (0, 0))
    (spool.done / "new").mkdir()
    apply(spool, Keep(days=1), Keep(), datetime.now(UTC))
    assert names(spool.done) == ["new"]


def test_what_waits_and_what_runs_is_never_removed(spool: Spool) -> None:
    (spool.incoming / "a.yaml").write_text("{}")
    job = spool.claim("a.yaml")
    assert job is not None
    (spool.incoming / "b.yaml").write_text("{}")
    apply(spool, Keep(jobs=0), Keep(jobs=0), datetime.now(UTC))
    assert job.folder.exists()
    assert names(spool.incoming) == ["b.yaml"]
    job.release()


def test_the_daemon_applies_it_and_never_touches_outputs(tmp_path: Path) -> None:
    prelude = "service.daemon.RETENTION_PAUSE = 0.1"
    with running_daemon(tmp_path, prelude=prelude, rescan=0.1, keep_done=1, keep_failed="0d") as daemon:
        (daemon.outputs / "model").mkdir()
        daemon.drop("a.yaml")
        daemon.wait_for("done", "a.yaml")
        daemon.drop("bad.yaml", exit=2)
        daemon.drop("b.yaml")
        wait_until(lambda: daemon.log().count("as configured") >= 2, "the removals")
        wait_until(lambda: set(daemon.jobs("done")) == {"b.yaml"}, "the newest alone")
        assert daemon.jobs("failed") == {}
        assert (daemon.outputs / "model").is_dir()
        assert (daemon.outputs / "a.yaml.steps").exists()


@pytest.mark.parametrize("value", [-1, True, 1.5, "", "30", "d", "30 weeks", "-1d", [], "9999999d"])
def test_what_says_not_how_long_is_a_clear_error(value: object) -> None:
    with pytest.raises(ServiceError, match=r'keep_done is .*, but must be "all", a number of jobs, or days'):
        load_config(None, {"spool": "s", "outputs": "o", "keep_done": value})


@given(st.integers(0, 10**6))
def test_numbers_and_days_are_read_as_they_are_shown(number: int) -> None:
    assert parse_keep(number) == Keep(jobs=number)
    assert parse_keep(f"{number % 1000} days") == parse_keep(f"{number % 1000}d") == Keep(days=number % 1000)
    assert str(parse_keep(f"{number % 1000}d")) == f"{number % 1000}d"
    assert parse_keep("all") == parse_keep(Keep()) == Keep()
