"""Where the outputs of leased jobs grow and how they are published: what an owner that only slept can still do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergecore.confined import OutputFolder, confined
from mergecore.errors import Interrupted, OutputError, OutputExistsError
from mergecore.spec import load_spec
from service.leases import Tenancy
from service.publishing import Workplace

SPEC = load_spec({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1.0}}]})


class Tenant(Tenancy):
    """Whose lease runs out when a test says so."""

    def __init__(self) -> None:
        self.lost = False

    def over(self) -> bool:
        return self.lost


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "outputs"
    folder.mkdir()
    with confined([], [folder]):
        yield folder


def workplace(outputs: Path, token: str, tenant: Tenant | None = None, out: str = "out") -> Workplace:
    return Workplace(Path("running") / f"job@{token}", outputs, outputs / out, tenant or Tenant())


def merged(place: Path) -> dict[str, Any]:
    """As a merge does it: a whole folder appears in the place."""
    place.mkdir()
    (place / "model").write_text(place.parent.name)
    return {"tensors": 3, "output": str(place)}


def test_a_merge_is_published_whole_and_nothing_is_left_beside_it(outputs: Path) -> None:
    work = workplace(outputs, "1", out="deep/er/out")
    seen: list[Path] = []

    def merge(place: Path) -> dict[str, Any]:
        seen.append(place)
        assert not (outputs / "deep").exists()
        return merged(place)

    assert work.merge(SPEC, {}, merge) == {"tensors": 3, "output": str(outputs / "deep/er/out")}
    assert seen == [outputs / ".job@1" / "out"]
    assert os.listdir(outputs) == ["deep"]
    assert os.listdir(outputs / "deep/er/out") == ["model"]


def test_a_name_that_is_taken_is_found_before_and_after_the_merge(outputs: Path) -> None:
    (outputs / "out").mkdir()

    def late(place: Path) -> dict[str, Any]:
        (outputs / "out" / "file").touch()
        return merged(place)

    for merge in (late, merged):
        with pytest.raises(OutputExistsError, match="out exists already and was not touched"):
            workplace(outputs, "1").merge(SPEC, {}, merge)
    assert os.listdir(outputs / "out") == ["file"]
    (outputs / "out" / "file").unlink()
    assert workplace(outputs, "2").merge(SPEC, {"1": "expired"}, merged)["tensors"] == 3, "an empty folder is replaced"
    assert os.listdir(outputs) == ["out"]


def test_a_lease_that_runs_out_while_it_is_merged_publishes_nothing(outputs: Path) -> None:
    tenant = Tenant()

    def merge(place: Path) -> dict[str, Any]:
        tenant.lost = True
        return merged(place)

    with pytest.raises(Interrupted, match="run out: nothing is published"):
        workplace(outputs, "1", tenant, "deep/out").merge(SPEC, {}, merge)
    assert os.listdir(outputs) == [".job@1"]
    with pytest.raises(Interrupted):
        workplace(outputs, "2", tenant).merge(SPEC, {}, merged)
    assert os.listdir(outputs) == [".job@1"], "nor is anything begun"


def test_an_owner_that_slept_can_neither_publish_nor_write_where_the_next_one_merges(outputs: Path) -> None:
    old = workplace(outputs, "1")
    old.enter({})
    merged(old.place)
    (old.place.parent / "at work").write_text("half")
    opened = OutputFolder.at(old.place.parent, [])
    at_work = os.open(old.place.parent / "at work", os.O_WRONLY)

    def merge(place: Path) -> dict[str, Any]:
        # It wakes, and has seen nothing: its last look at the lease was before it slept.
        with pytest.raises(Interrupted, match="another daemon has taken this job over"):
            old.publish()
        os.write(at_work, b"I was only asleep")
        with pytest.raises(FileNotFoundError):
            opened.open("more", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(FileNotFoundError):
            os.mkdir("folder", dir_fd=opened.descriptor)
        opened.remove(["out", "at work"])
        assert os.listdir(place.parent) == []
        return merged(place)

    workplace(outputs, "2").merge(SPEC, {"1": "expired"}, merge)
    opened.close()
    os.close(at_work)
    assert (outputs / "out" / "model").read_text() == ".job@2"
    assert os.listdir(outputs) == ["out"]


def test_an_owner_that_slept_touches_nothing_of_those_after_it(outputs: Path) -> None:
    new = workplace(outputs, "3")
    new.enter({"1": "expired", "2": "expired"})
    merged(new.place)
    tenant = Tenant()
    old = workplace(outputs, "2", tenant)
    tenant.lost = True
    with pytest.raises(Interrupted):
        old.merge(SPEC, {"1": "expired"}, merged)
    assert (new.place / "model").read_text() == ".job@3"
    new.publish()
    assert (outputs / "out" / "model").read_text() == ".job@3"


def test_what_was_returned_is_gone_on_with_and_what_may_still_be_written_is_not(outputs: Path) -> None:
    for token in "123":
        (outputs / f".job@{token}").mkdir()
        (outputs / f".job@{token}" / "kept").write_text(token)
    (outputs / ".job@9").mkdir()
    (outputs / ".other@1").mkdir()
    inode = (outputs / ".job@2" / "kept").stat().st_ino
    former = {"1": "returned", "2": "returned", "3": "expired", "x": "returned"}
    workplace(outputs, "4").enter(former)
    assert sorted(os.listdir(outputs)) == [".job@4", ".job@9", ".other@1"]
    assert (outputs / ".job@4" / "kept").read_text() == "2"
    assert (outputs / ".job@4" / "kept").stat().st_ino == inode
    workplace(outputs, "4").enter(former)
    assert (outputs / ".job@4" / "kept").read_text() == "2", "the next attempt under the same lease"


def test_of_an_expired_search_a_copy_of_the_journal_is_all_that_stays(outputs: Path) -> None:
    old = outputs / ".job@1" / ".out.evolve"
    old.mkdir(parents=True)
    (old / "journal.jsonl").write_text("one\n")
    (old / "candidate").mkdir()
    with (old / "journal.jsonl").open("a") as asleep:
        workplace(outputs, "2").enter({"1": "expired"})
        asleep.write("two\n")
    new = outputs / ".job@2" / ".out.evolve"
    assert (os.listdir(new), (new / "journal.jsonl").read_text()) == (["journal.jsonl"], "one\n")


def test_a_result_that_an_earlier_attempt_did_not_get_to_publish_is_published(outputs: Path) -> None:
    work = workplace(outputs, "1")
    work.enter({})
    work.place.mkdir()
    manifest = {"spec": SPEC.as_dict(), "spec_text": SPEC.text, "result": {"tensors": 7}}
    (work.place / "mergecore_manifest.json").write_text(json.dumps(manifest))

    def merge(place: Path) -> dict[str, Any]:
        raise OutputExistsError(f"{place} exists")

    assert work.merge(SPEC, {}, merge) == {"tensors": 7, "output": str(outputs / "out")}
    assert os.listdir(outputs) == ["out"]


def test_links_lead_nowhere(outputs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "out").mkdir(parents=True)
    (outputs / ".job@1").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="cannot publish"):
        workplace(outputs, "1").publish()
    workplace(outputs, "2").enter({"1": "expired"})
    assert os.listdir(elsewhere) == ["out"], "the link goes, not what it leads to"
    assert os.listdir(outputs) == [".job@2"]
    (outputs / "away").symlink_to(elsewhere)
    work = workplace(outputs, "2", out="away/out")
    with pytest.raises(OutputError, match="leads out of the outputs folder"):
        work.merge(SPEC, {}, lambda place: merged(place))
    assert os.listdir(elsewhere / "out") == []
