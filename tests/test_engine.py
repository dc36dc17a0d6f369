"""The bytes of a merge depend on spec and inputs alone; it stops and goes on; its memory is bounded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergecore
from mergecore import Progress, load_spec, merge, merging
from mergecore.device import CpuDevice
from mergecore.errors import Interrupted, MergecoreError
from tests.merges import (
    DARE,
    METHODS,
    KeepingDevice,
    LateDevice,
    checksums,
    computing_on,
    cut_anywhere,
    merged,
    results_of,
    run_python,
    scratch,
    spec_of,
    write_worn_trio,
    writing_at_once,
)
from tests.models import LLAMA, llama, moved, tensor_bytes, write_model, write_trio


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_worn_trio(tmp_path_factory.mktemp("trio"))


@pytest.fixture(scope="module")
def expected(trio: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results_of(trio, tmp_path_factory.mktemp("expected"))


# ---- Equal bytes


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12, deadline=None)
@given(
    random=st.randoms(use_true_random=False),
    threads=st.integers(1, 2),
    shard_size=st.integers(1, 200_000),
    read=st.sampled_from(["map", "pread"]),
    write=st.sampled_from(["direct", "cached"]),
    lanes=st.integers(1, 4),
)
def test_bytes_depend_on_no_window_thread_shard_or_way_of_reading_or_writing(
    trio: list[Path],
    expected: dict[str, Any],
    method: str,
    random: Random,
    threads: int,
    shard_size: int,
    read: str,
    write: str,
    lanes: int,
) -> None:
    run = {"threads": threads, "shard_size": shard_size, "read": read, "write": write}
    with scratch() as folder, cut_anywhere(random), writing_at_once(lanes):
        assert merged(spec_of(trio, **METHODS[method], run=run), folder / "out") == expected[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_device_may_deliver_a_result_while_it_computes_the_next(
    trio: list[Path], expected: dict[str, Any], tmp_path: Path, method: str
) -> None:
    with computing_on(LateDevice()), cut_anywhere(Random(3)):
        assert merged(spec_of(trio, **METHODS[method]), tmp_path / "out") == expected[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_stays_on_the_device_is_uploaded_once_and_gives_the_same_bytes(
    trio: list[Path], expected: dict[str, Any], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = KeepingDevice()
    monkeypatch.setattr(merging, "open_devices", lambda name, memory: [device])
    spec = spec_of(trio, **METHODS[method])
    with cut_anywhere(Random(3)):
        assert merged(spec, tmp_path / "cut") == expected[method]
    jobs = [job for job in mergecore.plan(load_spec(spec)).jobs if job.parameters is not None]
    once = sum(len(list(job.windows())) * job.matrices * (1 + job.surveyed_reads) for job in jobs)
    device.uploads = 0
    assert merged(spec, tmp_path / "whole") == expected[method]
    # Order statistics look for a block again, which is no window.
    assert device.uploads == once or any(job.choosing_reads for job in jobs)


@pytest.fixture(scope="module")
def large_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Three models whose embedding (40 MB) and projection (20 MB) exceed a small budget."""
    folder = tmp_path_factory.mktemp("large")
    base = {
        "model.embed_tokens.weight": torch.randn(20_000, 1_000, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(
            4_000, 2_500, generator=torch.Generator().manual_seed(2)
        ).bfloat16(),
        "model.norm.weight": torch.ones(1_000, dtype=torch.bfloat16),
    }
    yield write_trio(folder, base)
    shutil.rmtree(folder)


@pytest.mark.parametrize("keys", [{}, {"merge_method": "task_arithmetic", "sparsify": DARE}], ids=["widen", "dare"])
def test_bytes_do_not_depend_on_the_memory_budget(large_trio: list[Path], tmp_path: Path, keys: dict[str, Any]) -> None:
    results, windows = [], []
    for memory, threads in [("16MiB", 2), ("64MiB", 1), ("4GiB", 2)]:
        spec = spec_of(large_trio, **keys, run={"memory": memory, "threads": threads})
        windows.append(sum(len(list(job.windows())) for job in mergecore.plan(load_spec(spec)).jobs))
        merge(load_spec(spec), tmp_path / "out")
        results.append(checksums(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert results[0] == results[1] == results[2]
    assert windows[0] > windows[1] > windows[2]


def test_a_model_in_several_files_merges_like_one_in_a_single_file(tmp_path: Path) -> None:
    base = llama()
    one, many = write_trio(tmp_path / "one", base), write_trio(tmp_path / "many", base, shards=4)
    expected = merged(spec_of(one), tmp_path / "a")
    assert merged(spec_of(many), tmp_path / "b") == expected
    files = [path / "model.safetensors" for path in one]
    assert merged(spec_of(files), tmp_path / "c") == expected


# ---- Stopping and going on


class StopAt:
    """Asks to stop at the window of this number, counted from 1."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def windows_of(spec: dict[str, Any]) -> int:
    planned = mergecore.plan(load_spec(spec))
    passes = {job.name: planned.passes if job.parameters is not None else 1 for job in planned.jobs}
    return sum(passes[job.name] * job.matrices * len(list(job.windows())) for job in planned.jobs)


@pytest.mark.parametrize("method", ["widen after dare", "linear", "ties of the whole model", "metagpt after trimming"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_merge_stopped_anywhere_goes_on_to_the_same_bytes(
    trio: list[Path], expected: dict[str, Any], method: str, data: st.DataObject
) -> None:
    spec = spec_of(trio, **METHODS[method], run={"shard_size": data.draw(st.integers(1, 200_000))})
    stops = data.draw(st.lists(st.integers(1, windows_of(spec)), min_size=1, max_size=3))
    with scratch() as folder, writing_at_once(data.draw(st.integers(1, 3))):
        whole = merge(load_spec(spec), folder / "whole")
        done = 0
        for number in stops:
            seen: list[Progress] = []
            try:
                with computing_on(data.draw(st.sampled_from([CpuDevice, LateDevice]))()):
                    merge(
                        load_spec(spec), folder / "out", resume=True, should_stop=StopAt(number), progress=seen.append
                    )
            except Interrupted:
                assert os.listdir(folder / ".out.partial")
                assert not (folder / "out").exists()
                assert all(step.tensors_done >= done for step in seen)
                done = max([done, *(step.tensors_done for step in seen)])
            else:
                break  # what was left had fewer windows
        if not (folder / "out").exists():
            result = merge(load_spec(spec), folder / "out", resume=True, progress=seen.append)
            assert result.resumed
            assert result.bytes_read <= whole.bytes_read
            assert seen[-1].bytes_read == seen[-1].bytes_read_total
            assert seen[-1].bytes_written == seen[-1].bytes_written_total
            assert seen[-1].tensors_done == seen[-1].tensors_total
        assert tensor_bytes(folder / "out") == expected[method]
        assert checksums(folder / "out") == checksums(folder / "whole")
        assert sorted(os.listdir(folder)) == ["out", "whole"]


def interrupt(spec: dict[str, Any], out: Path) -> None:
    """Stops a merge when about half of its windows are done."""
    with pytest.raises(Interrupted) as caught:
        merge(load_spec(spec), out, should_stop=StopAt(windows_of(spec) // 2))
    assert caught.value.exit_code == 3


def test_finished_tensors_are_not_read_again(trio: list[Path], tmp_path: Path) -> None:
    spec = spec_of(trio)
    interrupt(spec, tmp_path / "out")
    first: list[Progress] = []
    result = merge(load_spec(spec), tmp_path / "out", resume=True, progress=first.append)
    assert first[0].tensors_done > 0
    assert result.bytes_read < first[0].bytes_read_total


def test_how_it_runs_may_change_before_it_goes_on(trio: list[Path], tmp_path: Path) -> None:
    interrupt(spec_of(trio), tmp_path / "out")
    changed = spec_of(trio, run={"memory": "32MiB", "threads": 1, "read": "pread"})
    assert merge(load_spec(changed), tmp_path / "out", resume=True).resumed


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"t": 0.5}},
        {"seed": 1},
        {"sparsify": DARE},
        {"run": {"shard_size": "20kB"}},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_a_changed_spec_starts_from_zero(trio: list[Path], tmp_path: Path, change: dict[str, Any]) -> None:
    interrupt(spec_of(trio), tmp_path / "out")
    result = merge(load_spec(spec_of(trio, **change)), tmp_path / "out", resume=True)
    assert not result.resumed
    assert tensor_bytes(tmp_path / "out") == merged(spec_of(trio, **change), tmp_path / "fresh")


def test_a_changed_input_starts_from_zero(tmp_path: Path) -> None:
    base = llama()
    trio = write_trio(tmp_path, base)
    interrupt(spec_of(trio), tmp_path / "out")
    write_model(trio[1], moved(base, 1e-3, 9), LLAMA)
    result = merge(load_spec(spec_of(trio)), tmp_path / "out", resume=True)
    assert not result.resumed
    assert tensor_bytes(tmp_path / "out") == merged(spec_of(trio), tmp_path / "fresh")


def test_without_resume_a_stopped_merge_starts_from_zero(trio: list[Path], tmp_path: Path) -> None:
    interrupt(spec_of(trio), tmp_path / "out")
    assert not merge(load_spec(spec_of(trio)), tmp_path / "out").resumed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_missing_does_not_cost_the_finished_work(trio: list[Path], tmp_path: Path) -> None:
    interrupt(spec_of(trio), tmp_path / "out")
    with pytest.raises(MergecoreError, match=r"device cuda: .*--device cpu"):
        merge(load_spec(spec_of(trio)), tmp_path / "out", resume=True, device="cuda")
    assert merge(load_spec(spec_of(trio)), tmp_path / "out", resume=True).resumed


# ---- Memory and threads

PEAK = """
import sys
from mergecore import merge
for spec in sys.argv[2:]:
    print(merge(spec, sys.argv[1] + "/out-" + spec.rsplit("/")[-1], memory=64 << 20).peak_rss)
"""


def test_peak_memory_does_not_depend_on_the_size_of_a_tensor(tmp_path: Path) -> None:
    """Three checkpoints of 200 MB, nearly all of it one embedding, with a budget of 64 MiB."""
    base = llama(layers=1)
    random = torch.Generator().manual_seed(1)
    # Like a real vocabulary, 50,000 tokens; all rows equal, so that making it is no work.
    row = torch.randn(2_000, generator=random)
    names = ("base", "near", "far")
    for number, name in enumerate(names):
        embedding = (row * (1 + 0.01 * number)).bfloat16().expand(50_000, 2_000)
        write_model(tmp_path / "large" / name, base | {"model.embed_tokens.weight": embedding}, LLAMA)
        write_model(tmp_path / "tiny" / name, base, LLAMA)
    for size in ("tiny", "large"):
        (tmp_path / f"{size}.json").write_text(json.dumps(spec_of([tmp_path / size / name for name in names])))
    try:
        ended = run_python(PEAK, tmp_path, tmp_path / "tiny.json", tmp_path / "large.json")
        assert ended.returncode == 0, ended.stderr
        tiny, large = map(int, ended.stdout.split())
        assert tiny < large < tiny + (110 << 20)
    finally:
        shutil.rmtree(tmp_path)


def test_peak_memory_is_the_merge_s_and_not_its_parent_s(trio: list[Path], tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of(trio)))
    ballast = b"\1" * (800 << 20)
    ended = run_python(PEAK, tmp_path, spec)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < len(ballast)


def test_the_number_of_threads_is_the_caller_s_again_afterwards(trio: list[Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    merge(load_spec(spec_of(trio)), tmp_path / "out", threads=before + 1)
    assert torch.get_num_threads() == before
