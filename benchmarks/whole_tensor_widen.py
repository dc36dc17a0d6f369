"""WIDEN as one writes it down from the paper: whole models in memory, float32 tensors, plain PyTorch. A peer to time.

    python -m benchmarks.whole_tensor_widen BASE MODEL... OUT

It stands for the authors' script, of which it has the means: every model is loaded whole, and a matrix's norms,
directions, ranks and softmaxes are tensors of their own (Yu et al. 2024, equations 1 to 7, t = s = 1). It is not held
against an oracle: it is here for its cost.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model, float32."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return tensors


def importance(divergence: Tensor) -> Tensor:
    """Equations 3 to 6 on (models, columns)."""
    models, columns = divergence.shape
    ranks = torch.empty_like(divergence)
    order = divergence.argsort(dim=1)
    ranks.scatter_(1, order, torch.arange(1, columns + 1, dtype=ranks.dtype).expand(models, -1) / columns)
    scores = torch.softmax(ranks, dim=0)
    return torch.where(ranks > ranks.mean(dim=1, keepdim=True), torch.ones_like(scores), scores)


def merged(base: Tensor, models: list[Tensor], rows: bool) -> Tensor:
    """Equations 1, 2 and 7 on one tensor; `rows`: columns lie along the rows (token embeddings)."""
    deltas = torch.stack([model - base for model in models])
    if base.dim() < 2:
        return base + (importance(deltas.abs()).unsqueeze(1) * deltas.unsqueeze(1)).squeeze(1).sum(dim=0)
    axis = 1 if rows else 0
    magnitude = base.norm(dim=axis, keepdim=True)
    direction = base / magnitude
    magnitudes, directions = [], []
    for model in models:
        own = model.norm(dim=axis, keepdim=True)
        magnitudes.append((own - magnitude).abs().flatten())
        directions.append(1 - ((model / own) * direction).sum(dim=axis))
    weights = (importance(torch.stack(magnitudes)) + importance(torch.stack(directions))) / 2
    return base + (weights.unsqueeze(2 if rows else 1) * deltas).sum(dim=0)


def main() -> int:
    """Merges and writes one file."""
    base, *models = map(load, map(Path, sys.argv[1:-1]))
    out = {}
    for name in list(base):
        rows = "embed" in name or "lm_head" in name
        out[name] = merged(base[name], [model[name] for model in models], rows).bfloat16()
    folder = Path(sys.argv[-1])
    folder.mkdir()
    save_file(out, folder / "model.safetensors", {"format": "pt"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
