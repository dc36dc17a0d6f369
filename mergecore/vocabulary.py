"""Which rows make the embeddings of an output whose models have different vocabularies.

An output has one tokenizer. Every model's embedding (and head) is first laid out in that tokenizer's order, then merged
like any other tensor; here are only tables of rows, made from tokenizers and numbers of rows. No tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from mergecore.errors import CheckpointError
from mergecore.tokenizer import Files, ModelTokenizer, read_tokenizer, same_tokenizer_files, some_tokens

if TYPE_CHECKING:
    from tokenizers import AddedToken

Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Place = tuple[int, int]
"""(number of a model, row of its embedding)."""

_NOWHERE = -1


@dataclass(frozen=True)
class TokenRow:
    """Where models take the row of one token from that they do not have; with `force`, all models.

    `source`: None for the usual rule (see plan_vocabulary), "zero", the number of a model for its row of the token, or
    (number of a model, another of its tokens, or a row).
    """

    source: Literal["zero"] | int | tuple[int, str | int] | None = None
    force: bool = False


@dataclass(frozen=True)
class RowTable:
    """One model's embedding in the output's vocabulary, row by row.

    table: int64 (rows, 2), the (model number, row) that each row is a copy of; (-1, 0) stands for zeros.
    means: rows that are the mean of several places instead.
    filled: rows from here to the end are the mean of all rows in front of them, whatever the table says there.
    """

    table: Rows
    means: Mapping[int, tuple[Place, ...]]
    filled: int


@dataclass(frozen=True)
class Vocabulary:
    """What a merge that has a tokenizer of its own needs to know."""

    rows: int
    """Rows of the output's embedding and head."""
    tables: tuple[RowTable | None, ...]
    """By model number; None where a model's embedding is taken as it is."""
    files: Files
    """The output's tokenizer files, those of a processor included."""
    warnings: tuple[str, ...]
    moved: Mapping[int, int | None] = field(repr=False)
    """Ids of tokens in the reference's config -> ids in the output (None: the token is gone), where they differ."""
    roles: Mapping[str, int] = field(repr=False)
    """Config keys such as "eos_token_id" -> id of the token that has this role in the output's tokenizer."""
    resized: bool = field(repr=False)
    """Whether the reference's embedding has another number of rows."""

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The reference's config.json or generation_config.json with the output's vocabulary size and token ids.

        The reference is the base, or the first model without one. Token ids follow their tokens; where the output lacks
        the token, they follow its role. `vocab_size` changes at the top where it stands there, and in text_config.
        """
        result = {key: self._id(key, value) for key, value in config.items()}
        text = config.get("text_config")
        if isinstance(text, dict):
            result["text_config"] = self.configured(text)
        # A config leaves out what equals its class's default, also where that is no longer right.
        if self.resized and ("vocab_size" in config or ("model_type" in config and not isinstance(text, dict))):
            result["vocab_size"] = self.rows
        return result

    def digest(self) -> str:
        """xxh3_128 of the tables: equal exactly when every row of every model comes from the same places."""
        state = xxhash.xxh3_128(f"{self.rows}".encode())
        for table in self.tables:
            state.update(b"own" if table is None else f"{table.filled} {sorted(table.means.items())}".encode())
            state.update(b"" if table is None else table.table.tobytes())
        return state.hexdigest()

    def _id(self, key: str, value: Any) -> Any:
        """What stands at a config's key, as ids of the output if it is one id or a list of them."""
        if not key.endswith(("_token_id", "_token_index")):
            return value
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(row, int) for row in listed):
            return value
        ids = [row for row in (self.moved.get(row, row) for row in listed) if row is not None]
        if not ids:
            return self.roles.get(key)
        return ids if isinstance(value, list) else ids[0]


def plan_vocabulary(
    folders: Sequence[Path],
    rows: Sequence[int],
    *,
    source: Literal["union", "base"] | int | Path = "union",
    base: int | None = None,
    tokens: Mapping[str, TokenRow] | None = None,
    pad_to_multiple_of: int = 1,
) -> Vocabulary:
    """The output's tokenizer, and every model's embedding in its vocabulary.

    folders, rows: of every model, its folder and the rows of its embedding (of its head, if that has fewer).
    source: `base` keeps the tokenizer of the base, or of the first model without a base; a model's number or a folder
        keeps that one's; `union` is the base's with all other models' tokens added behind.
    base: its number among the models.
    tokens: are added to the tokenizer where it lacks them; see TokenRow.

    A model takes its own row of a token if it has one. If not: the base's; else the row of the only model that has the
    token; else the mean of all that have it. A token that no model has a row for is zeros. Tokens that lie beyond a
    model's embedding are left out. Rows that belong to no token (padding) are a model's own, or those of the model
    whose tokenizer it is, and the output keeps as many of them as that model has; rows beyond, which
    `pad_to_multiple_of` can add, are the mean of all rows before. So models of one vocabulary keep their embeddings
    as they are.

    CheckpointError where a tokenizer is missing or malformed, or a model lacks a token that `tokens` asks it for.
    """
    tokens = tokens or {}
    reference = 0 if base is None else base
    warnings: list[str] = []
    known = _read(folders, reference, warnings)
    ids = [_within(known[model], folders[model], rows[model], warnings) for model in range(len(folders))]

    donor: int | None
    if isinstance(source, Path):
        output = _required(source)
        donor = next((model for model, own in enumerate(ids) if own == output.ids), None)
    else:
        donor = source if isinstance(source, int) else reference
        output = known[donor].limited(rows[donor])
    if source == "union":
        output = output.extended(_others(known, ids, output, warnings))
    output = output.extended(_asked(tokens, output))

    needed = max(output.ids.values(), default=-1) + 1
    filled = needed if donor is None else max(needed, rows[donor])
    size = -(-filled // pad_to_multiple_of) * pad_to_multiple_of
    is_token, forced = np.zeros((2, size), bool)
    is_token[list(output.ids.values())] = True
    own = _own_rows(ids, rows, output.ids, ~is_token & (np.arange(size) < filled))
    fills, shared = _fills(own, is_token, base, donor)
    for token, asked in tokens.items():
        row = output.ids[token]
        forced[row] = asked.force
        if asked.source is not None:
            fills[row], shared[row] = _place(token, asked.source, folders, rows, ids), False
    zeros = [token for token, row in output.ids.items() if fills[row, 0] < 0 and not shared[row]]
    zeros = [token for token in zeros if token not in tokens or tokens[token].source is None]
    if zeros:
        warnings.append(f"zeros, because no model has a row: {some_tokens(zeros)}")

    roles = {f"{role}_id": output.ids.get(output.role(role) or "") for role in output.config if role.endswith("_token")}
    return Vocabulary(
        rows=size,
        tables=tuple(_table(model, own, fills, shared, forced, filled, rows[model]) for model in range(len(rows))),
        files=output.files(),
        warnings=tuple(dict.fromkeys(warnings)),
        moved={
            row: output.ids.get(token) for token, row in known[reference].ids.items() if output.ids.get(token) != row
        },
        roles={key: row for key, row in roles.items() if row is not None},
        resized=size != rows[reference],
    )


# ---- Tokenizers


def _required(folder: Path) -> ModelTokenizer:
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    return tokenizer


def _read(folders: Sequence[Path], reference: int, warnings: list[str]) -> list[ModelTokenizer]:
    """Every model's tokenizer; the reference's for one that has none."""
    known = []
    expected = _required(folders[reference])
    for model, folder in enumerate(folders):
        if model == reference or same_tokenizer_files(folders[reference], folder):
            known.append(replace(expected, folder=folder))
            continue
        tokenizer = read_tokenizer(folder)
        if tokenizer is None:
            warnings.append(f"{folder} has no tokenizer; taken to be that of {folders[reference]}")
        known.append(tokenizer or expected)
    return known


def _within(tokenizer: ModelTokenizer, folder: Path, rows: int, warnings: list[str]) -> dict[str, int]:
    """The tokens that the model's embedding has rows for."""
    beyond = [token for token, row in tokenizer.ids.items() if row >= rows]
    if beyond:
        warnings.append(
            f"{folder} has {rows} rows and none for {some_tokens(beyond)}, which its tokenizer names: left out"
        )
    return {token: row for token, row in tokenizer.ids.items() if row < rows} if beyond else tokenizer.ids


def _others(
    known: Sequence[ModelTokenizer], ids: Sequence[Mapping[str, int]], output: ModelTokenizer, warnings: list[str]
) -> list[AddedToken]:
    """What a union adds to the base's tokenizer: other models' regular tokens, then their added tokens.

    A tokenizer of another vocabulary cannot make the other's regular tokens from text; so they are added tokens, too.
    """
    from tokenizers import AddedToken

    added: dict[str, AddedToken] = dict(output.added)
    ambiguous = [
        content
        for tokenizer, own in zip(known, ids, strict=True)
        for content, token in tokenizer.added.items()
        if content in own and repr(added.setdefault(content, token)) != repr(token)
    ]
    if ambiguous:
        ambiguous = list(dict.fromkeys(ambiguous))
        warnings.append(f"added with several settings, of which the first are kept: {some_tokens(ambiguous)}")
    regular = [token for own in ids for token in own if token not in output.ids and token not in added]
    if regular:
        regular = list(dict.fromkeys(regular))
        warnings.append(
            "regular tokens of other vocabularies become added tokens, which are cut out of any text that contains "
            f"them, also inside words: {some_tokens(regular)}"
        )
    return [*map(AddedToken, regular), *added.values()]


def _asked(tokens: Mapping[str, TokenRow], output: ModelTokenizer) -> list[AddedToken]:
    """The tokens of a spec that the output's tokenizer lacks."""
    from tokenizers import AddedToken

    if "" in tokens:
        raise CheckpointError("tokens: a token cannot be empty")
    try:
        return [AddedToken(token) for token in tokens if token not in output.ids]
    except UnicodeEncodeError as error:
        raise CheckpointError(f"tokens: {error.object!r} is not valid text: {error.reason}") from None


# ---- Rows


def _own_rows(ids: Sequence[Mapping[str, int]], rows: Sequence[int], output: Mapping[str, int], padding: Flags) -> Rows:
    """Each model's own row for every row of the output, or -1: int64 (models, size).

    For the output's padding it is the same row, if the model has no token there either.
    """
    places = np.fromiter(output.values(), np.int64, len(output))
    own = np.full((len(ids), len(padding)), _NOWHERE, np.int64)
    for model, found in enumerate(ids):
        there = np.fromiter((found.get(token, _NOWHERE) for token in output), np.int64, len(output))
        own[model, places[there >= 0]] = there[there >= 0]
        free = padding & (np.arange(len(padding)) < rows[model])
        free[[row for row in found.values() if row < len(padding)]] = False
        own[model, free] = np.flatnonzero(free)
    return own


def _fills(own: Rows, is_token: Flags, base: int | None, donor: int | None) -> tuple[Rows, Flags]:
    """The place (size, 2) that stands in for a row that a model does not have, and which rows are means of all instead.

    The base's for a token, for padding that of the model whose tokenizer it is; else the only one there is.
    """
    count = (own >= 0).sum(axis=0)
    first = np.argmax(own >= 0, axis=0)
    preferred = np.where(is_token, _NOWHERE if base is None else base, _NOWHERE if donor is None else donor)
    has_preferred = (preferred >= 0) & (np.take_along_axis(own, preferred[None], axis=0)[0] >= 0)
    model = np.where(has_preferred, preferred, np.where(count == 1, first, _NOWHERE))
    row = np.where(model >= 0, np.take_along_axis(own, model[None], axis=0)[0], 0)
    return np.stack([model, row], axis=1), (count > 1) & ~has_preferred


def _place(
    token: str,
    source: Literal["zero"] | int | tuple[int, str | int],
    folders: Sequence[Path],
    rows: Sequence[int],
    ids: Sequence[Mapping[str, int]],
) -> Place:
    """Where a spec asks for a token's row."""
    if source == "zero":
        return (_NOWHERE, 0)
    model, asked = (source, token) if isinstance(source, int) else source
    row = ids[model].get(asked) if isinstance(asked, str) else asked
    if row is None:
        raise CheckpointError(f"tokens: {token!r}: {folders[model]} has no token {asked!r}")
    if not 0 <= row < rows[model]:
        raise CheckpointError(f"tokens: {token!r}: {folders[model]} has no row {row}, only 0 to {rows[model] - 1}")
    return (model, row)


def _table(
    model: int,
    own: Rows,
    fills: Rows,
    shared: Flags,
    forced: Flags,
    filled: int,
    rows: int,
) -> RowTable | None:
    """One model's embedding of `rows` rows in the output's vocabulary; None if nothing changes."""
    size = own.shape[1]
    replaced = (own[model] < 0) | forced
    mine = np.stack([np.full(size, model), own[model]], axis=1)
    table = np.where(replaced[:, None], fills, mine)
    means = {
        int(row): tuple((int(other), int(own[other, row])) for other in np.flatnonzero(own[:, row] >= 0))
        for row in np.flatnonzero(replaced & shared)
    }
    if size == filled == rows and not replaced.any() and (own[model] == np.arange(size)).all():
        return None
    return RowTable(table, means, filled)
