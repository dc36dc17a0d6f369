"""What lies beside the weights in an output directory: manifest, model card, config, tokenizer.

The manifest (mergecore_manifest.json) says from what, how and at what cost the model was made, with a
checksum of every tensor; `mergecore verify` holds the files against it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergecore import __version__
from mergecore.accounting import COPIED, MERGED
from mergecore.checkpoint import read_config
from mergecore.inputs import Input
from mergecore.output.verify import MANIFEST_NAME
from mergecore.planning import MergePlan
from mergecore.small_files import files_in

if TYPE_CHECKING:
    from mergecore.output.writer import OutputWriter
    from mergecore.progress import MergeResult


def add_files(writer: OutputWriter, plan: MergePlan, result: MergeResult, fit: Mapping[str, Any] | None = None) -> None:
    """Adds everything but the weights to an output whose tensors are complete. `fit`: what a fit on samples reports."""
    reference = plan.reference
    if plan.config:
        writer.add_file("config.json", _json(plan.config))
    generation = reference.folder / "generation_config.json"
    if generation.is_file():
        before, _ = read_config(generation)
        after = before if plan.vocabulary is None else plan.vocabulary.configured(before)
        writer.add_file(generation.name, generation if after == before else _json(after))
    for name, file in plan.tokenizer.items():
        writer.add_file(name, file)
    for path in _code_files(plan):
        if path.name not in plan.tokenizer:
            writer.add_file(path.name, path)
    for name, content in ({} if plan.evolved is None else plan.evolved.files()).items():
        writer.add_file(name, content)
    writer.add_file("README.md", _model_card(plan).encode(errors="replace"))
    found = {"fit": fit, "evolve": None if plan.evolved is None else plan.evolved.as_dict()}
    told = {name: value for name, value in found.items() if value is not None}
    writer.add_file(MANIFEST_NAME, _json({**_manifest(writer, plan, result), **told}))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _code_files(plan: MergePlan) -> list[Path]:
    """Code of the model's own: carried along as it is, never run here."""
    if "auto_map" not in plan.reference.config:
        return []
    return files_in(plan.reference.folder, ["*.py"])


def _model_card(plan: MergePlan) -> str:
    models = "\n".join(f"- {model.path.name}" for model in plan.models)
    base = f"Base: {plan.reference.path.name}\n\n" if plan.spec.base_model is not None else ""
    return (
        "---\nlibrary_name: transformers\ntags:\n- merge\n- mergecore\n---\n"
        f"# Merge by {plan.method.name}\n\n"
        f"Made with mergecore {__version__}: {plan.method.summary} ({plan.method.reference}).\n\n"
        f"{base}Models:\n\n{models}\n\n"
        f"{'' if plan.evolved is None else plan.evolved.card()}"
        f"```yaml\n{plan.spec.text.strip()}\n```\n"
    )


def _manifest(writer: OutputWriter, plan: MergePlan, result: MergeResult) -> dict[str, Any]:
    stored = {job.name: job for job in plan.jobs}
    tensors = {
        name: {
            "file": plan.layout.shards[slot.shard].filename,
            "offset": slot.offset,
            "bytes": slot.nbytes,
            "dtype": stored[name].dtype,
            "shape": list(stored[name].shape),
            "xxh3_128": writer.checksums[name],
            "merged": stored[name].merges,
        }
        for name, slot in plan.layout.slots.items()
    }
    return {
        "mergecore": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "identity": plan.identity(),
        "method": plan.method.name,
        "spec": plan.spec.as_dict(),
        "spec_text": plan.spec.text,
        "inputs": [
            {"path": str(account.model.path), **account.model.fingerprint(), "tensors": account.as_dict()}
            for account in plan.accounts
        ],
        **({"statistics": _fingerprints(plan.statistics)} if plan.statistics else {}),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "result": {key: value for key, value in result.as_dict().items() if key != "output"},
        "tensors_out": _totals(plan),
        "tensors": tensors,
    }


def _fingerprints(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    return [{"path": str(each.path), **each.fingerprint()} for each in inputs]


def _totals(plan: MergePlan) -> dict[str, dict[str, int]]:
    """Tensors and parameters of the output, as an input's account has them."""
    kinds = {
        "stored": plan.jobs,
        MERGED: [job for job in plan.jobs if job.merges],
        COPIED: [job for job in plan.jobs if not job.merges],
    }
    return {
        kind: {"tensors": len(jobs), "parameters": sum(prod(job.shape) for job in jobs)} for kind, jobs in kinds.items()
    }
