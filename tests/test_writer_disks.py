"""Disks that are full or fail under the writer: the error is told, and nothing half-done is left or trusted."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mergecore.errors import OutputError
from mergecore.output import shards as shards_module
from mergecore.output.writer import OutputWriter
from tests.outputs import everything_below, expected_files, files_in, layout_of, put, put_rest


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
            monkeypatch.setattr(writer._shards._write_back[0], stage, raising(errno.EIO))
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
