"""Several loops of one merge side by side: the same bytes, one error, a memory that they share."""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergecore import Progress, load_spec, merge, merging, placement, plan, reads
from mergecore.batches import Batch
from mergecore.budget import result_bytes
from mergecore.device import CpuDevice, open_device
from mergecore.engine import Merge
from mergecore.errors import Interrupted, MergecoreError, NonFiniteError, OutputError
from mergecore.loop import Loop
from mergecore.ops import blend
from mergecore.output.buffers import ring_bytes
from mergecore.output.writer import OutputWriter
from tests.merges import METHODS, LateDevice, cut_anywhere, many_kinds, merged, results_of, scratch, spec_of
from tests.models import LLAMA, llama, moved, spec_dict, tensor_bytes, write_model, write_trio
from tests.test_device_memory import CrowdedDevice


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, base = tmp_path_factory.mktemp("trio"), many_kinds()
    models = {"base": base, "near": moved(base, 3e-4, 2), "far": moved(base, 4e-3, 3)}
    return [write_model(folder / name, tensors, LLAMA) for name, tensors in models.items()]


@pytest.fixture(scope="module")
def expected(trio: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one loop makes of the trio."""
    return results_of(trio, tmp_path_factory.mktemp("expected"))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enough for four loops, of which none claims more than it needs next."""
    monkeypatch.setattr(reads, "ASKED_AHEAD", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are enough for loops to share a CPU."""
    monkeypatch.setattr(merging, "LEAST_EACH", 0)


@contextmanager
def side_by_side(devices: Sequence[CpuDevice]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "open_devices", lambda name, memory: devices)
        yield


@contextmanager
def shared_by(loops: int) -> Iterator[list[str]]:
    """So many loops on the CPU; which thread computed each blend."""
    seen: list[str] = []

    def noted(*arguments: Any, **options: Any) -> None:
        seen.append(threading.current_thread().name)
        blend(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuDevice, "loops", loops)
        patch.setattr("mergecore.ops.blend", noted)
        yield seen


# ---- Equal bytes


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=4, deadline=None)
@given(random=st.randoms(use_true_random=False), loops=st.integers(2, 4), lanes=st.integers(1, 3))
def test_bytes_depend_on_no_number_of_loops(
    trio: list[Path], expected: dict[str, Any], method: str, random: Random, loops: int, lanes: int
) -> None:
    run = {"threads": 4, "shard_size": 60_000}
    with scratch() as folder, cut_anywhere(random), shared_by(loops), pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_lanes", lambda threads, outputs: lanes)
        assert merged(spec_of(trio, **METHODS[method], run=run), folder / "out") == expected[method]


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_no_number_of_devices(
    trio: list[Path], expected: dict[str, Any], method: str, tmp_path: Path
) -> None:
    with side_by_side([LateDevice(), LateDevice(), LateDevice()]), cut_anywhere(Random(5)):
        assert merged(spec_of(trio, **METHODS[method]), tmp_path / "out") == expected[method]


def test_every_loop_gets_tensors_of_a_merge(tmp_path: Path, threads: None) -> None:
    trio = write_trio(tmp_path, llama(layers=20))
    with shared_by(3) as seen:
        merge(load_spec(spec_dict("linear", *trio)), tmp_path / "out")
    assert set(seen) == {threading.current_thread().name, "loop 1", "loop 2"}


def test_batches_of_one_tensor_are_of_one_loop(
    trio: list[Path], tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave its pages mapped for each other."""
    seen: dict[str, list[int]] = {}
    original = Loop._run_batch

    def noted(loop: Loop, batch: Batch, *arguments: Any) -> None:
        seen.setdefault(batch.form.name, []).append(loop.number)
        original(loop, batch, *arguments)

    monkeypatch.setattr(Loop, "_run_batch", noted)
    spec = spec_dict("widen", *trio)
    spec["sweep"] = {"points": [{"merge_method": "widen"}, {"merge_method": "ties", "parameters.density": 0.3}]}
    with shared_by(3):
        merge(load_spec(spec), tmp_path / "out")
    assert {len(set(loops)) for loops in seen.values()} == {1}
    assert max(map(len, seen.values())) > 1
    assert len({loops[0] for loops in seen.values()}) > 1


def test_small_tensors_mean_one_loop(tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that decide much and compute little would wait for each other."""
    monkeypatch.undo()
    trio = write_trio(tmp_path, llama(layers=20))
    with shared_by(3) as seen:
        merge(load_spec(spec_dict("linear", *trio)), tmp_path / "out")
    assert set(seen) == {threading.current_thread().name}


def test_one_thread_means_one_loop(tmp_path: Path) -> None:
    trio = write_trio(tmp_path, llama(layers=20))
    with shared_by(3) as seen:
        merge(load_spec(spec_dict("linear", *trio)), tmp_path / "out", threads=1)
    assert set(seen) == {threading.current_thread().name}


@pytest.mark.parametrize("method", ["tsv", "iso_c after dare"])
def test_matrices_that_are_decomposed_mean_one_loop(
    trio: list[Path], expected: dict[str, Any], method: str, tmp_path: Path
) -> None:
    """LAPACK's last bits may depend on its threads, and those of a loop on what others do."""
    with shared_by(3) as seen:
        assert merged(spec_of(trio, **METHODS[method], run={"threads": 4}), tmp_path / "out") == expected[method]
    assert set(seen) == {threading.current_thread().name}


@pytest.mark.parametrize("short", [1, 5])
def test_a_device_that_is_out_of_memory_does_not_disturb_the_other(
    trio: list[Path], expected: dict[str, Any], short: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "ASKED_AHEAD", 0)
    monkeypatch.setattr(placement, "SMALLEST", 2_000)
    crowded = CrowdedDevice(12_000, range(short, short + 2))
    with side_by_side([LateDevice(), crowded]):
        for method in ("linear", "widen", "ties"):
            out, before = tmp_path / method, crowded.failures
            result = merge(load_spec(spec_dict_of(trio, method)), out)
            assert tensor_bytes(out) == expected[method]
            assert any("ran out of memory" in warning for warning in result.warnings) == (crowded.failures > before)
    assert crowded.failures > 0


def spec_dict_of(trio: list[Path], method: str) -> dict[str, Any]:
    keys: dict[str, Any] = {"merge_method": "widen", **METHODS[method]}
    return spec_dict(keys.pop("merge_method"), *trio, **keys)


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", "cuda:0+", "cuda:-1", "cuda:0,1", ""])
def test_a_device_that_has_no_such_name_is_refused(name: str) -> None:
    with pytest.raises(MergecoreError, match="expected auto, cpu, cuda"):
        open_device(name)


def test_what_uses_one_device_takes_no_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergecore.device.open_devices", lambda name: [CpuDevice(), CpuDevice()])
    with pytest.raises(MergecoreError, match="only a merge uses several GPUs"):
        open_device("cuda:0+1")


# ---- Threads and memory


def test_loops_share_the_threads_and_the_last_one_has_all_of_them(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = write_trio(tmp_path, llama(layers=6))
    counts: dict[str, list[int]] = {}
    upload, run = Loop._upload, Loop.run

    def noted(loop: Loop, *arguments: Any) -> Any:
        part = upload(loop, *arguments)
        counts.setdefault(threading.current_thread().name, []).append(torch.get_num_threads())
        return part

    def late(loop: Loop) -> None:
        if loop.number == 0:  # its tensors come when the other loop has ended
            batch = loop._claim()
            assert batch
            for thread in threading.enumerate():
                if thread.name == "loop 1":
                    thread.join()
        run(loop)

    monkeypatch.setattr("mergecore.loop.ALONE", 0)
    monkeypatch.setattr(Loop, "_upload", noted)
    monkeypatch.setattr(Loop, "run", late)
    merge(load_spec(spec_dict("widen", *trio)), tmp_path / "out")
    assert set(counts["loop 1"]) == {2}
    assert set(counts[threading.current_thread().name]) == {4}
    assert torch.get_num_threads() == 4


def held(trio: list[Path], monkeypatch: pytest.MonkeyPatch, out: Path, **run: Any) -> tuple[int, int, int]:
    """Loops of a merge, what they hold together, and what its plan says."""
    found: list[tuple[int, int]] = []
    original = Merge.run

    def noted(merge: Merge) -> Any:
        found.append((len(merge.loops), max(batch.held_bytes for batch in merge._batches)))
        return original(merge)

    monkeypatch.setattr(Merge, "run", noted)
    spec = load_spec(spec_dict("widen", *trio, run=run))
    planned = plan(spec)
    merge(spec, out)
    [(loops, each)] = found
    return loops, loops * each, planned.held_bytes


def test_loops_hold_together_what_one_would(tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"model.layers.0.mlp.up_proj.weight": torch.randn(30_000, 1_000).bfloat16()}
    base = write_model(tmp_path / "base", large, LLAMA)
    trio = [base, write_model(tmp_path / "near", moved(large, 1e-3, 1), LLAMA)]
    trio.append(write_model(tmp_path / "far", moved(large, 1e-2, 2), LLAMA))
    loops, together, planned = held(trio, monkeypatch, tmp_path / "out", memory="64MiB")
    assert loops == 2
    assert together <= planned <= 64 << 20


def test_tensors_that_are_copied_keep_to_a_loop_s_share(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"model.steps": torch.arange(8_000_000), "model.norm.weight": torch.ones(8).bfloat16()}
    trio = [write_model(tmp_path / name, steps, LLAMA) for name in ("base", "near", "far")]
    loops, together, planned = held(trio, monkeypatch, tmp_path / "out", memory="16MiB")
    assert loops == 2
    assert together <= planned <= 16 << 20


def test_files_that_cannot_all_be_mapped_mean_one_loop(
    trio: list[Path], expected: dict[str, Any], tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "MOST_MAPPED", 26)  # of 3 loops with 3 streams of 3 files
    with shared_by(3) as seen:
        assert merged(spec_of(trio, **METHODS["linear"]), tmp_path / "out") == expected["linear"]
    assert set(seen) == {threading.current_thread().name}


def test_statistics_that_need_more_than_a_share_of_the_memory_mean_one_loop(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"model.embed_tokens.weight": torch.randn(60_000, 8).bfloat16()}
    trio = [write_model(tmp_path / "base", long, LLAMA)]
    trio += [write_model(tmp_path / name, moved(long, 1e-3, n), LLAMA) for n, name in enumerate(("near", "far"))]
    loops, together, planned = held(trio, monkeypatch, tmp_path / "out", memory="16MiB")
    assert loops == 1
    assert together <= planned <= 16 << 20


def test_files_that_may_not_be_open_all_at_once_mean_one_loop(
    trio: list[Path], expected: dict[str, Any], tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [(64, 150)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    with shared_by(3) as seen:
        assert merged(spec_of(trio, **METHODS["linear"]), tmp_path / "few") == expected["linear"]
        assert set(seen) == {threading.current_thread().name}
        limits.append((64, 4096))
        assert merged(spec_of(trio, **METHODS["linear"]), tmp_path / "more") == expected["linear"]
    assert limits == [(64, 150), (64, 4096), (3 * 3 * 3 + 2 + 200, 4096)], "no more than is needed, of what is allowed"
    assert len(set(seen)) > 1


def test_buffers_have_room_for_the_windows_of_a_point_that_is_resumed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of fewer points are larger."""
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.randn(4000, 1000).bfloat16()}
    trio = [write_model(tmp_path / name, tensors, LLAMA) for name in ("base", "near", "far")]
    sizes: list[int] = []

    class Noted(OutputWriter):
        def __init__(self, *arguments: Any, buffer_bytes: int, **options: Any) -> None:
            sizes.append(buffer_bytes)
            super().__init__(*arguments, buffer_bytes=buffer_bytes, **options)

    monkeypatch.setattr(merging, "OutputWriter", Noted)
    spec = spec_dict("task_arithmetic", *trio, run={"memory": "16MiB"})
    alone = max(map(result_bytes, plan(load_spec(spec)).jobs))
    spec["sweep"] = {"parameters": {"parameters.lambda": [n / 8 for n in range(8)]}}
    with side_by_side([LateDevice()]):
        merge(load_spec(spec), tmp_path / "out")
    assert len(sizes) == 8
    assert min(sizes) >= ring_bytes(2 + LateDevice.pending, alone)


# ---- Errors


def test_the_first_error_of_any_loop_stops_all_and_is_raised(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = write_trio(tmp_path, llama(layers=40))
    original, after = Loop._run_batch, threading.Event()

    def failing(loop: Loop, *arguments: Any) -> None:
        if loop.number == 1:
            after.set()
            raise OutputError("the disk is gone")
        after.wait(60)
        original(loop, *arguments)

    monkeypatch.setattr(Loop, "_run_batch", failing)
    seen: list[Progress] = []
    with pytest.raises(OutputError, match="the disk is gone"):
        merge(load_spec(spec_dict("widen", *trio)), tmp_path / "out", progress=seen.append)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == [], "nothing is left beside it"
    assert seen[-1].tensors_done < seen[-1].tensors_total / 2 if seen else True
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loop ")]


def test_a_loop_that_waits_for_the_writer_hears_of_an_interruption(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C: in the thread that merges, while it waits for the other loop."""
    trio = write_trio(tmp_path, llama(layers=40))
    original, slow = Loop.run, Loop._run_batch

    def interrupted(loop: Loop) -> None:
        if loop.number == 0:
            raise KeyboardInterrupt
        original(loop)

    def slowly(loop: Loop, *arguments: Any) -> None:
        time.sleep(0.05)
        slow(loop, *arguments)

    monkeypatch.setattr(Loop, "run", interrupted)
    monkeypatch.setattr(Loop, "_run_batch", slowly)
    seen: list[Progress] = []
    with pytest.raises(KeyboardInterrupt):
        merge(load_spec(spec_dict("widen", *trio)), tmp_path / "out", progress=seen.append)
    assert not (tmp_path / "out").exists()
    assert not seen or seen[-1].tensors_done < seen[-1].tensors_total / 2


def test_a_merge_that_is_stopped_keeps_what_every_loop_has_finished(tmp_path: Path, threads: None) -> None:
    trio = write_trio(tmp_path, llama(layers=20))
    spec = load_spec(spec_dict("widen", *trio))
    merge(spec, tmp_path / "expected", threads=1)
    seen: list[Progress] = []
    with shared_by(3), pytest.raises(Interrupted):
        merge(
            spec, tmp_path / "out", progress=seen.append, should_stop=lambda: bool(seen) and seen[-1].tensors_done >= 20
        )
    again: list[Progress] = []
    with shared_by(3):
        result = merge(spec, tmp_path / "out", resume=True, progress=again.append)
    assert result.resumed
    assert again[0].tensors_done >= seen[-1].tensors_done
    assert again[-1].tensors_done == again[-1].tensors_total
    assert again[-1].bytes_read == again[-1].bytes_read_total
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "expected")


def test_warnings_come_in_the_order_of_the_tensors(
    tmp_path: Path, threads: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama(layers=12)
    spoilt = [name for name in base if "proj" in name]
    tensors = {name: tensor.clone() for name, tensor in base.items()}
    for name in spoilt:
        tensors[name][0, 0] = float("nan")
    folders = [write_model(tmp_path / "base", base, LLAMA), write_model(tmp_path / "near", tensors, LLAMA)]
    spec = spec_dict("linear", *folders, write_model(tmp_path / "far", base, LLAMA))
    with pytest.raises(NonFiniteError):
        merge(load_spec(spec), tmp_path / "out")
    original = Loop._run_batch

    def unevenly(loop: Loop, *arguments: Any) -> None:
        time.sleep(0.003 * loop.number)
        original(loop, *arguments)

    monkeypatch.setattr(Loop, "_run_batch", unevenly)
    with caplog.at_level(logging.WARNING), shared_by(3):
        result = merge(load_spec({**spec, "on_nonfinite": "warn"}), tmp_path / "out")
    told = [warning.split()[0] for warning in result.warnings if "NaN" in warning]
    assert told == [job.name for job in plan(load_spec(spec)).jobs if job.name in spoilt]
    assert len([record for record in caplog.records if "NaN" in record.message]) == len(spoilt)
