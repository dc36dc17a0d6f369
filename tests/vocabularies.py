"""Small real tokenizers in model folders, and what tables of rows make of embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mergecore.vocabulary import Vocabulary

TEXTS = {
    "english": "the cat sat on the mat and the dog sat on the log while the cat and the dog ate the hat of the man",
    "german": "die Katze sitzt auf der Matte und der Hund liegt auf dem Teppich weil die Katze und der Hund müde sind",
}
KINDS = ("BPE", "Unigram", "WordPiece")
Array = npt.NDArray[np.float64]


def trained(kind: str, text: str = "english", size: int = 60, special: Sequence[str] = ("<unk>", "<s>")) -> Tokenizer:
    """A tokenizer of this kind, trained on one of the texts."""
    corpus, unknown = [TEXTS[text]] * 4, special[0]
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=list(special), unk_token=unknown, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def words(*tokens: str, added: Sequence[str | AddedToken] = ()) -> Tokenizer:
    """A tokenizer whose regular tokens are these words, with ids from 0."""
    tokenizer = Tokenizer(models.WordLevel({token: row for row, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(list(added))
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer | None, /, **config: Any) -> Path:
    """A folder with tokenizer.json and this tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def three(tmp_path: Path) -> list[Path]:
    """Folders of a base and two models, each of which has tokens that others lack."""
    return [
        save(tmp_path / "base", words("a", "b")),
        save(tmp_path / "near", words("b", "c", "d")),
        save(tmp_path / "far", words("d", "e", "a")),
    ]


def write_files(files: Mapping[str, bytes | Path], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


def ids_of(folder: Path) -> dict[str, int]:
    """What transformers makes of the folder."""
    import transformers

    ids: dict[str, int] = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return ids


def embeddings(*rows: int) -> list[Array]:
    """Entry (r, 0) of model m is 100 m + r: every row tells where it is from."""
    return [np.arange(count, dtype=float)[:, None] + 100 * model for model, count in enumerate(rows)]


def laid_out(vocabulary: Vocabulary, embeddings: Sequence[Array]) -> list[Array]:
    """Every model's embedding (rows, hidden) in the output's vocabulary, as the tables say."""
    result = []
    for own, table in zip(embeddings, vocabulary.tables, strict=True):
        if table is None:
            result.append(own)
            continue
        new = np.zeros((vocabulary.rows, own.shape[1]))
        for row, (model, place) in enumerate(table.table.tolist()):
            if row in table.means:
                new[row] = np.mean([embeddings[m][r] for m, r in table.means[row]], axis=0)
            elif model >= 0:
                new[row] = embeddings[model][place]
        new[table.filled :] = new[: table.filled].mean(axis=0)
        result.append(new)
    return result
