"""A crash at any point leaves a complete or a resumable output: nothing is trusted that was not synced."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergecore.errors import Interrupted, OutputExistsError
from mergecore.output import lanes as lanes_module
from mergecore.output import shards as shards_module
from mergecore.output.layout import OutputLayout, plan_layout
from mergecore.output.writer import OutputWriter
from tests.outputs import TENSORS, expected_files, files_in, in_child, layout_of, put, put_rest

# The crashes happen in forked children. They use neither torch nor any lock that another thread may hold.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# Crashes. A child process dies in the middle of a system call; what was not synced by then is lost.


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
    lanes: int = 1

    def run(self, out: Path, resume: bool) -> None:
        shards_module.WRITE_STEP = 4096
        lanes_module.CHECKPOINT_BYTES = self.checkpoint_bytes
        with OutputWriter(out, self.layout, "a merge", resume=resume, lanes=self.lanes) as writer:
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


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_crash_at_any_point_leaves_a_complete_or_a_resumable_output(memory_disk: Path, lanes: int) -> None:
    layout = layout_of(TENSORS[:4], 8000 if lanes > 1 else 10**9)
    merge = Merge(layout, list(layout.slots), 3000, 4000, lanes)
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
        lanes=data.draw(st.integers(1, 4), label="lanes"),
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
