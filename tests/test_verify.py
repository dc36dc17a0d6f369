"""verify_output finds every difference between an output and its manifest, and says it in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergecore.output import verify as verify_module
from mergecore.output.layout import INDEX_NAME, plan_layout
from mergecore.output.verify import MANIFEST_NAME, verify_output
from mergecore.output.writer import OutputWriter

TENSORS = [("a", "BF16", (40, 10)), ("none", "F32", (0,)), ("b", "F32", (5, 5)), ("scale", "F32", ())]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def make_output(out: Path, shard_size: int = 850) -> Path:
    layout = plan_layout(TENSORS, shard_size)
    shapes = {name: (dtype, list(shape)) for name, dtype, shape in TENSORS}
    with OutputWriter(out, layout, "a merge") as writer:
        for name, slot in layout.slots.items():
            buffer = writer.acquire(slot.name, 0, slot.nbytes)
            buffer[:] = (name.encode() * slot.nbytes)[: slot.nbytes]
            writer.write(name, 0, buffer)
            writer.finish(name)
        writer.sync()
        entries = {
            name: {
                "file": layout.shards[slot.shard].filename,
                "offset": slot.offset,
                "bytes": slot.nbytes,
                "dtype": shapes[name][0],
                "shape": shapes[name][1],
                "xxh3_128": writer.checksums[name],
            }
            for name, slot in layout.slots.items()
        }
        writer.add_file(MANIFEST_NAME, json.dumps({"tensors": entries}).encode())
        writer.publish()
    return out


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    change(manifest["tensors"])
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))


@pytest.mark.parametrize("shard_size", [850, 10**9])
def test_an_untouched_output_has_no_problems_and_progress_reaches_all_bytes(tmp_path: Path, shard_size: int) -> None:
    seen: list[tuple[int, int]] = []
    assert verify_output(make_output(tmp_path / "out", shard_size), lambda *place: seen.append(place)) == []
    assert seen == [(800, 904), (900, 904), (904, 904)]


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "READ_STEP", 300)
    seen: list[int] = []
    assert verify_output(make_output(tmp_path / "out"), lambda done, total: seen.append(done)) == []
    assert seen == [300, 600, 800, 900, 904]


def test_every_single_changed_byte_is_found(tmp_path: Path) -> None:
    out = make_output(tmp_path / "out")
    good = (out / SECOND).read_bytes()
    for position in range(4096, len(good)):
        (out / SECOND).write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        (problem,) = verify_output(out)
        name = "b" if position < 4096 + 100 else "scale"
        assert problem.startswith(f"{SECOND}: the bytes of tensor '{name}' have changed")


def flip_header(out: Path) -> None:
    content = bytearray((out / FIRST).read_bytes())
    content[9] = ord("}")
    (out / FIRST).write_bytes(content)


def truncate(out: Path) -> None:
    content = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(content[:-1])


def extend(out: Path) -> None:
    with (out / FIRST).open("ab") as file:
        file.write(b"\0")


def rename_in_header(out: Path) -> None:
    content = (out / SECOND).read_bytes()
    (out / SECOND).write_bytes(content.replace(b'"scale"', b'"scalf"', 1))


def change_index(out: Path) -> None:
    (out / INDEX_NAME).write_text((out / INDEX_NAME).read_text().replace(FIRST, SECOND))


@pytest.mark.parametrize(
    ("damage", "problems"),
    [
        (lambda out: (out / FIRST).unlink(), [f"{FIRST} is missing (2 tensors)"]),
        (lambda out: (out / "x.safetensors").touch(), ["x.safetensors is in the folder, but not in the manifest"]),
        (lambda out: (out / INDEX_NAME).unlink(), [f"{INDEX_NAME} is missing; the model cannot be loaded without it"]),
        (lambda out: (out / INDEX_NAME).write_text("{"), [f"{INDEX_NAME} is damaged: JSONDecodeError: "]),
        (change_index, [f"{INDEX_NAME} does not place the tensors in the files that the manifest says"]),
        (rename_in_header, [f"{SECOND} has tensor 'scalf', the manifest does not", f"{SECOND} has no tensor 'scale'"]),
        (flip_header, [FIRST]),
        (truncate, [FIRST]),
        (extend, [FIRST]),
        (
            lambda out: edit_manifest(out, lambda tensors: tensors["b"].update(dtype="I32", shape=[25])),
            [
                f"{SECOND}: tensor 'b' has dtype F32, the manifest says I32",
                f"{SECOND}: tensor 'b' has shape [5, 5], the manifest says [25]",
            ],
        ),
    ],
    ids=str,
)
def test_damaged_files_are_told(tmp_path: Path, damage: Callable[[Path], object], problems: list[str]) -> None:
    out = make_output(tmp_path / "out")
    damage(out)
    found = verify_output(out)
    assert len(found) == len(problems)
    assert all(problem in sentence for problem, sentence in zip(problems, found, strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / MANIFEST_NAME).unlink(),
        lambda out: (out / MANIFEST_NAME).write_text("[]"),
        lambda out: (out / MANIFEST_NAME).write_text('{"tensors": {"a": 1}}'),
        lambda out: edit_manifest(out, lambda tensors: tensors["a"].pop("bytes")),
        lambda out: edit_manifest(out, lambda tensors: tensors["a"].update(bytes="many")),
        lambda out: edit_manifest(out, lambda tensors: tensors["a"].update(file="../elsewhere")),
        lambda out: edit_manifest(out, lambda tensors: tensors["a"].update(file=["list"])),
    ],
)
def test_without_a_sound_manifest_nothing_is_checked(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    out = make_output(tmp_path / "out")
    damage(out)
    (problem,) = verify_output(out)
    assert MANIFEST_NAME in problem
    assert "cannot be read" in problem or "is damaged" in problem


def test_a_folder_that_does_not_exist_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    (problem,) = verify_output(tmp_path / "absent")
    assert "No such file" in problem
