"""An output appears complete or not at all, whatever happens meanwhile; a later run goes on where one stopped."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergecore.errors import CheckpointError, Interrupted, OutputError, OutputExistsError
from mergecore.output import shards as shards_module
from mergecore.output import writer as writer_module
from mergecore.output.layout import INDEX_NAME, OutputLayout, plan_layout
from mergecore.output.writer import OutputWriter

# The crashes happen in forked children. They use neither torch nor any lock that another thread may hold.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TENSORS = [
    ("embed", "BF16", (64, 33)),
    ("layers.0.a", "F32", (17, 5)),
    ("layers.0.b", "BF16", (0, 4)),
    ("layers.1.a", "BF16", (50, 100)),
    ("scale", "F32", ()),
    ("layers.1.b", "BF16", (31, 7)),
]


def layout_of(tensors: list[tuple[str, str, tuple[int, ...]]] = TENSORS, shard_size: int = 8000) -> OutputLayout:
    return plan_layout(tensors, shard_size)


def content(name: str, nbytes: int) -> bytes:
    """What the tests write into a tensor: bytes that tell the tensor and the position."""
    seed = xxhash.xxh3_64_digest(name.encode())
    return b"".join(xxhash.xxh3_128_digest(seed + bytes([i & 255, i >> 8])) for i in range(nbytes // 16 + 1))[:nbytes]


def put(writer: OutputWriter, name: str, window: int = 1000) -> None:
    """Writes one whole tensor in windows."""
    data = content(name, writer.layout.slots[name].nbytes)
    for begin in range(0, len(data), window):
        piece = data[begin : begin + window]
        buffer = writer.acquire(name, begin, len(piece))
        buffer[:] = piece
        writer.write(name, begin, buffer)
    writer.finish(name)


def put_rest(writer: OutputWriter) -> None:
    for name in writer.layout.slots:
        if name not in writer.finished:
            put(writer, name)


def expected_files(layout: OutputLayout) -> dict[str, bytes]:
    files = {shard.filename: bytearray(shard.header.ljust(shard.size)) for shard in layout.shards}
    for slot in layout.slots.values():
        data = content(slot.name, slot.nbytes)
        files[layout.shards[slot.shard].filename][slot.offset : slot.offset + slot.nbytes] = data
    result = {name: bytes(data) for name, data in files.items()}
    return result if layout.index is None else result | {INDEX_NAME: layout.index}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "WRITE_STEP", 4096)
    monkeypatch.setattr(writer_module, "CHECKPOINT_BYTES", 3000)


# What is published.


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("shard_size", [1, 8000, 10**9])
def test_published_files_are_the_planned_bytes_and_nothing_else_is_left(tmp_path: Path, shard_size: int) -> None:
    layout = layout_of(shard_size=shard_size)
    with OutputWriter(tmp_path / "new" / "out", layout, "a merge") as writer:
        assert not writer.resumed
        put_rest(writer)
        writer.publish()
        assert writer.written == sum(slot.nbytes for slot in layout.slots.values())
        assert writer.checksums == {
            name: xxhash.xxh3_128_hexdigest(content(name, slot.nbytes)) for name, slot in layout.slots.items()
        }
    assert files_in(tmp_path / "new" / "out") == expected_files(layout)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    for name, slot in layout.slots.items():
        with safe_open(tmp_path / "new" / "out" / layout.shards[slot.shard].filename, framework="pt") as file:
            tensor = file.get_tensor(name)
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == content(name, slot.nbytes)


@pytest.mark.usefixtures("small_steps")
def test_buffers_may_lie_in_memory_of_another_kind(tmp_path: Path) -> None:
    """Such as a GPU copies its results to: arrays, which compare entry by entry, and grow."""
    layout, made = layout_of(), []

    def new_buffer(nbytes: int) -> np.ndarray[Any, Any]:
        made.append(nbytes)
        return np.empty(nbytes, np.uint8)

    with OutputWriter(tmp_path / "out", layout, "a merge", buffer_bytes=5000, new_buffer=new_buffer) as writer:
        for name in layout.slots:
            put(writer, name, window=1 << 20)
            writer.sync()  # all buffers are free
        needed = [slot.offset % 4096 + slot.nbytes for slot in layout.slots.values()]
        larger = [size for n, size in enumerate(needed) if size > max([5000, *needed[:n]])]
        assert made == [5000, *larger], "made anew only where more was wanted"
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout)


def test_windows_of_several_tensors_may_alternate(tmp_path: Path) -> None:
    layout = layout_of()
    first, second = content("embed", 4224), content("layers.1.a", 10000)
    with OutputWriter(tmp_path / "out", layout, "a merge") as writer:
        for begin in range(0, 10000, 500):
            for name, data in (("embed", first), ("layers.1.a", second)):
                if piece := data[begin : begin + 500]:
                    buffer = writer.acquire(name, begin, 500)
                    buffer[: len(piece)] = piece
                    writer.write(name, begin, buffer[: len(piece)])
        writer.finish("layers.1.a")
        writer.finish("embed")
        writer.sync()
        put_rest(writer)
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout)


def test_other_files_are_published_beside_the_shards(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("words")
    with OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
        writer.add_file("config.json", b"{}")
        writer.add_file("tokenizer.json", tmp_path / "tokenizer.json")
        for name in ("", ".", "..", "a/b", "/etc/x", "a\\b", "a\0b"):
            with pytest.raises(ValueError, match="plain file name"):
                writer.add_file(name, b"")
        for name in ("config.json", "model-00001-of-00003.safetensors", INDEX_NAME):
            with pytest.raises(ValueError, match="already"):
                writer.add_file(name, b"")
        with pytest.raises(CheckpointError, match="absent does not exist"):
            writer.add_file("absent", tmp_path / "absent")
        put_rest(writer)
        writer.publish()
    others = {"config.json": b"{}", "tokenizer.json": b"words"}
    assert files_in(tmp_path / "out") == expected_files(layout_of()) | others


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
        put_rest(writer)
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout_of())


def occupy_with_file(out: Path) -> None:
    out.write_text("mine")


def occupy_with_folder(out: Path) -> None:
    out.mkdir()
    (out / "mine").touch()


def occupy_with_link(out: Path) -> None:
    out.symlink_to("nowhere")


@pytest.mark.parametrize("occupy", [occupy_with_file, occupy_with_folder, occupy_with_link])
def test_a_taken_name_is_refused_at_once_and_again_at_the_end(tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    out = tmp_path / "out"

    def merge_meanwhile_occupied() -> None:
        with OutputWriter(out, layout_of(), "a merge") as writer:
            put_rest(writer)
            occupy(out)
            writer.publish()

    with pytest.raises(OutputExistsError, match="out exists already"):
        merge_meanwhile_occupied()
    with pytest.raises(OutputExistsError, match="out exists already"):
        OutputWriter(out, layout_of(), "a merge", resume=True)
    out.rename(tmp_path / "moved")
    with OutputWriter(out, layout_of(), "a merge", resume=True) as writer:  # the work of the merge was kept
        assert writer.finished == set(layout_of().slots)
        writer.publish()
    assert files_in(out) == expected_files(layout_of())


def test_refusing_a_taken_name_touches_nothing(tmp_path: Path) -> None:
    occupy_with_folder(tmp_path / "out")
    before = everything_below(tmp_path)
    with pytest.raises(OutputExistsError):
        OutputWriter(tmp_path / "out", layout_of(), "a merge")
    assert everything_below(tmp_path) == before


def test_a_path_without_a_name_is_refused() -> None:
    with pytest.raises(OutputError, match="no name"):
        OutputWriter("/", layout_of(), "a merge")


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot create .*Not a directory"):
        OutputWriter(tmp_path / "file" / "below" / "out", layout_of(), "a merge")


# Misuse.


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[OutputWriter]:
    with OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
        yield writer


def test_windows_out_of_order_beyond_the_tensor_or_after_its_end_are_refused(writer: OutputWriter) -> None:
    buffer = writer.acquire("embed", 0, 5000)
    for name, offset, nbytes, words in [
        ("embed", 8, 100, "0 come next"),
        ("embed", 0, 4225, "do not fit"),
        ("other", 0, 100, "no tensor 'other'"),
    ]:
        with pytest.raises(ValueError, match=words):
            writer.write(name, offset, buffer[:nbytes])
    with pytest.raises(ValueError, match="not contiguous"):
        writer.write("embed", 0, buffer[:100:2])
    buffer[:4224] = content("embed", 4224)
    writer.write("embed", 0, buffer[:4224])  # a refused write leaves the buffer with the caller
    writer.finish("embed")
    for call in (lambda: writer.finish("embed"), lambda: writer.write("embed", 0, buffer[:0])):
        with pytest.raises(ValueError, match="finished already"):
            call()


def test_a_tensor_with_missing_bytes_cannot_be_finished_nor_the_output_published(writer: OutputWriter) -> None:
    writer.write("embed", 0, writer.acquire("embed", 0, 4222))
    with pytest.raises(ValueError, match="4,222 of 4,224 bytes"):
        writer.finish("embed")
    with pytest.raises(ValueError, match="6 of 6 tensors are not finished, first 'embed'"):
        writer.publish()


def test_only_buffers_of_the_writer_are_taken_and_each_once(writer: OutputWriter) -> None:
    with pytest.raises(ValueError, match="not in a buffer"):
        writer.write("embed", 0, memoryview(bytearray(10)))
    buffer = writer.acquire("embed", 0, 10)
    writer.write("embed", 0, buffer)
    with pytest.raises(ValueError, match="not in a buffer"):
        writer.write("embed", 10, buffer)


def test_holding_all_buffers_is_an_error_and_no_deadlock(tmp_path: Path) -> None:
    with OutputWriter(tmp_path / "out", layout_of(), "a merge", buffer_bytes=8192) as writer:
        held = [writer.acquire("embed", 0, 1000), writer.acquire("embed", 1000, 3000)]
        with pytest.raises(ValueError, match="the caller holds all 8,192 bytes"):
            writer.acquire("embed", 4000, 4200)
        del held


def test_a_closed_writer_says_so(writer: OutputWriter) -> None:
    writer.abandon(keep=False)
    writer.abandon(keep=True)  # the first one counts
    for call in (lambda: writer.acquire("embed", 0, 1), writer.sync, writer.publish, lambda: writer.add_file("a", b"")):
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_a_buffer_lies_in_its_page_as_its_bytes_do_in_the_file(writer: OutputWriter) -> None:
    for begin in range(0, 4224, 64):
        buffer = writer.acquire("embed", begin, 64)
        assert buffer.nbytes == 64
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        assert address % 4096 == (writer.layout.slots["embed"].offset + begin) % 4096
        writer.write("embed", begin, buffer)


# Two at once.


def test_a_second_merge_to_the_same_output_is_told_who_writes_it(tmp_path: Path) -> None:
    with OutputWriter(tmp_path / "out", layout_of(), "a merge") as first:
        put(first, "embed")
        first.sync()
        for resume in (False, True):
            with pytest.raises(OutputError, match=rf"another merge is writing .*out \(process {os.getpid()} on "):
                OutputWriter(tmp_path / "out", layout_of(), "a merge", resume=resume)
        put_rest(first)
        first.publish()
    assert files_in(tmp_path / "out") == expected_files(layout_of())


@pytest.mark.parametrize("published", [True, False])
def test_a_merge_that_ends_while_another_one_starts_leaves_it_a_lock_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    first = OutputWriter(tmp_path / "out", layout_of(), "a merge")
    put_rest(first)
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        """The second merge has opened the lock file of the first, which ends now and removes it."""
        monkeypatch.undo()
        if published:
            first.publish()
        else:
            first.abandon(keep=False)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    if published:
        with pytest.raises(OutputExistsError):
            OutputWriter(tmp_path / "out", layout_of(), "a merge")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    else:
        with OutputWriter(tmp_path / "out", layout_of(), "a merge"), pytest.raises(OutputError, match="another merge"):
            OutputWriter(tmp_path / "out", layout_of(), "a merge")


def test_of_many_processes_that_start_together_exactly_one_writes(tmp_path: Path) -> None:
    def contend() -> None:
        try:
            with OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
                put_rest(writer)
                writer.publish()
        except OutputExistsError:
            os._exit(11)
        except OutputError:
            os._exit(12)

    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in [in_child(contend) for _ in range(8)]]
    assert sorted(set(codes) - {11, 12}) == [0]
    assert codes.count(0) == 1
    assert files_in(tmp_path / "out") == expected_files(layout_of())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Going on after an interruption.


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
    monkeypatch.setattr(writer_module, "CHECKPOINT_SECONDS", 0.01)
    with OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
        put(writer, "embed")
        while "embed" not in writer.finished:
            time.sleep(0.01)
        assert b'"embed"' in (tmp_path / ".out.partial" / "journal.jsonl").read_bytes()


# Crashes. A child process dies in the middle of a system call; what was not synced by then is lost.


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process and returns its number; the process ends with 0, or with 1 if `work` raised."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class PowerLoss:
    """Lets the process die at its n-th change of the disk, and takes what was not synced with it.

    Written ranges that no fsync or fdatasync of the file followed are overwritten with garbage, appended journal lines
    are cut in their middle, a rename that no fsync of the folder followed is undone. So a journal line that vouches for
    unsynced data is found out. Renaming unsynced files, or removing anything after an unsynced rename, ends with 3.
    """

    WRITES = ("pwrite", "write", "ftruncate", "posix_fallocate", "fsync", "fdatasync")
    CALLS = (*WRITES, "rename", "unlink", "mkdir", "rmdir")

    def __init__(self, at: int) -> None:
        self.left = at
        self.unsynced: list[tuple[int, int, int]] = []  # (descriptor, offset, nbytes)
        self.synced_files: set[int] = set()  # inodes
        self.unsynced_rename: tuple[Path, Path] | None = None
        self.real = {name: getattr(os, name) for name in self.CALLS}
        self.lock = threading.Lock()
        for name in self.CALLS:
            setattr(os, name, self.failing(name))

    def failing(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                self.left -= 1
                if self.left == 0:
                    if name == "pwrite":  # half of it arrives
                        descriptor, data, offset = arguments
                        self.wrote(descriptor, offset, self.real[name](descriptor, data[: len(data) // 2], offset))
                    self.die()
                if name == "rename":
                    folders = (options["src_dir_fd"], options["dst_dir_fd"])
                    source, target = (
                        Path(os.readlink(f"/proc/self/fd/{folder}"), name)
                        for folder, name in zip(folders, arguments, strict=True)
                    )
                    self.unsynced_rename = source, target
                    if not all(path.stat().st_ino in self.synced_files for path in source.iterdir()):
                        os._exit(3)
                if name == "unlink" and self.unsynced_rename is not None:
                    os._exit(3)
                result = self.real[name](*arguments, **options)
                if name == "pwrite":
                    self.wrote(arguments[0], arguments[2], result)
                elif name == "write":
                    self.wrote(arguments[0], os.fstat(arguments[0]).st_size - result, result)
                elif name in ("fsync", "fdatasync"):
                    inode = os.fstat(arguments[0]).st_ino
                    self.synced_files.add(inode)
                    if self.unsynced_rename is not None and inode == self.unsynced_rename[1].parent.stat().st_ino:
                        self.unsynced_rename = None
                    self.unsynced = [entry for entry in self.unsynced if os.fstat(entry[0]).st_ino != inode]
                return result

        return call

    def wrote(self, descriptor: int, offset: int, nbytes: int) -> None:
        self.unsynced.append((descriptor, offset, nbytes))
        self.synced_files.discard(os.fstat(descriptor).st_ino)

    def die(self) -> None:
        if self.unsynced_rename is not None and self.unsynced_rename[1].exists():
            self.real["rename"](*reversed(self.unsynced_rename))
        for descriptor, offset, nbytes in self.unsynced:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".jsonl"):
                self.real["ftruncate"](descriptor, offset + nbytes // 2)
            else:
                self.real["pwrite"](descriptor, os.urandom(nbytes), offset)
        os._exit(9)


@dataclass(frozen=True)
class Merge:
    """A merge in the sense of these tests: which tensors, in which order and windows, synced how often."""

    layout: OutputLayout
    order: list[str]
    window: int
    checkpoint_bytes: int

    def run(self, out: Path, resume: bool) -> None:
        shards_module.WRITE_STEP = 4096
        writer_module.CHECKPOINT_BYTES = self.checkpoint_bytes
        with OutputWriter(out, self.layout, "a merge", resume=resume) as writer:
            for name in self.order:
                if name not in writer.finished:
                    put(writer, name, self.window)
            writer.add_file("config.json", b"{}")
            writer.publish()

    def crash(self, out: Path, at: int, resume: bool = True) -> bool:
        """Runs in a child that dies at its `at`-th change of the disk; False if it was done before."""

        def work() -> None:
            PowerLoss(at)
            self.run(out, resume)

        code = os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])
        assert code in (0, 9)
        return code == 9

    def check_after_crashes(self, out: Path) -> None:
        """Whatever is there: complete under its name, or resumable; and in the end the same bytes."""
        expected = expected_files(self.layout) | {"config.json": b"{}"}
        if out.exists():
            assert files_in(out) == expected
            with pytest.raises(OutputExistsError):
                OutputWriter(out, self.layout, "a merge", resume=True)
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(in_child(lambda: self.run(out, resume=True)), 0)[1]) == 0
            assert files_in(out) == expected
        assert list(out.parent.iterdir()) == [out]


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder where fsync costs nothing, if there is one: these tests lose unsynced data by themselves."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_crash_at_any_point_leaves_a_complete_or_a_resumable_output(memory_disk: Path) -> None:
    layout = layout_of(TENSORS[:4])
    merge = Merge(layout, list(layout.slots), 3000, 4000)
    at = 1
    while merge.crash(memory_disk / str(at) / "parent" / "out", at):
        merge.check_after_crashes(memory_disk / str(at) / "parent" / "out")
        at += 1
    assert at > 30


def test_a_crash_while_an_earlier_run_is_discarded_does_not_bring_its_journal_back(memory_disk: Path) -> None:
    layout = layout_of(TENSORS[:4])
    merge = Merge(layout, list(layout.slots), 3000, 4000)
    for at in range(1, 30):
        out = memory_disk / str(at) / "out"
        with suppress(Interrupted), OutputWriter(out, layout, "a merge") as writer:
            put_rest(writer)
            raise Interrupted
        assert merge.crash(out, at, resume=False)
        merge.check_after_crashes(out)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_series_of_crashes_ends_in_the_bytes_of_an_undisturbed_run(memory_disk: Path, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 20_000), min_size=1, max_size=6), label="tensor sizes")
    layout = plan_layout([(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)], data.draw(st.integers(1, 40_000)))
    merge = Merge(
        layout,
        order=data.draw(st.permutations(list(layout.slots)), label="order"),
        window=data.draw(st.integers(500, 20_000), label="window"),
        checkpoint_bytes=data.draw(st.integers(1, 40_000), label="checkpoint bytes"),
    )
    folder = Path(tempfile.mkdtemp(dir=memory_disk))
    for at in data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=3), label="crashes"):
        if not (folder / "out").exists():
            merge.crash(folder / "out", at)
    merge.check_after_crashes(folder / "out")


def test_what_was_synced_before_a_crash_is_not_written_again(tmp_path: Path) -> None:
    def work() -> None:
        loss = PowerLoss(at=10**9)
        writer = OutputWriter(tmp_path / "out", layout_of(), "a merge")
        put(writer, "embed")
        writer.sync()
        put(writer, "layers.0.a")
        loss.die()

    os.waitpid(in_child(work), 0)
    with OutputWriter(tmp_path / "out", layout_of(), "a merge", resume=True) as writer:
        assert writer.finished >= {"embed"}
        put_rest(writer)
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout_of())


# Disks that fail.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = None
    if shutil.which("mount"):
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted is None or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here: that needs root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("check_finds_it", [True, False], ids=["checked", "preallocated"])
def test_a_full_disk_is_found_before_anything_is_written(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, check_finds_it: bool
) -> None:
    real = shutil.disk_usage(small_disk)
    if not check_finds_it:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=10**9))
    layout = layout_of([("a", "BF16", (15000,)), ("b", "BF16", (20000,))], 30000)
    with pytest.raises(OutputError, match=r"disk space for .*out: 78,192 bytes are needed, [0-9,]+ were free"):
        OutputWriter(small_disk / "parent" / "out", layout, "a merge")
    assert everything_below(small_disk) == set()


def test_a_mount_point_is_refused_as_output(small_disk: Path) -> None:
    with pytest.raises(OutputError, match="mount point"):
        OutputWriter(small_disk, layout_of(), "a merge")


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Lets the kernel refuse writes beyond an offset (EFBIG; Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_shard_that_the_file_system_cannot_hold_is_refused(
    tmp_path: Path, limit_files: Callable[[int], None]
) -> None:
    limit_files(10**6)
    with pytest.raises(OutputError, match=r"preallocate 2,004,096 bytes for .*model.safetensors: File too large"):
        OutputWriter(tmp_path / "out", layout_of([("a", "U8", (2_000_000,))], 10**9), "a merge")
    assert everything_below(tmp_path) == set()


@pytest.mark.parametrize("call", ["acquire", "write", "finish", "sync", "publish", "add_file"])
def test_a_failed_write_surfaces_at_the_next_call_and_leaves_nothing(
    tmp_path: Path, limit_files: Callable[[int], None], call: str
) -> None:
    layout = layout_of([("a", "U8", (3_000_000,)), ("empty", "U8", (0,))], 10**9)

    def merge() -> None:
        with OutputWriter(tmp_path / "parent" / "out", layout, "a merge") as writer:
            buffer = writer.acquire("a", 0, 2_000_000)
            held = writer.acquire("a", 2_000_000, 1000)
            limit_files(1_000_000)
            writer.write("a", 0, buffer)
            while writer._failure is None:
                time.sleep(0.001)
            calls: dict[str, Callable[[], object]] = {
                "acquire": lambda: writer.acquire("a", 2_001_000, 1000),
                "write": lambda: writer.write("a", 2_000_000, held),
                "finish": lambda: writer.finish("empty"),
                "sync": writer.sync,
                "publish": writer.publish,
                "add_file": lambda: writer.add_file("config.json", b""),
            }
            calls[call]()

    with pytest.raises(OutputError) as caught:
        merge()
    assert str(caught.value) == (
        f"cannot write {tmp_path}/parent/.out.partial/output/model.safetensors at offset 1,000,000: File too large"
    )
    assert everything_below(tmp_path) == set()


def raising(code: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def test_a_failed_sync_keeps_its_tensors_out_of_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = OutputWriter(tmp_path / "out", layout_of(), "a merge")
    put(writer, "embed")
    writer.sync()
    put(writer, "layers.0.a")
    monkeypatch.setattr(os, "fdatasync", raising(errno.EIO))
    with pytest.raises(OutputError, match=r"cannot sync .*model-00001-of-00003.safetensors: Input/output error"):
        writer.sync()
    writer.abandon(keep=True)
    monkeypatch.undo()
    with OutputWriter(tmp_path / "out", layout_of(), "a merge", resume=True) as writer:
        assert writer.finished == {"embed"}


@pytest.mark.parametrize("stage", ["_start_writeback", "_wait_writeback"])
def test_a_failed_write_back_is_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setattr(shards_module, "WRITE_STEP", 4096)

    def merge() -> None:
        with OutputWriter(tmp_path / "out", layout_of(), "a merge", direct=False, dirty_limit=0) as writer:
            assert writer._shards is not None
            monkeypatch.setattr(writer._shards._write_back, stage, raising(errno.EIO))
            put_rest(writer)
            writer.sync()

    with pytest.raises(OutputError, match=r"cannot write .* at offset [0-9,]+: Input/output error"):
        merge()
    assert everything_below(tmp_path) == set()


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), RuntimeError("a bug")])
def test_a_caller_that_waits_for_a_buffer_is_woken_by_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    goes_wrong = threading.Event()

    def pwrite(*_: object) -> int:
        goes_wrong.wait()
        raise failure

    with OutputWriter(tmp_path / "out", layout_of(), "a merge", buffer_bytes=0) as writer:
        monkeypatch.setattr(os, "pwrite", pwrite)
        writer.write("embed", 0, writer.acquire("embed", 0, 100))
        timer = threading.Timer(0.1, goes_wrong.set)
        timer.start()
        with pytest.raises(OutputError, match=r"Input/output error|RuntimeError\('a bug'\)"):
            writer.acquire("embed", 100, 4000)
        timer.join()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    with OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
        monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:77], offset))
        put_rest(writer)
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout_of())


def test_an_error_of_the_caller_leaves_nothing_behind_but_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "new" / "newer" / "out"
    with suppress(RuntimeError), OutputWriter(out, layout_of(), "a merge") as writer:
        put(writer, "embed")
        raise RuntimeError
    assert everything_below(tmp_path) == {"there"}


# Past the page cache.


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def direct_disk(tmp_path: Path) -> Path:
    from mergecore import _stream

    with (tmp_path / "probe").open("wb") as file:
        if _stream.direct_alignment(file.fileno()) == 0:
            pytest.skip(f"the file system of {tmp_path} does not say that it can write past the page cache")
    (tmp_path / "probe").unlink()
    return tmp_path


@pytest.mark.parametrize("window", [1000, 4096, 10_000, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_whole_pages_go_past_the_page_cache_if_wanted_and_the_rest_through_it(
    direct_disk: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, window: int
) -> None:
    written: list[tuple[bool, int, int]] = []
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        written.append((is_direct(descriptor), offset, len(data)))
        return real(descriptor, data, offset)

    layout = layout_of([("a", "BF16", (9000,)), ("b", "BF16", (7,)), ("c", "BF16", (20000,))], 10**9)
    with OutputWriter(direct_disk / "out", layout, "a merge", direct=direct, buffer_bytes=30_000) as writer:
        monkeypatch.setattr(os, "pwrite", pwrite)
        for name in layout.slots:
            put(writer, name, window)
        writer.publish()
    assert files_in(direct_disk / "out") == expected_files(layout)
    for past_the_cache, offset, nbytes in written:
        assert past_the_cache == (direct and offset % 4096 == 0 and nbytes >= 4096)
        assert not past_the_cache or nbytes % 4096 == 0
    pages = sum(nbytes for past_the_cache, _, nbytes in written if past_the_cache) // 4096
    edges = 2 * sum(-(-slot.nbytes // window) for slot in layout.slots.values())
    assert pages >= (layout.nbytes // 4096 - edges if direct else 0)


def test_a_file_system_that_refuses_direct_writes_gets_cached_ones(
    direct_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, real = [], os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    with OutputWriter(direct_disk / "out", layout_of(), "a merge") as writer:
        monkeypatch.setattr(os, "pwrite", pwrite)
        put(writer, "layers.1.a", 10_000)
        for name in set(writer.layout.slots) - {"layers.1.a"}:
            put(writer, name)
        writer.publish()
    assert files_in(direct_disk / "out") == expected_files(layout_of())
    assert refused, "the test has seen no direct write"


def test_a_direct_write_that_fails_is_a_failed_write(direct_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, data, offset)

    def merge() -> None:
        with OutputWriter(direct_disk / "out", layout_of(), "a merge") as writer:
            monkeypatch.setattr(os, "pwrite", pwrite)
            put(writer, "layers.1.a", 10_000)
            writer.sync()

    with pytest.raises(OutputError, match=r"cannot write .* at offset [0-9,]+: Input/output error"):
        merge()
    assert everything_below(direct_disk) == set()


# Write-back.


def test_bytes_not_on_disk_stay_below_the_limit_and_write_back_starts_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, limit = 4096, 20_000
    monkeypatch.setattr(shards_module, "WRITE_STEP", step)
    from mergecore import _stream

    events: list[tuple[str, int, int, int]] = []

    def recording(kind: str, real: Callable[..., Any]) -> Callable[[int, int, int], None]:
        def call(descriptor: int, offset: int, nbytes: int) -> None:
            real(descriptor, offset, nbytes)
            events.append((kind, descriptor, offset, nbytes))

        return call

    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        events.append(("written", descriptor, offset, len(data)))
        return real(descriptor, data, offset)

    layout = layout_of([(f"t{i}", "U8", (30_000,)) for i in range(4)], 60_000)
    with OutputWriter(tmp_path / "out", layout, "a merge", direct=False, dirty_limit=limit) as writer:
        writer.sync()
        assert writer._shards is not None
        for kind in ("start", "wait"):
            monkeypatch.setattr(
                writer._shards._write_back, f"_{kind}_writeback", recording(kind, getattr(_stream, f"{kind}_writeback"))
            )
        monkeypatch.setattr(os, "pwrite", pwrite)
        for name in layout.slots:
            put(writer, name, 7000)
        writer.sync()
        monkeypatch.undo()
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout)

    written = started = waited = 0
    begun: list[tuple[int, int, int]] = []
    for kind, *place in events:
        if kind == "written":
            written += place[2]
        elif kind == "start":
            started += place[2]
            begun.append((place[0], place[1], place[2]))
        else:
            assert tuple(place) == begun.pop(0)  # the oldest first
            waited += place[2]
        assert written - waited <= limit + step
        assert written - started <= 2 * step  # one step, and one that was just written
    assert waited > 0


def test_the_limit_holds_for_a_real_disk_and_python_is_not_blocked(tmp_path: Path) -> None:
    """The real module, 16 MiB steps and a window of more than one step."""
    layout = plan_layout([("large", "U8", (40 << 20,))], 10**9)
    data = os.urandom(1 << 20) * 40
    with OutputWriter(tmp_path / "out", layout, "a merge", direct=False, dirty_limit=8 << 20) as writer:
        buffer = writer.acquire("large", 0, 40 << 20)
        buffer[:] = data
        writer.write("large", 0, buffer)
        writer.finish("large")
        writer.publish()
        assert writer.checksums == {"large": xxhash.xxh3_128_hexdigest(data)}
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[len(layout.shards[0].header) :] == data


def test_planning_and_verifying_import_neither_torch_nor_compiled_code() -> None:
    check = "import sys, mergecore.output.writer; print(sorted({'torch', 'mergecore._stream'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
