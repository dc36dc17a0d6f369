"""The `tokenizer` of a spec: which vocabulary the output has, and where the rows of its embeddings come from.

The tables are mergekit's. What they lead to is in vocabulary.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mergecore.spec.fields import ModelPath, Switch, Text, choice, integer, refused, table
from mergecore.spec.tables import Table


class TokenOf(Table):
    """A token of one model, by text or by number; or zeros."""

    looks_like = "a model, {kind: zero} or {kind: model_token, model: /models/A, token: '<s>'}"

    kind: Annotated[Literal["zero", "model_token"], choice("zero", "model_token")] = Field(
        title="Kind", description="zero: a row of zeros. model_token: the row of a token of a model."
    )
    model: ModelPath | None = Field(default=None, title="Model", description="model_token: the model.")
    token: Text | None = Field(default=None, title="Token", description="model_token: the token's text.")
    token_id: Annotated[int, integer(0, 2**31 - 1, "a token's number, from 0")] | None = Field(
        default=None, title="Token id", description="model_token: the token's number."
    )

    @model_validator(mode="after")
    def _complete(self) -> TokenOf:
        given = [name for name in ("model", "token", "token_id") if getattr(self, name) is not None]
        if self.kind == "zero" and given:
            raise refused(f"{given[0]} has no meaning for zero")
        if self.kind == "model_token" and (self.model is None or (self.token is None) == (self.token_id is None)):
            raise refused("model_token needs model, and one of token and token_id")
        return self


def _row_or_model(value: Any) -> str:
    return "row" if isinstance(value, TokenOf | dict) and (not isinstance(value, dict) or "kind" in value) else "model"


class Token(Table):
    """Where one token's row comes from."""

    looks_like = "a mapping such as {source: /models/A, force: true}"

    source: (
        Annotated[
            Annotated[TokenOf, Tag("row")] | Annotated[ModelPath, Tag("model")],
            Discriminator(_row_or_model),
        ]
        | None
    ) = Field(default=None, title="Source", description="A model, {kind: zero} or {kind: model_token, ...}.")
    force: Switch = Field(
        default=False, title="Force", description="Use this row for models that have the token themselves, too."
    )


class Tokenizer(Table):
    """The output's vocabulary."""

    looks_like = "a mapping such as {source: union}"
    children = {"tokens": Token}  # noqa: RUF012

    source: ModelPath = Field(
        default="union",
        title="Source",
        description="union of all vocabularies, base, or the model whose vocabulary is taken.",
        examples=["union"],
    )
    tokens: Annotated[dict[str, Token], table("a mapping such as {'<s>': {source: /models/A}}")] = Field(
        default={}, title="Tokens", description="Where the rows of single tokens come from; new ones are added."
    )
    pad_to_multiple_of: Annotated[int, integer(1, 1 << 20, "a whole number from 1")] | None = Field(
        default=None, title="Pad to multiple of", description="Round the number of rows up to a multiple of this."
    )
