"""A spec: which models are merged, by which method, with which parameters.

The dialect is mergekit's, plus keys of our own: docs/spec.md. Not checked here: that models exist, and which methods
and method parameters there are; planning does that and words its findings with MergeSpec.error. Text becomes a spec in
reading.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from mergecore.errors import SpecError
from mergecore.spec.evolve import Evolve
from mergecore.spec.fields import Dtype, ModelPath, OnNonfinite, Orientation, Seed, Text, refused, table
from mergecore.spec.parts import Models, Module, OutputSlice, Part, Slices, parts_of
from mergecore.spec.problems import Keys, Problem
from mergecore.spec.sweep import Sweep
from mergecore.spec.tables import Calibration, ModelEntry, Parameters, Run, Sparsify, Table
from mergecore.spec.tokenizer import Tokenizer, TokenOf
from mergecore.spec.yaml_lines import Document

FORMS = ("models", "slices", "modules")


class MergeSpec(Table):
    """A whole spec. Immutable; made by load_spec and parse_spec."""

    model_config = ConfigDict(title="mergecore spec")
    looks_like = "a mapping with the keys merge_method and models"
    children = {  # noqa: RUF012
        "models": ModelEntry,
        "slices": OutputSlice,
        "modules": Module,
        "sparsify": Sparsify,
        "calibration": Calibration,
        "tokenizer": Tokenizer,
        "evolve": Evolve,
        "sweep": Sweep,
        "run": Run,
    }
    ignored_when_empty = frozenset({"slices", "modules", "tokenizer"})

    name: Text | None = Field(
        default=None,
        title="Name",
        description="In a file of several documents: what later documents call this merge's result.",
    )

    merge_method: Text = Field(
        title="Merge method", description="Name of the method; `mergecore methods` lists them.", examples=["widen"]
    )
    base_model: ModelPath | None = Field(
        default=None,
        title="Base model",
        description="Path of the model that the others were trained from; deltas are differences to it.",
        examples=["/models/Qwen1.5-14B"],
    )
    models: Models | None = Field(
        default=None,
        title="Models",
        description="The models to merge, in order.",
        examples=[[{"model": "/models/A"}]],
    )
    slices: Slices | None = Field(
        default=None,
        title="Slices",
        description="In the place of models: the output's layers, slice after slice, from layers of models.",
        examples=[[{"sources": [{"model": "/models/A", "layer_range": [0, 16]}]}]],
    )
    modules: Annotated[dict[str, Module], table("a mapping such as {text_decoder: {models: [...]}}")] | None = Field(
        default=None,
        title="Modules",
        description="In the place of models: components of the models by name, each with its own models or slices.",
    )
    parameters: Parameters = Field(
        default={},
        title="Parameters",
        description="Method parameters. Each is a value, a list of values from the first layer to the last, or a list "
        "of {filter, value}, of which the first whose filter is part of the tensor's name decides.",
        examples=[{"t": 1.0, "weight": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]}],
    )
    sparsify: Sparsify | None = Field(
        default=None,
        title="Sparsify",
        description="Drop delta entries in front of the method: at random (DARE, DELLA) or by magnitude.",
        examples=[{"method": "dare", "drop_rate": 0.1}],
    )
    calibration: Calibration = Field(
        default_factory=Calibration,
        title="Calibration",
        description="Methods that are fitted on samples: how many are drawn from each model's data, and how they are "
        "read.",
        examples=[{"samples": 30, "length": 512}],
    )
    dtype: Dtype | None = Field(
        default=None,
        title="Dtype",
        description="Type of the result's tensors, if out_dtype is not given. Sums are always float64.",
    )
    out_dtype: Dtype | None = Field(
        default=None, title="Output dtype", description="Type of the result's tensors; without it, dtype."
    )
    tokenizer_source: ModelPath | None = Field(
        default=None,
        title="Tokenizer source",
        description="The output's tokenizer: union of all, base, or the path of a model; embedding rows follow it.",
        examples=["base"],
    )
    tokenizer: Tokenizer | None = Field(
        default=None,
        title="Tokenizer",
        description="In the place of tokenizer_source: with the origin of single tokens, and padding.",
        examples=[{"source": "union"}],
    )
    chat_template: Text | None = Field(
        default=None,
        title="Chat template",
        description="auto (the most common of the models'), the name of a template, or its Jinja text.",
        examples=["auto"],
    )
    orientation: Annotated[dict[str, Orientation], table("a mapping such as {'*.embed_tokens.weight': rows}")] = Field(
        default={},
        title="Orientation",
        description="Which tensors are scored per stored row or per stored column: glob of the tensor's name to rows "
        "or columns; the first that matches decides. Without one, the architecture tells.",
        examples=[{"*.embed_tokens.weight": "rows"}],
    )
    seed: Seed = Field(default=0, title="Seed", description="Seed of all random choices; 0 <= seed < 2**64.")
    on_nonfinite: OnNonfinite = Field(
        default="error",
        title="On non-finite",
        description="What NaN and Inf in an input lead to: error stops the merge, warn lets them through.",
    )
    evolve: Evolve | None = Field(
        default=None,
        title="Evolve",
        description="A search by CMA-ES for numbers of this spec; the best candidate is the result.",
        examples=[
            {
                "parameters": {"parameters.lambda": [0.0, 2.0]},
                "score": {"text": ["data/a.txt"]},
                "generations": 10,
            }
        ],
    )
    sweep: Sweep | None = Field(
        default=None,
        title="Sweep",
        description="Many merges of the same inputs, which are read once: combinations of methods and parameters. The "
        "output is a folder with a model for each.",
        examples=[{"parameters": {"parameters.lambda": [0.2, 0.4, 0.6]}}],
    )
    run: Run = Field(
        default_factory=Run,
        title="Run",
        description="Where and with what the merge runs; no part of the result's identity.",
        examples=[{"memory": "1GiB"}],
    )

    _path: Path | None = PrivateAttr(default=None)
    _name: str | None = PrivateAttr(default=None)
    _text: str | None = PrivateAttr(default=None)
    _document: Document | None = PrivateAttr(default=None)
    _earlier: tuple[MergeSpec, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _complete(self) -> MergeSpec:
        given = [form for form in FORMS if getattr(self, form) is not None]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none of them"
            raise refused(f"expected one of models, slices and modules, {found}")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise refused("expected one of tokenizer and tokenizer_source, found both")
        if self.evolve is not None and self.sweep is not None:
            raise refused("expected one of evolve and sweep, found both")
        return self

    @property
    def earlier(self) -> tuple[MergeSpec, ...]:
        """The merges of the same file whose results this one needs, in an order in which they can run."""
        return self._earlier

    def parts(self) -> Iterator[Part]:
        """What makes up the output, first layers first; without `slices` one part per module, or one in all."""
        top = ((("parameters",), self.parameters),)
        common: dict[str, Any] = {"base_model": self.base_model}
        if self.modules is None:
            yield from parts_of(self.models, self.slices, module=None, keys=(), levels=top, **common)
        for name, module in (self.modules or {}).items():
            keys: Keys = ("modules", name)
            levels = (((*keys, "parameters"), module.parameters), *top)
            yield from parts_of(module.models, module.slices, module=name, keys=keys, levels=levels, **common)

    def references(self) -> Iterator[tuple[str, Keys]]:
        """Every model that the spec names, and where; a model may be named several times."""
        if self.base_model is not None:
            yield self.base_model, ("base_model",)
        for part in self.parts():
            yield from ((source.model, source.keys) for source in part.sources)
            if part.base_model is not None and part.base_keys != ("base_model",):
                yield part.base_model, part.base_keys
        if self.tokenizer_source not in (None, "base", "union"):
            yield str(self.tokenizer_source), ("tokenizer_source",)
        if self.tokenizer is not None:
            if self.tokenizer.source not in ("base", "union"):
                yield self.tokenizer.source, ("tokenizer", "source")
            for token, entry in self.tokenizer.tokens.items():
                named = entry.source.model if isinstance(entry.source, TokenOf) else entry.source
                if named is not None:
                    yield named, ("tokenizer", "tokens", token, "source")

    def data(self) -> Iterator[tuple[str, Keys]]:
        """Every file of samples and texts, and folder of statistics, that the spec names, and where."""
        for part in self.parts():
            for source in part.sources:
                named = {"data": source.data, "statistics": source.statistics}
                yield from ((path, (*source.keys[:-1], key)) for key, path in named.items() if path is not None)
        if self.evolve is not None:
            for number, text in enumerate(self.evolve.score.text or ()):
                yield text, ("evolve", "score", "text", number)

    @property
    def path(self) -> Path | None:
        """The spec's file; None if it was not read from one."""
        return self._path

    @property
    def directory(self) -> Path:
        """Where relative model paths start: the spec's directory, or the working one."""
        return Path() if self._path is None else self._path.parent

    @property
    def text(self) -> str:
        """The spec as it was given; YAML made from the dict if it was given as one."""
        if self._text is None:
            return str(yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False))
        return self._text

    def line_of(self, *keys: str | int) -> int | None:
        """The line of a key or value, or of the nearest thing around it that the text has; None without a text."""
        return None if self._document is None else self._document.line_of(keys)

    def error(self, message: str, *keys: str | int) -> SpecError:
        """A SpecError `FILE:LINE: key.path: message` about what stands at `keys`."""
        problem = Problem(keys, message, self.line_of(*keys))
        return SpecError(problem.worded(self._name), problem)

    def as_dict(self) -> dict[str, Any]:
        """Everything that is in effect, defaults included, as plain JSON values that load_spec accepts."""
        return self.model_dump(mode="json")

    def identity(self) -> str:
        """Canonical JSON of what decides the bytes of the result's tensors: all but `run`; model paths as written."""
        what = self.as_dict()
        del what["run"], what["name"]
        what["orientation"] = list(what["orientation"].items())  # the first match decides: the order has a meaning
        return json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)
