"""The power goes at any operation on the disk while leases are taken, renewed and given up, and outputs published."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergecore.output.verify import verify_output
from mergecore.spec import load_spec
from service.durable import make_folder, write_atomic
from service.errors import ServiceError
from service.leases import read_lease, token_of
from service.ownership import LEASES, agreed
from service.publishing import Workplace
from service.spool import Job, Spool
from tests.faulty_disk import FaultyDisk, faulty_disk
from tests.leases import Clocks, turned_by_hand
from tests.models import llama, spec_dict, tensor_bytes, write_trio
from tests.test_power_loss import TEXT, at_any_operation, only_job
from tests.test_publishing import Tenant


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path_factory.mktemp("power") / "disk") as disk:
        yield disk


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return turned_by_hand(monkeypatch)


def leased(disk: FaultyDisk) -> Spool:
    """A new daemon's view of the spool."""
    return Spool(disk.mount / "spool", 60.0)


def with_a_spec(disk: FaultyDisk) -> Spool:
    spool = leased(disk)
    spool.prepare(LEASES)
    path = spool.incoming / "a.yaml"
    with path.open("w") as file:
        file.write(TEXT)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(spool.incoming, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return spool


def taken_over(spool: Spool, clock: Clocks, seconds: float = 61) -> list[Job]:
    """What is adopted, at once or when leases have run out; those that were just taken have not."""
    jobs = list(spool.adopt(set()))
    clock.observer += seconds
    return [*jobs, *spool.adopt({job.name for job in jobs})]


def ended(jobs: list[Job], spool: Spool, clock: Clocks, when: str) -> None:
    """These jobs end, and nothing is left of takers that died; after an hour if their lease was not yet on disk."""
    for job in jobs:
        job.finish("done")
    assert taken_over(spool, clock, 3601) == [], when
    assert [name for name in os.listdir(spool.running) if not name.startswith(".probe")] == [], when


def test_how_jobs_are_owned_is_known_or_not_yet_written_and_never_half(disk: FaultyDisk) -> None:
    seen = set()
    for when in at_any_operation(disk, lambda: None, lambda: leased(disk).prepare(LEASES)):
        seen.add(agreed(disk.mount / "spool"))
        leased(disk).prepare(LEASES)
        with pytest.raises(ServiceError, match="owned through leases"):
            Spool(disk.mount / "spool").prepare("locks")
        assert agreed(disk.mount / "spool") == LEASES, when
    assert seen == {None, LEASES}


def test_a_claim_through_a_lease_leaves_the_spec_in_one_folder(disk: FaultyDisk, clock: Clocks) -> None:
    for when in at_any_operation(disk, lambda: with_a_spec(disk), lambda: leased(disk).claim("a.yaml")):
        place = only_job(leased(disk))
        spool = leased(disk)
        jobs = taken_over(spool, clock)
        assert [job.status().spec for job in jobs] == ([] if place.startswith("incoming") else ["a.yaml"]), when
        ended(jobs, spool, clock, when)


def test_a_job_that_is_taken_over_keeps_its_status_and_knows_who_had_it(disk: FaultyDisk, clock: Clocks) -> None:
    tokens: list[str] = []

    def begin() -> None:
        job = with_a_spec(disk).claim("a.yaml")
        assert job is not None
        job.update(error="before", lease=token_of(job.folder))  # a worker was started
        tokens.append(token_of(job.folder))

    def take() -> None:
        taken_over(leased(disk), clock)[0].update(attempts=2)

    for when in at_any_operation(disk, begin, take):
        only_job(leased(disk))
        spool = leased(disk)
        (job,) = taken_over(spool, clock)
        status = job.status()
        assert (status.spec, status.error, status.lease) == ("a.yaml", "before", ""), when
        assert status.former_leases[tokens[-1]] == "expired", when
        ended([job], spool, clock, when)


def test_a_job_that_is_given_back_keeps_its_status(disk: FaultyDisk, clock: Clocks) -> None:
    def begin() -> None:
        job = with_a_spec(disk).claim("a.yaml")
        assert job is not None
        job.update(lease="worker")
        job.release()

    def take_and_end() -> None:
        (job,) = leased(disk).adopt(set())
        job.finish("done", output="/out")

    for when in at_any_operation(disk, begin, take_and_end):
        if only_job(leased(disk)).startswith("running"):
            (job,) = taken_over(leased(disk), clock)
            assert job.status().former_leases["worker"] in ("returned", "expired"), when
            job.finish("done", output="/out")
        assert only_job(leased(disk)).startswith("done"), when
        (status,) = [one for one in leased(disk).jobs() if one.state == "done"]
        assert (status.spec, status.output) == ("a.yaml", "/out"), when


def test_a_lease_is_whole_whenever_its_renewal_is_cut_off(disk: FaultyDisk, clock: Clocks) -> None:
    jobs: list[Job] = []

    def begin() -> None:
        job = with_a_spec(disk).claim("a.yaml")
        assert job is not None
        jobs.append(job)

    def renew() -> None:
        for _ in range(3):
            clock.sleep(15)
            jobs[-1].owned.renew()

    for when in at_any_operation(disk, begin, renew):
        assert read_lease(jobs[-1].folder).seconds == 60, when
        assert read_lease(jobs[-1].folder).renewed > 0, when


def test_a_leased_merge_is_published_once_and_whole(disk: FaultyDisk, tmp_path: Path) -> None:
    import mergecore

    trio = write_trio(tmp_path / "models", dict(list(llama(layers=1).items())[:3]))
    spec = load_spec(spec_dict("task_arithmetic", *trio))
    mergecore.merge(spec, tmp_path / "out")
    expected = tensor_bytes(tmp_path / "out")
    outputs = disk.mount / "outputs"

    def prepare() -> None:
        outputs.mkdir()
        folder = os.open(disk.mount, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def work(token: str, former: dict[str, str]) -> dict[str, Any]:
        place = Workplace(Path("running") / f"job@{token}", outputs, outputs / "out", Tenant())
        return place.merge(spec, former, lambda place: mergecore.merge(spec, place, resume=True).as_dict())

    for when in at_any_operation(disk, prepare, lambda: work("1", {}), chances=(None, 1)):
        if (outputs / "out").exists():
            assert verify_output(outputs / "out") == [], when
        else:
            assert work("2", {"1": "expired"})["tensors"] == 3
        assert tensor_bytes(outputs / "out") == expected, when
        assert not (outputs / ".job@2").exists(), when
    disk.format()
    prepare()
    work("1", {})
    disk.reboot()
    assert verify_output(outputs / "out") == [], "what was said to be published is"


def test_the_journal_of_a_search_is_there_after_a_takeover(disk: FaultyDisk) -> None:
    outputs = disk.mount / "outputs"

    def search() -> None:
        folder = outputs / ".job@1" / ".out.evolve"
        make_folder(folder)
        write_atomic(folder / "journal.jsonl", "one\n" * 3000)

    def enter(token: str, former: dict[str, str]) -> None:
        Workplace(Path("running") / f"job@{token}", outputs, outputs / "out", Tenant()).enter(former)

    for when in at_any_operation(disk, search, lambda: enter("2", {"1": "expired"})):
        enter("3", {"1": "expired", "2": "expired"})
        assert (outputs / ".job@3" / ".out.evolve" / "journal.jsonl").read_text() == "one\n" * 3000, when
        assert os.listdir(outputs) == [".job@3"], when
