"""The output's config.json: the reference's, with what the merge changed: dtype, tied head, number of layers.

Only values; manifest.py writes the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergecore.sections import Section
from mergecore.spec import MergeSpec

QUANTISATIONS = ("quantization_config", "compression_config")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
"""What configs call the number of layers."""


def output_config(
    reference: Mapping[str, Any], spec: MergeSpec, sections: Sequence[Section], *, untied_head: bool
) -> dict[str, Any]:
    """config.json of the output, as plain JSON values; empty if the reference has none.

    `untied_head`: the output has a head of its own although the reference ties it.
    """
    # What was quantised is stored plainly.
    config = {key: value for key, value in reference.items() if key not in QUANTISATIONS}
    if not config:
        return config
    wanted = spec.out_dtype or spec.dtype
    dtypes = {"torch_dtype", "dtype"}
    changed: dict[str, Any] = {} if wanted is None else dict.fromkeys(dtypes, wanted)
    if untied_head:
        changed["tie_word_embeddings"] = False
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):  # of a component
            kept = {inner: entry for inner, entry in value.items() if inner not in QUANTISATIONS}
            config[key] = kept | {inner: entry for inner, entry in changed.items() if inner in kept}
    named = (dtypes & config.keys()) or {"dtype"}
    config |= {key: value for key, value in changed.items() if key not in dtypes - named}
    for module in {section.part.module for section in sections}:
        own = [section for section in sections if section.part.module == module]
        if own[0].layers is not None:
            _set_layers(config, module, own)
    return config


def _set_layers(config: dict[str, Any], module: str | None, sections: list[Section]) -> None:
    """The number of layers of a stack, and what the config lists layer by layer."""
    inner = next((key for key in (f"{module}_config", *_INNER.get(module, ())) if key in config), None)
    place = config if inner is None else {**config[inner]}
    if inner is not None:
        config[inner] = place
    # An encoder and a decoder stand beside each other: the count without a name is the other one's.
    own = (f"num_{module}_layers", f"{module}_layers") if module is not None else ()
    count = next((key for key in (*own, *COUNTS) if isinstance(place.get(key), int)), None)
    if count is None:
        return
    before = place[count]
    place[count] = sum(section.layers or 0 for section in sections)
    for key, value in list(place.items()):
        if "layer" in key and isinstance(value, list) and len(value) == before:
            place[key] = [kind for section in sections for kind in _listed(section, inner, key)]


_INNER: dict[str | None, tuple[str, ...]] = {
    None: ("text_config",),
    "text_decoder": ("text_config", "llm_config"),
    "vision_tower": ("vision_config",),
}
"""Where a module's own config stands in that of the whole model."""


def _listed(section: Section, inner: str | None, key: str) -> list[Any]:
    """What the section's first model lists under `key` for the layers that it gives."""
    pattern = section.base or section.members[0]
    config = pattern.model.config
    values = (config if inner is None else config.get(inner, config)).get(key, [])
    first = pattern.first_layer or 0
    return list(values[first : first + (section.layers or 0)])
