"""The embeddings of a merge whose spec asks for a tokenizer: every model's rows in the output's vocabulary.

From the keys of a spec to vocabulary.py's tables, and from tables to sources. Which tokens there are is
vocabulary.py's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mergecore.architecture import embedding_of, head_of, is_head
from mergecore.chat_template import commonest_template, named_template, with_template
from mergecore.errors import CheckpointError
from mergecore.inputs import Input, Inputs
from mergecore.sections import input_error
from mergecore.sources import Filled, RowMap, Source
from mergecore.spec import MergeSpec
from mergecore.spec.problems import Keys
from mergecore.spec.tokenizer import TokenOf
from mergecore.tokenizer import Files, read_tokenizer, tokenizer_differences, tokenizer_files
from mergecore.vocabulary import TokenRow, Vocabulary, plan_vocabulary


class Embeddings:
    """How the models' embeddings and heads are laid out for the output, and the output's tokenizer files.

    Without a tokenizer in the spec everything stays as it is, and the files are the reference's. Raises SpecError and
    CheckpointError.
    """

    def __init__(self, spec: MergeSpec, models: Sequence[Input], base: Input | None, inputs: Inputs) -> None:
        self.models = list(models)
        self.vocabulary: Vocabulary | None = None
        self.warnings: tuple[str, ...] = ()
        reference = base or self.models[0]
        source, keys = _source(spec)
        if source is None:
            self.files: Files = dict(tokenizer_files(reference.folder))
            self.warnings = tuple(tokenizer_differences([model.folder for model in _with_rows(self.models)]))
        else:
            try:
                self.files = self._plan(spec, source, base, inputs)
            except CheckpointError as error:
                raise input_error(spec, keys, str(error)) from error
        if spec.chat_template is not None:
            self.files = self._with_template(spec, reference)

    def laid_out(self, model: Input, name: str, sources: Sequence[Source | None]) -> Source | None:
        """The tensor `name` of `model` in the output's vocabulary; `sources` are those of all models, as stored."""
        number = self.models.index(model)
        own = sources[number]
        if self.vocabulary is None or own is None:
            return own
        table = self.vocabulary.tables[number]
        if table is None:
            return own
        # A model without this tensor (the bias of a head) has zeros for it.
        known = tuple(own if source is None else source for source in sources)
        rows, means = table.table.copy(), dict(table.means)
        for other, source in enumerate(sources):
            if source is None:
                rows[rows[:, 0] == other] = (-1, 0)
                means = {row: tuple(place for place in places if place[0] != other) for row, places in means.items()}
        end = table.filled
        within = {row: places for row, places in means.items() if places and row < end}
        mapped = RowMap((end, *own.shape[1:]), known, rows[:end], within)
        return mapped if end == self.vocabulary.rows else Filled(mapped, self.vocabulary.rows)

    @staticmethod
    def is_vocabulary(name: str, embedding: str | None) -> bool:
        """Whether the tensor has a row per token."""
        return name == embedding or is_head(name)

    def _plan(self, spec: MergeSpec, source: str, base: Input | None, inputs: Inputs) -> Files:
        """The output's tokenizer files, by the vocabulary that is planned unless there is none to start from."""
        asked = spec.tokenizer
        tokens = {}
        for token, entry in (asked.tokens if asked is not None else {}).items():
            here = ("tokenizer", "tokens", token, "source")
            tokens[token] = TokenRow(self._origin(spec, entry.source, here, inputs), entry.force)
        reference = base or self.models[0]
        chosen = reference if source in ("union", "base") else inputs.open(source)
        padding = asked.pad_to_multiple_of if asked is not None else None
        if source != "union" and not tokens and not padding and read_tokenizer(reference.folder) is None:
            # Its rows cannot be told apart, so they stay where they are; the files are a wish of the user.
            self.warnings = (f"{reference.path} has no tokenizer; rows of embeddings are merged as they stand",)
            return dict(tokenizer_files(chosen.folder))
        place: Literal["union", "base"] | int | Path = chosen.folder
        if source in ("union", "base"):
            place = "union" if source == "union" else "base"
        elif chosen in self.models:
            place = self.models.index(chosen)
        self.vocabulary = plan_vocabulary(
            [model.folder for model in self.models],
            [_rows(model) for model in self.models],
            source=place,
            base=None if base is None else self.models.index(base),
            tokens=tokens,
            pad_to_multiple_of=padding or 1,
        )
        self.warnings = self.vocabulary.warnings
        return dict(self.vocabulary.files)

    def _origin(self, spec: MergeSpec, source: TokenOf | str | None, keys: Keys, inputs: Inputs) -> Any:
        """A token's source as TokenRow has it."""
        if source is None:
            return None
        if isinstance(source, TokenOf) and source.kind == "zero":
            return "zero"
        named = source.model if isinstance(source, TokenOf) else source
        model = inputs.open(str(named))
        if model not in self.models:
            raise spec.error(f"{named} is not one of the models that are merged", *keys)
        number = self.models.index(model)
        if not isinstance(source, TokenOf):
            return number
        return number, source.token if source.token is not None else source.token_id

    def _with_template(self, spec: MergeSpec, reference: Input) -> Files:
        assert spec.chat_template is not None
        try:
            if spec.chat_template == "auto":
                template = commonest_template([model.folder for model in self.models])
            else:
                template = named_template(spec.chat_template)
        except ValueError as error:
            raise spec.error(str(error), "chat_template") from None
        if template is None:
            self.warnings += ("no model has a chat template; the output has none",)
            return self.files
        if not self.files:
            self.warnings += (f"{reference.path} has no tokenizer: the chat template stands alone",)
        return with_template(self.files, template)


def _source(spec: MergeSpec) -> tuple[str | None, Keys]:
    if spec.tokenizer is not None:
        return spec.tokenizer.source, ("tokenizer",)
    return spec.tokenizer_source, ("tokenizer_source",)


def _rows(model: Input) -> int:
    """Rows of the model's embedding, or of its head if that has fewer."""
    names = filter(None, (embedding_of(model.tensors), head_of(model.tensors)))
    rows = [model.tensors[name].shape[0] for name in names]
    if not rows:
        raise CheckpointError(f"{model.path} has no embedding of tokens")
    return min(rows)


def _with_rows(models: Sequence[Input]) -> list[Input]:
    """The models that have embeddings of one number of rows: others are refused anyway."""
    found = [model for model in models if embedding_of(model.tensors) is not None]
    return [model for model in found if _rows(model) == _rows(found[0])]
