"""Specs: text or a dict -> MergeSpec. Imports no torch."""

from __future__ import annotations

from mergecore.spec.settings import Setting, evaluate
from mergecore.spec.spec import MergeSpec, json_schema, load_spec, parse_size, parse_spec
from mergecore.spec.tables import ModelEntry, Run, Sparsify

__all__ = [
    "MergeSpec",
    "ModelEntry",
    "Run",
    "Setting",
    "Sparsify",
    "evaluate",
    "json_schema",
    "load_spec",
    "parse_size",
    "parse_spec",
]
