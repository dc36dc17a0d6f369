"""The `evolve` of a spec: which numbers of it are searched for, how a candidate is scored, and how long.

Not for putting numbers into the spec (filling.py) or for the search (mergecore/evolve.py).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from mergecore.spec.fields import Count, Length, Text, choice, expected, integer, refused, table
from mergecore.spec.tables import Table

MOST_CANDIDATES = 1_000_000


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))


def _range(value: Any) -> tuple[float, float]:
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_number, value)):
        low, high = float(value[0]), float(value[1])
        if low < high and math.isfinite(high - low):
            return low, high
        raise refused(f"found [{value[0]}, {value[1]}], expected the lower bound first and the higher one after it")
    raise expected(value, "[lower bound, upper bound] such as [0.0, 1.0]")


def _paths(value: dict[str, Any]) -> dict[str, Any]:
    if not value:
        raise expected(value, "at least one parameter such as {parameters.lambda: [0.0, 2.0]}")
    return value


def _sigma(value: Any) -> float:
    if _number(value) and 0 < value <= 0.33:
        return float(value)
    raise expected(value, "a number above 0, up to 0.33")


def _seconds(value: Any) -> float:
    if _number(value) and value > 0:
        return float(value)
    raise expected(value, "a number of seconds above 0")


def _files(value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list | tuple) and listed:
        return tuple(listed)
    raise expected(value, "a list of text files such as [data/a.txt]")


Range = Annotated[
    tuple[float, float],
    BeforeValidator(_range),
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}),
]
Population = Annotated[
    int,
    integer(3, 10_000, "a whole number from 3 to 10000"),
    WithJsonSchema({"type": "integer", "minimum": 3, "maximum": 10_000}),
]
SearchSeed = Annotated[
    int,
    integer(0, 2**32 - 1, "a whole number from 0 to 2**32 - 1"),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 2**32 - 1}),
]
Sigma = Annotated[
    float, BeforeValidator(_sigma), WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 0.33})
]
Seconds = Annotated[float, BeforeValidator(_seconds), WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
Texts = Annotated[
    tuple[Text, ...],
    BeforeValidator(_files),
    WithJsonSchema({"type": ["array", "string"], "items": {"type": "string", "minLength": 1}, "minItems": 1}),
]
Direction = Annotated[Literal["minimise", "maximise"], choice("minimise", "maximise")]


class Score(Table):
    """How good a candidate is: bits per byte of texts, or what a command prints."""

    looks_like = "a mapping such as {text: [data/a.txt]} or {command: 'python score.py {model}'}"

    text: Texts | None = Field(
        default=None,
        title="Text",
        description="Text files; the score is the mean of their bits per byte under the candidate, lower is better.",
        examples=[["data/a.txt", "data/b.txt"]],
    )
    samples: Count | None = Field(
        default=None, title="Samples", description="text: how many stretches of each file are taken; 16 if not given."
    )
    length: Length | None = Field(
        default=None, title="Length", description="text: tokens of a stretch at most; 256 if not given."
    )
    command: Text | None = Field(
        default=None,
        title="Command",
        description="A program and its arguments, without a shell; {model} becomes the candidate's folder. The score "
        "is the last number on its standard output.",
        examples=["python score.py {model}"],
    )
    direction: Direction | None = Field(
        default=None, title="Direction", description="command: minimise (if not given) or maximise the score."
    )
    timeout: Seconds | None = Field(
        default=None,
        title="Timeout",
        description="command: seconds after which it is killed and the candidate has failed; 3600 if not given.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Score:
        if (self.text is None) == (self.command is None):
            raise refused(f"expected one of text and command, found {'none' if self.text is None else 'both'}")
        kind, others = ("text", COMMAND_KEYS) if self.command is None else ("command", TEXT_KEYS)
        for name in others:
            if getattr(self, name) is not None:
                raise refused(f"{name} has no meaning for {kind}")
        if self.command is not None and "{model}" not in self.command:
            raise refused("the command does not say where the model goes: write {model} in it")
        return self


TEXT_KEYS = ("samples", "length")
COMMAND_KEYS = ("direction", "timeout")


class Evolve(Table):
    """A search for parameters by CMA-ES."""

    looks_like = "a mapping with parameters, score and generations"
    children = {"score": Score}  # noqa: RUF012

    parameters: Annotated[
        dict[str, Range],
        table("a mapping such as {parameters.lambda: [0.0, 2.0]}"),
        AfterValidator(_paths),
    ] = Field(
        title="Parameters",
        description="What is searched for: the place of a number in the spec, keys joined by dots and entries of "
        "lists by number from 0, to its lower and upper bound.",
        examples=[{"parameters.lambda": [0.0, 2.0], "models.0.parameters.weight": [0.0, 1.0]}],
    )
    score: Score = Field(title="Score", description=Score.looks_like)
    population: Population | None = Field(
        default=None,
        title="Population",
        description="Candidates of a generation; 4 + 3 ln(number of parameters), rounded down, if not given.",
        examples=[8],
    )
    generations: Count = Field(title="Generations", description="How many generations.", examples=[10])
    sigma: Sigma = Field(
        default=0.3, title="Sigma", description="Standard deviation of the first generation, as a part of each range."
    )
    seed: SearchSeed = Field(default=0, title="Seed", description="Seed of the search; the same gives the same.")

    @model_validator(mode="after")
    def _bounded(self) -> Evolve:
        if self.generations * self.candidates > MOST_CANDIDATES:
            raise refused(f"{self.generations} generations of {self.candidates} are more than {MOST_CANDIDATES} merges")
        return self

    @property
    def candidates(self) -> int:
        """How many a generation has."""
        return self.population or 4 + int(3 * math.log(len(self.parameters)))
