"""The power goes at any operation on the disk: nothing promised is lost, and no half output has its final name.

The disk keeps only what was synced, and perhaps some of the rest (faulty_filesystem.py). Real daemons and workers lose
their power in test_power_loss_service.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import mergecore.output.lanes as lanes
from mergecore import merge
from mergecore.errors import Interrupted, MergecoreError, OutputExistsError
from mergecore.output.verify import verify_output
from mergecore.spec import MergeSpec, load_spec
from service.commands import submit_command
from service.spool import ERROR, SPEC, Spool
from service.status import read_status
from tests.faulty_disk import FaultyDisk, faulty_disk
from tests.models import llama, spec_dict, tensor_bytes, write_trio

CHANCES = (None, 1, 2)
"""What survives of what was not synced: nothing, or by chance with this seed."""
TEXT = "merge_method: linear\n"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path_factory.mktemp("power") / "disk") as disk:
        yield disk


def at_any_operation(
    disk: FaultyDisk,
    prepare: Callable[[], object],
    act: Callable[[], object],
    chances: Iterable[int | None] = CHANCES,
    most: int = 1000,
) -> Iterator[str]:
    """Yields after each power loss in `act`, at its first operation, at its second, and so on; says which it was."""
    for survives in chances:
        for after in range(most):
            disk.format()
            prepare()
            disk.cut_power(after, survives)
            with contextlib.suppress(OSError, MergecoreError):
                act()
            if not disk.is_off:
                assert after > 3, "hardly anything happened"
                break
            disk.reboot()
            yield f"cut before operation {after}, chance {survives}"


# --- the spool ---


def places(spool: Spool) -> list[str]:
    """Where jobs and specs lie."""
    found = [f"incoming/{path.name}" for path in spool.incoming.iterdir() if not path.name.startswith(".")]
    for folder in (spool.running, spool.done, spool.failed):
        found += [f"{folder.name}/{path.parent.name}" for path in folder.glob(f"[!.]*/{SPEC}")]
    return found


def prepared(disk: FaultyDisk) -> Spool:
    """A spool in which one spec waits, all durable."""
    spool = Spool(disk.mount / "deep" / "spool")
    spool.prepare()
    spec = disk.mount.parent / "a.yaml"
    spec.write_text(TEXT)
    submit_command(spec, spool.root)
    return spool


def only_job(spool: Spool) -> str:
    """The one job there is; its spec is whole."""
    (place,) = places(spool)
    path = spool.root / place
    assert (path if path.is_file() else path / SPEC).read_text() == TEXT
    return place


def test_a_submitted_spec_is_durable_in_a_new_spool(disk: FaultyDisk) -> None:
    disk.format()
    spool = prepared(disk)
    disk.reboot()
    assert only_job(spool) == "incoming/a.yaml"


def test_a_claim_leaves_the_spec_in_one_folder_and_any_daemon_finds_it(disk: FaultyDisk) -> None:
    spool = Spool(disk.mount / "deep" / "spool")

    def claim() -> None:
        job = spool.claim("a.yaml")
        assert job is not None
        job.release()

    for when in at_any_operation(disk, lambda: prepared(disk), claim):
        place = only_job(spool)
        adopted = list(spool.adopt(set()))
        assert [f"running/{job.name}" for job in adopted] == ([] if place.startswith("incoming") else [place]), when
        assert len(list(spool.running.iterdir())) == len(adopted), "empty claims are gone"
        for job in adopted:
            assert job.status().spec == "a.yaml"
            job.release()


def test_the_end_of_a_job_keeps_it_in_one_folder_and_can_be_repeated(disk: FaultyDisk) -> None:
    spool = Spool(disk.mount / "deep" / "spool")

    def begin() -> None:
        job = prepared(disk).claim("a.yaml")
        assert job is not None
        job.update(result={"tensors": 3}, output="/out")
        job.release()

    def finish() -> None:
        (job,) = spool.adopt(set())
        try:
            outcome = job.outcome()
            assert outcome == "done"
            job.finish(outcome)
        finally:
            job.release()

    for when in at_any_operation(disk, begin, finish):
        if only_job(spool).startswith("running"):
            finish()
        place = only_job(spool)
        assert place.startswith("done"), when
        assert read_status(spool.root / place).output == "/out"


def test_a_retry_is_made_or_not_and_never_half(disk: FaultyDisk) -> None:
    spool = Spool(disk.mount / "deep" / "spool")

    def fail() -> None:
        job = prepared(disk).claim("a.yaml")
        assert job is not None
        (job.folder / "cancel").write_text("me\n")
        job.cancel(by="me")

    def retry() -> None:
        (folder,) = spool.failed.iterdir()
        spool.retry(folder.name)

    for when in at_any_operation(disk, fail, retry):
        if only_job(spool).startswith("failed"):
            retry()
        (job,) = spool.adopt(set())
        assert job.outcome() is None, f"it would not be run; {when}"
        assert job.cancellation() is None, when
        assert not (job.folder / ERROR).exists()
        job.release()


def test_a_status_that_was_only_a_heartbeat_is_read_whole(disk: FaultyDisk) -> None:
    spool = Spool(disk.mount / "deep" / "spool")

    def begin() -> None:
        job = prepared(disk).claim("a.yaml")
        assert job is not None
        job.update(output="/out")
        job.release()

    def beat() -> None:
        (job,) = spool.adopt(set())
        try:
            for number in range(3):
                job.update(durable=False, heartbeat=f"beat {number}")
        finally:
            job.release()

    for when in at_any_operation(disk, begin, beat):
        status = read_status(spool.root / only_job(spool))
        assert (status.spec, status.output) == ("a.yaml", "/out"), when


def test_a_spool_that_was_being_made_can_be_made(disk: FaultyDisk) -> None:
    spool = Spool(disk.mount / "deep" / "spool")
    for _ in at_any_operation(disk, lambda: None, spool.prepare):
        spool.prepare()
        assert places(spool) == []


# --- outputs ---


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    tensors = dict(list(llama(layers=1).items())[:4])
    return write_trio(tmp_path_factory.mktemp("models"), tensors)


def linear(trio: list[Path], shard_size: int) -> MergeSpec:
    return load_spec(spec_dict("task_arithmetic", *trio, run={"shard_size": shard_size}))


def check(out: Path, expected: dict[str, tuple[str, tuple[int, ...], bytes]], when: str) -> None:
    """Whatever has the final name is complete."""
    if out.exists():
        assert verify_output(out) == [], when
        assert tensor_bytes(out) == expected, when


@pytest.mark.parametrize("resume", [True, False])
def test_a_merge_goes_on_after_a_power_loss_and_its_output_has_the_same_bytes(
    disk: FaultyDisk, trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    spec = linear(trio, shard_size=14_000)
    monkeypatch.setattr(lanes, "CHECKPOINT_SECONDS", 0.0)  # a journal line per tensor, as of large ones
    merge(spec, tmp_path / "out")
    expected = tensor_bytes(tmp_path / "out")
    out = disk.mount / "new" / "outputs" / "out"
    resumed = 0
    for when in at_any_operation(disk, lambda: None, lambda: merge(spec, out)):
        check(out, expected, when)
        try:
            result = merge(spec, out, resume=resume)
        except OutputExistsError:
            assert out.exists(), when
        else:
            resumed += result.resumed
        check(out, expected, when)
        assert os.listdir(out.parent) == ["out"], when
    assert (resumed > 20) is resume, resumed


def test_what_an_abandoned_journal_vouched_for_is_not_taken_for_written(
    disk: FaultyDisk, trio: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge is interrupted and begun anew from zero, and the power goes: the old journal is back, its data not."""
    monkeypatch.setattr(lanes, "CHECKPOINT_SECONDS", 0.0)
    spec = linear(trio, shard_size=1_000_000)
    merge(spec, tmp_path / "out")
    expected = tensor_bytes(tmp_path / "out")
    out = disk.mount / "out"

    def interrupt() -> None:
        asked = iter(range(1000))
        with pytest.raises(Interrupted):
            merge(spec, out, should_stop=lambda: next(asked) > 2)

    for when in at_any_operation(disk, interrupt, lambda: merge(spec, out), range(25), most=14):
        merge(spec, out, resume=True)
        check(out, expected, when)
