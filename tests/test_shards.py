"""How shards are written: past the page cache or through it, in steps, several at once."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mergecore.errors import OutputError
from mergecore.output import lanes as lanes_module
from mergecore.output import shards as shards_module
from mergecore.output.layout import plan_layout
from mergecore.output.shards import ShardFiles
from mergecore.output.writer import OutputWriter
from tests.outputs import everything_below, expected_files, files_in, layout_of, put, put_rest

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
            real_one = getattr(_stream, f"{kind}_writeback")
            monkeypatch.setattr(writer._shards._write_back[0], f"_{kind}_writeback", recording(kind, real_one))
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


# Lanes.


def test_shards_of_different_lanes_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that takes its time does not hold up the others, nor their records."""
    layout = layout_of([(f"t{i}", "U8", (30_000,)) for i in range(4)], 30_000)
    may_go_on, write = threading.Event(), ShardFiles.write

    def waiting(shards: ShardFiles, number: int, offset: int, data: memoryview) -> None:
        if number == 0 and offset > 0:
            assert may_go_on.wait(60)
        write(shards, number, offset, data)

    monkeypatch.setattr(ShardFiles, "write", waiting)
    monkeypatch.setattr(lanes_module, "CHECKPOINT_SECONDS", 0.0)
    with OutputWriter(tmp_path / "out", layout, "a merge", lanes=2) as writer:
        assert [writer.lane_of(name) for name in layout.slots] == [0, 1, 0, 1]
        for name in layout.slots:
            put(writer, name)
        for _ in range(1000):
            if len(writer.finished) == 2:
                break
            time.sleep(0.01)
        assert writer.finished == {"t1", "t3"}
        may_go_on.set()
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout)


@pytest.mark.parametrize("started", [0, 1, 2])
def test_a_lane_that_cannot_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    """As under a limit of threads."""
    layout = layout_of([(f"t{i}", "U8", (30_000,)) for i in range(3)], 30_000)
    left, start = started, threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        nonlocal left
        if thread.name == "writer of out":
            left -= 1
            if left < 0:
                raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            OutputWriter(tmp_path / "out", layout, "a merge", lanes=3)
    assert everything_below(tmp_path) == set()
    assert not any(thread.name == "writer of out" for thread in threading.enumerate())
    with OutputWriter(tmp_path / "out", layout, "a merge") as writer:  # nor a lock
        put_rest(writer)
        writer.publish()


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_the_failure_of_one_lane_ends_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    layout = layout_of([(f"t{i}", "U8", (30_000,)) for i in range(3)], 30_000)
    write = ShardFiles._write_some

    def failing(shards: ShardFiles, number: int, offset: int, data: memoryview, in_step: bool) -> int:
        if number == broken and offset > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(shards, number, offset, data, in_step)

    monkeypatch.setattr(ShardFiles, "_write_some", failing)

    def merge() -> None:
        with OutputWriter(tmp_path / "out", layout, "a merge", lanes=3, buffer_bytes=8192) as writer:
            put_rest(writer)
            writer.publish()

    with pytest.raises(OutputError, match=rf"cannot write .*model-0000{broken + 1}-of-00003.* No space left on device"):
        merge()
    assert everything_below(tmp_path) == set()
    assert not any(thread.name == "writer of out" for thread in threading.enumerate())
