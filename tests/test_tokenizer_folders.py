"""Model folders as they are: tokenizers that do not fit their embedding or config, older formats, malformed files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mergecore.chat_template import commonest_template
from mergecore.errors import CheckpointError
from mergecore.small_files import LARGEST_FILE
from mergecore.tokenizer import read_tokenizer, tokenizer_differences
from mergecore.vocabulary import TokenRow, plan_vocabulary
from tests.vocabularies import KINDS, TEXTS, embeddings, ids_of, laid_out, save, three, trained, words, write_files

ROOT = Path(__file__).parent.parent

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
