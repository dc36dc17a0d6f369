"""The planned bytes of an output are what safetensors reads, whatever the tensors are."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from mergecore.output.layout import ITEM_BYTES, OutputLayout, plan_layout

Tensors = list[tuple[str, str, tuple[int, ...]]]

# The types that the torch of every supported version can hold.
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
dtypes = st.sampled_from(["BOOL", "U8", "BF16", "F16", "F32", "I64"])
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)  # shorter than "__metadata__"
tensor_lists = st.dictionaries(names, st.tuples(dtypes, shapes), max_size=8).map(
    lambda items: [(name, dtype, shape) for name, (dtype, shape) in items.items()]
)


def planned_files(layout: OutputLayout) -> dict[str, bytes]:
    """The files of a layout, with every tensor's bytes counting up from its own number."""
    files = {shard.filename: bytearray(shard.header.ljust(shard.size, b"\xee")) for shard in layout.shards}
    for number, slot in enumerate(layout.slots.values()):
        end = slot.offset + slot.nbytes
        files[layout.shards[slot.shard].filename][slot.offset : end] = pattern(number, slot.nbytes)
    return {name: bytes(content) for name, content in files.items()}


def pattern(number: int, nbytes: int) -> bytes:
    return bytes((number * 31 + position) % 251 for position in range(nbytes))


@given(tensor_lists, st.integers(1, 200))
def test_safetensors_finds_every_tensor_with_its_dtype_shape_and_bytes(tensors: Tensors, shard_size: int) -> None:
    layout = plan_layout(tensors, shard_size)
    found = {}
    for content in planned_files(layout).values():
        found.update(dict(safetensors.deserialize(content)))
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in found.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }
    for number, (name, _, _) in enumerate(tensors):
        assert bytes(found[name]["data"]) == pattern(number, layout.slots[name].nbytes)


@given(tensor_lists, st.integers(1, 200))
def test_shards_keep_the_order_and_exceed_their_size_only_for_one_tensor(tensors: Tensors, shard_size: int) -> None:
    layout = plan_layout(tensors, shard_size)
    assert list(layout.slots) == [name for name, _, _ in tensors]
    assert all(0 <= after.shard - before.shard <= 1 for before, after in pairwise(layout.slots.values()))
    for number, shard in enumerate(layout.shards):
        inside = [slot.nbytes for slot in layout.slots.values() if slot.shard == number]
        assert sum(inside) <= shard_size or len(inside) == 1
        assert shard.size == len(shard.header) + sum(inside)
        following = [slot.nbytes for slot in layout.slots.values() if slot.shard == number + 1]
        assert not following or sum(inside) + following[0] > shard_size  # not closed too early


@given(tensor_lists)
def test_every_tensor_starts_at_a_multiple_of_its_item_size(tensors: Tensors) -> None:
    layout = plan_layout(tensors, 10**9)
    assert all(layout.slots[name].offset % ITEM_BYTES[dtype] == 0 for name, dtype, _ in tensors)


def test_tensors_of_one_dtype_lie_in_the_given_order_and_data_starts_on_a_page() -> None:
    layout = plan_layout([("z", "BF16", (3, 5)), ("a", "BF16", ()), ("m", "BF16", (7,))], 10**9)
    assert [slot.offset for slot in layout.slots.values()] == [4096, 4126, 4128]
    assert len(layout.shards[0].header) == 4096


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    layout = plan_layout([("a", "F32", (2, 2))], 16)
    assert [shard.filename for shard in layout.shards] == ["model.safetensors"]
    assert layout.index is None


def test_the_index_of_several_shards_is_the_one_of_transformers() -> None:
    layout = plan_layout([("b", "F32", (2, 2)), ("a", "BF16", (4, 4)), ("c", "I64", ())], 20)
    assert [shard.filename for shard in layout.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert layout.index is not None
    assert json.loads(layout.index) == {
        "metadata": {"total_size": 56},
        "weight_map": {
            "a": "model-00002-of-00003.safetensors",
            "b": "model-00001-of-00003.safetensors",
            "c": "model-00003-of-00003.safetensors",
        },
    }


def test_torch_opens_zero_element_and_zero_dimensional_tensors(tmp_path: Path) -> None:
    layout = plan_layout([("none", "BF16", (0, 5)), ("scalar", "F32", ()), ("row", "BF16", (3,))], 10**9)
    (tmp_path / "x.safetensors").write_bytes(planned_files(layout)["model.safetensors"])
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert {name: tuple(file.get_tensor(name).shape) for name in file.keys()} == {  # noqa: SIM118
            "none": (0, 5),
            "scalar": (),
            "row": (3,),
        }
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("tensors", "shard_size", "words"),
    [
        ([("a", "BF16", (1,)), ("a", "BF16", (1,))], 100, "'a' is given twice"),
        ([("a", "BF17", (1,))], 100, "dtype 'BF17'"),
        ([("a", "BF16", (2, -1))], 100, "cannot be negative"),
        ([("__metadata__", "BF16", (1,))], 100, "reserves"),
        ([("a", "BF16", (1,))], 0, "at least 1 byte"),
        ([("\ud800", "BF16", (1,))], 100, "surrogates"),
    ],
)
def test_what_no_file_can_hold_is_refused(tensors: Tensors, shard_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_layout(tensors, shard_size)


def test_the_digest_tells_layouts_apart() -> None:
    tensors: Tensors = [("a", "BF16", (8,)), ("b", "BF16", (8,))]
    digests = {
        plan_layout(tensors, 100).digest(),
        plan_layout(tensors, 16).digest(),
        plan_layout(tensors[::-1], 100).digest(),
        plan_layout([("a", "F16", (8,)), ("b", "BF16", (8,))], 100).digest(),
    }
    assert len(digests) == 4
    assert plan_layout(tensors, 100).digest() in digests
