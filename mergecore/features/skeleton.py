"""A causal language model of transformers without its weights: its modules, run one layer at a time on tensors given.

The model's own `forward` is run with its layers, its embedding and its head taken out, so whatever a model does
between them (masks, positions, scaled embeddings, capped logits) is done as it does it. Not for where tensors come
from (weights.py), nor for going through many samples (passes.py).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergecore.architecture import is_buffer
from mergecore.errors import CheckpointError

Tensors = Mapping[str, Tensor]
OUTSIDE = -1
"""The group of what lies outside of the layers, beside embedding and head."""


@dataclass(frozen=True)
class Call:
    """What a layer is given beside the hidden states: the same for all texts of one length."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    named: bool
    """Whether the hidden states come as the keyword `hidden_states`."""


class Skeleton:
    """The modules of the causal language model that `config` (the content of config.json) describes.

    They compute in `dtype` on `device`, one text at a time, without padding. CheckpointError if transformers has no
    such model (code that comes with a model is never run), or if it is not a stack of layers.
    """

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        self.dtype, self.device = dtype, device or torch.device("cpu")
        self.model: Any = _without_weights(config, dtype, self.device)
        self.config = self.model.config
        text = self.config.get_text_config(decoder=True)
        self.hidden_size, self.vocabulary = int(text.hidden_size), int(text.vocab_size)
        self._prefix, layers = _layers(self.model, int(text.num_hidden_layers))
        self.layers = list(layers)
        self._embedding, self._head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.model.named_modules()}
        self._embedding_name = f"{names[id(self._embedding)]}.weight"
        self._head_name = f"{names[id(self._head)]}." if self._head is not None else ""
        self._transforms = _transforms(self.model)
        self._in_tuple: int | None = None
        self._calls: dict[int, list[Call]] = {}

    # Names: what a checkpoint stores, and which module takes it

    def groups(self, names: Iterable[str]) -> dict[str, int]:
        """Of each stored tensor that a layer or what lies outside of them takes, its layer, or OUTSIDE.

        Embedding and head have groups of their own: they are not in the result (`embedding_of`, `head_of`).
        """
        known = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        found = {}
        for name in names:
            target = self._target(name)[0]
            if target == self._embedding_name or (self._head_name and target.startswith(self._head_name)):
                continue
            if target not in known:
                continue
            found[name] = self._layer(target)
        return found

    def embedding_of(self, names: Iterable[str]) -> str:
        """The stored tensor that is the token embedding."""
        found = next((name for name in names if self._target(name)[0] == self._embedding_name), None)
        if found is None:
            raise CheckpointError(f"no tensor is {self._embedding_name}, the token embedding of {self._class()}")
        return found

    def head_of(self, names: Iterable[str]) -> tuple[str, str | None]:
        """The stored tensors that are the head's weight and bias; a head that is not stored is the embedding."""
        names = list(names)
        targets = {self._target(name)[0]: name for name in names}
        weight = targets.get(f"{self._head_name}weight") or self.embedding_of(names)
        return weight, targets.get(f"{self._head_name}bias")

    def unchanged(self, names: Iterable[str]) -> dict[str, str]:
        """Of each parameter that a stored tensor is as it lies there, by its name in the model, that tensor."""
        found = ((name, *self._target(name)) for name in names)
        return {target: name for name, target, pattern in found if pattern is None}

    def linear_layers(self, number: int) -> dict[str, tuple[nn.Module, int]]:
        """The linear layers inside of a layer by the names of their weights in the model, with their inputs."""
        from transformers.pytorch_utils import Conv1D

        found: dict[str, tuple[nn.Module, int]] = {}
        for name, module in self.layers[number].named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                inputs = module.in_features if isinstance(module, nn.Linear) else module.nx
                found[f"{self._prefix}.{number}.{name}.weight"] = (module, int(inputs))
        return found

    def layer_parameters(self, number: int, tensors: Tensors) -> dict[str, Tensor]:
        """The layer's parameters by their names in it, made from the stored tensors of its group."""
        prefix = f"{self._prefix}.{number}."
        found = {name.removeprefix(prefix): tensor for name, tensor in self._converted(tensors).items()}
        return self._complete(found, self.layers[number], f"layer {number}")

    def name_in_layer(self, name: str, number: int) -> str:
        """What a stored tensor of a layer is (a part of) there."""
        return self._target(name)[0].removeprefix(f"{self._prefix}.{number}.")

    def outside_parameters(self, tensors: Tensors) -> dict[str, Tensor]:
        """The parameters outside of the layers by their names in the model."""
        return self._converted(tensors)

    def _complete(self, found: dict[str, Tensor], module: nn.Module, what: str) -> dict[str, Tensor]:
        wanted = dict(module.named_parameters())
        missing = [name for name in wanted if name not in found]
        if missing:
            raise CheckpointError(f"{what} of {self._class()} lacks {', '.join(missing[:8])}")
        for name, parameter in wanted.items():
            if found[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{what} of {self._class()}: {name} is {list(found[name].shape)}, expected {list(parameter.shape)}"
                )
        buffers = dict(module.named_buffers())
        return {name: tensor for name, tensor in found.items() if name in wanted or name in buffers}

    def _target(self, name: str) -> tuple[str, str | None]:
        """The parameter that a stored tensor becomes (or is a part of), and the pattern that makes it a part."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters, meta = self._transforms
        target: tuple[str, str | None] = rename_source_key(
            name, renamings, converters, self.model.base_model_prefix, meta
        )
        return target

    def _layer(self, target: str) -> int:
        match = re.match(rf"{re.escape(self._prefix)}\.(\d+)\.", target)
        number = OUTSIDE if match is None else int(match[1])
        return number if number < len(self.layers) else OUTSIDE

    def _converted(self, tensors: Tensors) -> dict[str, Tensor]:
        """Parameters by their names in the model: renamed; experts that are stored one by one put together."""
        from transformers.core_model_loading import dot_natural_key

        _, converters, _ = self._transforms
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        found: dict[str, Tensor] = {}
        collected: dict[str, Any] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = self._target(name)
            if pattern is None:
                found[target] = tensors[name]
            else:
                if target not in collected:
                    collected[target] = _differentiable(by_pattern[pattern])
                collected[target].add_tensor(target, name, pattern, tensors[name])
        for target, converter in collected.items():
            made = converter.convert(target, model=self.model, config=self.config)
            found.update({name: part[0] if isinstance(part, list) else part for name, part in made.items()})
        return found

    def _class(self) -> str:
        return type(self.model).__name__

    # Running

    def begin(self, tokens: Tensor, rows: Callable[[Tensor], Tensor], outside: Tensors) -> Tensor:
        """The hidden states that the first layer is given: (1, n, hidden).

        `tokens` are int64 (n,); `rows` gives rows of the embedding, int64 (m,) -> (m, width).
        """
        ids, places = torch.unique(tokens, return_inverse=True)
        table = rows(ids)

        def embed(*_: Any, **__: Any) -> Tensor:
            padding, self._embedding.padding_idx = self._embedding.padding_idx, None
            try:
                with _as_it_is(self._embedding):
                    return functional_call(self._embedding, {"weight": table}, (places.unsqueeze(0),))
            finally:
                self._embedding.padding_idx = padding

        calls: list[tuple[Call, Tensor]] = []
        self._run(tokens, outside, embed, self._record(calls), lambda number, hidden: hidden, _short)
        self._calls.setdefault(len(tokens), [call for call, _ in calls])
        return calls[0][1]

    def layer(self, number: int, parameters: Tensors, hidden: Tensor) -> Tensor:
        """What layer `number` makes of hidden states (1, n, hidden), of a text that `begin` has seen the length of."""
        output = self.layer_output(number, parameters, hidden)
        return output[0] if isinstance(output, tuple) else output

    def layer_output(self, number: int, parameters: Tensors, hidden: Tensor) -> Any:
        call = self._calls[hidden.shape[1]][number]
        arguments = call.arguments if call.named else (hidden, *call.arguments)
        keywords = {**call.keywords, "hidden_states": hidden} if call.named else dict(call.keywords)
        return functional_call(self.layers[number], dict(parameters), arguments, keywords)

    def end(self, hidden: Tensor, outside: Tensors) -> Tensor:
        """What the head is given of the last layer's hidden states (1, n, hidden): the model's features."""
        taken: list[Tensor] = []

        def head(features: Tensor, *_: Any, **__: Any) -> Tensor:
            taken.append(features)
            return _short(features)

        self._finish(hidden, outside, head)
        return taken[0]

    def logits(self, raw: Tensor, outside: Tensors) -> Tensor:
        """The model's logits (1, n, vocabulary), float32 or `dtype`, from what its head gave: scaled, capped, or
        as they are."""
        hidden = torch.zeros(1, raw.shape[1], self.hidden_size, dtype=self.dtype, device=self.device)
        output = self._finish(hidden, outside, lambda *_, **__: raw)
        logits: Tensor = output.logits
        return logits

    def _finish(self, hidden: Tensor, outside: Tensors, head: Callable[..., Tensor]) -> Any:
        last = len(self.layers) - 1
        tokens = torch.zeros(hidden.shape[1], dtype=torch.int64, device=self.device)
        width = self._embedding.weight.shape[1]
        nothing = torch.zeros(1, hidden.shape[1], width, dtype=self.dtype, device=self.device)
        skipped: list[tuple[Call, Tensor]] = []
        record = self._record(skipped)
        return self._run(
            tokens, outside, lambda *_, **__: nothing, record, lambda n, given: hidden if n == last else given, head
        )

    def _record(self, calls: list[tuple[Call, Tensor]]) -> Callable[..., Tensor]:
        def record(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
            named = "hidden_states" in keywords
            hidden: Tensor = keywords.pop("hidden_states") if named else arguments[0]
            calls.append((Call(arguments if named else arguments[1:], keywords, named), hidden))
            return hidden

        return record

    def _run(
        self,
        tokens: Tensor,
        outside: Tensors,
        embed: Callable[..., Tensor],
        record: Callable[..., Tensor],
        output: Callable[[int, Tensor], Tensor],
        head: Callable[..., Tensor],
    ) -> Any:
        """The model's `forward` with the embedding, the layers and the head replaced."""

        def stub(number: int) -> Callable[..., Any]:
            def run(*arguments: Any, **keywords: Any) -> Any:
                return self._as_output(output(number, record(arguments, keywords)))

            return run

        replaced: list[tuple[nn.Module, Callable[..., Any]]] = [(self._embedding, embed), (self._head, head)]
        replaced += [(layer, stub(number)) for number, layer in enumerate(self.layers)]
        if self._in_tuple is None:
            self._in_tuple = 0
            self._in_tuple = self._outputs(tokens, outside, embed)
        with _replaced(replaced):
            return functional_call(
                self.model, dict(outside), (), {"input_ids": tokens.unsqueeze(0), "use_cache": False}
            )

    def _as_output(self, hidden: Tensor) -> Any:
        """The hidden states as a layer returns them: alone, or first in a tuple."""
        return (hidden, *(None,) * (self._in_tuple - 1)) if self._in_tuple else hidden

    def _outputs(self, tokens: Tensor, outside: Tensors, embed: Callable[..., Tensor]) -> int:
        """How many things a layer returns in a tuple, 0 if it returns the hidden states alone: found by running the
        first one with weights of zero, which take no memory on a CPU until they are written."""

        class Found(Exception):
            pass

        first = self.layers[0]
        zeros = {
            name: torch.zeros(parameter.shape, dtype=self.dtype, device=self.device)
            for name, parameter in first.named_parameters()
        }

        def probe(*arguments: Any, **keywords: Any) -> Any:
            with _as_it_is(first):
                found = functional_call(first, zeros, arguments, keywords)
            raise Found(len(found) if isinstance(found, tuple) else 0)

        try:
            with _replaced([(self._embedding, embed), (first, probe)]), torch.no_grad():
                functional_call(self.model, dict(outside), (), {"input_ids": tokens.unsqueeze(0), "use_cache": False})
        except Found as found:
            return int(found.args[0])
        raise CheckpointError(f"{self._class()} does not run the layers {self._prefix}")


def _short(features: Tensor, *_: Any, **__: Any) -> Tensor:
    """In the place of logits that nobody needs."""
    return features[..., :1]


@contextmanager
def _replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Modules with another `forward` for a while."""
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


@contextmanager
def _as_it_is(module: nn.Module) -> Iterator[None]:
    """A replaced module with its own `forward` for a while."""
    forward = module.__dict__.pop("forward")
    try:
        yield
    finally:
        module.__dict__["forward"] = forward


def _without_weights(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """The model with parameters that have no memory; its buffers, which are computed, have some."""
    try:
        from accelerate import init_empty_weights
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError(f"{error}; methods that run models need: pip install mergecore[features]") from error
    kind = str(config.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"transformers has no model of type {kind or '(none in config.json)'!r}; cannot run it")
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        with init_empty_weights(include_buffers=False):
            # The fused products of experts know no float64.
            experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(plain), dtype=dtype, **experts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"transformers makes no causal language model of type {kind!r}: {error}") from error
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    model.requires_grad_(False)
    return model.eval()


def _layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(each) for each in module}) >= 1:
            return name, module
    raise CheckpointError(f"{type(model).__name__} has no list of {count} layers")


def _transforms(model: Any) -> tuple[list[Any], list[Any], dict[str, Tensor]]:
    """How transformers renames and puts together what checkpoints of this model store."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = get_model_conversion_mapping(model)
    converters = [transform for transform in found if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in found if not isinstance(transform, WeightConverter)]
    return renamings, converters, dict(model.state_dict())


def _differentiable(converter: Any) -> Any:
    """A copy of a converter that gradients go through: its operations, which only arrange entries, are made to
    compute without them."""
    converter = copy.deepcopy(converter)
    for operation in converter.operations:
        plain = getattr(type(operation).convert, "__wrapped__", None)
        if plain is not None:
            operation.convert = partial(plain, operation)
    return converter


def stored_names(tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Of stored tensors with their shapes, those that are parameters and not constants of old checkpoints."""
    return [name for name, shape in tensors.items() if not is_buffer(name, shape)]
