"""An output appears complete or not at all; misuse of the writer and a second merge to the same output are told."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open

from mergecore.errors import CheckpointError, OutputError, OutputExistsError
from mergecore.output import lanes as lanes_module
from mergecore.output import shards as shards_module
from mergecore.output.buffers import new_buffer
from mergecore.output.layout import INDEX_NAME, plan_layout
from mergecore.output.writer import OutputWriter
from tests.outputs import content, everything_below, expected_files, files_in, in_child, layout_of, put, put_rest

# The crashes happen in forked children. They use neither torch nor any lock that another thread may hold.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "WRITE_STEP", 4096)
    monkeypatch.setattr(lanes_module, "CHECKPOINT_BYTES", 3000)


# What is published.


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("shard_size", [1, 8000, 10**9])
def test_published_files_are_the_planned_bytes_and_nothing_else_is_left(
    tmp_path: Path, shard_size: int, lanes: int
) -> None:
    layout = layout_of(shard_size=shard_size)
    with OutputWriter(tmp_path / "new" / "out", layout, "a merge", lanes=lanes) as writer:
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

    with OutputWriter(tmp_path / "out", layout, "a merge", buffer_bytes=5000, rings=[new_buffer]) as writer:
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


@pytest.mark.parametrize("buffer_bytes", [1, 10_000, 1 << 20])
def test_no_buffer_is_lent_again_before_it_is_summed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    fast = xxhash.xxh3_128

    class Slow:
        def __init__(self) -> None:
            self.state = fast()

        def update(self, data: memoryview) -> None:
            time.sleep(0.01)
            self.state.update(data)

        def hexdigest(self) -> str:
            return self.state.hexdigest()

    monkeypatch.setattr(xxhash, "xxh3_128", Slow)
    layout = layout_of()
    with OutputWriter(tmp_path / "out", layout, "a merge", buffer_bytes=buffer_bytes) as writer:
        put_rest(writer)
        writer.sync()
        sums = {slot.name: fast(content(slot.name, slot.nbytes)).hexdigest() for slot in layout.slots.values()}
        assert writer.checksums == sums
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout)


def test_a_small_result_goes_to_the_disk_though_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "CHECKPOINT_SECONDS", 0.1)
    with OutputWriter(tmp_path / "out", layout_of(), "a merge") as writer:
        time.sleep(0.5)  # the thread sleeps, too
        put(writer, "embed", window=1 << 20)
        until = time.monotonic() + 20
        while "embed" not in writer.checksums and time.monotonic() < until:
            time.sleep(0.05)
        assert "embed" in writer.checksums


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


def test_threads_with_rings_of_their_own_write_at_once(tmp_path: Path) -> None:
    layout = plan_layout([(f"t.{n}", "U8", (5000 + 700 * n,)) for n in range(60)], 40_000)
    names = deque(layout.slots)

    def work(writer: OutputWriter, ring: int) -> None:
        with suppress(IndexError):
            while True:
                put(writer, names.popleft(), window=1800, ring=ring)

    with OutputWriter(tmp_path / "out", layout, "a merge", buffer_bytes=8000, rings=[new_buffer] * 3) as writer:
        threads = [threading.Thread(target=work, args=(writer, ring)) for ring in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.publish()
    assert files_in(tmp_path / "out") == expected_files(layout)


def test_a_thread_that_holds_all_its_buffers_holds_up_no_other(tmp_path: Path) -> None:
    with OutputWriter(tmp_path / "out", layout_of(), "a merge", buffer_bytes=8192, rings=[new_buffer] * 2) as writer:
        held = [writer.acquire("embed", 0, 1000, 0), writer.acquire("embed", 1000, 3000, 0)]
        put(writer, "layers.1.a", window=4000, ring=1)
        with pytest.raises(ValueError, match="the caller holds all 8,192 bytes"):
            writer.acquire("embed", 4000, 4200, 0)
        del held


def test_a_thread_that_waits_for_a_buffer_hears_that_the_writer_is_closed(tmp_path: Path) -> None:
    told: list[str] = []

    def wait(writer: OutputWriter) -> None:
        try:
            writer.acquire("embed", 1000, 7500)
        except ValueError as error:
            told.append(str(error))

    with OutputWriter(tmp_path / "out", layout_of(), "a merge", buffer_bytes=8192) as writer:
        writer._queued[0] = writer._rings[0]  # something that no lane will ever write
        held = writer.acquire("embed", 0, 1000)
        thread = threading.Thread(target=wait, args=(writer,))
        thread.start()
        time.sleep(0.2)
        assert thread.is_alive()
        writer.abandon(keep=False)
        thread.join(20)
        assert not thread.is_alive()
        del held
    assert len(told) == 1
    assert "is closed" in told[0]


def test_a_restart_takes_back_the_buffers_of_its_thread_only(tmp_path: Path) -> None:
    with OutputWriter(tmp_path / "out", layout_of(), "a merge", rings=[new_buffer] * 2) as writer:
        first, second = writer.acquire("embed", 0, 100, 0), writer.acquire("layers.1.a", 0, 100, 1)
        writer.restart("embed", 0)
        with pytest.raises(ValueError, match="not in a buffer"):
            writer.write("embed", 0, first)
        writer.write("layers.1.a", 0, second)


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


# What it loads.


def test_planning_and_verifying_import_neither_torch_nor_compiled_code() -> None:
    check = "import sys, mergecore.output.writer; print(sorted({'torch', 'mergecore._stream'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
