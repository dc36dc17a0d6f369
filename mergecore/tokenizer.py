"""A model folder's tokenizer: which row of the embedding each token has, and the files that carry it.

Tokens are numbered as the `tokenizers` library and transformers' AutoTokenizer number them when they load the folder,
which is not always what a JSON file claims. Folders are untrusted: no code of theirs is run, nothing is fetched, and
what is malformed or too large is a CheckpointError. What becomes of embedding rows is vocabulary.py's affair.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mergecore.errors import CheckpointError
from mergecore.small_files import files_in, read_bytes, read_if_there, read_object, read_text

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

Files = dict[str, bytes | Path]
"""Files of an output: name -> content, or the file to copy."""

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "spiece.model", "sentencepiece*.model", "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
MOST_TOKENS = 1 << 22
"""The largest vocabularies in use have some 2**18."""

# What comes along when a tokenizer is written anew, and what else holds no vocabulary.
_SETTINGS = ("chat_template*", "preprocessor_config.json", "processor_config.json", "*.py")
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_ATTRIBUTES = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that belong to its tokenizer or processor, by name."""
    return {path.name: path for path in files_in(folder, TOKENIZER_FILES)}


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of one folder, or one made from it. `config` is tokenizer_config.json, {} without one."""

    folder: Path
    backend: Tokenizer
    config: dict[str, Any]
    changed: bool = False
    """Whether it differs from the files in the folder."""

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> row, in the order of rows."""
        vocabulary: dict[str, int] = self.backend.get_vocab()
        return dict(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))

    @cached_property
    def added(self) -> dict[str, AddedToken]:
        """The tokens that are found in a text before it is split, with their attributes, in the order of rows."""
        added = self.backend.get_added_tokens_decoder()
        return {added[row].content: added[row] for row in sorted(added)}

    def role(self, name: str) -> str | None:
        """The token that has a role such as "eos_token"."""
        return _content(self.config.get(name))

    def extended(self, tokens: Iterable[AddedToken]) -> ModelTokenizer:
        """With these added behind the others. A regular token keeps its row and becomes an added one."""
        new = [token for token in tokens if token.content and token.content not in self.added]
        if not new:
            return self
        backend = _backend(self.backend.to_str(), self.folder)
        backend.add_tokens(new)
        return replace(self, backend=backend, changed=True)

    def limited(self, rows: int) -> ModelTokenizer:
        """Without the tokens that would need a row beyond the first `rows`: an embedding has nothing for them."""
        beyond = {token for token, row in self.ids.items() if row >= rows}
        if not beyond:
            return self
        data = json.loads(self.backend.to_str())
        data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] not in beyond]
        model = data["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):  # Unigram: (token, score) pairs
            model["vocab"] = [pair for pair in vocabulary if pair[0] not in beyond]
        else:
            model["vocab"] = {token: row for token, row in vocabulary.items() if token not in beyond}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [
                [left, right]
                for left, right in model["merges"]
                if beyond.isdisjoint((left, right, left + right.removeprefix(prefix)))
            ]
        backend = _backend(json.dumps(data), self.folder)
        return replace(self, backend=backend, config=_forget(self.config, beyond), changed=True)

    def files(self) -> Files:
        """The folder's own files; if it was changed, tokenizer.json and tokenizer_config.json in their stead."""
        own = tokenizer_files(self.folder)
        if not self.changed:
            return {**own}
        config = dict(self.config)
        if isinstance(config.get("added_tokens_decoder"), dict):
            # Loaders that find this key add what it lists, and nothing else.
            attributes = {_content(entry): entry for entry in config["added_tokens_decoder"].values()}
            config["added_tokens_decoder"] = {
                str(self.ids[token]): attributes.get(token, _attributes(added)) for token, added in self.added.items()
            }
        files: Files = {name: path for name, path in own.items() if _matches(name, _SETTINGS)}
        files["tokenizer.json"] = (self.backend.to_str(pretty=True) + "\n").encode()
        files["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        return files


def read_tokenizer(folder: Path) -> ModelTokenizer | None:
    """The tokenizer of a model folder; None where there is none.

    One without tokenizer.json is converted by transformers. CheckpointError says which file is malformed, too large or
    not readable, and what to do.
    """
    names = tokenizer_files(folder)
    config = read_object(folder / "tokenizer_config.json")
    if config.get("added_tokens_decoder") is None:
        # Older folders: what these say overrides the config, as in transformers.
        config |= {name: _tagged(value) for name, value in read_object(folder / "special_tokens_map.json").items()}
    if "tokenizer.json" in names:
        backend = _backend(read_text(folder / "tokenizer.json"), folder / "tokenizer.json")
    else:
        vocabularies = [name for name in names if not _matches(name, (*_SETTINGS, *_COMPANIONS))]
        if not vocabularies:
            return None
        backend, roles = _converted(folder, vocabularies)
        config = roles | config
    try:
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for token in _configured(folder, config) if token.content not in added])
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{folder}: the added tokens in tokenizer_config.json are malformed: {error!r}") from None
    tokenizer = ModelTokenizer(folder, backend, config)
    if max(tokenizer.ids.values(), default=0) >= MOST_TOKENS:
        raise CheckpointError(f"{folder}: the tokenizer has ids of {MOST_TOKENS:,} and more; it is malformed")
    return tokenizer


def same_tokenizer_files(first: Path, second: Path) -> bool:
    """Whether both folders have the same tokenizer.json and companions, byte for byte."""

    if not (first / "tokenizer.json").exists():
        return False
    return all(read_if_there(first / name) == read_if_there(second / name) for name in ("tokenizer.json", *_COMPANIONS))


def tokenizer_differences(folders: Sequence[Path]) -> list[str]:
    """Warnings, one per model at most, about tokenizers that do not number tokens as that of `folders[0]` does.

    Quick: compares what tokenizer.json lists. Silent about folders that have none; no tensor is read.
    """
    warnings: list[str] = []
    first: dict[int, str] | None = None
    for folder in folders[1:]:
        try:
            if same_tokenizer_files(folders[0], folder):
                continue
            first = first or _listed(folders[0])
            other = _listed(folder)
        except CheckpointError as error:
            warnings.append(str(error))
            continue
        if first and other:
            warnings += _differences(folders[0], first, folder, other)
    return list(dict.fromkeys(warnings))


def some_tokens(tokens: Sequence[str]) -> str:
    """How many tokens, and the first three."""
    named = ", ".join(map(repr, tokens[:3])) + (", ..." if len(tokens) > 3 else "")
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({named})"


def _listed(folder: Path) -> dict[int, str] | None:
    """Row -> token, as tokenizer.json lists them; None without the file."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    data = read_object(path)
    try:
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: (token, score) pairs
            tokens = {row: str(pair[0]) for row, pair in enumerate(vocabulary)}
        else:
            tokens = {int(row): token for token, row in vocabulary.items()}
        return tokens | {int(entry["id"]): str(entry["content"]) for entry in data.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a valid tokenizer: {error!r}") from None


def _differences(first: Path, expected: Mapping[int, str], second: Path, found: Mapping[int, str]) -> Iterator[str]:
    moved = [row for row, token in found.items() if expected.get(row, token) != token]
    known = set(expected.values())
    new = [token for token in found.values() if token not in known]
    if moved:
        row = min(moved)
        yield (
            f"the tokenizers of {first} and {second} mean different tokens by {len(moved)} of {len(found)} ids ({row} "
            f"is {expected[row]!r} in the first, {found[row]!r} in the second), but rows of the embeddings are merged "
            "by id; `tokenizer_source: union` merges them by token"
        )
    elif new:
        yield (
            f"{second} has {some_tokens(new)} that the tokenizer of {first} lacks; `tokenizer_source: union` keeps all "
            "tokens"
        )


# ---- What the files say


def _configured(folder: Path, config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The tokens that tokenizer_config.json and its companions name, in the order in which transformers adds them."""
    from tokenizers import AddedToken

    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        decoder = {row: token for token, row in read_object(folder / "added_tokens.json").items()}
    if not isinstance(decoder, dict):
        raise TypeError(f"added_tokens_decoder is {type(decoder).__name__}, not an object")
    named: list[Any] = [decoder[row] for row in sorted(decoder, key=int)]
    named += [config.get(role) for role in _ROLES]
    named += [value for key, value in config.items() if key.endswith("_token") and key not in _ROLES]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(key) or []
        named += extra.values() if isinstance(extra, dict) else extra
    for value in named:
        if isinstance(value, str):
            yield AddedToken(value, special=True)
        elif isinstance(value, dict):
            attributes = {key: entry for key, entry in value.items() if key in _ATTRIBUTES}
            yield AddedToken(attributes.pop("content"), **attributes)


def _tagged(value: Any) -> Any:
    """A token of special_tokens_map.json as tokenizer_config.json writes it."""
    if isinstance(value, dict) and "content" in value:
        return {"__type": "AddedToken", **value, "special": True}
    return value


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _attributes(token: AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in _ATTRIBUTES}


def _forget(config: Mapping[str, Any], tokens: set[str]) -> dict[str, Any]:
    """The config without these tokens, which loaders would add again if a role or a list named them."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_token") and _content(value) in tokens:
            kept[key] = None
        elif isinstance(value, list):
            kept[key] = [entry for entry in value if _content(entry) not in tokens]
        elif key in ("added_tokens_decoder", "extra_special_tokens") and isinstance(value, dict):
            kept[key] = {name: entry for name, entry in value.items() if _content(entry) not in tokens}
        else:
            kept[key] = value
    return kept


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _backend(text: str, path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception, and pyo3's PanicException, which is not one
        raise CheckpointError(f"{path} is not a valid tokenizer: {error}") from None


def _converted(folder: Path, files: Sequence[str]) -> tuple[Tokenizer, dict[str, str]]:
    """What transformers makes of the vocabulary files of older formats, and which token has which role."""
    advice = (
        f"{folder} has no tokenizer.json but {', '.join(files)}; install the converters (`pip install "
        "'mergecore[tokenizers]'`), or load it with transformers' AutoTokenizer and save it with save_pretrained"
    )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CheckpointError(advice) from None
    try:
        with TemporaryDirectory(prefix="mergecore-") as copies:  # its reader opens files by their names
            for path in files_in(folder, (*TOKENIZER_FILES, "config.json")):
                Path(copies, path.name).write_bytes(read_bytes(path))
            loaded = AutoTokenizer.from_pretrained(copies, trust_remote_code=False, local_files_only=True)
        # Through text: its object may be shared with the one in transformers.
        return _backend(loaded.backend_tokenizer.to_str(), folder), dict(loaded.special_tokens_map)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a converter or a missing package raises
        raise CheckpointError(f"{advice}. It cannot be converted here: {error}") from None
