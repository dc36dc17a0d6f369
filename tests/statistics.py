"""Statistics folders as `mergecore stats` writes them, with the content that a test wants."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore.architecture import is_linear
from mergecore.inputs import Inputs
from mergecore.methods.base import Gathered


def write_statistics(folder: Path, model: Path, tensors: Mapping[str, Tensor]) -> Path:
    """The statistics of a model: `gram.NAME` and `fisher.NAME`."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    fingerprint = Inputs(lambda path, revision: Path(path), Path()).open(str(model)).fingerprint()
    about = {"statistics": {"model": {"path": str(model), **fingerprint}}}
    (folder / "mergecore_manifest.json").write_text(json.dumps(about))
    return folder


def random_statistics(folder: Path, model: Path, kind: Gathered) -> Path:
    """Of one model's files always the same ones: Gram matrices of linear layers (out, in), or what Fisher information
    may look like."""
    files = sorted(model.glob("*.safetensors"))
    random = torch.Generator().manual_seed(zlib.crc32(b"".join(file.read_bytes() for file in files)))
    found = {}
    for name, tensor in {name: each for file in files for name, each in load_file(file).items()}.items():
        shape = tuple(tensor.shape)
        if kind is Gathered.FISHER:
            found[kind.of(name)] = torch.randn(shape, generator=random).square() * 1e-3
        elif is_linear(name, shape) and len(shape) == 2:
            inputs = torch.randn(3 * shape[1], shape[1], generator=random, dtype=torch.float64)
            found[kind.of(name)] = (inputs.T @ inputs).float()
    return write_statistics(folder, model, found)
