"""The mappings inside of a spec: a model entry, `sparsify` and `run`, with the description of each key.

The spec itself, which is made of them, is in spec.py; single values are in fields.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergecore.spec.fields import (
    Computed,
    Count,
    Density,
    Device,
    DropRate,
    Length,
    Memory,
    ModelPath,
    Priority,
    Read,
    Size,
    Sparsifier,
    Switch,
    Text,
    Threads,
    Write,
    expected,
    refused,
    table,
)
from mergecore.spec.settings import Setting

Parameters = Annotated[dict[str, Setting], table("a mapping of parameters such as {weight: 0.5}")]


class Table(BaseModel):
    """A mapping with known keys. A key without a value (null) counts as not given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    looks_like: ClassVar[str] = "a mapping"
    ignored_when_empty: ClassVar[frozenset[str]] = frozenset()
    children: ClassVar[Mapping[str, type[Table]]] = {}
    """The tables under a key: the value itself, the items of its list, or the values of its mapping."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise expected(value, cls.looks_like)
        empty = cls.ignored_when_empty
        return {
            key: given
            for key, given in value.items()
            if not ((given is None and key in cls.model_fields) or (not given and key in empty))
        }


class ModelUse(Table):
    """A model, or some layers of it, with parameters of its own."""

    model: ModelPath = Field(
        title="Model",
        description="Path of a Hugging Face model directory; a relative one starts at the spec's directory.",
        examples=["/models/Qwen1.5-14B-Chat"],
    )
    parameters: Parameters = Field(
        default={},
        title="Parameters of this model",
        description="Method parameters for this model; they win over those at the top of the spec.",
        examples=[{"weight": 0.5}],
    )
    statistics: Text | None = Field(
        default=None,
        title="Statistics",
        description="regmean, fisher: the folder that `mergecore stats` made of this model.",
        examples=["/statistics/math"],
    )


class ModelEntry(ModelUse):
    """One model of the merge."""

    looks_like = "a mapping such as {model: /models/A, parameters: {weight: 0.5}}"

    data: Text | None = Field(
        default=None,
        title="Data",
        description="Methods that are fitted on samples: a JSONL or text file of what this model is good at.",
        examples=["/data/math.jsonl"],
    )


class Calibration(Table):
    """The samples that a method is fitted on, drawn from the `data` of each model."""

    looks_like = "a mapping such as {samples: 30, length: 512}"

    samples: Count = Field(default=30, title="Samples", description="Texts drawn from each model's data.")
    length: Length = Field(default=512, title="Length", description="Tokens of a text at most; the rest is cut off.")
    field: Text = Field(default="text", title="Field", description="In JSONL objects: the key of the text.")
    dtype: Computed = Field(
        default="float32", title="Dtype", description="In what the models are run: float32, float64 or bfloat16."
    )


class Sparsify(Table):
    """Dropping of delta entries in front of the method, at random or by magnitude."""

    looks_like = "a mapping such as {method: dare, drop_rate: 0.1}"

    method: Sparsifier = Field(title="Method", description="How entries are chosen.", examples=["dare"])
    drop_rate: DropRate | None = Field(
        default=None,
        title="Drop rate",
        description="dare: the probability of a delta entry to become 0; 0 <= p < 1.",
        examples=[0.1],
    )
    density: Density | None = Field(
        default=None,
        title="Density",
        description="magnitude, breadcrumbs: the share of delta entries that stay, the largest ones; 0 < density <= 1.",
        examples=[0.5],
    )
    gamma: Density | None = Field(
        default=None,
        title="Gamma",
        description="breadcrumbs: the share of the largest delta entries that are dropped before; 0.01 if not given.",
        examples=[0.01],
    )
    epsilon: DropRate | None = Field(
        default=None,
        title="Epsilon",
        description="della: keep-probabilities lie within density +- epsilon, by rank of magnitude in a row; 0.15 if "
        "not given.",
        examples=[0.15],
    )
    rescale: Switch | None = Field(
        default=None,
        title="Rescale",
        description="dare, della: divide the entries that stay by their probability (true). magnitude, breadcrumbs: "
        "restore the sum of the magnitudes (false).",
    )

    @model_validator(mode="after")
    def _complete(self) -> Sparsify:
        needed, allowed = _SPARSIFIER_KEYS[self.method]
        given = {name for name in ("drop_rate", "density", "gamma", "epsilon") if getattr(self, name) is not None}
        if needed not in given:
            raise refused(f"{needed} is missing: {self.method} needs it")
        for name in sorted(given - allowed):
            raise refused(f"{name} has no meaning for {self.method}; expected {' and '.join(sorted(allowed))}")
        if self.method == "della" and self.density is not None and self.density < 1:
            epsilon = 0.15 if self.epsilon is None else self.epsilon
            if not (epsilon < self.density and self.density + epsilon < 1):
                raise refused(f"density {self.density:g} +- epsilon {epsilon:g} must lie between 0 and 1")
        return self


_SPARSIFIER_KEYS = {
    "dare": ("drop_rate", {"drop_rate"}),
    "magnitude": ("density", {"density"}),
    "breadcrumbs": ("density", {"density", "gamma"}),
    "della": ("density", {"density", "epsilon"}),
}
"""By method: the key that it must have, and all that it may have."""


class Run(Table):
    """Where and with what the merge runs. Nothing here changes the values of the result's tensors."""

    looks_like = "a mapping such as {memory: 1GiB, device: auto}"

    output: Text | None = Field(
        default=None,
        title="Output",
        description="Name of the output directory for merges run by the daemon; without it, the spec's own name.",
        examples=["my-merge"],
    )
    device: Device = Field(
        default="auto",
        title="Device",
        description="auto, cpu, cuda, cuda:N or cuda:N+M, several GPUs side by side; auto takes one if there is one.",
    )
    memory: Memory = Field(
        default=1 << 30,
        title="Memory",
        description="Budget of the windows in flight, 16MiB or more: 512MiB (powers of 1024), 1GB (powers of 1000).",
        examples=["1GiB"],
    )
    device_memory: Memory | None = Field(
        default=None,
        title="Device memory",
        description="Bytes of a GPU's memory that are used at most; without it most of what is free at the start.",
        examples=["24GiB"],
    )
    threads: Threads = Field(default=0, title="Threads", description="Threads that compute; 0 for all processors.")
    shard_size: Size = Field(
        default=5 * 10**9, title="Shard size", description="Largest size of an output file.", examples=["5GB"]
    )
    priority: Priority = Field(
        default=0, title="Priority", description="The daemon takes waiting specs with a higher number first."
    )
    force: Switch = Field(
        default=False,
        title="Force",
        description="The daemon runs the merge also if it has done the same spec on the same inputs before.",
    )
    read: Read = Field(
        default="map",
        title="Read",
        description="map: map the input files into memory. pread: read through buffers, for network mounts.",
    )
    write: Write = Field(
        default="direct",
        title="Write",
        description="direct: past the page cache where possible. cached: leave the output in the page cache.",
    )
