"""Column sums are shared among threads by tiles of rows: their bits depend on neither threads nor windows."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergecore import ops
from tests import oracle
from tests.conftest import require_tool
from tests.kernel_inputs import Inputs, plain, threads
from tests.test_columns import by_column
from tests.test_geometry import column_gram

TILE = 256  # rows
BF16, F32 = torch.bfloat16, torch.float32
SHAPES = [(5 * TILE + 3, 700), (2 * TILE, 2500), (4000, 65), (4000, 1), (TILE - 1, 6000), (3, 9000)]


def sums(made: Inputs, cuts: Sequence[int] = ()) -> list[Tensor]:
    gradient = made.models[0].float()
    return [made.column_moments(cuts), column_gram(made, cuts), by_column(made, gradient, cuts)]


def tile_by_tile(made: Inputs) -> Tensor:
    """The moments of each tile alone, added in order."""
    total = torch.zeros(ops.moment_count(len(made.models)), made.shape[1], dtype=torch.float64)
    for first in range(0, made.shape[0], TILE):
        total += made.rows(first, min(made.shape[0], first + TILE)).column_moments()
    return total


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=5, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 4000), max_size=5))
def test_threads_and_windows_change_no_bit(shape: tuple[int, int], count: int, cuts: list[int]) -> None:
    made = plain(sum(shape), *shape, BF16, BF16, F32, BF16)
    with threads(1):
        wanted, tiles = sums(made), tile_by_tile(made)
    assert torch.equal(oracle.bits(tiles), oracle.bits(wanted[0]))
    with threads(count):
        found = sums(made, [cut for cut in cuts if cut < shape[0]])
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(oracle.bits(one), oracle.bits(two))


@pytest.mark.parametrize("models", [1, 2, 5, 30])
def test_any_number_of_models(models: int) -> None:
    """Parts have fewer columns where there are more sums."""
    made = plain(models, 3 * TILE, 300, *[BF16] * (1 + models))
    alone = [Inputs(made.base, [model]).column_moments() for model in made.models]
    with threads(3):
        found = made.column_moments()
        assert torch.equal(column_gram(made)[0], alone[0][0])
    assert torch.equal(found[0], alone[0][0])
    for number, one in enumerate(alone):
        assert torch.equal(oracle.bits(found[1 + number :: models]), oracle.bits(one[1:]))


# Threads of its own: torch's would hide a thread that waits for ever.
FAILING = """
#include <cstdio>
#include <new>
#include <thread>
#include "tiles.h"
using namespace mergecore;
int main() {
  const Window window{40 * kTileRows, 64, 0, 0};
  std::vector<double> sums(64), pending(64);
  TileSums tiles(window, 1, sums.data(), pending.data(), 3);
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      try {
        tiles.run([](const Tile& tile, double* to) {
          if (tile.row == 3 * kTileRows) throw std::bad_alloc();
          to[0] += 1.0;
        });
      } catch (const std::bad_alloc&) {
        ++failed;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%d %g\\n", failed.load(), sums[0]);
}
"""


def test_a_thread_that_fails_lets_the_others_go(tmp_path: Path) -> None:
    require_tool("c++", "g++")
    (tmp_path / "failing.cpp").write_text(FAILING)
    csrc = Path(__file__).parent.parent / "csrc"
    command = ["c++", "-std=c++17", "-O1", "-pthread", "-I", str(csrc), "failing.cpp", "-o", "failing"]
    subprocess.run(command, check=True, cwd=tmp_path)
    told = subprocess.run([tmp_path / "failing"], check=True, capture_output=True, text=True, timeout=60).stdout
    assert told.split() == ["1", "3"]  # what comes before it is added, nothing after it
