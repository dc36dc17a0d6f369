"""Which layers of which models make up the output: `models`, `slices` and `modules`, and their common form, parts.

The tables are mergekit's; a spec has one of the three. Not for looking into models: sections.py does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from mergecore.spec.fields import ModelPath, expected, refused
from mergecore.spec.problems import Keys
from mergecore.spec.settings import evaluate, number_or_same
from mergecore.spec.tables import ModelEntry, ModelUse, Parameters, Table

MODELS_LOOK_LIKE = "a list of models such as [{model: /models/A}, {model: /models/B}]"
SOURCES_LOOK_LIKE = "a list of sources such as [{model: /models/A, layer_range: [0, 16]}]"
SLICES_LOOK_LIKE = "a list of slices such as [{sources: [{model: /models/A, layer_range: [0, 16]}]}]"


def filled_list(what: str) -> BeforeValidator:
    """A list with something in it."""

    def check(value: Any) -> Any:
        if isinstance(value, list | tuple) and value:
            return tuple(value)
        raise expected(value, what)

    return BeforeValidator(check)


def _layer_range(value: Any) -> tuple[int, int]:
    if isinstance(value, list | tuple) and len(value) == 2:
        first, end = value
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in (first, end))
        if whole and 0 <= first < end:
            return int(first), int(end)
    raise expected(value, "[first layer, layer after the last] such as [0, 16]")


LayerRange = Annotated[
    tuple[int, int],
    BeforeValidator(_layer_range),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}),
]


class SliceSource(ModelUse):
    """Some layers of one model."""

    looks_like = "a mapping such as {model: /models/A, layer_range: [0, 16]}"

    layer_range: LayerRange = Field(
        title="Layer range",
        description="The first layer, counted from 0, and the one after the last.",
        examples=[[0, 16]],
    )


class OutputSlice(Table):
    """The next layers of the output: as many as each source names, merged layer by layer."""

    looks_like = "a mapping such as {sources: [{model: /models/A, layer_range: [0, 16]}]}"
    children = {"sources": SliceSource}  # noqa: RUF012

    sources: Annotated[tuple[SliceSource, ...], filled_list(SOURCES_LOOK_LIKE), Field(min_length=1)] = Field(
        title="Sources", description=SOURCES_LOOK_LIKE
    )
    base_model: ModelPath | None = Field(
        default=None, title="Base model", description="The base of these layers, if it is not the spec's."
    )
    residual_weight: float | None = Field(
        default=None, title="Residual weight", description="Accepted as in mergekit, where it has no effect either."
    )
    parameters: Parameters = Field(default={}, title="Parameters", description="Method parameters for these layers.")

    @model_validator(mode="after")
    def _same_length(self) -> OutputSlice:
        lengths = {source.layer_range[1] - source.layer_range[0] for source in self.sources}
        if len(lengths) > 1:
            found = ", ".join(str(list(source.layer_range)) for source in self.sources)
            raise refused(f"the sources of a slice must have the same number of layers; found {found}")
        return self


Models = Annotated[tuple[ModelEntry, ...], filled_list(MODELS_LOOK_LIKE), Field(min_length=1)]
Slices = Annotated[tuple[OutputSlice, ...], filled_list(SLICES_LOOK_LIKE), Field(min_length=1)]


class Module(Table):
    """One component of the models, merged in its own way."""

    looks_like = "a mapping with models or slices"
    children = {"models": ModelEntry, "slices": OutputSlice}  # noqa: RUF012

    models: Models | None = Field(default=None, title="Models", description="Whole models, as at the top of a spec.")
    slices: Slices | None = Field(default=None, title="Slices", description="Layers, as at the top of a spec.")
    parameters: Parameters = Field(default={}, title="Parameters", description="Method parameters for this module.")

    @model_validator(mode="after")
    def _one_form(self) -> Module:
        if (self.models is None) == (self.slices is None):
            raise refused("expected either models or slices")
        return self


class Source(NamedTuple):
    """One model of a part; `layers` is None for all of them."""

    model: str
    keys: Keys
    parameters: Parameters
    layers: tuple[int, int] | None = None
    data: str | None = None


@dataclass(frozen=True)
class Part:
    """The next layers of the output (or all of them), of one module (or all): what is merged there and how."""

    keys: Keys
    module: str | None
    sources: tuple[Source, ...]
    base_model: str | None
    base_keys: Keys
    levels: tuple[tuple[Keys, Parameters], ...]
    """Where method parameters are looked for, nearest first."""

    def settings(self, source: int | None) -> Iterator[tuple[Keys, Parameters]]:
        """The places of parameters for source number `source`, or for the part as a whole."""
        if source is not None:
            yield (*self.sources[source].keys[:-1], "parameters"), self.sources[source].parameters
        yield from self.levels

    def parameter(
        self,
        name: str,
        tensor_name: str,
        t: float = 0.0,
        source: int | None = None,
        *,
        validate: Callable[[Any, Keys], Any] = lambda value, keys: number_or_same(value),
    ) -> Any:
        """The value of a method parameter for a tensor at layer place t (settings.evaluate); None if nothing sets it.

        The source's settings come first; where they give nothing for this tensor, those of the slice, of the
        module and of the spec follow. `validate` gets every scalar with the keys it stands at.
        """
        for keys, settings in self.settings(source):
            if name in settings:
                here = (*keys, name)
                value = evaluate(settings[name], tensor_name, t, validate=lambda found: validate(found, here))  # noqa: B023
                if value is not None:
                    return value
        return None


def parts_of(
    models: tuple[ModelEntry, ...] | None,
    slices: tuple[OutputSlice, ...] | None,
    *,
    module: str | None,
    base_model: str | None,
    keys: Keys,
    levels: tuple[tuple[Keys, Parameters], ...],
) -> Iterator[Part]:
    """The parts of one `models` or `slices` that stands below `keys`."""
    if models is not None:
        sources = tuple(
            Source(entry.model, (*keys, "models", i, "model"), entry.parameters, None, entry.data)
            for i, entry in enumerate(models)
        )
        yield Part((*keys, "models"), module, sources, base_model, ("base_model",), levels)
    for i, part in enumerate(slices or ()):
        here = (*keys, "slices", i)
        sources = tuple(
            Source(entry.model, (*here, "sources", j, "model"), entry.parameters, entry.layer_range)
            for j, entry in enumerate(part.sources)
        )
        base_keys = ("base_model",) if part.base_model is None else (*here, "base_model")
        own = ((*here, "parameters"), part.parameters)
        yield Part(here, module, sources, part.base_model or base_model, base_keys, (own, *levels))
