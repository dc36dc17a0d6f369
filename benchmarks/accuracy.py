"""How many of WIDEN's ranks, calibration decisions and result entries are right, against exact arithmetic.

    python -m benchmarks.accuracy [--hidden 256] [--layers 2] [--vocabulary 2048]

bf16 checkpoints with the shapes of a small Qwen2 and deltas of three sizes are merged by mergecore, and by
the paper's formulas written down in whole-tensor float32 PyTorch; both are held against tests/oracle.py.
An entry is right if it is the exact result rounded to bf16.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import mergecore
from benchmarks.checkpoints import WEIGHT_STD
from mergecore import ops
from mergecore.methods import METHODS
from mergecore.methods.base import Coefficients, Moments, TensorView
from tests import oracle
from tests.models import write_model

DELTA_STDS = (3e-5, 3e-4, 4e-3)
PAPER = oracle.Widen()

# Of one tensor, by kind (magnitude, direction; one kind for a vector): ranks from 1 and which columns are
# essential, each (models, columns).
Decided = Sequence[tuple[Tensor, Tensor]]


@dataclass
class Score:
    """What is wrong of how many. Errors are distances from the exact result rounded to bf16."""

    ranks: int = 0
    wrong_ranks: int = 0
    decisions: int = 0
    wrong_decisions: int = 0
    entries: int = 0
    wrong_entries: int = 0
    largest_ulps: float = 0.0
    largest_error: float = 0.0

    def add_decided(self, found: Decided, right: Decided, ranked: bool) -> None:
        for (found_ranks, found_essential), (right_ranks, right_essential) in zip(found, right, strict=True):
            if ranked:
                self.ranks += right_ranks.numel()
                self.wrong_ranks += int((found_ranks != right_ranks).sum())
            self.decisions += right_essential.numel()
            self.wrong_decisions += int((found_essential != right_essential).sum())

    def add_result(self, result: Tensor, exact: oracle.Exact) -> None:
        ulps = exact.ulps(result)
        self.entries += ulps.size
        self.wrong_entries += int(np.count_nonzero(ulps))
        self.largest_ulps = max(self.largest_ulps, float(ulps.max()))
        error = np.abs(oracle.floats(result) - oracle.rounded(exact.values, result.dtype))
        self.largest_error = max(self.largest_error, float(error.max()))


def shapes(hidden: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """A Qwen2 with grouped-query attention and a head of its own."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, width in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4)):
            out[f"{prefix}self_attn.{name}_proj.weight"] = (width, hidden)
            out[f"{prefix}self_attn.{name}_proj.bias"] = (width,)
        out[f"{prefix}self_attn.o_proj.weight"] = (hidden, hidden)
        out[f"{prefix}mlp.up_proj.weight"] = (hidden * 11 // 4, hidden)
        out[f"{prefix}mlp.down_proj.weight"] = (hidden, hidden * 11 // 4)
        out[f"{prefix}input_layernorm.weight"] = (hidden,)
    out["lm_head.weight"] = (vocabulary, hidden)
    return out


def checkpoints(sizes: Mapping[str, tuple[int, ...]], delta_std: float, seed: int) -> list[dict[str, Tensor]]:
    """A base and two models whose deltas have this standard deviation, in bf16."""
    random = torch.Generator().manual_seed(seed)
    out: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, shape in sizes.items():
        base = torch.randn(shape, generator=random) * WEIGHT_STD + (1.0 if "norm" in name else 0.0)
        out[0][name] = base.bfloat16()
        for model in out[1:]:
            model[name] = (out[0][name].float() + torch.randn(shape, generator=random) * delta_std).bfloat16()
    return out


def merged(models: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole merge, as a user runs it; the first model is the base."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {"model_type": "qwen2", "tie_word_embeddings": False}
        paths = [str(write_model(folder / str(n), tensors, config)) for n, tensors in enumerate(models)]
        entries = [{"model": path} for path in paths[1:]]
        spec = mergecore.load_spec({"merge_method": "widen", "base_model": paths[0], "models": entries})
        mergecore.merge(spec, folder / "out")
        return load_file(folder / "out" / "model.safetensors")


def importances(view: TensorView) -> Tensor:
    coefficients = METHODS["widen"].coefficients(view)
    assert isinstance(coefficients, Coefficients)
    return coefficients.values


def decided(base: Tensor, models: Sequence[Tensor], by_rows: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Mergecore's ranks and decisions for one tensor, from its kernels and its method."""
    vector = base.dim() == 1
    base, *models = (tensor.view(1, -1) if vector else tensor for tensor in (base, *models))
    sums = torch.zeros(ops.moment_count(len(models)), base.shape[0 if by_rows else 1], dtype=torch.float64)
    if by_rows:
        ops.row_moments(base, models, sums)
    else:
        pending = torch.zeros_like(sums)
        ops.column_moments(base, models, sums, pending)
        sums += pending
    moments = Moments.of(sums)
    # A softmax stays below 1: with s = 2 the importances tell what was essential.
    parameters: dict[str, Any] = {parameter.name: parameter.default for parameter in METHODS["widen"].parameters}
    parameters |= {"s": 2.0, "weight": (1.0,) * len(models)}
    both = TensorView(len(models), vector, parameters, moments)
    importance = importances(both)
    if vector:
        yield moments.dd.sqrt(), importance == 2.0
        return
    cosine = TensorView(len(models), vector, parameters | {"disentangle": False}, moments)
    directions = importances(cosine)
    yield ops.rank(moments.magnitude_divergence()), 2.0 * importance - directions > 1.5
    yield ops.rank(moments.direction_divergence()), directions == 2.0


def whole_tensor_float32(base: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, Decided]:
    """Section 3.3 of the paper as it reads, in float32 PyTorch: a matrix (out, in) or a vector."""
    start, others = base.float(), [model.float() for model in models]
    if base.dim() == 1:
        divergences = [torch.stack([(other - start).abs() for other in others])]
        scores = divergences
    else:
        norms = [tensor.norm(dim=0) for tensor in (start, *others)]
        directions = [tensor / norm for tensor, norm in zip((start, *others), norms, strict=True)]
        divergences = [
            torch.stack([(norm - norms[0]).abs() for norm in norms[1:]]),
            torch.stack([1 - torch.cosine_similarity(one, directions[0], dim=0) for one in directions[1:]]),
        ]
        places = torch.arange(1, base.shape[1] + 1)
        scores = []
        for divergence in divergences:
            ranks = torch.empty(divergence.shape)
            for row, order in zip(ranks, divergence.argsort(dim=1, stable=True), strict=True):
                row[order] = places / base.shape[1]
            scores.append(ranks)
    essential = [score > score.mean(dim=1, keepdim=True) for score in scores]
    importance = [
        torch.where(mask, 1.0, torch.softmax(score, dim=0)) for mask, score in zip(essential, scores, strict=True)
    ]
    weight = torch.stack(importance).mean(dim=0)
    result = start + sum(w * (other - start) for w, other in zip(weight, others, strict=True))
    whole = [(score * base.shape[-1]).round().double() for score in scores]
    return result.to(base.dtype), list(zip(whole, essential, strict=True))


def measure(delta_std: float, *, hidden: int, layers: int, vocabulary: int, seed: int = 0) -> dict[str, Score]:
    """Both implementations' scores on checkpoints of one delta size."""
    models = checkpoints(shapes(hidden, layers, vocabulary), delta_std, seed)
    ours, float32 = Score(), Score()
    results = merged(models)
    for name, result in results.items():
        base, *others = (model[name] for model in models)
        by_rows, vector = "embed" in name, base.dim() == 1

        def as_matrix(tensor: Tensor, by_rows: bool = by_rows) -> Tensor:
            return tensor.T if by_rows else tensor.view(-1, tensor.shape[-1])

        a, *xs = (oracle.floats(as_matrix(tensor)) for tensor in (base, *others))
        kinds = oracle.importances(a, xs, PAPER, vector=vector)
        exact = oracle.weighted(a, xs, kinds)
        right = [
            (torch.tensor([[float(score) for score in row] for row in kind.scores]), torch.tensor(kind.essential))
            for kind in kinds
        ]
        ours.add_decided(list(decided(base, others, by_rows)), right, not vector)
        ours.add_result(as_matrix(result), exact)
        turned = [tensor.T if by_rows else tensor for tensor in (base, *others)]
        result32, decided32 = whole_tensor_float32(turned[0], turned[1:])
        float32.add_decided(decided32, right, not vector)
        float32.add_result(result32.view(-1, result32.shape[-1]), exact)
    return {"mergecore": ours, "float32": float32}


def share(wrong: int, of: int) -> str:
    return f"{wrong} ({100 * wrong / of:.3g} %)" if wrong else "0"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="WIDEN against exact arithmetic")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    options = vars(parser.parse_args())
    console = Console(width=100)
    table = Table("delta std", "", "wrong ranks", "wrong decisions", "wrong entries", "largest error", box=None)
    for delta_std in DELTA_STDS:
        for name, score in measure(delta_std, **options).items():
            table.add_row(
                f"{delta_std:.0e}",
                name,
                share(score.wrong_ranks, score.ranks),
                share(score.wrong_decisions, score.decisions),
                share(score.wrong_entries, score.entries),
                f"{score.largest_error:.1e}" if score.wrong_entries else "0",
            )
    console.print(table)
    console.print(f"of {score.ranks} ranks, {score.decisions} decisions and {score.entries} entries at each delta std")


if __name__ == "__main__":
    main()
