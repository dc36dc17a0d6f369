"""The spool's folders, locks and renames, and the reading of the drop folder, without a daemon."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergecore.printable import printable
from service import spool as spool_module
from service.durable import write_atomic
from service.errors import ServiceError
from service.incoming import PATIENCE, Incoming
from service.resources import read_priority
from service.spool import Spool, job_name
from service.status import JobStatus, read_status, write_status


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.prepare()
    return spool


def drop(spool: Spool, name: str, content: str = "merge_method: linear\n") -> Path:
    path = spool.incoming / name
    path.write_text(content)
    return path


def everything_in(spool: Spool) -> list[str]:
    found = {str(path.relative_to(spool.root)) for path in spool.root.rglob("*") if path.is_file()}
    return sorted(found - {"ownership"})


# --- the way of a job ---


def test_preparing_makes_the_four_folders_and_leaves_nothing_else(spool: Spool) -> None:
    spool.prepare()
    assert sorted(path.name for path in spool.root.iterdir()) == ["done", "failed", "incoming", "ownership", "running"]
    assert everything_in(spool) == []


def test_a_claimed_spec_is_in_running_with_a_status_and_a_held_lock(spool: Spool) -> None:
    drop(spool, "nice.yaml", "x: 1\n")
    job = spool.claim("nice.yaml")
    assert job is not None
    assert re.fullmatch(r"nice-\d{8}T\d{6}Z-[0-9a-f]{4}", job.name)
    assert everything_in(spool) == [f"running/{job.name}/{name}" for name in ("lock", "spec.yaml", "status.json")]
    assert (job.folder / "spec.yaml").read_text() == "x: 1\n"
    status = job.status()
    assert (status.job, status.state, status.spec) == (job.name, "running", "nice.yaml")
    assert status.host
    assert status.created.endswith("Z")
    assert list(spool.adopt(set())) == []
    job.release()


@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_finished_job_has_moved_with_its_final_status_and_without_a_lock(spool: Spool, state: str) -> None:
    drop(spool, "a.yaml")
    job = spool.claim("a.yaml")
    assert job is not None
    job.finish(state, error="why" if state == "failed" else "")
    assert everything_in(spool) == [f"{state}/{job.name}/spec.yaml", f"{state}/{job.name}/status.json"]
    status = read_status(spool.root / state / job.name)
    assert (status.state, status.error) == (state, "why" if state == "failed" else "")
    assert status.finished >= status.created


def test_claiming_what_is_gone_gives_nothing_and_leaves_nothing(spool: Spool) -> None:
    assert spool.claim("never.yaml") is None
    assert list(spool.running.iterdir()) == []


def test_finishing_again_after_an_error_completes_the_move(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(spool, "a.yaml")
    job = spool.claim("a.yaml")
    assert job is not None

    def broken(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(spool_module, "sync_folder", broken)
    with pytest.raises(OSError, match="Input/output"):
        job.finish("done")
    monkeypatch.undo()
    job.finish("done")
    assert everything_in(spool) == [f"done/{job.name}/spec.yaml", f"done/{job.name}/status.json"]


def test_the_job_of_a_dead_owner_is_adopted_with_its_status(spool: Spool) -> None:
    drop(spool, "a.yaml")
    job = spool.claim("a.yaml")
    assert job is not None
    job.update(attempts=1, output="/o")
    job.release()
    (adopted,) = spool.adopt(set())
    assert adopted.name == job.name
    assert (adopted.status().attempts, adopted.status().output) == (1, "/o")
    assert adopted.outcome() is None
    assert list(spool.adopt(set())) == []
    adopted.release()


def test_adoption_goes_by_age_and_passes_over_ones_own(spool: Spool) -> None:
    names = []
    for i, name in enumerate(["c.yaml", "a.yaml", "b.yaml"]):
        drop(spool, name)
        job = spool.claim(name)
        assert job is not None
        job.update(created=f"2030-01-01T00:00:0{i}.000Z")
        job.release()
        names.append(job.name)
    adopted = list(spool.adopt({names[1]}))
    assert [job.name for job in adopted] == [names[0], names[2]]
    for job in adopted:
        job.release()


def test_a_claim_that_got_no_spec_is_cleaned_up_once_its_owner_is_gone(spool: Spool) -> None:
    job = spool._new_job("x.yaml")
    assert list(spool.adopt(set())) == []
    assert job.folder.exists(), "its owner is at work"
    job.release()
    assert list(spool.adopt(set())) == []
    assert not job.folder.exists()


def test_what_somebody_else_put_into_running_is_not_deleted(spool: Spool) -> None:
    (spool.running / "mine").mkdir()
    (spool.running / "mine" / "notes.txt").write_text("keep")
    (spool.running / "stray").write_text("keep")
    assert list(spool.adopt(set())) == []
    assert (spool.running / "mine" / "notes.txt").exists()
    assert (spool.running / "stray").exists()


@pytest.mark.parametrize(
    ("left", "outcome"),
    [
        ({"result": {"tensors": 3}}, "done"),
        ({"state": "failed"}, "failed"),
        ({"state": "done"}, "done"),
        ({"state": "interrupted"}, None),
        ({}, None),
    ],
)
def test_what_the_last_worker_left_tells_whether_there_is_anything_to_run(
    spool: Spool, left: dict[str, Any], outcome: str | None
) -> None:
    drop(spool, "a.yaml")
    job = spool.claim("a.yaml")
    assert job is not None
    job.update(**left)
    assert job.outcome() == outcome
    (job.folder / "error.txt").write_text("no\n")
    assert job.outcome() == (outcome or "failed")
    job.release()


def _claim_all(root: Path, results: multiprocessing.Queue[list[str]]) -> None:
    spool, mine = Spool(root), []
    for name in sorted(os.listdir(spool.incoming)):
        assert list(spool.adopt(set())) == [], "every job in running/ has a living owner"
        job = spool.claim(name)
        if job is not None:
            mine.append(name)
            job.finish("done")
    results.put(mine)


def test_processes_that_claim_and_adopt_at_once_share_the_specs_without_a_double(spool: Spool) -> None:
    names = [f"{i:03}.yaml" for i in range(120)]
    for name in names:
        drop(spool, name)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[list[str]] = context.Queue()
    processes = [context.Process(target=_claim_all, args=(spool.root, results)) for _ in range(3)]
    for process in processes:
        process.start()
    claimed = [name for _ in processes for name in results.get(timeout=60)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(claimed) == names
    assert sorted(status.spec for status in spool.jobs()) == names
    assert list(spool.running.iterdir()) == []


# --- what cannot be a spool ---


def test_a_file_in_a_folders_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "incoming").write_text("")
    with pytest.raises(ServiceError, match=re.escape(f"spool {tmp_path}: cannot be used, at {tmp_path}/incoming")):
        Spool(tmp_path).prepare()


def test_folders_on_two_filesystems_are_a_clear_error(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second filesystem here (/dev/shm)")
    elsewhere = other / f"mergecore-test-{os.getpid()}"
    elsewhere.mkdir()
    try:
        (tmp_path / "done").symlink_to(elsewhere)
        with pytest.raises(ServiceError, match=r"must lie on one filesystem.*done lies on another one"):
            Spool(tmp_path).prepare()
        assert list(elsewhere.iterdir()) == []
    finally:
        shutil.rmtree(elsewhere)
    assert everything_in(Spool(tmp_path)) == []


def test_a_folder_without_write_permission_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)  # permissions do not bind root, who may run this test
    with pytest.raises(ServiceError, match="give the user that runs the daemon write permission"):
        Spool(tmp_path).prepare()


# --- names and status ---


@given(st.text(max_size=200))
def test_a_job_name_is_safe_whatever_the_spec_is_called(stem: str) -> None:
    name = job_name(stem.replace("/", "") + ".yaml")
    assert set(name) <= set(string.ascii_letters + string.digits + "._-")
    assert name[0] not in ".-"
    assert len(name) <= 64 + 1 + 16 + 1 + 4


@given(st.text(alphabet=st.characters(), max_size=50))
def test_printable_text_is_one_line_without_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert text != shown or text.isprintable()


@given(
    st.builds(
        JobStatus,
        spec=st.text(),
        state=st.sampled_from(["running", "done"]),
        attempts=st.integers(0, 9),
        seconds=st.floats(0, 1e6),
        result=st.dictionaries(st.text(), st.integers()),
    )
)
def test_a_status_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, status: JobStatus) -> None:
    folder = tmp_path_factory.mktemp("job")
    status.job = folder.name
    write_status(folder, status, durable=False)
    assert read_status(folder) == status
    assert [path.name for path in folder.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"state": 3, "progress": [], "attempts": "x"}', b"[" * 100_000],
)
def test_a_damaged_status_reads_as_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) == JobStatus(job=tmp_path.name)


def test_replacing_a_file_that_cannot_be_written_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, "old")
    (tmp_path / ".status.json.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(path, "new")
    assert path.read_text() == "old"


# --- the list of jobs ---


def test_every_job_is_listed_once_with_the_state_that_its_folder_and_lock_tell(spool: Spool) -> None:
    jobs = {}
    for name in ("live", "left", "good", "bad"):
        drop(spool, f"{name}.yaml")
        jobs[name] = spool.claim(f"{name}.yaml")
    assert all(jobs.values())
    jobs["left"].release()  # type: ignore[union-attr]
    jobs["good"].finish("done")  # type: ignore[union-attr]
    jobs["bad"].finish("failed")  # type: ignore[union-attr]
    states = {status.spec: status.state for status in spool.jobs()}
    assert states == {"live.yaml": "running", "left.yaml": "interrupted", "good.yaml": "done", "bad.yaml": "failed"}
    assert list(spool.adopt({jobs["left"].name})) == [], "listing takes no lock for good"  # type: ignore[union-attr]
    jobs["live"].release()  # type: ignore[union-attr]


def test_the_last_success_is_the_newest_in_done(spool: Spool) -> None:
    assert spool.last_success() == 0
    drop(spool, "a.yaml")
    job = spool.claim("a.yaml")
    assert job is not None
    job.finish("done")
    assert spool.last_success() == pytest.approx((spool.done / job.name).stat().st_mtime, abs=5)


# --- the drop folder ---


class Clock:
    """A monotonic clock that tests turn."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def incoming(spool: Spool, clock: Clock) -> Incoming:
    return Incoming(spool.incoming, settle=1.0, clock=clock)


def test_without_events_a_file_is_ready_once_it_has_not_changed_for_the_settle_time(
    spool: Spool, incoming: Incoming, clock: Clock
) -> None:
    path = drop(spool, "a.yaml")
    assert incoming.scan() == []
    assert incoming.next_due() == pytest.approx(1.0)
    clock.now += 0.9
    path.write_text("more: 1\n")
    assert incoming.scan() == []
    clock.now += 0.9
    assert incoming.scan() == []
    assert incoming.next_due() == pytest.approx(0.1)
    clock.now += 0.11
    assert incoming.scan() == ["a.yaml"]
    assert incoming.waiting == 1


def test_a_file_is_ready_as_soon_as_an_event_says_that_it_is_complete(spool: Spool, incoming: Incoming) -> None:
    drop(spool, "a.yaml")
    incoming.note_complete("a.yaml")
    assert incoming.scan() == ["a.yaml"]
    assert incoming.next_due() is None


def test_a_file_with_an_open_writer_is_not_taken_for_complete_though_it_settled(
    spool: Spool, incoming: Incoming, clock: Clock
) -> None:
    drop(spool, "a.yaml")
    incoming.note_written("a.yaml")
    incoming.scan()
    clock.now += 30
    assert incoming.scan() == []
    incoming.note_complete("a.yaml")
    assert incoming.scan() == ["a.yaml"]


def test_a_close_event_that_was_lost_delays_a_file_but_does_not_lose_it(
    spool: Spool, incoming: Incoming, clock: Clock
) -> None:
    drop(spool, "a.yaml")
    incoming.note_written("a.yaml")
    clock.now += PATIENCE + 1
    assert incoming.scan() == ["a.yaml"]


def test_writing_again_takes_the_completeness_back(spool: Spool, incoming: Incoming) -> None:
    path = drop(spool, "a.yaml")
    incoming.note_complete("a.yaml")
    path.write_text("longer than before: 1\n")
    assert incoming.scan() == []
    incoming.note_written("a.yaml")
    assert incoming.scan() == []


def test_an_event_about_one_file_says_nothing_about_the_next_of_its_name(spool: Spool, incoming: Incoming) -> None:
    drop(spool, "a.yaml")
    incoming.note_complete("a.yaml")
    assert incoming.scan() == ["a.yaml"]
    os.rename(spool.incoming / "a.yaml", spool.root / "taken")
    incoming.forget("a.yaml")
    drop(spool, "a.yaml")
    assert incoming.scan() == []


def test_an_empty_file_has_to_settle_even_if_it_was_closed(spool: Spool, incoming: Incoming, clock: Clock) -> None:
    drop(spool, "a.yaml", "")
    incoming.note_complete("a.yaml")
    assert incoming.scan() == []
    clock.now += 1.1
    assert incoming.scan() == ["a.yaml"]


def test_an_event_about_a_file_that_is_gone_is_nothing(incoming: Incoming) -> None:
    incoming.note_complete("gone.yaml")
    incoming.note_written("gone.yaml")
    assert incoming.scan() == []


@pytest.mark.parametrize("name", [".a.yaml", "a.yaml.tmp", "a.part", "a.yaml~", ".a.yaml.swp", "a.swp", "a.yaml.part"])
def test_temporary_names_are_ignored_in_silence(
    spool: Spool, incoming: Incoming, clock: Clock, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    drop(spool, name)
    incoming.note_complete(name)
    incoming.scan()
    clock.now += 1000
    assert incoming.scan() == []
    assert incoming.waiting == 0
    assert caplog.records == []


def test_what_is_no_spec_is_left_alone_and_told_once(
    spool: Spool, incoming: Incoming, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "mergecore.service")
    drop(spool, "notes.txt")
    (spool.incoming / "link.yaml").symlink_to("/etc/hostname")
    os.mkfifo(spool.incoming / "pipe.yaml")
    (spool.incoming / "folder.yaml").mkdir()
    for _ in range(3):
        assert incoming.scan() == []
        clock.now += 1000
    assert sorted(record.getMessage().split()[0] for record in caplog.records) == [
        "incoming/link.yaml",
        "incoming/notes.txt",
        "incoming/pipe.yaml",
    ]


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.json", "a.YAML", "with space.yaml", "ä.yaml"])
def test_specs_are_known_by_their_suffix(spool: Spool, incoming: Incoming, clock: Clock, name: str) -> None:
    drop(spool, name)
    incoming.scan()
    clock.now += 2
    assert incoming.scan() == [name]


def test_the_order_is_priority_then_arrival_then_name(spool: Spool, incoming: Incoming, clock: Clock) -> None:
    for name, priority, mtime in [
        ("late.yaml", None, 50),
        ("b.yaml", 0, 20),
        ("a.yaml", None, 20),
        ("high.yaml", 7, 90),
        ("low.yaml", -1, 10),
        ("json.json", 8, 99),
    ]:
        run = "" if priority is None else f"run: {{output: x, priority: {priority}}}\n"
        path = drop(spool, name, json.dumps({"run": {"priority": 8}}) if name.endswith("json") else run or "x: 1\n")
        os.utime(path, (mtime, mtime))
    incoming.scan()
    clock.now += 2
    assert incoming.scan() == ["json.json", "high.yaml", "a.yaml", "b.yaml", "late.yaml", "low.yaml"]
    assert [status.job for status in incoming.queued()] == incoming.scan()


@given(st.integers(-999_999, 999_999), st.sampled_from(["block", "flow", "json", "quoted"]), st.booleans())
def test_the_priority_is_what_a_yaml_reader_finds(
    tmp_path_factory: pytest.TempPathFactory, priority: int, style: str, commented: bool
) -> None:
    spec = {
        "merge_method": "linear",
        "models": [{"model": "/m/priority"}],
        "run": {"output": "x", "priority": priority},
    }
    text = {
        "block": yaml.safe_dump(spec),
        "flow": yaml.safe_dump(spec, default_flow_style=True),
        "json": json.dumps(spec, indent=2),
        "quoted": f"run:\n  'priority': {priority}\n",
    }[style]
    if commented and style != "json":
        text = "# priority: 77\n" + text
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(text)
    assert read_priority(path) == yaml.safe_load(text)["run"]["priority"]


@given(st.binary(max_size=300))
def test_the_priority_of_anything_else_is_a_number_too(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_bytes(content)
    assert isinstance(read_priority(path), int)
    assert read_priority(path.with_name("absent")) == 0
