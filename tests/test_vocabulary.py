"""One tokenizer and one embedding for models of different vocabularies: every row is explained, and loaders agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from mergecore.chat_template import CHATML, commonest_template, folder_template, named_template, with_template
from mergecore.errors import CheckpointError
from mergecore.small_files import LARGEST_FILE
from mergecore.tokenizer import read_tokenizer, tokenizer_differences, tokenizer_files
from mergecore.vocabulary import TokenRow, Vocabulary, plan_vocabulary
from tests.vocabularies import KINDS, TEXTS, Array, laid_out, save, trained, words, write_files

ROOT = Path(__file__).parent.parent


def embeddings(*rows: int) -> list[Array]:
    """Entry (r, 0) of model m is 100 m + r: every row tells where it is from."""
    return [np.arange(count, dtype=float)[:, None] + 100 * model for model, count in enumerate(rows)]


def ids_of(folder: Path) -> dict[str, int]:
    """What transformers makes of the folder."""
    ids: dict[str, int] = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return ids


def by_token(vocabulary: Vocabulary, rows: Sequence[int], folder: Path) -> list[dict[str, float]]:
    """The row of every token of the output, for every model."""
    ids = ids_of(write_files(vocabulary.files, folder))
    return [
        {token: float(embedding[row, 0]) for token, row in ids.items()}
        for embedding in laid_out(vocabulary, embeddings(*rows))
    ]


# ---- The same vocabulary changes nothing


@pytest.mark.parametrize("source", ["union", "base", 1])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_one_vocabulary_keep_their_embeddings_padding_and_files(
    kind: str, source: Any, tmp_path: Path
) -> None:
    tokenizer = trained(kind)
    folders = [save(tmp_path / name, tokenizer, eos_token="<s>") for name in ("base", "near", "far")]
    vocabulary = plan_vocabulary(folders, [128, 128, 128], source=source, base=0)
    assert vocabulary.tables == (None, None, None)
    assert vocabulary.rows == 128
    assert vocabulary.files == tokenizer_files(folders[source if source == 1 else 0])
    assert vocabulary.warnings == ()
    config = {"vocab_size": 128, "eos_token_id": 1}
    assert vocabulary.configured(config) == config


def test_of_more_padding_only_the_base_s_is_kept(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, words("a", "b", "c")) for name in ("base", "near")]
    vocabulary = plan_vocabulary(folders, [4, 6], base=0)
    assert vocabulary.tables[0] is None
    assert laid_out(vocabulary, embeddings(4, 6))[1].ravel().tolist() == [100, 101, 102, 103]


def test_a_model_without_padding_takes_that_of_the_base(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, words("a", "b", "c")) for name in ("base", "near")]
    vocabulary = plan_vocabulary(folders, [5, 3], base=0)
    assert laid_out(vocabulary, embeddings(5, 3))[1].ravel().tolist() == [100, 101, 102, 3, 4]


# ---- Union


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_keeps_the_base_s_ids_and_adds_the_others_behind(kind: str, tmp_path: Path) -> None:
    first, second = trained(kind), trained(kind, "german", special=("<unk>", "<s>", "<|im_end|>"))
    second.add_tokens([AddedToken("<new>", special=True, lstrip=True), "plain"])
    base, near = save(tmp_path / "base", first), save(tmp_path / "near", second)
    sizes = [first.get_vocab_size(), second.get_vocab_size()]
    vocabulary = plan_vocabulary([base, near], sizes, base=0)
    out = write_files(vocabulary.files, tmp_path / "out")
    ids = ids_of(out)
    assert ids == Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
    assert ids.items() >= first.get_vocab().items()
    assert ids.keys() == first.get_vocab().keys() | second.get_vocab().keys()
    assert sorted(ids.values()) == list(range(vocabulary.rows))
    regular = second.get_vocab(with_added_tokens=False).keys() - first.get_vocab().keys() - {"<|im_end|>"}
    assert max(ids[token] for token in regular) < min(ids[token] for token in ("<|im_end|>", "<new>", "plain"))
    added = {
        token.content: token for token in transformers.AutoTokenizer.from_pretrained(out).added_tokens_decoder.values()
    }
    assert added["<new>"].special
    assert added["<new>"].lstrip
    assert not added["plain"].special
    mine, theirs = laid_out(vocabulary, embeddings(*sizes))
    for token, row in ids.items():
        own = [first.token_to_id(token), second.token_to_id(token)]
        places = [own[0], None if own[1] is None else 100 + own[1]]
        assert mine[row, 0] == (places[0] if places[0] is not None else places[1])
        assert theirs[row, 0] == (places[1] if places[1] is not None else places[0])


@pytest.mark.parametrize("kind", KINDS)
def test_text_with_an_added_token_of_another_model_is_cut_there(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_special_tokens(["<|im_start|>"])
    folders = [save(tmp_path / "base", tokenizer), save(tmp_path / "chat", other)]
    vocabulary = plan_vocabulary(folders, [64, 64], base=0)
    loaded = transformers.AutoTokenizer.from_pretrained(write_files(vocabulary.files, tmp_path / "out"))
    text = TEXTS["english"]
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded(text + "<|im_start|>")["input_ids"] == [
        *tokenizer.encode(text).ids,
        other.token_to_id("<|im_start|>"),
    ]
    assert vocabulary.rows == 64
    assert vocabulary.tables[1] is None


def test_regular_tokens_of_another_vocabulary_are_told(tmp_path: Path) -> None:
    folders = [save(tmp_path / "base", words("a", "b")), save(tmp_path / "near", words("b", "c"))]
    (warning,) = plan_vocabulary(folders, [2, 2], base=0).warnings
    assert warning.startswith("regular tokens of other vocabularies become added tokens")
    assert warning.endswith(": 1 token ('c')")


def test_a_token_added_with_several_settings_keeps_the_first(tmp_path: Path) -> None:
    folders = [
        save(tmp_path / name, words("a", added=[AddedToken("<x>", special=special)]))
        for name, special in (("base", True), ("near", False))
    ]
    vocabulary = plan_vocabulary(folders, [2, 2], base=0)
    assert vocabulary.warnings == ("added with several settings, of which the first are kept: 1 token ('<x>')",)
    assert vocabulary.files == tokenizer_files(folders[0])


ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "TokenizersBackend"])
@pytest.mark.parametrize("decoder", [False, True])
def test_tokenizer_classes_that_build_their_own_agree_on_the_ids(
    tokenizer_class: str, decoder: bool, tmp_path: Path
) -> None:
    """Some classes of transformers take the vocabulary from tokenizer.json and added tokens from the config."""
    tokenizers = []
    for name, extra in (("base", ["<|im_start|>", "<|im_end|>"]), ("near", ["<|im_end|>", "<think>"])):
        tokenizer = trained("BPE", special=("<unk>", "<s>", "</s>"))
        tokenizer.add_special_tokens(extra)
        config: dict[str, Any] = {"tokenizer_class": tokenizer_class, **ROLES}
        if decoder:
            config["added_tokens_decoder"] = {
                str(row): {"content": token.content, "special": True, "normalized": False}
                for row, token in tokenizer.get_added_tokens_decoder().items()
            }
        save(tmp_path / name, tokenizer, **config)
        tokenizers.append(tokenizer)
    sizes = [ids.get_vocab_size() for ids in tokenizers]
    vocabulary = plan_vocabulary([tmp_path / "base", tmp_path / "near"], sizes, base=0)
    ids = ids_of(write_files(vocabulary.files, tmp_path / "out"))
    assert ids == tokenizers[0].get_vocab() | {"<think>": sizes[0]}
    assert vocabulary.rows == sizes[0] + 1


# ---- Which row a model takes that lacks a token


def three(tmp_path: Path) -> list[Path]:
    return [
        save(tmp_path / "base", words("a", "b")),
        save(tmp_path / "near", words("b", "c", "d")),
        save(tmp_path / "far", words("d", "e", "a")),
    ]


def test_a_missing_token_is_the_base_s_or_the_only_donor_s_or_the_mean(tmp_path: Path) -> None:
    rows = [2, 3, 3]
    base, near, far = by_token(plan_vocabulary(three(tmp_path), rows, base=0), rows, tmp_path / "out")
    assert base == {"a": 0, "b": 1, "c": 101, "d": (102 + 200) / 2, "e": 201}
    assert near == {"a": 0, "b": 100, "c": 101, "d": 102, "e": 201}
    assert far == {"a": 202, "b": 1, "c": 101, "d": 200, "e": 201}


def test_without_a_base_the_first_model_has_no_precedence(tmp_path: Path) -> None:
    rows = [2, 3, 3]
    first, near, far = by_token(plan_vocabulary(three(tmp_path), rows), rows, tmp_path / "out")
    assert near["a"] == (0 + 202) / 2
    assert far["b"] == (1 + 100) / 2
    assert first["a"] == 0


@pytest.mark.parametrize("base", [0, 2])
def test_the_base_s_tokenizer_decides_what_is_kept(base: int, tmp_path: Path) -> None:
    rows = [2, 3, 3]
    vocabulary = plan_vocabulary(three(tmp_path), rows, source="base", base=base)
    assert vocabulary.tables[base] is None
    found = by_token(vocabulary, rows, tmp_path / "out")
    assert set(found[base]) == (set("ab") if base == 0 else set("dea"))
    assert found[1] == ({"a": 0, "b": 100} if base == 0 else {"d": 102, "e": 201, "a": 202})


def test_a_permuted_vocabulary_follows_its_tokens(tmp_path: Path) -> None:
    folders = [save(tmp_path / "base", words(*"abcd")), save(tmp_path / "near", words(*"dbac"))]
    vocabulary = plan_vocabulary(folders, [4, 4], source="base", base=0)
    assert laid_out(vocabulary, embeddings(4, 4))[1].ravel().tolist() == [102, 101, 103, 100]


def test_a_token_that_no_model_has_is_zeros(tmp_path: Path) -> None:
    folders = three(tmp_path)
    vocabulary = plan_vocabulary(folders, [2, 3, 3], base=0, tokens={"<new>": TokenRow()})
    assert vocabulary.warnings[-1] == "zeros, because no model has a row: 1 token ('<new>')"
    assert {rows["<new>"] for rows in by_token(vocabulary, [2, 3, 3], tmp_path / "out")} == {0}


def test_a_tokenizer_from_outside_the_merge(tmp_path: Path) -> None:
    folders = three(tmp_path)
    elsewhere = save(tmp_path / "elsewhere", words("e", "b", "z"))
    vocabulary = plan_vocabulary(folders, [2, 3, 3], source=elsewhere, base=0)
    assert by_token(vocabulary, [2, 3, 3], tmp_path / "out")[1] == {"e": 201, "b": 100, "z": 0}
    assert vocabulary.files == tokenizer_files(elsewhere)
    same = save(tmp_path / "same", words("a", "b"))
    assert plan_vocabulary([folders[0]], [8], source=same).tables == (None,)


# ---- tokens


def test_tokens_take_their_row_from_where_the_spec_says(tmp_path: Path) -> None:
    tokens = {
        "c": TokenRow("zero"),
        "d": TokenRow(2),
        "<x>": TokenRow((1, "c")),
        "<y>": TokenRow((2, 1)),
    }
    rows = [2, 3, 3]
    vocabulary = plan_vocabulary(three(tmp_path), rows, base=0, tokens=tokens)
    base, near, far = by_token(vocabulary, rows, tmp_path / "out")
    assert base == {"a": 0, "b": 1, "c": 0, "d": 200, "e": 201, "<x>": 101, "<y>": 201}
    assert near["c"] == 101
    assert near["d"] == 102
    assert far["c"] == 0


def test_force_gives_all_models_the_same_row(tmp_path: Path) -> None:
    rows = [2, 3, 3]
    tokens = {
        "a": TokenRow((1, "b"), force=True),
        "b": TokenRow("zero", force=True),
        "d": TokenRow(force=True),
    }
    found = by_token(plan_vocabulary(three(tmp_path), rows, base=0, tokens=tokens), rows, tmp_path / "out")
    assert [(rows["a"], rows["b"], rows["d"]) for rows in found] == [(100, 0, (102 + 200) / 2)] * 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (1, r"tokens: 'e': .*near has no token 'e'"),
        ((0, "z"), r"tokens: 'e': .*base has no token 'z'"),
        ((0, 2), r"tokens: 'e': .*base has no row 2, only 0 to 1"),
        ((0, -1), r"no row -1"),
    ],
)
def test_a_row_that_is_not_there_is_told(source: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_vocabulary(three(tmp_path), [2, 3, 3], base=0, tokens={"e": TokenRow(source)})


@pytest.mark.parametrize("token", ["", "\ud800"])
def test_a_token_that_no_text_can_hold_is_refused(token: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokens: "):
        plan_vocabulary(three(tmp_path), [2, 3, 3], base=0, tokens={token: TokenRow("zero")})


# ---- Padding


@pytest.mark.parametrize(("multiple", "rows"), [(1, 5), (4, 8), (5, 5), (64, 64)])
def test_rows_added_as_padding_are_the_mean_of_all_others(multiple: int, rows: int, tmp_path: Path) -> None:
    vocabulary = plan_vocabulary(three(tmp_path), [2, 3, 3], base=0, pad_to_multiple_of=multiple)
    assert vocabulary.rows == rows
    for embedding in laid_out(vocabulary, embeddings(2, 3, 3)):
        assert embedding.shape == (rows, 1)
        assert (embedding[5:] == embedding[:5].mean()).all()


def test_padding_is_added_to_what_the_base_has(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, words("a", "b")) for name in ("base", "near")]
    vocabulary = plan_vocabulary(folders, [6, 6], base=0, pad_to_multiple_of=4)
    for model, embedding in enumerate(laid_out(vocabulary, embeddings(6, 6))):
        assert embedding.ravel().tolist() == [100 * model + row for row in (*range(6), 2.5, 2.5)]
    assert plan_vocabulary(folders, [8, 8], base=0, pad_to_multiple_of=4).tables == (None, None)


# ---- Tokens beyond the embedding


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_beyond_the_embedding_are_left_out(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<pad>"])
    base = save(tmp_path / "base", tokenizer, pad_token="<pad>", eos_token="<s>", additional_special_tokens=["<pad>"])
    vocabulary = plan_vocabulary([base], [rows], source="base", base=0)
    assert vocabulary.tables == (None,)
    assert vocabulary.warnings == (
        f"{base} has {rows} rows and none for 1 token ('<pad>'), which its tokenizer names: left out",
    )
    loaded = transformers.AutoTokenizer.from_pretrained(write_files(vocabulary.files, tmp_path / "out"))
    assert len(loaded) == rows
    assert loaded.pad_token is None
    assert loaded.eos_token == "<s>"
    assert loaded(TEXTS["english"])["input_ids"] == tokenizer.encode(TEXTS["english"]).ids
    assert vocabulary.configured({"pad_token_id": rows, "eos_token_id": 1}) == {"pad_token_id": None, "eos_token_id": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_regular_vocabulary_is_cut_at_the_embedding(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    base = save(tmp_path / "base", tokenizer)
    vocabulary = plan_vocabulary([base], [50], source="base", base=0)
    ids = ids_of(write_files(vocabulary.files, tmp_path / "out"))
    assert ids == {token: row for token, row in tokenizer.get_vocab().items() if row < 50}


def test_a_token_that_only_the_config_names_has_the_id_that_loaders_give_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a", "b"), pad_token="<pad>", extra_special_tokens=["<x>"])
    expected = {"a": 0, "b": 1, "<pad>": 2, "<x>": 3}
    tokenizer = read_tokenizer(base)
    assert tokenizer is not None
    assert tokenizer.ids == ids_of(base) == expected
    near = save(tmp_path / "near", words("a", "b"))
    vocabulary = plan_vocabulary([base, near], [4, 2], source="base", base=0)
    assert laid_out(vocabulary, embeddings(4, 2))[1].ravel().tolist() == [100, 101, 2, 3]


def test_special_tokens_of_older_folders_count(tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a", "b"))
    token = {"content": "</s>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    (base / "added_tokens.json").write_text(json.dumps({"<y>": 3, "<x>": 2}))
    tokenizer = read_tokenizer(base)
    assert tokenizer is not None
    assert tokenizer.ids == ids_of(base) == {"a": 0, "b": 1, "<x>": 2, "<y>": 3, "</s>": 4}
    near = save(tmp_path / "near", words("a", "b", "c"))
    out = write_files(plan_vocabulary([base, near], [5, 3], base=0).files, tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == tokenizer.ids | {"c": 5}
    assert loaded.eos_token == "</s>"


# ---- config.json


def test_token_ids_of_the_config_follow_their_tokens(tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a", "<s>", "</s>", "<old>"), eos_token="</s>")
    chat = save(tmp_path / "chat", words("</s>", "a", "<s>", "<end>", "b"), eos_token="<end>", pad_token="a")
    vocabulary = plan_vocabulary([base, chat], [4, 5], source=1, base=0)
    config = {
        "vocab_size": 4,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 3,
        "image_token_index": 0,
        "hidden_size": 2,
        "decoder_start_token_id": None,
        "text_config": {"vocab_size": 4, "eos_token_id": 3},
    }
    assert vocabulary.configured(config) == {
        "vocab_size": 5,
        "bos_token_id": 2,
        "eos_token_id": [0],
        "pad_token_id": 1,
        "image_token_index": 1,
        "hidden_size": 2,
        "decoder_start_token_id": None,
        "text_config": {"vocab_size": 5, "eos_token_id": 3},
    }
    assert vocabulary.configured({"eos_token_id": 2, "temperature": 0.5}) == {"eos_token_id": 0, "temperature": 0.5}


def test_the_vocabulary_size_is_told_where_models_are_configured(tmp_path: Path) -> None:
    vocabulary = plan_vocabulary(three(tmp_path), [2, 3, 3], base=0)
    assert vocabulary.configured({"model_type": "llama"}) == {"model_type": "llama", "vocab_size": 5}
    nested = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert vocabulary.configured(nested) == nested | {"text_config": {"model_type": "gemma3_text", "vocab_size": 5}}
    assert vocabulary.configured({"temperature": 1}) == {"temperature": 1}


def test_the_digest_tells_where_rows_come_from(tmp_path: Path) -> None:
    folders, rows = three(tmp_path), [2, 3, 3]
    digests = [
        plan_vocabulary(folders, rows, base=0).digest(),
        plan_vocabulary(folders, rows, base=1).digest(),
        plan_vocabulary(folders, rows).digest(),
        plan_vocabulary(folders, rows, base=0, pad_to_multiple_of=4).digest(),
        plan_vocabulary(folders, rows, base=0, tokens={"a": TokenRow("zero", force=True)}).digest(),
        plan_vocabulary(folders, rows, base=0, source="base").digest(),
    ]
    assert len(set(digests)) == len(digests)
    assert plan_vocabulary(folders, rows, base=0).digest() == digests[0]


# ---- Any vocabularies

NAMES = [chr(ord("a") + i) for i in range(12)]
VOCABULARY = st.lists(st.sampled_from(NAMES), min_size=1, max_size=8, unique=True)


@given(
    vocabularies=st.lists(st.tuples(VOCABULARY, st.integers(0, 3)), min_size=1, max_size=4),
    union=st.booleans(),
    has_base=st.booleans(),
    multiple=st.sampled_from([1, 4]),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_every_row_of_the_output_is_explained(
    vocabularies: list[tuple[list[str], int]],
    union: bool,
    has_base: bool,
    multiple: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Against the rules, token by token."""
    folder = tmp_path_factory.mktemp("any")
    base = data.draw(st.integers(0, len(vocabularies) - 1)) if has_base else None
    names = [list(tokens) for tokens, _ in vocabularies]
    rows = [len(tokens) + padding for tokens, padding in vocabularies]
    folders = [save(folder / str(model), words(*tokens)) for model, tokens in enumerate(names)]
    vocabulary = plan_vocabulary(
        folders, rows, source="union" if union else "base", base=base, pad_to_multiple_of=multiple
    )

    first = 0 if base is None else base
    output = list(names[first])
    if union:
        output += [token for token in dict.fromkeys(chain(*names)) if token not in output]
    ids = Tokenizer.from_file(str(write_files(vocabulary.files, folder / "out") / "tokenizer.json")).get_vocab()
    assert ids == {token: row for row, token in enumerate(output)}
    filled = max(len(output), rows[first])
    assert vocabulary.rows == -(-filled // multiple) * multiple

    given_rows = embeddings(*rows)
    for model, found in enumerate(laid_out(vocabulary, given_rows)):
        for row, token in enumerate(output):
            has = [other for other in range(len(names)) if token in names[other]]
            if model in has:
                has = [model]
            elif base in has:
                has = [first]
            places = [given_rows[other][names[other].index(token), 0] for other in has]
            assert found[row, 0] == np.mean(places)
        for row in range(len(output), filled):
            own = len(names[model]) <= row < rows[model]
            assert found[row, 0] == given_rows[model if own else first][row, 0]
        assert (found[filled:] == found[:filled].mean(axis=0)).all()


# ---- Folders that are not as they should be


def test_a_model_without_a_tokenizer_is_taken_to_have_the_base_s(tmp_path: Path) -> None:
    folders = [save(tmp_path / "base", words("a", "b")), save(tmp_path / "bare", None)]
    vocabulary = plan_vocabulary(folders, [2, 2], base=0)
    assert vocabulary.tables == (None, None)
    assert vocabulary.warnings == (f"{folders[1]} has no tokenizer; taken to be that of {folders[0]}",)
    with pytest.raises(CheckpointError, match=r"bare has no tokenizer; copy tokenizer\.json"):
        plan_vocabulary(folders, [2, 2], base=1)


HOSTILE = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
tokenizer_of = cache(trained)
BROKEN: Mapping[str, Any] = {
    "nothing": "",
    "list": "[]",
    "nested": "[" * 100_000,
    "no model": "{}",
    "pointer": "version https://git-lfs.github.com/spec/v1\n",
    "bytes": b"\xff\xfe",
    "merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
    "unigram": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}},
    "text id": {"model": {"type": "WordLevel", "vocab": {"a": "x"}, "unk_token": "a"}},
    "list id": {"added_tokens": [{"id": [], "content": "a"}]},
    "no token": {"added_tokens": [7]},
    "negative": {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_malformed_tokenizer_is_told(broken: str, tmp_path: Path) -> None:
    folders = [save(tmp_path / name, words("a")) for name in ("base", "near")]
    content = BROKEN[broken]
    if isinstance(content, dict):
        content = json.dumps(json.loads(words("a").to_str()) | content)
    (folders[1] / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"near/tokenizer\.json"):
        plan_vocabulary(folders, [1, 1], base=0)
    assert all("near" in warning for warning in tokenizer_differences(folders))


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": {"content": "b"}}},
        {"added_tokens_decoder": {"5": {"content": 7}}},
        {"added_tokens_decoder": {"5": {"contents": "b"}}},
        {"extra_special_tokens": 5},
    ],
)
def test_a_malformed_tokenizer_config_is_told(config: Any, tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a"))
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        plan_vocabulary([base], [1])


JSON_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.sampled_from([float("inf"), 2**70, "a", "", [], {}, [["a", 1.0]]])
)


def with_one_node_replaced(value: Any, data: st.DataObject) -> Any:
    """The value, with something else in one place of it."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        return value | {key: with_one_node_replaced(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], with_one_node_replaced(value[place], data), *value[place + 1 :]]
    return data.draw(JSON_VALUES)


@given(kind=st.sampled_from(KINDS), name=st.sampled_from(HOSTILE), data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_file_gives_a_vocabulary_or_a_clear_error(
    kind: str, name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = tokenizer_of(kind)
    decoder = {str(row): {"content": token.content} for row, token in tokenizer.get_added_tokens_decoder().items()}
    good = save(folder / "good", tokenizer, eos_token="<s>", extra_special_tokens=["<x>"])
    bad = save(folder / "bad", tokenizer, eos_token="<s>", extra_special_tokens=["<x>"], added_tokens_decoder=decoder)
    if name in ("special_tokens_map.json", "added_tokens.json"):
        save(bad, tokenizer)
        (bad / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<s>", "lstrip": True}}))
        (bad / "added_tokens.json").write_text(json.dumps({"<y>": 60, "<z>": 61}))
    (bad / name).write_text(json.dumps(with_one_node_replaced(json.loads((bad / name).read_text()), data)))
    with suppress(CheckpointError):
        plan_vocabulary([bad, good], [40, 70], base=data.draw(st.integers(0, 1)))
    assert all(isinstance(warning, str) for warning in tokenizer_differences([good, bad]))
    with suppress(CheckpointError):
        commonest_template([bad, good])


def test_files_that_are_too_large_or_no_files_are_not_read(tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a"))
    with open(base / "tokenizer.json", "r+b") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has 134,217,729 bytes"):
        plan_vocabulary([base], [1])
    (base / "tokenizer.json").unlink()
    os.mkfifo(base / "tokenizer.json")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        plan_vocabulary([base], [1])


def test_ids_without_bounds_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a"))
    data = json.loads(words("a").to_str())
    data["model"]["vocab"]["b"] = 4_000_000_000
    (base / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"base: the tokenizer has ids of 4,194,304 and more"):
        plan_vocabulary([base], [1])


def test_a_vocabulary_in_an_older_format_is_converted_or_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (base / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    near = save(tmp_path / "near", words("cat", "dog"))
    vocabulary = plan_vocabulary([base, near], [8, 2], base=0)
    ids = ids_of(write_files(vocabulary.files, tmp_path / "out"))
    assert ids == {token: row for row, token in enumerate([*tokens, "dog"])}
    assert "vocab.txt" not in vocabulary.files
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"base has no tokenizer\.json but vocab\.txt; .*mergecore\[tokenizers\]"):
        plan_vocabulary([base, near], [8, 2], base=0)


def test_a_folder_s_own_code_is_not_run(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "own.py").write_text("raise SystemExit('ran')")
    (base / "vocab.json").write_text("{}")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json but vocab\.json"):
        plan_vocabulary([base], [1])


def test_planning_a_vocabulary_imports_neither_torch_nor_tokenizers_beforehand() -> None:
    code = (
        "import sys, mergecore.vocabulary, mergecore.chat_template\nprint({'torch', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"


# ---- Models that are merged by id although their tokenizers differ


def test_tokenizers_that_number_tokens_alike_are_no_warning(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, words("a", "b"), eos_token=eos) for name, eos in (("base", "a"), ("near", "b"))]
    assert tokenizer_differences([*folders, save(tmp_path / "bare", None), tmp_path / "nowhere"]) == []
    assert tokenizer_differences([tmp_path / "bare", *folders]) == []


def test_other_ids_are_counted_with_an_example(tmp_path: Path) -> None:
    base, near = save(tmp_path / "base", words(*"abcd")), save(tmp_path / "near", words(*"abdc"))
    assert tokenizer_differences([base, near]) == [
        f"the tokenizers of {base} and {near} mean different tokens by 2 of 4 ids (2 is 'c' in the first, 'd' in the "
        "second), but rows of the embeddings are merged by id; `tokenizer_source: union` merges them by token"
    ]


def test_tokens_that_the_output_would_not_know_are_told(tmp_path: Path) -> None:
    base, near = save(tmp_path / "base", words("a")), save(tmp_path / "near", words("a", added=["<x>", "<y>"]))
    (warning,) = tokenizer_differences([base, near])
    assert warning == (
        f"{near} has 2 tokens ('<x>', '<y>') that the tokenizer of {base} lacks; "
        "`tokenizer_source: union` keeps all tokens"
    )
    assert tokenizer_differences([near, base]) == []


# ---- Chat templates

HELLO = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_a_template_is_a_name_or_jinja() -> None:
    assert named_template("chatml") == CHATML
    assert named_template(HELLO) == HELLO
    for wanted in ("alpaca", "", "auto-ish"):
        with pytest.raises(ValueError, match="no chat template: expected auto, chatml, or the template's own text"):
            named_template(wanted)


@pytest.mark.parametrize("stored", ["chat_template.jinja", "tokenizer_config.json", "list", "chat_template.json"])
def test_the_commonest_template_is_found_wherever_it_is(stored: str, tmp_path: Path) -> None:
    folders = [save(tmp_path / name, words("a")) for name in ("base", "one", "two", "bare")]
    (folders[0] / "chat_template.jinja").write_text("{{ 'base' }}")
    for folder in folders[1:3]:
        if stored == "chat_template.jinja":
            (folder / stored).write_text(HELLO + "\n")
        elif stored == "list":
            named = [{"name": "tool_use", "template": "{}"}, {"name": "default", "template": HELLO + "\n"}]
            save(folder, words("a"), chat_template=named)
        else:
            (folder / stored).write_text(json.dumps({"chat_template": HELLO + "\n"}))
    assert [folder_template(folder) for folder in folders] == ["{{ 'base' }}", HELLO + "\n", HELLO + "\n", None]
    assert commonest_template(folders) == HELLO + "\n"
    assert commonest_template(folders[:2]) == "{{ 'base' }}"
    assert commonest_template(folders[3:]) is None


@pytest.mark.parametrize("changed", [False, True])
def test_transformers_applies_the_template_that_was_written(changed: bool, tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a"), chat_template="{{ 'old' }}", eos_token="a")
    near = save(tmp_path / "near", words("a", "b") if changed else words("a"))
    (base / "chat_template.json").write_text('{"chat_template": "{{ 1 }}"}')
    files = plan_vocabulary([base, near], [1, 2], base=0).files
    out = write_files(with_template(files, named_template("chatml")), tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.eos_token == "a"
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert not (out / "chat_template.json").exists()
    loaded = transformers.AutoTokenizer.from_pretrained(write_files(with_template(files, HELLO), tmp_path / "hello"))
    assert loaded.apply_chat_template(MESSAGES, tokenize=False) == "user: Hi\nassistant: Ho\n"
