"""`mergecore stats`: statistics of a model on samples of text, for the methods that weigh models by them.

A folder like a model's comes out: safetensors with `gram.NAME` (grams.py) and `fisher.NAME` (fisher.py) for the tensors
NAME of the model, and a manifest that says of which model and from which samples. Not for reading it (gathered.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from mergecore import __version__
from mergecore.device import open_device
from mergecore.errors import Interrupted
from mergecore.features.fisher import fisher_names, gather_fisher
from mergecore.features.fitting import DTYPES
from mergecore.features.grams import gather_grams, gram_sizes
from mergecore.features.passes import Network
from mergecore.features.perplexity import of_model
from mergecore.features.samples import Sample, read_samples, tokenizer_in, total_tokens
from mergecore.features.weights import Reader
from mergecore.inputs import Input, Inputs
from mergecore.methods.base import Gathered
from mergecore.output.layout import OutputLayout, plan_layout
from mergecore.output.verify import MANIFEST_NAME
from mergecore.output.writer import OutputWriter
from mergecore.references import local_folder

KINDS = {"regmean": (Gathered.INPUTS,), "fisher": (Gathered.FISHER,), "both": (Gathered.INPUTS, Gathered.FISHER)}
STORED = {torch.float32: "F32", torch.float64: "F64"}
WRITE_BYTES = 16 << 20
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class GatherResult:
    """What was gathered: where it lies, of how much text, and what it cost."""

    output: str
    kinds: tuple[str, ...]
    samples: int
    tokens: int
    tensors: int
    left_out: tuple[str, ...]
    """Matrices inside of layers without a Gram matrix: experts that a module takes together, and other kinds."""
    bytes_written: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def gather(
    model: str,
    data: str | Path,
    out: str | Path,
    *,
    kind: str = "both",
    samples: int = 30,
    length: int = 512,
    field: str = "text",
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> GatherResult:
    """Statistics of `model` (path or name, also with an adapter) on `samples` texts of the file `data`, into the new
    folder `out`. They are float32, or float64 if the model is run in it.

    `progress` is told what was done, and the bytes written and those to write. Raises CheckpointError, SpecError,
    InputFault, OutputError, and Interrupted when `should_stop` says so; then and on any other error nothing is left at
    or beside `out`.
    """
    started = time.monotonic()
    computed, kinds = DTYPES[dtype], KINDS[kind]
    stored = torch.float64 if computed is torch.float64 else torch.float32
    place = open_device(device).torch_device
    opened = Inputs(lambda path, revision: local_folder(path, revision), Path()).open(model)
    drawn = read_samples(
        Path(data), tokenizer_in(opened.folder, {}), count=samples, length=length, field=field, seed=seed
    )
    with Reader(list(opened.tensors.values()), "map") as reader:
        weights = of_model(opened, reader, computed, place)
        network = Network(opened.config, weights.shapes, computed, place)
        sizes = gram_sizes(network) if Gathered.INPUTS in kinds else {}
        shapes: dict[str, tuple[int, ...]] = {Gathered.INPUTS.of(name): (size, size) for name, size in sizes.items()}
        if Gathered.FISHER in kinds:
            shapes |= {Gathered.FISHER.of(name): weights.shapes[name] for name in fisher_names(network)}
        layout = plan_layout([(name, STORED[stored], shape) for name, shape in shapes.items()], SHARD_BYTES)
        inside = [name for number in range(network.layers) for name in network.groups[number]]
        left_out = [name for name in inside if sizes and name not in sizes and len(weights.shapes[name]) > 1]
        with OutputWriter(out, layout, "statistics") as writer:
            put = _Put(writer, stored)
            total, done = network.layers * len(kinds), 0

            def after_layer(_: int) -> None:
                nonlocal done
                done += 1
                progress(f"{done}/{total} layers", writer.written, layout.nbytes)
                if should_stop():
                    writer.abandon(keep=False)
                    raise Interrupted("stopped on request; nothing is kept")

            if Gathered.INPUTS in kinds:
                gather_grams(network, weights, drawn, put.as_(Gathered.INPUTS), after_layer)
            if Gathered.FISHER in kinds:
                gather_fisher(network, weights, drawn, writer.scratch, stored, put.as_(Gathered.FISHER), after_layer)
            opened.check_unchanged()
            writer.sync()
            result = GatherResult(
                output=str(out),
                kinds=tuple(each.value for each in kinds),
                samples=len(drawn),
                tokens=total_tokens(drawn),
                tensors=len(shapes),
                left_out=tuple(left_out),
                bytes_written=layout.nbytes,
                seconds=time.monotonic() - started,
            )
            how = {"length": length, "field": field, "seed": seed, "dtype": dtype}
            manifest = _manifest(opened, Path(data), drawn, how, result, layout, shapes, writer.checksums)
            writer.add_file(MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode())
            writer.publish()
    return result


class _Put:
    """Writes whole tensors in pieces."""

    def __init__(self, writer: OutputWriter, dtype: torch.dtype) -> None:
        self.writer, self.dtype = writer, dtype

    def as_(self, kind: Gathered) -> Callable[[str, Tensor], None]:
        """What takes the tensors of one kind."""
        return lambda name, tensor: self._write(kind.of(name), tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        flat, item = tensor.reshape(-1), self.dtype.itemsize
        for first in range(0, flat.numel(), WRITE_BYTES // item):
            piece = flat[first : first + WRITE_BYTES // item]
            buffer = self.writer.acquire(name, first * item, piece.numel() * item)
            torch.frombuffer(buffer, dtype=self.dtype).copy_(piece)
            self.writer.write(name, first * item, buffer)
        self.writer.finish(name)


def _manifest(
    model: Input,
    data: Path,
    samples: list[Sample],
    how: Mapping[str, Any],
    result: GatherResult,
    layout: OutputLayout,
    shapes: Mapping[str, tuple[int, ...]],
    checksums: Mapping[str, str],
) -> dict[str, Any]:
    """Of the form that `mergecore verify` reads."""
    digest = xxhash.xxh3_128()
    for sample in samples:
        digest.update(sample.tokens.numpy().tobytes())
    dtype = {name: "F64" if slot.nbytes == 8 * prod(shapes[name]) else "F32" for name, slot in layout.slots.items()}
    return {
        "mergecore": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "statistics": {
            "kinds": list(result.kinds),
            "model": {"path": str(model.path), **model.fingerprint()},
            "data": str(data),
            **how,
            "samples": result.samples,
            "tokens": result.tokens,
            "tokens_xxh3_128": digest.hexdigest(),
            "left_out": list(result.left_out),
        },
        "versions": {"torch": torch.__version__},
        "tensors": {
            name: {
                "file": layout.shards[slot.shard].filename,
                "offset": slot.offset,
                "bytes": slot.nbytes,
                "dtype": dtype[name],
                "shape": list(shapes[name]),
                "xxh3_128": checksums[name],
            }
            for name, slot in layout.slots.items()
        },
    }
