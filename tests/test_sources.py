"""Sources: windows of derived tensors, held against the whole tensor as NumPy computes it in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mergecore.checkpoint import TensorInfo, open_checkpoint
from mergecore.errors import CheckpointError
from mergecore.quantised import dequantised
from mergecore.sources import Adapted, RowMap, Scaled, Source, Stored
from tests.models import streamed

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NAMES |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"}
FLOATS = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


class Memory:
    """Tensors in a file that exists only as bytes."""

    def __init__(self) -> None:
        self.content = bytearray(b"123")  # offsets need not be aligned

    def store(self, tensor: Tensor) -> Stored:
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        info = TensorInfo("t", NAMES[tensor.dtype], tuple(tensor.shape), Path("memory"), len(self.content), len(data))
        self.content += data
        return Stored(info)

    def read(self, source: Source, first: int, count: int) -> Tensor:
        pieces = source.pieces(first, count)
        assert all(nbytes > 0 for _, _, nbytes in pieces)
        view = memoryview(self.content)
        window = source.window(first, count, (view[offset : offset + nbytes] for _, offset, nbytes in pieces))
        assert (window.shape, NAMES[window.dtype]) == ((count,), source.dtype)
        return window.clone()


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check_windows(memory: Memory, source: Source, expected: np.ndarray, cuts: list[int]) -> None:
    """The whole is near the oracle's; cut anywhere, it is the same bits; an inner window reads its own bytes only."""
    whole = memory.read(source, 0, expected.size)
    np.testing.assert_allclose(whole.double().numpy(), expected.ravel(), rtol=1e-14, atol=1e-14)
    ends = sorted({0, expected.size, *(cut % (expected.size + 1) for cut in cuts)})
    parts = [memory.read(source, a, b - a) for a, b in pairwise(ends)]
    assert torch.equal(torch.cat([*parts, memory.read(source, 0, 0)]).view(torch.uint8), whole.view(torch.uint8))


CUTS = st.lists(st.integers(0, 10**6), max_size=6)
SIZES = st.integers(1, 9)


# ---- stored


@settings(deadline=None)
@given(FLOATS, SIZES, SIZES, CUTS)
def test_a_stored_tensor_comes_as_it_is(dtype: torch.dtype, rows: int, columns: int, cuts: list[int]) -> None:
    memory, values = Memory(), tensor((rows, columns), dtype)
    source = memory.store(values)
    assert (source.dtype, source.shape, source.nbytes) == (NAMES[dtype], (rows, columns), values.nbytes)
    check_windows(memory, source, values.double().numpy(), cuts)


def test_a_stored_window_lies_in_the_memory_it_was_given() -> None:
    memory = Memory()
    source = memory.store(tensor((4, 4)))
    ((_, offset, nbytes),) = source.pieces(4, 8)
    window = source.window(4, 8, iter([memoryview(memory.content)[offset : offset + nbytes]]))
    memory.content[offset : offset + 4] = np.float32(7).tobytes()
    assert window[0] == 7


# ---- scaled


@settings(deadline=None)
@given(
    st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu]),
    st.lists(st.integers(1, 3), max_size=1),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 5),
    CUTS,
)
def test_scales_multiply_their_blocks(
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    matrices: list[int],
    rows: int,
    columns: int,
    height: int,
    width: int,
    cuts: list[int],
) -> None:
    memory = Memory()
    weight = tensor((*matrices, rows, columns), dtype)
    scale = tensor((*matrices, -(-rows // height), -(-columns // width)), seed=1).abs().to(scale_dtype)
    spread = scale.double().numpy().repeat(height, -2).repeat(width, -1)[..., :rows, :columns]
    source = Scaled(memory.store(weight), memory.store(scale), (height, width))
    assert source.nbytes == weight.nbytes + scale.nbytes
    check_windows(memory, source, weight.double().numpy() * spread, cuts)


@given(CUTS)
def test_without_scales_fp8_is_widened(cuts: list[int]) -> None:
    memory, weight = Memory(), tensor((5, 3), torch.float8_e5m2)
    check_windows(memory, Scaled(memory.store(weight)), weight.double().numpy(), cuts)


def test_scales_that_do_not_fill_the_blocks_are_refused() -> None:
    memory = Memory()
    with pytest.raises(ValueError, match="in blocks of"):
        Scaled(memory.store(tensor((5, 3))), memory.store(tensor((2, 2))), (2, 2))


# ---- adapted


@settings(deadline=None)
@given(FLOATS, FLOATS, SIZES, SIZES, st.integers(1, 5), st.booleans(), CUTS)
def test_an_adapter_adds_the_scaled_product_of_its_factors(
    dtype: torch.dtype,
    factors: torch.dtype,
    outputs: int,
    inputs: int,
    rank: int,
    transposed: bool,
    cuts: list[int],
) -> None:
    memory = Memory()
    weight = tensor((inputs, outputs) if transposed else (outputs, inputs), dtype)
    a, b = tensor((rank, inputs), factors, 1), tensor((outputs, rank), factors, 2)
    update = b.double().numpy() @ a.double().numpy()
    expected = weight.double().numpy() + 0.37 * (update.T if transposed else update)
    source = Adapted(memory.store(weight), memory.store(a), memory.store(b), 0.37, transposed=transposed)
    assert source.nbytes == weight.nbytes + a.nbytes + b.nbytes
    check_windows(memory, source, expected, cuts)


@pytest.mark.parametrize("transposed", [False, True])
def test_large_updates_are_computed_in_blocks_of_rows(transposed: bool) -> None:
    memory, rows, columns = Memory(), 3000, 500
    weight, a, b = tensor((rows, columns)), tensor((4, columns), seed=1), tensor((rows, 4), seed=2)
    if transposed:
        a, b = b.T, a.T
    update = b.double().numpy() @ a.double().numpy()
    expected = weight.double().numpy() - 1.5 * (update.T if transposed else update)
    source = Adapted(memory.store(weight), memory.store(a), memory.store(b), -1.5, transposed=transposed)
    check_windows(memory, source, expected, [3, 499, 70_001, 1_048_500, 1_499_999])


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32 - 1), CUTS)
def test_factors_of_any_magnitudes_are_multiplied_without_loss(rank: int, seed: int, cuts: list[int]) -> None:
    memory, random = Memory(), np.random.default_rng(seed)
    a = random.standard_normal((rank, 7)) * 2.0 ** random.integers(-90, 90, (rank, 7))
    b = random.standard_normal((5, rank)) * 2.0 ** random.integers(-90, 90, (5, rank))
    a[random.random(a.shape) < 0.2] = 0
    weight = torch.zeros(5, 7)
    factors = [memory.store(torch.from_numpy(factor)) for factor in (a, b)]
    source = Adapted(memory.store(weight), factors[0], factors[1], 1.0)
    whole = memory.read(source, 0, 35).view(5, 7).numpy()
    exact = b.astype(np.longdouble) @ a.astype(np.longdouble)
    assert (np.abs(whole - exact) <= 1e-15 * (np.abs(b) @ np.abs(a))).all()
    ends = sorted({0, 35, *(cut % 36 for cut in cuts)})
    parts = [memory.read(source, start, end - start) for start, end in pairwise(ends)]
    assert torch.equal(torch.cat(parts).view(5, 7), torch.from_numpy(whole))


def test_factors_that_are_not_finite_show_in_the_result() -> None:
    memory = Memory()
    a, b = tensor((2, 3)), tensor((4, 2), seed=1)
    a[1, 2] = torch.nan
    source = Adapted(memory.store(tensor((4, 3))), memory.store(a), memory.store(b), 1.0)
    assert torch.equal(memory.read(source, 0, 12).view(4, 3).isnan(), torch.tensor([[False, False, True]] * 4))


def test_factors_that_do_not_fit_the_weight_are_refused() -> None:
    memory = Memory()
    a, b = memory.store(tensor((2, 3))), memory.store(tensor((4, 2)))
    Adapted(memory.store(tensor((4, 3))), a, b, 1.0)
    with pytest.raises(ValueError, match=r"for a weight \[3, 4\]"):
        Adapted(memory.store(tensor((3, 4))), a, b, 1.0)


# ---- rows in another order


@st.composite
def row_maps(draw: st.DrawFn) -> tuple[Memory, RowMap, np.ndarray]:
    memory = Memory()
    inner = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    dtypes = draw(st.lists(FLOATS, min_size=1, max_size=3))
    tensors = [tensor((draw(SIZES), *inner), dtype, seed) for seed, dtype in enumerate(dtypes)]
    origin = st.integers(0, len(tensors) - 1).flatmap(
        lambda number: st.tuples(st.just(number), st.integers(0, len(tensors[number]) - 1))
    )
    origins: list[list[tuple[int, int]]] = []
    while not origins or draw(st.integers(0, 5)):
        match draw(st.sampled_from(["run", "run", "row", "zeros", "mean"])):
            case "run":
                number, row = draw(origin)
                origins += [[(number, at)] for at in range(row, len(tensors[number]))]
            case "row":
                origins.append([draw(origin)])
            case "zeros":
                origins += [[]] * draw(st.integers(1, 3))
            case _:
                origins.append(draw(st.lists(origin, min_size=2, max_size=4)))
    rows = [
        np.mean([tensors[number][row].double().numpy() for number, row in pairs], axis=0) if pairs else np.zeros(inner)
        for pairs in origins
    ]
    table = np.array([pairs[0] if pairs else (-1, 0) for pairs in origins], np.int64)
    means = {row: tuple(pairs) for row, pairs in enumerate(origins) if len(pairs) > 1}
    source = RowMap((len(origins), *inner), tuple(map(memory.store, tensors)), table, means)
    assert source.dtype == (NAMES[dtypes[0]] if len(set(dtypes)) == 1 and not means else "F64")
    return memory, source, np.array(rows).reshape(len(origins), *inner)


@settings(deadline=None, max_examples=300)
@given(row_maps(), CUTS)
def test_rows_are_copied_averaged_or_zero(made: tuple[Memory, RowMap, np.ndarray], cuts: list[int]) -> None:
    memory, source, expected = made
    check_windows(memory, source, expected, cuts)
    whole = source.pieces(0, expected.size)
    assert source.nbytes == sum(nbytes for _, _, nbytes in whole)


def test_rows_that_follow_each_other_are_one_piece_and_no_copy() -> None:
    memory = Memory()
    stored = memory.store(tensor((10, 4)))
    table = np.array([[0, row] for row in (3, 4, 5, 6, 0, 1)], np.int64)
    source = RowMap((6, 4), (stored,), table)
    assert source.pieces(2, 12) == [(Path("memory"), stored.info.offset + 4 * 14, 4 * 12)]
    assert len(source.pieces(0, 24)) == 2
    assert source.nbytes == 6 * 4 * 4


def test_rows_may_come_from_derived_sources() -> None:
    memory = Memory()
    weight, a, b = tensor((5, 3)), tensor((2, 3), seed=1), tensor((5, 2), seed=2)
    adapted = Adapted(memory.store(weight), memory.store(a), memory.store(b), 2.0)
    source = RowMap((3, 3), (adapted, memory.store(weight)), np.array([[0, 4], [1, 0], [0, 1]], np.int64))
    update = weight.double().numpy() + 2.0 * (b.double().numpy() @ a.double().numpy())
    check_windows(memory, source, np.stack([update[4], weight[0].double().numpy(), update[1]]), [2, 5])


def test_copied_rows_keep_every_bit() -> None:
    memory = Memory()
    values = torch.tensor([[-0.0, torch.nan], [1.0, -torch.inf]], dtype=torch.bfloat16)
    source = RowMap((3, 2), (memory.store(values),), np.array([[0, 1], [-1, 0], [0, 0]], np.int64))
    expected = torch.stack([values[1], torch.zeros(2, dtype=torch.bfloat16), values[0]])
    assert torch.equal(memory.read(source, 0, 6).view(torch.int16), expected.view(-1).view(torch.int16))


@pytest.mark.parametrize(
    ("table", "means"),
    [
        ([[0, 2]], {}),
        ([[1, 0]], {}),
        ([[0, -1]], {}),
        ([[-2, 0]], {}),
        ([[0, 0], [0, 1]], {}),
        ([[0, 0]], {1: ((0, 0),)}),
        ([[0, 0]], {0: ((0, 2),)}),
        ([[0, 0]], {0: ()}),
    ],
)
def test_a_table_of_rows_that_there_are_not_is_refused(table: Any, means: Any) -> None:
    stored = Memory().store(tensor((2, 3)))
    with pytest.raises(ValueError):
        RowMap((1, 3), (stored,), np.array(table, np.int64), means)


# ---- fp8 checkpoints


def checkpoint_of(folder: Path, tensors: Mapping[str, Tensor], quantisation: Any = None) -> dict[str, Source]:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    config = {"model_type": "llama"} if quantisation is None else {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))
    return dequantised(open_checkpoint(folder))


FP8 = tensor((6, 10), torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("scale_name", "scale", "quantisation"),
    [
        ("weight_scale_inv", tensor((2, 3)), {"quant_method": "fp8", "weight_block_size": [4, 4]}),
        ("weight_scale_inv", tensor(()), {"quant_method": "fp8", "weight_block_size": None}),
        ("weight_scale", tensor(()), {"quant_method": "compressed-tensors"}),
        ("weight_scale", tensor((1,)), {"quant_method": "compressed-tensors"}),
        ("weight_scale", tensor((6,)), {"quant_method": "fbgemm_fp8"}),
        ("weight_scale", tensor((6, 1), torch.bfloat16), {"quant_method": "compressed-tensors"}),
        ("weight_scale", tensor((1, 10)), {"quant_method": "fbgemm_fp8"}),
        (
            "weight_scale",
            tensor((2, 3)),
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"block_structure": [4, 4]}}}},
        ),
        (
            "weight_scale",
            tensor((6, 2)),
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"group_size": 5}}}},
        ),
    ],
)
def test_fp8_weights_are_read_with_the_scales_of_their_kind(
    tmp_path: Path, scale_name: str, scale: Tensor, quantisation: Any
) -> None:
    norm = tensor((10,), torch.bfloat16)
    sources = checkpoint_of(
        tmp_path,
        {"a.weight": FP8, f"a.{scale_name}": scale, "a.input_scale": tensor(()), "a.k_scale": tensor((1,)), "n": norm},
        quantisation,
    )
    assert set(sources) == {"a.weight", "n"}
    assert torch.equal(streamed(sources["n"], 7), norm)
    values = scale.double()
    if scale.ndim == 2 and scale.shape[0] == 2:
        values = values.repeat_interleave(4, 0).repeat_interleave(4, 1)[:6, :10]
    elif scale.shape == (6, 2):
        values = values.repeat_interleave(5, 1)
    elif scale.shape == (6,):
        values = values[:, None]
    for entries in (7, 60):
        assert torch.equal(streamed(sources["a.weight"], entries), FP8.double() * values)


def test_fused_experts_have_blocks_of_scales_each(tmp_path: Path) -> None:
    weight, scale = tensor((3, 6, 10), torch.float8_e4m3fn), tensor((3, 2, 3), seed=1)
    tensors = {"experts.down_proj": weight, "experts.down_proj_scale_inv": scale}
    sources = checkpoint_of(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 4]})
    spread = scale.double().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :6, :10]
    assert torch.equal(streamed(sources["experts.down_proj"], 17), weight.double() * spread)


def test_fp8_without_any_quantisation_is_the_value_itself(tmp_path: Path) -> None:
    assert torch.equal(streamed(checkpoint_of(tmp_path, {"a.weight": FP8})["a.weight"], 60), FP8.double())


def test_other_checkpoints_are_read_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "w": tensor((2, 2)),
        "position_ids": torch.arange(4),
        "k_scale": tensor((2,)),
        "d": tensor((2,)).double(),
    }
    sources = checkpoint_of(tmp_path, tensors)
    assert {name: source.dtype for name, source in sources.items()} == {
        "w": "F32", "position_ids": "I64", "k_scale": "F32", "d": "F64",
    }  # fmt: skip
    assert all(isinstance(source, Stored) for source in sources.values())


INTEGERS = torch.zeros(2, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "method", "named"),
    [
        ({"a.qweight": INTEGERS, "a.scales": tensor((2, 4)).half()}, "gptq", r"a\.qweight"),
        ({"a.qweight": INTEGERS, "a.qzeros": INTEGERS + 1}, "awq", r"a\.qweight"),
        ({"a.weight": INTEGERS.to(torch.uint8)}, "bitsandbytes", r"a\.weight \(U8\)"),
        (
            {"a.weight": FP8, "a.weight_scale": tensor(()), "a.weight_zero_point": tensor(())},
            "fp8",
            "a.weight_zero_point",
        ),
        ({"a.weight": FP8}, "compressed-tensors", r"a\.weight \(F8_E4M3\)"),
        ({"a.weight": FP8, "a.weight_scale": tensor(()), "a.weight_scale_2": tensor(())}, "modelopt", "scale_2"),
        ({"a.weight_packed": INTEGERS.to(torch.uint8), "a.weight_scale": FP8}, "nvfp4", r"a\.weight_(packed|scale)"),
    ],
)
def test_what_cannot_be_dequantised_is_named_with_its_method(
    tmp_path: Path, tensors: dict[str, Tensor], method: str, named: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"{named}.* \({method}\)"):
        checkpoint_of(tmp_path, tensors, {"quant_method": method})


def test_rotated_weights_are_refused(tmp_path: Path) -> None:
    quantisation = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}}
    with pytest.raises(CheckpointError, match=r"stored rotated \(compressed-tensors, transform_config\)"):
        checkpoint_of(tmp_path, {"a.weight": FP8, "a.weight_scale": tensor(())}, quantisation)


def test_scales_that_fit_no_known_kind_are_an_error(tmp_path: Path) -> None:
    tensors = {"a.weight": FP8, "a.weight_scale_inv": tensor((2, 3))}
    with pytest.raises(CheckpointError, match=r"a\.weight_scale_inv .* does not fit a\.weight \[6, 10\]"):
        checkpoint_of(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [3, 3]})
    with pytest.raises(CheckpointError, match="scale_weight"):
        checkpoint_of(tmp_path, {"a.weight": FP8, "a.scale_weight": tensor(())})
