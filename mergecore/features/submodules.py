"""The submodules of a layer that SLTA merges one by one: the whole layer, or its attention and its MLP.

A submodule's output is the layer's, with the submodule's weights exchanged and the other weights those of the base; of
the attention with the MLP silenced, so that what the residual stream holds in between is seen. Differences of outputs
are then those of the submodule alone, whatever norms, residuals and parallel branches a layer has (SLTA, A.3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mergecore.errors import CheckpointError
from mergecore.features.passes import Network, Tensors

LAYER, ATTENTION, MLP = "layer", "attn", "mlp"


class Submodules:
    """What layer `number` is made of; found by watching it run on hidden states (1, n, hidden)."""

    def __init__(self, network: Network, number: int, parameters: Tensors, hidden: Tensor) -> None:
        self.network, self.number = network, number
        self.module = network.skeleton.layers[number]
        called = self._watch(parameters, hidden)
        large = [name for name, _, _ in called if self._has_matrices(name)]
        attention = [name for name in large if self._is_attention(name)]
        others = [name for name in large if name not in attention]
        self._parts = {LAYER: set(parameters)}
        if attention and others:
            own = {*attention, *self._norms_of(attention[0], called)}
            in_attention = {name for name in parameters if name.split(".")[0] in own}
            self._parts |= {ATTENTION: in_attention, MLP: set(parameters) - in_attention}
        self.attention: nn.Module | None = getattr(self.module, attention[0]) if attention else None
        self.attention_name = attention[0] if attention else ""
        self._silenced = {name: width for name, _, width in called if name in others}

    def parts(self, level: str) -> list[str]:
        """The submodules at a level: attention and MLP where the layer has both."""
        return [LAYER] if level == LAYER or len(self._parts) == 1 else [ATTENTION, MLP]

    def part_of(self, name: str, level: str) -> str:
        """The submodule that a stored tensor of this layer belongs to."""
        parameter = self.network.skeleton.name_in_layer(name, self.number)
        return next(part for part in self.parts(level) if parameter in self._parts[part])

    def output(self, part: str, base: Mapping[str, Tensor], other: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """(1, n, hidden): the layer's output, or the residual stream behind the attention, with `part` from `other`."""
        mixed = {name: (other if name in self._parts[part] else base)[name] for name in base}
        if part != ATTENTION:
            return self.network.skeleton.layer(self.number, mixed, hidden)
        with self._silence():
            return self.network.skeleton.layer(self.number, mixed, hidden)

    def _watch(self, parameters: Tensors, hidden: Tensor) -> list[tuple[str, Any, Any]]:
        """The layer's children in the order they are called, with what each is given and the width of what it gives,
        and for norms what it is given."""
        called: list[tuple[str, Any, Any]] = []
        self._outputs: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
                given = arguments[0] if arguments else keywords.get("hidden_states")
                first = output[0] if isinstance(output, tuple) else output
                self._outputs[name] = first
                called.append((name, given, (first.shape[-1], len(output) if isinstance(output, tuple) else 0)))

            return hook

        handles = [
            child.register_forward_hook(note(name), with_kwargs=True) for name, child in self.module.named_children()
        ]
        try:
            with torch.no_grad():
                self.network.skeleton.layer(self.number, parameters, hidden)
        finally:
            for handle in handles:
                handle.remove()
        return called

    def _norms_of(self, attention: str, called: list[tuple[str, Any, Any]]) -> Iterator[str]:
        """The norms in front of the attention, and those that its output goes through before anything is added."""
        place = next(i for i, (name, _, _) in enumerate(called) if name == attention)
        output = self._outputs[attention]
        for i, (name, given, _) in enumerate(called):
            if self._has_matrices(name):
                continue
            if i < place:
                yield name
            elif given is output:
                output = self._outputs[name]
                yield name

    def _has_matrices(self, name: str) -> bool:
        return any(parameter.dim() > 1 for parameter in getattr(self.module, name).parameters())

    def _is_attention(self, name: str) -> bool:
        return "attention" in type(getattr(self.module, name)).__name__.lower() or "attn" in name

    @contextmanager
    def _silence(self) -> Iterator[None]:
        """The MLP gives zeros."""

        def zeros(width: int, parts: int) -> Callable[..., Any]:
            def run(*arguments: Any, **keywords: Any) -> Any:
                given = arguments[0] if arguments else keywords["hidden_states"]
                nothing = given.new_zeros(*given.shape[:-1], width)
                return (nothing, *(None,) * (parts - 1)) if parts else nothing

            return run

        modules = [(getattr(self.module, name), shape) for name, shape in self._silenced.items()]
        try:
            for module, (width, parts) in modules:
                module.__dict__["forward"] = zeros(width, parts)
            yield
        finally:
            for module, _ in modules:
                module.__dict__.pop("forward", None)


class Heads:
    """The heads of an attention with projections of its own for queries, keys, values and output (SLTA, A.3.5).

    A head's features are its part of what the output projection is given, times its columns of that projection.
    """

    def __init__(self, submodules: Submodules) -> None:
        attention, config = submodules.attention, submodules.network.skeleton.config.get_text_config(decoder=True)
        names = dict(attention.named_children()) if attention is not None else {}
        if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(names):
            raise CheckpointError(
                f"level: head_mlp needs layers with q_proj, k_proj, v_proj and o_proj; {type(attention).__name__} has "
                f"{', '.join(names) or 'none'}: take level: attn_mlp"
            )
        self.submodules, self.output = submodules, cast(nn.Linear, names["o_proj"])
        self.count = int(config.num_attention_heads)
        self.groups = int(getattr(config, "num_key_value_heads", None) or self.count)
        self.width = int(self.output.in_features) // self.count
        self.weight_name = f"{submodules.attention_name}.o_proj.weight"

    def inputs(self, base: Mapping[str, Tensor], other: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """(1, n, heads * width): what the output projection is given, with the attention from `other`."""
        taken: list[Tensor] = []
        handle = self.output.register_forward_pre_hook(lambda module, arguments: taken.append(arguments[0]))
        try:
            self.submodules.output(ATTENTION, base, other, hidden)
        finally:
            handle.remove()
        return taken[0]

    def features(self, head: int, inputs: Tensor, weight: Tensor) -> Tensor:
        """(n, hidden): one head's, from the projection's inputs and its weight (hidden, heads * width)."""
        own = slice(head * self.width, (head + 1) * self.width)
        return inputs[0, :, own] @ weight[:, own].T

    def spread(self, alphas: Tensor, name: str, length: int) -> tuple[Tensor, str | None]:
        """Weights of the heads, float64 (models, heads), over a tensor of the attention by its name in the layer:
        (models, rows) and "rows", (models, columns) and "columns", or their mean (models, 1) and None.

        `length` is the tensor's number of rows, of columns for the output projection. Keys and values are shared by
        the heads of a group, and get their mean.
        """
        projection, last = name.split(".")[-2:]
        if projection == "o_proj" and last == "weight":
            return alphas.repeat_interleave(length // self.count, 1), "columns"
        axis = "rows" if last == "weight" else "columns"
        if projection == "q_proj":
            return alphas.repeat_interleave(length // self.count, 1), axis
        if projection in ("k_proj", "v_proj"):
            groups = alphas.unflatten(1, (self.groups, -1)).mean(dim=2)
            return groups.repeat_interleave(length // self.groups, 1), axis
        return alphas.mean(dim=1, keepdim=True), None
