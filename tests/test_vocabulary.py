"""One tokenizer and one embedding for models of different vocabularies: every row is explained, and loaders agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from mergecore.errors import CheckpointError
from mergecore.tokenizer import tokenizer_files
from mergecore.vocabulary import TokenRow, Vocabulary, plan_vocabulary
from tests.vocabularies import KINDS, TEXTS, embeddings, ids_of, laid_out, save, three, trained, words, write_files


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
