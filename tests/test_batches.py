"""The order of tensors where several shards are written at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergecore import merging
from mergecore.batches import Batch, interleaved


def batch_of(name: str, nbytes: int) -> Batch:
    return Batch(cast(Any, SimpleNamespace(name=name, input_bytes=nbytes)), ())


@given(
    tensors=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100), st.integers(1, 3)), max_size=40),
)
def test_lanes_take_turns_by_bytes_and_keep_their_order(tensors: list[tuple[int, int, int]]) -> None:
    lane_of = {str(n): lane for n, (lane, _, _) in enumerate(tensors)}
    batches = [batch_of(str(n), nbytes) for n, (_, nbytes, times) in enumerate(tensors) for _ in range(times)]
    order = interleaved(batches, lane_of.__getitem__)
    for lane in range(4):
        of_lane = [batch for batch in batches if lane_of[batch.form.name] == lane]
        assert [batch for batch in order if lane_of[batch.form.name] == lane] == of_lane
    names = list(dict.fromkeys(batch.form.name for batch in order))
    assert [batch.form.name for batch in order] == [name for name in names for _ in range(tensors[int(name)][2])]

    given = dict.fromkeys(lane_of.values(), 0)
    left = [lane_of[name] for name in names]
    for name in names:
        lane = lane_of[name]
        assert given[lane] == min(given[other] for other in left), "the one with the fewest bytes, of those with more"
        given[lane] += tensors[int(name)][1]
        left.remove(lane)


def test_one_lane_changes_no_order() -> None:
    batches = [batch_of(name, 7) for name in ("b", "a", "c")]
    assert interleaved(batches, lambda name: 0) == batches


@pytest.mark.parametrize(
    ("threads", "outputs", "lanes"), [(1, 1, 1), (7, 1, 1), (8, 1, 2), (16, 1, 4), (64, 1, 4), (16, 2, 2), (16, 8, 1)]
)
def test_few_cores_write_one_shard_after_the_other(threads: int, outputs: int, lanes: int) -> None:
    assert merging._lanes(threads, outputs) == lanes
