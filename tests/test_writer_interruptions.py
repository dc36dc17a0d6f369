"""A later run of the writer goes on where one stopped, and starts from zero where that does not fit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mergecore.errors import Interrupted
from mergecore.output import lanes as lanes_module
from mergecore.output.writer import OutputWriter
from tests.outputs import content, expected_files, files_in, layout_of, put, put_rest


def interrupted_after(out: Path, names: list[str], identity: str = "a merge") -> None:
    with suppress(Interrupted), OutputWriter(out, layout_of(), identity) as writer:
        for name in names:
            put(writer, name)
        writer.write("layers.1.b", 0, writer.acquire("layers.1.b", 0, 100))
        raise Interrupted


def test_finished_tensors_are_kept_and_the_unfinished_one_starts_again(tmp_path: Path) -> None:
    interrupted_after(tmp_path / "out", ["embed", "layers.1.a"])
    assert not (tmp_path / "out").exists()
    with OutputWriter(tmp_path / "out", layout_of(), "a merge", resume=True) as writer:
        assert writer.resumed
        assert writer.finished == {"embed", "layers.1.a"}
        assert writer.checksums["embed"] == xxhash.xxh3_128_hexdigest(content("embed", 4224))
        put_rest(writer)
        writer.publish()
        assert writer.written == sum(slot.nbytes for slot in layout_of().slots.values()) - 4224 - 10000
    assert files_in(tmp_path / "out") == expected_files(layout_of())


def forget_to_resume(staging: Path) -> dict[str, Any]:
    return {"resume": False}


def change_identity(staging: Path) -> dict[str, Any]:
    return {"identity": "another merge"}


def change_layout(staging: Path) -> dict[str, Any]:
    return {"layout": layout_of(shard_size=4300)}


def truncate_shard(staging: Path) -> dict[str, Any]:
    os.truncate(next((staging / "output").iterdir()), 5000)
    return {}


def lose_shard(staging: Path) -> dict[str, Any]:
    next((staging / "output").iterdir()).unlink()
    return {}


def damage_first_line(staging: Path) -> dict[str, Any]:
    journal = staging / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b"a merge", b"b merge"))
    return {"identity": "b merge"}


def lose_journal(staging: Path) -> dict[str, Any]:
    (staging / "journal.jsonl").unlink()
    return {}


@pytest.mark.parametrize(
    "change",
    [forget_to_resume, change_identity, change_layout, truncate_shard, lose_shard, damage_first_line, lose_journal],
)
def test_a_run_that_does_not_fit_what_is_there_starts_from_zero(
    tmp_path: Path, change: Callable[[Path], dict[str, Any]]
) -> None:
    interrupted_after(tmp_path / "out", ["embed", "layers.1.a"])
    arguments: dict[str, Any] = {"layout": layout_of(), "identity": "a merge", "resume": True}
    arguments |= change(tmp_path / ".out.partial")
    with OutputWriter(tmp_path / "out", **arguments) as writer:
        assert not writer.resumed
        assert writer.finished == set()
        put_rest(writer)
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(arguments["layout"])


@pytest.mark.parametrize("damage", [b"", b'{"name": "lay', b'{"name": "scale", "check": "0"}\n', b"[]\n", b"\xff\n"])
def test_journal_lines_count_up_to_the_first_that_is_not_whole(tmp_path: Path, damage: bytes) -> None:
    interrupted_after(tmp_path / "out", ["embed", "layers.1.a"])
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + damage + b"".join(lines[2:])[: 100 if damage else 20])
    for expected in ({"embed"}, {"embed", "scale"}):  # what is appended after the cut is read the next time
        with suppress(Interrupted), OutputWriter(tmp_path / "out", layout_of(), "a merge", resume=True) as writer:
            assert writer.finished == expected
            if expected == {"embed"}:
                put(writer, "scale")
            raise Interrupted


def test_files_that_an_earlier_run_added_are_not_published_by_the_next(tmp_path: Path) -> None:
    with suppress(Interrupted), OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
        writer.add_file("tokenizer.model", b"old")
        raise Interrupted
    with OutputWriter(tmp_path / "out", layout_of(), "a merge", resume=True) as writer:
        assert writer.resumed
        put_rest(writer)
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout_of())


def test_a_finished_tensor_reaches_the_journal_by_itself_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "CHECKPOINT_SECONDS", 0.01)
    with OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
        put(writer, "embed")
        while "embed" not in writer.finished:
            time.sleep(0.01)
        assert b'"embed"' in (tmp_path / ".out.partial" / "journal.jsonl").read_bytes()
