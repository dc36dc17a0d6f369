"""Leases on jobs, with clocks turned by hand; and how a spool tells who owns its jobs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mergecore.errors import Interrupted
from service import spool as spool_module
from service.commands import cancel_command, retry_command
from service.config import load_config
from service.durable import copy_plain, sync_folder
from service.errors import ServiceError
from service.leases import Lease, LeaseLost, Tenancy, Watch, job_of, read_lease, token_of
from service.ownership import LEASES, LOCKS
from service.spool import Job, Spool
from service.worker import Stop
from tests.leases import Clocks, turned_by_hand


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return turned_by_hand(monkeypatch)


def spool_at(root: Path) -> Spool:
    spool = Spool(root, 60.0)
    spool.prepare(LEASES)
    return spool


def claimed(spool: Spool, name: str = "a.yaml") -> Job:
    (spool.incoming / name).write_text("{}")
    job = spool.claim(name)
    assert job is not None
    return job


# --- without a daemon ---


def test_a_job_is_taken_over_only_after_its_lease_was_seen_unchanged_for_its_seconds(
    tmp_path: Path, clock: Clocks
) -> None:
    job = claimed(spool_at(tmp_path))
    other = spool_at(tmp_path)
    assert list(other.adopt(set())) == []
    clock.sleep(20)
    job.owned.renew()
    assert list(other.adopt(set())) == [], "it was renewed: the count starts anew"
    clock.sleep(59.9)
    assert list(other.adopt(set())) == []
    clock.sleep(0.2)
    (taken,) = other.adopt(set())
    assert (taken.name, taken.status().spec) == (job.name, "a.yaml")
    assert not job.folder.exists()
    assert [one.state for one in other.jobs()] == ["running"]


def test_the_clock_of_another_host_decides_nothing(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    here, clock.owner = clock.owner, 5e8  # it has been up for long
    other = spool_at(tmp_path)
    assert list(other.adopt(set())) == []
    clock.sleep(59)
    assert list(other.adopt(set())) == []
    clock.owner = here + 1
    assert not job.owned.lost


def test_the_time_that_an_observer_slept_through_counts_for_nothing(tmp_path: Path, clock: Clocks) -> None:
    claimed(spool_at(tmp_path))
    other = spool_at(tmp_path)
    assert list(other.adopt(set())) == []
    clock.owner += 3600  # suspended: the monotonic clock stands still
    assert list(other.adopt(set())) == []


def test_an_owner_has_given_up_before_anybody_takes_over(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    tenancy, watch = Tenancy(job.folder), Watch()
    assert not watch.has_run_out(job.folder)
    assert not tenancy.over()
    clock.sleep(39.9)
    assert not job.owned.lost
    assert not tenancy.over()
    clock.sleep(0.2)
    assert job.owned.lost
    assert tenancy.over()
    assert not watch.has_run_out(job.folder)
    clock.sleep(-30)
    assert job.owned.lost, "for ever"
    with pytest.raises(LeaseLost):
        job.finish("done")
    assert job.folder.exists()
    job.release()
    assert job.folder.exists(), "it is not ours to give"


def test_a_renewal_that_came_too_late_counts_for_nothing(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = claimed(spool_at(tmp_path))
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        replace(source, target)
        clock.sleep(35)  # the file system took its time

    clock.sleep(10)
    monkeypatch.setattr(os, "replace", slow)
    job.owned.renew()
    assert job.owned.lost


def test_a_renewal_that_fails_is_tried_again_until_time_is_up(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = claimed(spool_at(tmp_path))

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        clock.sleep(35)
        assert job.owned.renew() <= 1.0
    assert not job.owned.lost
    job.owned.renew()
    clock.sleep(35)
    assert not job.owned.lost


def test_a_claim_whose_lease_cannot_be_written_leaves_the_spec_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spool_at(tmp_path)
    (spool.incoming / "a.yaml").write_text("{}")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            spool.claim("a.yaml")
    assert os.listdir(spool.running) == []
    assert os.listdir(spool.incoming) == ["a.yaml"]


def test_a_free_job_that_cannot_be_taken_stays_free(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spool_at(tmp_path)
    job = claimed(spool)
    job.release()

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(spool_module, "copy_plain", full)
        with pytest.raises(OSError, match="No space"):
            list(spool.adopt(set()))
    assert os.listdir(spool.running) == [job.name]
    assert len(list(spool.adopt(set()))) == 1


def test_of_many_takers_one_gets_the_job_and_the_former_owner_can_do_nothing(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    takers = [spool_at(tmp_path) for _ in range(5)]
    for taker in takers:
        assert list(taker.adopt(set())) == []
    clock.sleep(30)
    # As if it had checked just before it fell asleep: whatever it does next goes by path.
    assert not job.owned.lost
    clock.sleep(31)
    got = [one for taker in takers for one in taker.adopt(set())]
    assert len(got) == 1
    clock.sleep(-31)
    for act in (lambda: job.update(error="I was there"), lambda: job.finish("failed"), lambda: job.cancel("me")):
        with pytest.raises(FileNotFoundError):
            act()
    job.release()
    assert job.owned.lost
    assert [one.state for one in takers[0].jobs()] == ["running"]
    clock.sleep(31)
    assert got[0].status().error == ""
    got[0].finish("done")
    assert sorted(path.name for path in (tmp_path / "done" / job.name).iterdir()) == ["spec.yaml", "status.json"]


def test_what_the_former_owner_has_open_is_not_what_the_new_one_has(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    other = spool_at(tmp_path)
    list(other.adopt(set()))
    (job.folder / "log").write_text("merging\n")
    folder = os.open(job.folder, os.O_RDONLY | os.O_DIRECTORY)
    with (job.folder / "log").open("a") as output, (job.folder / "status.json").open("r+") as status:
        clock.sleep(61)
        (taken,) = other.adopt(set())
        taken.update(error="mine")
        for file in (output, status):
            file.write("I was only asleep" * 100)
            file.flush()
        with pytest.raises(FileNotFoundError):
            os.close(os.open("status.json", os.O_WRONLY | os.O_CREAT, dir_fd=folder))
    os.close(folder)
    assert taken.status().error == "mine"
    assert (taken.folder / "log").read_text() == "merging\n"
    assert sorted(os.listdir(taken.folder)) == ["lease", "log", "spec.yaml", "status.json"]
    assert os.listdir(tmp_path / "running") == [taken.folder.name]


def test_a_taker_that_sleeps_half_way_gets_nothing_and_breaks_nothing(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed(spool_at(tmp_path)).update(error="before")
    slow, quick = spool_at(tmp_path), spool_at(tmp_path)
    assert list(slow.adopt(set())) == list(quick.adopt(set())) == []
    clock.sleep(61)
    taken: list[Job] = []

    def sleeping(source: Path, target: Path) -> None:
        monkeypatch.setattr(spool_module, "copy_plain", copy_plain)
        assert list(quick.adopt(set())) == []
        clock.sleep(121)
        taken.extend(quick.adopt(set()))
        copy_plain(source, target)

    monkeypatch.setattr(spool_module, "copy_plain", sleeping)
    assert list(slow.adopt(set())) == []
    (job,) = taken
    assert job.status().error == "before"
    assert os.listdir(tmp_path / "running") == [job.folder.name]


def test_a_taker_whose_new_folder_is_cleaned_up_while_it_sleeps_leaves_the_job_whole(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed(spool_at(tmp_path)).update(error="before")
    slow, other = spool_at(tmp_path), spool_at(tmp_path)
    assert list(slow.adopt(set())) == []
    clock.sleep(61)

    def sleeping(source: Path, target: Path) -> None:
        monkeypatch.setattr(spool_module, "copy_plain", copy_plain)
        for path in target.parent.iterdir():  # it looks like a claim that never got its spec
            path.unlink()
        target.parent.rmdir()
        target.open("x")

    monkeypatch.setattr(spool_module, "copy_plain", sleeping)
    assert list(slow.adopt(set())) == []
    assert list(other.adopt(set())) == []
    clock.sleep(61)
    (job,) = other.adopt(set())
    assert job.status().error == "before"


def test_a_lease_that_ran_out_is_known_though_the_status_is_damaged(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    (job.folder / "status.json").write_text("{")
    other = spool_at(tmp_path)
    list(other.adopt(set()))
    clock.sleep(61)
    (taken,) = other.adopt(set())
    assert taken.status().former_leases == {token_of(job.folder): "expired"}


def test_an_owner_that_wakes_while_its_job_is_taken_can_neither_end_it_nor_give_it_back(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = claimed(spool_at(tmp_path))
    other = spool_at(tmp_path)
    assert list(other.adopt(set())) == []

    def woken(source: Path, target: Path) -> None:
        monkeypatch.setattr(spool_module, "copy_plain", copy_plain)
        clock.owner -= 61  # it was asleep after its last look
        for act in (lambda: job.finish("failed"), lambda: job.update(error="late")):
            with pytest.raises(FileNotFoundError):
                act()
        job.release()
        clock.owner += 61
        copy_plain(source, target)

    monkeypatch.setattr(spool_module, "copy_plain", woken)
    clock.sleep(61)
    (taken,) = other.adopt(set())
    assert job.owned.lost
    assert os.listdir(tmp_path / "running") == [taken.folder.name]
    assert os.listdir(tmp_path / "failed") == []
    assert (taken.folder / "spec.yaml").exists()


def test_a_request_to_cancel_is_not_lost_by_a_takeover(
    tmp_path: Path, clock: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed(spool_at(tmp_path))
    other = spool_at(tmp_path)
    assert list(other.adopt(set())) == []
    clock.sleep(61)

    def late(folder: Path) -> None:
        sync_folder(folder)
        if (folder / "spec.yaml").exists():  # the job has just moved; by a path that was looked up before:
            monkeypatch.setattr(spool_module, "sync_folder", sync_folder)
            (left,) = [one for one in (tmp_path / "running").iterdir() if one != folder]
            (left / "cancel").write_text("me\n")

    monkeypatch.setattr(spool_module, "sync_folder", late)
    (taken,) = other.adopt(set())
    assert taken.cancellation() == "me"


def test_a_stop_is_asked_for_when_the_lease_is_over(tmp_path: Path, clock: Clocks) -> None:
    job = claimed(spool_at(tmp_path))
    stop = Stop(Tenancy(job.folder))
    stop.check()
    clock.sleep(39)
    assert not stop()
    job.owned.renew()
    clock.sleep(39)
    assert not stop(), "its daemon has renewed it"
    clock.sleep(2)
    assert stop()
    with pytest.raises(Interrupted):
        stop.check()


@pytest.mark.parametrize(
    ("key", "value"), [("ownership", "lease"), ("ownership", True), ("lease_seconds", 0.5), ("lease_seconds", 3601)]
)
def test_what_makes_no_lease_is_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ServiceError, match=f"{key} is {value!r}, but must be"):
        load_config(None, {"spool": tmp_path, "outputs": tmp_path, key: value})


def test_a_job_that_cannot_start_now_is_not_taken_just_to_be_given_back(tmp_path: Path, clock: Clocks) -> None:
    spool = spool_at(tmp_path)
    claimed(spool, "left.yaml").release()
    claimed(spool, "cancelled.yaml").release()
    failed = claimed(spool, "failed.yaml")
    (failed.folder / "error.txt").write_text("no")
    failed.release()
    spool._new_job("empty.yaml").release()
    for job in spool.running_jobs():
        if job.spec == "cancelled.yaml":
            spool.request_cancel(job.job, "me")
    before = sorted(os.listdir(spool.running))
    taken = list(spool_at(tmp_path).adopt(set(), lambda folder: False))
    assert sorted(job.status().spec for job in taken) == ["cancelled.yaml", "failed.yaml"]
    (left,) = [name for name in os.listdir(spool.running) if "@" not in name]
    assert left in before
    assert left.startswith("left-")


def test_a_job_that_is_given_back_is_free_at_once_and_a_claim_without_a_spec_is_cleaned_up(
    tmp_path: Path, clock: Clocks
) -> None:
    job = claimed(spool_at(tmp_path))
    job.release()
    other = spool_at(tmp_path)
    (again,) = other.adopt(set())
    assert job_of(again.folder) == again.name == job.name
    again.finish("failed")
    retry_command(tmp_path, again.name)
    (third,) = other.adopt(set())
    third.finish("done")
    empty = other._new_job("x.yaml")
    assert list(spool_at(tmp_path).adopt(set())) == []
    watcher = spool_at(tmp_path)
    list(watcher.adopt(set()))
    clock.sleep(61)
    assert list(watcher.adopt(set())) == []
    assert not empty.folder.exists()
    assert os.listdir(tmp_path / "running") == []


def test_a_lease_that_cannot_be_read_is_one_of_the_longest_kind_and_over_for_its_worker(
    tmp_path: Path, clock: Clocks
) -> None:
    folder = tmp_path / "a@b"
    folder.mkdir()
    watch, tenancy = Watch(), Tenancy(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text('{"seconds": 1, "renewed": 1e12}')
    for content in (None, b"\xff{", b'{"seconds": 1e9, "renewed": "x"}', elsewhere):
        if isinstance(content, bytes):
            (folder / "lease").write_bytes(content)
        elif content is not None:
            replaced_by_link(folder / "lease", content)
        assert read_lease(folder).seconds == 3600
        assert Tenancy(folder).over()
        watch.has_run_out(folder)
        clock.sleep(3599)
        assert not watch.has_run_out(folder)
    clock.sleep(2)
    assert watch.has_run_out(folder)
    (folder / "lease").unlink()
    Lease(folder, 60.0, clock.owner)
    assert read_lease(folder).seconds == 60
    assert not tenancy.over()
    assert elsewhere.read_text() == '{"seconds": 1, "renewed": 1e12}'


# --- how a spool tells ---


def test_how_jobs_are_owned_is_written_down_and_the_other_way_is_refused(tmp_path: Path) -> None:
    for how, other in ((LOCKS, LEASES), (LEASES, LOCKS)):
        root = tmp_path / how
        Spool(root).prepare(how)
        assert (root / "ownership").read_text() == f"{how}\n"
        for _ in range(2):
            again = Spool(root)
            again.prepare()
            assert again.leased == (how == LEASES)
        with pytest.raises(ServiceError, match=rf"owned through {how}, but the configuration asks for {other};"):
            Spool(root).prepare(other)
    new = Spool(tmp_path / "new")
    new.prepare()
    assert not new.leased


def replaced_by_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda marker: marker.write_text(""),
        lambda marker: marker.write_text("lea"),
        lambda marker: replaced_by_link(marker, Path("/nowhere")),
        replaced_by_folder,
        replaced_by_pipe,
    ],
    ids=["empty", "torn", "link", "folder", "pipe"],
)
def test_a_word_that_cannot_be_read_never_means_locks(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    job = claimed(spool_at(tmp_path))
    spoil(tmp_path / "ownership")
    for how in (None, LOCKS, LEASES):
        with pytest.raises(ServiceError, match="it is not known how its jobs are owned"):
            Spool(tmp_path).prepare(how)
    for act in (lambda: cancel_command(tmp_path, job.name), lambda: list(Spool(tmp_path).adopt(set()))):
        with pytest.raises(ServiceError, match="it is not known how its jobs are owned"):
            act()
    assert (job.folder / "spec.yaml").exists()


def test_of_two_first_starts_that_disagree_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: Path, target: Path) -> None:
        monkeypatch.undo()
        Spool(tmp_path).prepare(LEASES)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ServiceError, match=r"owned through leases, says .*/ownership, and not through locks"):
        Spool(tmp_path).prepare()
    assert sorted(os.listdir(tmp_path)) == ["done", "failed", "incoming", "ownership", "running"]


def test_a_spool_whose_jobs_are_owned_otherwise_is_refused_though_its_word_is_gone(
    tmp_path: Path, clock: Clocks
) -> None:
    leased, locked = tmp_path / "leased", tmp_path / "locked"
    claimed(spool_at(leased))
    spool = Spool(locked)
    spool.prepare()
    claimed(spool).release()
    for root, other in ((leased, LOCKS), (locked, LEASES)):
        (root / "ownership").unlink()
        with pytest.raises(ServiceError, match=rf"such a daemon finish it, .* before jobs are owned through {other}"):
            Spool(root).prepare(other)
        assert not (root / "ownership").exists()
