"""Windows over files: the bytes of the file in any cut, bounded memory, and faults instead of crashes."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergecore._stream import ReadFault, WindowStream, start_writeback, wait_writeback

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGESIZE")

Piece = tuple[int, int, int]

# "by 3": so many threads share a window.
WAYS = ["map", "pread", "map by 3", "pread by 3"]
ways = pytest.mark.parametrize("way", WAYS)


def stream(files: list[Path], way: str, depth: int = 1) -> WindowStream:
    mode, _, threads = way.partition(" by ")
    return WindowStream(files, mode, depth, threads=int(threads or 1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 1 MiB and a bit: its size is no multiple of anything."""
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(MIB + 1237))
    return path


def cut(size: int, window: int) -> list[Piece]:
    return [(0, at, min(window, size - at)) for at in range(0, size, window)]


def run_alone(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, which may die."""
    preamble = "import os, sys, mmap, faulthandler\nfrom mergecore._stream import ReadFault, WindowStream\n"
    command = [sys.executable, "-c", preamble + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# ---- the same bytes


@st.composite
def partitions(draw: st.DrawFn) -> tuple[list[bytes], list[list[Piece]]]:
    """Files, and every byte of them cut into pieces that are dealt out to windows."""
    seed = np.random.default_rng(draw(st.integers(0, 99)))
    files = [seed.bytes(draw(st.integers(0, 5 * PAGE))) for _ in range(draw(st.integers(1, 3)))]
    pieces: list[Piece] = []
    for number, content in enumerate(files):
        cuts = sorted(draw(st.lists(st.integers(0, len(content)), max_size=6)))
        edges = [0, *cuts, len(content)]
        pieces += [(number, begin, end - begin) for begin, end in pairwise(edges)]
    if draw(st.booleans()):
        pieces = draw(st.permutations(pieces))
    windows: list[list[Piece]] = [[]]
    for piece in pieces:
        if draw(st.booleans()):
            windows.append([])
        windows[-1].append(piece)
    return files, windows


@settings(max_examples=150, deadline=None)
@given(
    case=partitions(),
    way=st.sampled_from(WAYS),
    depth=st.integers(0, 3),
    passes=st.lists(st.booleans(), min_size=1, max_size=3),
)
def test_any_partition_into_windows_yields_the_bytes_of_the_files(
    case: tuple[list[bytes], list[list[Piece]]], way: str, depth: int, passes: list[bool]
) -> None:
    contents, windows = case
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        with stream(paths, way, depth) as windows_of:
            for keep in passes:
                for window in windows:
                    windows_of.submit(window, keep)
            for _ in passes:
                for window in windows:
                    views = windows_of.next()
                    assert [bytes(view) for view in views] == [contents[f][at : at + n] for f, at, n in window]
                    windows_of.check()


@settings(max_examples=150, deadline=None)
@given(
    case=partitions(),
    way=st.sampled_from(WAYS),
    depth=st.integers(0, 3),
    passes=st.lists(st.booleans(), min_size=1, max_size=4),
    choices=st.randoms(use_true_random=False),
)
def test_windows_that_are_not_passed_over_yield_the_bytes_of_the_files(
    case: tuple[list[bytes], list[list[Piece]]], way: str, depth: int, passes: list[bool], choices: random.Random
) -> None:
    """Submitted before or between, skipped while they are read or before."""
    contents, windows = case
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        order = [(window, keep) for keep in passes for window in windows]
        submitted = 0
        with stream(paths, way, depth) as windows_of:
            for number, (window, _) in enumerate(order):
                while submitted <= number or (submitted < len(order) and choices.random() < 0.7):
                    windows_of.submit(*order[submitted])
                    submitted += 1
                if choices.random() < 0.5:
                    windows_of.skip()
                    continue
                views = windows_of.next()
                assert [bytes(view) for view in views] == [contents[f][at : at + n] for f, at, n in window]
                windows_of.check()


@ways
def test_windows_may_be_submitted_while_others_are_read(path: Path, way: str) -> None:
    pieces = cut(path.stat().st_size, 10_007)
    read = b""
    with stream([path], way, depth=2) as windows:
        windows.submit(pieces[:1], False)
        for piece in pieces[1:]:
            windows.submit([piece], False)
            read += bytes(windows.next()[0])
        read += bytes(windows.next()[0])
    assert read == path.read_bytes()


@ways
def test_views_are_plain_bytes_that_torch_and_numpy_take(path: Path, way: str) -> None:
    with stream([path], way) as windows:
        windows.submit([(0, 3, 4096), (0, 5, 0)], False)
        view, empty = windows.next()
        assert (view.format, view.itemsize, view.ndim, view.readonly) == ("B", 1, 1, False)
        assert len(empty) == 0
        content = path.read_bytes()[3 : 3 + 4096]
        assert torch.frombuffer(view, dtype=torch.uint8).numpy().tobytes() == content
        assert np.frombuffer(view, np.uint8).tobytes() == content


@ways
def test_a_view_outlives_its_stream(path: Path, way: str) -> None:
    windows = stream([path], way)
    windows.submit([(0, 100, 1000)], False)
    view = windows.next()[0]
    windows.close()
    del windows
    assert bytes(view) == path.read_bytes()[100:1100]


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(path).write_bytes(b"content")
    with WindowStream([path]) as windows:
        windows.submit([(0, 0, 7)])
        assert bytes(windows.next()[0]) == b"content"


# ---- wrong use


@ways
def test_a_missing_file_is_named(tmp_path: Path, way: str) -> None:
    with stream([tmp_path / "absent"], way) as windows:
        with pytest.raises(FileNotFoundError) as error:
            windows.submit([(0, 0, 1)], False)
        assert error.value.filename == str(tmp_path / "absent")


@ways
def test_a_folder_is_no_file(tmp_path: Path, way: str) -> None:
    with stream([tmp_path], way) as windows, pytest.raises(ValueError, match="not a regular file"):
        windows.submit([(0, 0, 1)], False)


@ways
@pytest.mark.parametrize(
    ("offset", "nbytes"), [(MIB, 1238), (MIB + 1238, 0), (0, 2**62), (2**62, 2**62), (-1, 1), (1, -1)]
)
def test_a_piece_outside_the_file_is_refused_and_nothing_is_submitted(
    path: Path, way: str, offset: int, nbytes: int
) -> None:
    with stream([path], way) as windows:
        with pytest.raises(ValueError, match=f"{path}: {nbytes} bytes at offset {offset} .* has {MIB + 1237} bytes"):
            windows.submit([(0, 0, 1), (0, offset, nbytes)], False)
        for use in (windows.next, windows.skip):
            with pytest.raises(RuntimeError, match="every submitted window is already out"):
                use()


def test_other_wrong_arguments_say_what_is_wrong(path: Path) -> None:
    with pytest.raises(ValueError, match="it must be 'map' or 'pread'"):
        WindowStream([path], "mmap")
    with pytest.raises(ValueError, match="depth"):
        WindowStream([path], "map", -1)
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        WindowStream([path], threads=0)
    with WindowStream([path]) as windows, pytest.raises(IndexError, match="no file 1: the stream has 1"):
        windows.submit([(1, 0, 1)])


@ways
def test_close_may_be_repeated_and_ends_all_use(path: Path, way: str) -> None:
    windows = stream([path], way)
    for piece in cut(path.stat().st_size, 100_000):
        windows.submit([piece], False)
    windows.next()
    windows.close()
    windows.close()
    windows.check()
    for use in (windows.next, windows.skip, lambda: windows.submit([(0, 0, 1)], False)):
        with pytest.raises(ValueError, match="the stream is closed"):
            use()


@ways
def test_streams_that_are_dropped_leave_no_thread_and_no_descriptor(path: Path, way: str) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    before = held()
    for _ in range(20):
        windows = stream([path], way)
        windows.submit([(0, 0, 1000)], False)
        del windows
    assert held() == before


# ---- read-ahead


def is_cached(path: Path, offset: int) -> bool:
    """Whether the page cache has a byte; to look does not bring it there, as even a read that may not wait can."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as pages:
        view = np.frombuffer(pages, np.uint8)
        address, found = view.ctypes.data + offset // PAGE * PAGE, ctypes.c_ubyte()
        del view  # or the mapping could not be closed
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), ctypes.byref(found)) == 0
        return bool(found.value & 1)


@pytest.mark.parametrize("way", ["map", "pread"])
def test_the_disk_is_asked_for_all_that_is_submitted(path: Path, way: str) -> None:
    size, window = 32 * MIB, 8 * MIB
    with open(path, "wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(path, size - 1):
        pytest.skip("this file system keeps its files in memory")
    with stream([path], way, depth=0) as windows:
        windows.submit([(0, 0, window)], False)
        assert len(windows.next()) == 1
        assert not is_cached(path, size - 1)
        for piece in cut(size, window)[1:]:
            windows.submit([piece], False)  # not read while the first one is out
        until = time.monotonic() + 20
        while not is_cached(path, size - 1) and time.monotonic() < until:
            time.sleep(0.01)
        assert is_cached(path, size - 1)


# ---- memory

RESIDENT = """
    def resident(kind):
        status = open("/proc/self/status").read()
        return int(status.split(kind + ":")[1].split()[0]) << 10
    path, mode, kind, keep = sys.argv[1:5]
    size, window = os.path.getsize(path), 8 << 20
    with WindowStream([path], mode, 1) as windows:
        pieces = [(0, at, min(window, size - at)) for at in range(4, size, window)]
        for piece in pieces:
            windows.submit([piece], keep == "keep")
        before = peak = resident(kind)
        for piece in pieces:
            total = sum(windows.next()[0][::4096])
            peak = max(peak, resident(kind))
    print(peak - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "weights"
    with open(path, "wb") as file:
        file.truncate(256 * MIB)
    return path


@pytest.mark.parametrize(("mode", "kind"), [("map", "RssFile"), ("map", "VmRSS"), ("pread", "VmRSS")])
def test_resident_memory_does_not_grow_with_the_file(large: Path, mode: str, kind: str) -> None:
    result = run_alone(RESIDENT, large, mode, kind, "drop")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 32 * MIB  # two windows of 8 MiB, and what the allocator likes


SPOTS = """
    def resident():
        status = open("/proc/self/status").read()
        return int(status.split("RssFile:")[1].split()[0]) << 10
    size = os.path.getsize(sys.argv[1])
    with WindowStream([sys.argv[1]], "map", 0) as windows:
        before = resident()
        for at in range(100_000, size - 1000, 130_000):
            windows.submit([(0, at, 1000)])
            sum(windows.next()[0])
        print(resident() - before)
"""


def test_of_a_few_bytes_here_and_there_nothing_around_them_stays_resident(large: Path) -> None:
    large.read_bytes()  # what a fault finds in the page cache it maps with its neighbours
    result = run_alone(SPOTS, large)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 4 * MIB


LARGE_PAGES = """
    def resident():
        status = open("/proc/self/status").read()
        return int(status.split("RssFile:")[1].split()[0]) << 10
    end, MIB = 64 << 20, 1 << 20
    with WindowStream([sys.argv[1]], "map", 0) as windows:
        before = resident()
        for at in range(0, end, 65536):  # as if faults had mapped large pages
            windows.submit([(0, at, 1)], True)
            windows.next()
        mapped = resident() - before
        for at in range(MIB // 2, end, MIB):
            windows.submit([(0, at, 1000)])
            windows.next()
        print(mapped, resident() - before)
"""


def test_a_large_page_around_a_few_bytes_does_not_stay_resident(large: Path) -> None:
    large.read_bytes()
    result = run_alone(LARGE_PAGES, large)
    assert result.returncode == 0, result.stderr
    mapped, left = map(int, result.stdout.split())
    assert mapped > 32 * MIB
    assert left < 4 * MIB


def test_kept_windows_stay_resident(large: Path) -> None:
    result = run_alone(RESIDENT, large, "map", "RssFile", "keep")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 200 * MIB


PASSED_OVER = """
    def resident():
        status = open("/proc/self/status").read()
        return int(status.split("RssFile:")[1].split()[0]) << 10
    path, keep = sys.argv[1:]
    size, window = os.path.getsize(path), 8 << 20
    with WindowStream([path], "map", 1) as windows:
        pieces = [(0, at, min(window, size - at)) for at in range(4, size, window)]
        for kept in (True, keep == "keep"):
            for piece in pieces:
                windows.submit([piece], kept)
        windows.submit([(0, 0, 1)], True)
        before = resident()
        for piece in pieces:
            total = sum(windows.next()[0][::4096])
        for piece in pieces:
            windows.skip()
        windows.next()
        print(resident() - before)
"""


@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_pages_that_were_kept_stay_or_go_with_a_window_that_is_passed_over(large: Path, keep: str) -> None:
    result = run_alone(PASSED_OVER, large, keep)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 200 * MIB if keep == "keep" else int(result.stdout) < 32 * MIB


# ---- faults


@ways
def test_a_window_that_is_passed_over_before_it_is_read_has_no_fault(path: Path, tmp_path: Path, way: str) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x" * MIB)
    with stream([path, other], way, depth=0) as windows:
        for file in (0, 1, 0):
            windows.submit([(file, 0, MIB)], False)
        windows.next()
        os.truncate(other, 0)
        windows.skip()
        assert bytes(windows.next()[0]) == path.read_bytes()[:MIB]
        windows.check()


@ways
def test_what_was_computed_is_checked_when_the_next_window_is_passed_over(path: Path, way: str) -> None:
    with stream([path], way) as windows:
        for _ in range(2):
            windows.submit([(0, 0, MIB)], False)
        windows.next()
        os.truncate(path, 500_000)
        with pytest.raises(ReadFault, match="truncated"):
            windows.skip()


@ways
def test_a_file_truncated_before_it_is_read_is_a_fault(path: Path, way: str) -> None:
    with stream([path], way, depth=0) as windows:
        windows.submit([(0, 0, PAGE)], False)
        windows.submit([(0, 700_000, 50_000)], False)
        windows.next()
        os.truncate(path, 500_000)
        with pytest.raises(ReadFault, match=f"truncated from {MIB + 1237} to 500000 bytes while in use") as error:
            windows.next()
        assert isinstance(error.value, OSError)
        assert error.value.path == str(path)
        assert error.value.reason.startswith("truncated")
        assert str(path) in str(error.value)


@ways
def test_a_file_truncated_under_a_window_is_a_fault_once_and_for_all(path: Path, way: str) -> None:
    windows = stream([path], way, depth=0)
    windows.submit([(0, 1000, MIB)], False)
    windows.submit([(0, 0, 1)], False)
    view = windows.next()[0]
    windows.check()
    content = path.read_bytes()
    os.truncate(path, 300_000)
    sum(view[::512])  # SIGBUS, were it not for the handler
    with pytest.raises(ReadFault, match="truncated"):
        windows.check()
    path.write_bytes(content)
    for use in (windows.check, windows.skip, windows.next):
        with pytest.raises(ReadFault, match="truncated"):
            use()
    windows.close()
    with pytest.raises(ReadFault, match="truncated"):
        windows.check()


@ways
def test_bytes_lost_within_the_last_page_are_a_fault_although_no_page_is_missing(path: Path, way: str) -> None:
    with stream([path], way) as windows:
        windows.submit([(0, 0, MIB + 1237)], False)
        windows.next()
        os.truncate(path, MIB + 1236)
        with pytest.raises(ReadFault, match="truncated"):
            windows.check()


@ways
def test_a_file_that_is_rewritten_while_in_use_is_a_fault(path: Path, way: str) -> None:
    with stream([path], way) as windows:
        windows.submit([(0, 0, 1000)], False)
        windows.next()
        with open(path, "r+b") as file:
            file.write(b"other bytes")
        os.utime(path)
        with pytest.raises(ReadFault, match="modified while in use"):
            windows.check()


@ways
def test_other_files_of_the_stream_do_not_hide_the_fault(path: Path, tmp_path: Path, way: str) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x" * 100_000)
    with stream([other, path], way, depth=0) as windows:
        windows.submit([(0, 0, 100_000), (1, 0, MIB)], False)
        first, second = windows.next()
        os.truncate(path, 0)
        assert bytes(first) == b"x" * 100_000
        sum(second[::PAGE])
        with pytest.raises(ReadFault) as error:
            windows.next()
        assert error.value.path == str(path)


def test_the_rest_of_a_truncated_mapping_reads_as_zeros_from_any_thread(path: Path) -> None:
    with WindowStream([path]) as windows:
        windows.submit([(0, 0, MIB)])
        view = windows.next()[0]
        os.truncate(path, 64 * PAGE)
        array = np.frombuffer(view, np.uint8)
        sums: list[int] = []
        threads = [
            threading.Thread(target=lambda part=part: sums.append(int(part.sum())))
            for part in np.split(array[64 * PAGE :], 8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sums == [0] * 8
        assert array[: 64 * PAGE].any()
        with pytest.raises(ReadFault, match="truncated") as error:
            windows.check()
        assert error.value.offset >= 64 * PAGE


@pytest.mark.parametrize("mode", ["map", "pread"])
def test_a_process_survives_truncation_in_the_middle_of_a_computation(path: Path, mode: str) -> None:
    result = run_alone(
        """
        import torch
        path, mode = sys.argv[1:]
        size = os.path.getsize(path)
        windows = WindowStream([path], mode, 1)
        for at in range(0, size, size // 4 + 1):
            windows.submit([(0, at, min(size // 4 + 1, size - at))], False)
        try:
            while True:
                tensor = torch.frombuffer(windows.next()[0], dtype=torch.uint8)
                os.truncate(path, 8192)
                tensor.to(torch.float64).sum()
        except ReadFault as fault:
            print("survived", fault.reason)
        """,
        path,
        mode,
    )
    assert result.stdout == f"survived truncated from {MIB + 1237} to 8192 bytes while in use\n", result.stderr
    assert result.returncode == 0


FOREIGN = """
    with WindowStream([sys.argv[1]]) as windows:
        windows.submit([(0, 0, 1000)])
        windows.next()
        {before}
        file = open(sys.argv[2], "r+b")
        foreign = mmap.mmap(file.fileno(), 0)
        file.truncate(0)
        foreign[5000]
    print("not reached")
"""


@pytest.mark.parametrize("before", ["", "os.kill(os.getpid(), 7)"])
def test_a_bus_error_that_is_not_ours_still_ends_the_process(path: Path, tmp_path: Path, before: str) -> None:
    (tmp_path / "foreign").write_bytes(bytes(10_000))
    result = run_alone(FOREIGN.format(before=before), path, tmp_path / "foreign")
    assert result.returncode == -signal.SIGBUS
    assert result.stdout == ""


@pytest.mark.parametrize("order", ["handler first", "faulthandler first"])
def test_a_bus_error_that_is_not_ours_reaches_the_handler_before_us(path: Path, tmp_path: Path, order: str) -> None:
    (tmp_path / "foreign").write_bytes(bytes(10_000))
    enable = "faulthandler.enable()"
    code = textwrap.dedent(FOREIGN.format(before=enable if order == "handler first" else ""))
    if order == "faulthandler first":
        code = f"{enable}\n{code}"
    result = run_alone(code, path, tmp_path / "foreign")
    assert result.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in result.stderr


def test_a_handler_installed_after_ours_is_put_behind_us_at_the_next_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(bytes(10_000))
    result = run_alone(
        """
        with WindowStream(sys.argv[1:]) as windows:
            windows.submit([(0, 0, 1000)])
            faulthandler.enable()
            windows.submit([(1, 0, 10000)])
            windows.next()
            view = windows.next()[0]
            os.truncate(sys.argv[2], 0)
            print(sum(view[::512]), flush=True)
            os.kill(os.getpid(), 7)
        """,
        path,
        tmp_path / "foreign",
    )
    assert result.stdout == "0\n"
    assert result.stderr.count("Fatal Python error: Bus error") == 1
    assert result.returncode == -signal.SIGBUS


# ---- write-back


def test_write_back_takes_any_range_and_ignores_what_cannot_be_synced(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as file:
        file.write(bytes(3 * PAGE))
        file.flush()
        start_writeback(file.fileno(), 0, PAGE)
        wait_writeback(file.fileno(), 0, 3 * PAGE)
    reader, writer = os.pipe()
    start_writeback(writer, 0, PAGE)
    wait_writeback(writer, 0, PAGE)
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="write-back of 4096 bytes at offset 8192 failed"):
        wait_writeback(writer, 8192, 4096)
