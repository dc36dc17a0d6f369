"""What tensor names and config.json tell about a model: layers, embeddings, tied weights, fused experts.

No list of architectures: names follow the conventions of the field, and what no rule knows still merges
by name. A spec's `orientation` overrides what is said here about scoring.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Orientation = Literal["rows", "columns"]

HEAD = "lm_head.weight"
_LAYER = re.compile(r"^(?P<stack>.*?(?:^|\.)(?:layers?|h|blocks?))\.(?P<index>\d+)\.")
_EMBEDDING = re.compile(
    r"embed_(tokens|positions|in)\w*|(\w+_)?(word|tok|token|type|position)_embeddings?|(tokens|positions|pos)_embed"
    r"|embeddings?|wte|wpe|shared|relative_attention_bias"
)
# transformers.pytorch_utils.Conv1D stores (in, out): an input feature is a stored row.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_SHARED_AGAIN = re.compile(r"(.*?)(?:encoder|decoder)\.embed_tokens\.weight")
_TOWER = re.compile(r"visi|visual|image|audio|speech|multi_?modal|mm_|projector|connector")
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|position_ids|\.(attn|attention)\.bias)$")


def layer_of(name: str) -> tuple[str, int, str] | None:
    """The stack, the layer's number and the rest of a tensor's name; None outside of the layers.

    "model.layers.3.mlp.up_proj.weight" is ("model.layers", 3, "mlp.up_proj.weight").
    """
    match = _LAYER.match(name)
    return None if match is None else (match["stack"], int(match["index"]), name[match.end() :])


def with_layer(name: str, number: int) -> str:
    """The name of the same tensor in another layer."""
    match = _LAYER.match(name)
    return name if match is None else f"{match['stack']}.{number}.{name[match.end() :]}"


def layer_stacks(names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Of each stack, the rest of the name of the tensors in its layers, and how many layers have it."""
    stacks: dict[str, dict[str, int]] = {}
    for layer in filter(None, map(layer_of, names)):
        rests = stacks.setdefault(layer[0], {})
        rests[layer[2]] = rests.get(layer[2], 0) + 1
    return stacks


def renaming(names: Collection[str], others: Collection[str]) -> tuple[str, str] | None:
    """What `others` has in front of its names where `names` has something else: ("model.", "model.language_model.").

    A text model and the text part of a larger one have the same layers below other names. None where they are
    called alike, or where no stack of layers is the same.
    """
    if set(names) == set(others):
        return None
    ours, theirs = layer_stacks(names), layer_stacks(others)
    for stack in [stack for stack in ours if stack not in theirs]:
        for other in [other for other in theirs if other not in ours]:
            if set(ours[stack]) == set(theirs[other]) and stack.split(".")[-1] == other.split(".")[-1]:
                front, back = stack.split("."), other.split(".")
                while front and back and front[-1] == back[-1]:
                    front.pop(), back.pop()
                return "".join(f"{part}." for part in back), "".join(f"{part}." for part in front)
    return None


def tower_of(name: str) -> str | None:
    """The component for images, sound and the like that a tensor belongs to; None for the language model."""
    if not _TOWER.search(name):
        return None
    parts = name.split(".")
    found = next((i for i, part in enumerate(parts[:-1]) if _TOWER.search(part)), None)
    return None if found is None else ".".join(parts[: found + 1])


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside of the layers comes before them (embeddings) and not after (last norm, head)."""
    parts = name.split(".")[:-1]
    return any(_EMBEDDING.fullmatch(part) or part.startswith("embed") for part in parts) and not is_head(name)


def is_head(name: str) -> bool:
    """Whether a tensor is the output head's, or its bias."""
    return name.endswith(("lm_head.weight", "lm_head.bias", "embed_out.weight", "embed_out.bias"))


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a constant that old checkpoints stored (masks, frequencies), not a parameter."""
    return bool(_BUFFER.search(name)) and not (name.endswith(".bias") and len(shape) < 2)


def is_bias(name: str) -> bool:
    """Whether a tensor that is absent may be read as zeros."""
    return name.endswith(".bias")


def is_embedding(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a lookup table whose rows are tokens or positions."""
    parts = name.split(".")
    return len(shape) == 2 and parts[-1] == "weight" and len(parts) > 1 and bool(_EMBEDDING.fullmatch(parts[-2]))


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer or a convolution inside the model (or several: experts)."""
    other = is_head(name) or name.endswith("bias") or is_embedding(name, shape)
    return len(shape) > 1 and 0 not in shape and not other


def embedding_of(names: Iterable[str]) -> str | None:
    """The name of the token embedding, which a tied head shares."""
    endings = (
        "embed_tokens.weight",
        "wte.weight",
        "embed_in.weight",
        "tok_embeddings.weight",
        "word_embeddings.weight",
        "shared.weight",
    )
    return next((name for name in names if name.endswith(endings)), None)


def is_shared_again(name: str, names: Container[str]) -> bool:
    """Whether a tensor repeats `shared.weight`, the embedding that encoder and decoder have in common (T5, BART)."""
    match = _SHARED_AGAIN.fullmatch(name)
    return match is not None and f"{match[1]}shared.weight" in names


def head_of(names: Iterable[str]) -> str | None:
    """The name of the output head; None where none is stored."""
    return next((name for name in names if is_head(name) and name.endswith(".weight")), None)


def is_tied(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a model's output head is its token embedding."""
    text = config.get("text_config")
    flags = [source.get("tie_word_embeddings") for source in (config, text if isinstance(text, Mapping) else {})]
    return head_of(names) is None or True in flags


def place_in(layer: int, count: int) -> float:
    """How far down `count` layers one is, from 0 (first) to 1 (last); a single one stands at 1, as in mergekit."""
    return layer / (count - 1) if count > 1 else 1.0


def _transposed_experts(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The modules whose fused experts are stored (experts, in, out), as some models have them.

    The gate and the up projection together have twice as many outputs as the down projection has inputs: read the
    wrong way round, twice the hidden size would have to equal the hidden size.
    """
    found = set()
    for name, gate_up in shapes.items():
        module, _, last = name.rpartition(".")
        down = shapes.get(f"{module}.down_proj", ())
        if last == "gate_up_proj" and len(gate_up) == len(down) == 3 and gate_up[2] == 2 * down[1]:
            found.add(module)
    return frozenset(found)


@dataclass(frozen=True)
class Architecture:
    """The structure of the output model, from the reference's names and config."""

    model_type: str
    experts: frozenset[int]
    layers: Mapping[str, int]
    """How many layers each stack (the name's part before the layer number) has."""
    orientations: Mapping[str, Orientation]
    """The spec's override: glob of a tensor's name -> orientation; the first match decides."""
    transposed: frozenset[str] = frozenset()
    """Modules whose fused experts are stored (experts, in, out)."""

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        names: Iterable[str],
        orientations: Mapping[str, Orientation],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Architecture:
        """`shapes` of the tensors tell how fused experts are stored; without them (experts, out, in) is taken."""
        layers: dict[str, int] = {}
        for stack, number, _ in filter(None, map(layer_of, names)):
            layers[stack] = max(layers.get(stack, 0), number + 1)
        counts = [config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
        experts = frozenset(count for count in counts if isinstance(count, int))
        transposed = _transposed_experts(shapes or {})
        return cls(str(config.get("model_type", "")), experts, layers, orientations, transposed)

    def place(self, name: str) -> float:
        """Where in its stack a tensor's layer stands, 0 (first) to 1 (last); 0 outside the layers."""
        layer = layer_of(name)
        return 0.0 if layer is None else place_in(layer[1], self.layers[layer[0]])

    def orientation(self, name: str, shape: tuple[int, ...]) -> Orientation:
        """Whether WIDEN's columns lie across the stored rows ("columns") or along them ("rows").

        A linear layer is stored (out, in): a column is an input feature. Embeddings are scored per token.
        Vectors are one row of columns, whatever the spec says.
        """
        if len(shape) < 2:
            return "columns"
        for pattern, orientation in self.orientations.items():
            if fnmatch.fnmatchcase(name, pattern):
                return orientation
        return "rows" if self.is_transposed(name, shape) or is_embedding(name, shape) else "columns"

    def is_transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a linear layer is stored (in, out), or fused experts (experts, in, out)."""
        if len(shape) == 3:
            return name.rpartition(".")[0] in self.transposed
        return self.model_type in _CONV1D_MODELS and bool(_CONV1D.search(name))

    def matrices(self, name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """A tensor as (matrices, rows, columns): vectors are one row, convolutions out x rest, and fused
        experts (experts, out, in) one matrix each. Without elements there are no rows."""
        if 0 in shape:
            return 1, 0, 1
        if len(shape) <= 1:
            return 1, 1, shape[0] if shape else 1
        if len(shape) == 3 and ("expert" in name or shape[0] in self.experts):
            return shape[0], shape[1], shape[2]
        rest = 1
        for size in shape[1:]:
            rest *= size
        return 1, shape[0], rest
