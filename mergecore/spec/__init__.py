"""Specs: text or a dict -> MergeSpec. Imports no torch."""

from __future__ import annotations

from mergecore.spec.evolve import Evolve
from mergecore.spec.filling import filled, keys_of, written
from mergecore.spec.parts import Part
from mergecore.spec.reading import json_schema, load_spec, parse_spec
from mergecore.spec.settings import Setting, evaluate
from mergecore.spec.spec import MergeSpec
from mergecore.spec.tables import ModelEntry, Run, Sparsify

__all__ = [
    "Evolve",
    "MergeSpec",
    "ModelEntry",
    "Part",
    "Run",
    "Setting",
    "Sparsify",
    "evaluate",
    "filled",
    "json_schema",
    "keys_of",
    "load_spec",
    "parse_spec",
    "written",
]
