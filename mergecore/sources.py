"""Where the windows of one input tensor come from."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mergecore.checkpoint import TensorInfo

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source(Protocol):
    """An input tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def files(self) -> list[Path]: ...
    def pieces(self, first: int, count: int) -> list[tuple[Path, int, int]]: ...
    def window(self, first: int, count: int, views: list[memoryview]) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        return self.info.nbytes

    @property
    def files(self) -> list[Path]:
        return [self.info.file]

    def pieces(self, first: int, count: int) -> list[tuple[Path, int, int]]:
        size = self.info.nbytes // max(1, prod(self.info.shape))
        return [(self.info.file, self.info.offset + first * size, count * size)]

    def window(self, first: int, count: int, views: list[memoryview]) -> Tensor:
        return torch.frombuffer(views[0], dtype=DTYPES[self.dtype])
