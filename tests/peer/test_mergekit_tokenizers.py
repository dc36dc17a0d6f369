"""Vocabularies, rows of embeddings and chat templates are mergekit's; docs/peers.md names what differs.

A linear merge with the weight 1 for one model shows that model's embedding as mergekit lays it out. mergekit numbers
the tokens that a union adds by chance: they are compared by token, those of the base by id.
Runs only where MERGEKIT_PYTHON names the interpreter of an environment with mergekit 0.1.5.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from tokenizers import AddedToken, Tokenizer

from mergecore.chat_template import commonest_template, named_template, with_template
from mergecore.vocabulary import TokenRow, Vocabulary, plan_vocabulary
from tests.models import LLAMA, llama, load_tensors, write_model
from tests.vocabularies import KINDS, Array, laid_out, save, trained, words, write_files

PYTHON = os.environ.get("MERGEKIT_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="mergekit is not here: set MERGEKIT_PYTHON to an interpreter with mergekit 0.1.5"
)
MODELS = ("base", "near", "far")
HIDDEN, EMBEDDING = 16, "model.embed_tokens.weight"
RUN = """
import sys, yaml, pathlib
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.yml")):
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    run_merge(config, str(file.with_suffix("")), MergeOptions(quiet=True, write_model_card=False))
"""


@dataclass(frozen=True)
class Case:
    """Tokenizers of base, near, far; padding rows of all; the keys of the spec, `@near` standing for a model's path."""

    tokenizers: Callable[[], list[Tokenizer]]
    keys: dict[str, Any]
    plan: dict[str, Any] = field(default_factory=dict)
    padding: int = 0
    base: bool = True


def trio(kind: str) -> list[Tokenizer]:
    """Different vocabularies, with tokens of their own that are found before the text is split."""
    base, near, far = [
        trained(kind, text, size, special=("<unk>",))
        for text, size in (("english", 60), ("german", 60), ("german", 50))
    ]
    near.add_tokens([AddedToken("<new>", special=True), "plain", "the"])
    far.add_tokens([AddedToken("<far>", special=True, lstrip=True), AddedToken("<new>", special=True)])
    return [base, near, far]


def three(*vocabularies: str) -> list[Tokenizer]:
    return [words(*tokens) for tokens in vocabularies]


chosen = partial(three, "abz", "bcd", "dea")


TOKENS = {
    "c": {"source": {"kind": "zero"}},
    "d": {"source": "@far"},
    "a": {"source": {"kind": "model_token", "model": "@near", "token": "b"}, "force": True},
    "<x>": {"source": {"kind": "model_token", "model": "@far", "token_id": 1}},
}
OUR_TOKENS = {
    "c": TokenRow("zero"),
    "d": TokenRow(2),
    "a": TokenRow((1, "b"), force=True),
    "<x>": TokenRow((2, 1)),
}
CASES = {
    **{f"union {kind}": Case(partial(trio, kind), {"tokenizer_source": "union"}) for kind in KINDS},
    **{
        f"base {kind}": Case(partial(trio, kind), {"tokenizer_source": "base"}, {"source": "base"}) for kind in KINDS
    },
    "model": Case(partial(trio, "BPE"), {"tokenizer_source": "@near"}, {"source": 1}),
    "one vocabulary": Case(partial(three, "abcd", "abcd", "abcd"), {"tokenizer_source": "union"}),
    "permuted": Case(partial(three, "abcd", "dbac", "cdba"), {"tokenizer_source": "union"}),
    "disjoint": Case(partial(three, "ab", "cd", "ef"), {"tokenizer_source": "union"}),
    "overlapping": Case(partial(three, "ab", "bcd", "dea"), {"tokenizer_source": "union"}),
    "tokens": Case(chosen, {"tokenizer": {"source": "union", "tokens": TOKENS}}, {"tokens": OUR_TOKENS}),
    "multiple": Case(
        chosen, {"tokenizer": {"source": "union", "pad_to_multiple_of": 8}}, {"pad_to_multiple_of": 8}
    ),
    "padding": Case(chosen, {"tokenizer_source": "union"}, padding=4),
    "chat auto": Case(chosen, {"tokenizer_source": "base", "chat_template": "auto"}, {"source": "base"}),
    "chat chatml": Case(chosen, {"tokenizer_source": "base", "chat_template": "chatml"}, {"source": "base"}),
}  # fmt: skip
TEMPLATES = [None, "{{ messages[0]['content'] }}\n", "{{ messages[0]['content'] }}"]


@dataclass(frozen=True)
class Found:
    """Of one case: each model's embedding and the ids of tokens, mergekit's and ours."""

    folder: Path
    theirs: list[Array]
    their_ids: dict[str, int]
    ours: list[Array]
    our_ids: dict[str, int]
    plan: Vocabulary
    tokenizers: list[Tokenizer]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Every case, merged by one process of mergekit."""
    top = tmp_path_factory.mktemp("cases")
    for name, case in CASES.items():
        folder = top / name
        for number, (model, tokenizer) in enumerate(zip(MODELS, case.tokenizers(), strict=True)):
            template = {"chat_template": TEMPLATES[number]} if TEMPLATES[number] else {}
            save(folder / model, tokenizer, eos_token=tokenizer.id_to_token(1), **template)
            rows = tokenizer.get_vocab_size() + case.padding
            tensors = llama(layers=1, hidden=HIDDEN, vocabulary=rows, dtype=torch.float32)
            tensors[EMBEDDING] = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(number))
            config = LLAMA | {
                "vocab_size": rows, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2,
            }  # fmt: skip
            write_model(folder / model, tensors, config)
        for number in range(3):
            models = [
                {"model": f"@{model}", "parameters": {"weight": int(position == number)}}
                for position, model in enumerate(MODELS)
            ]
            spec = {"merge_method": "linear", "base_model": "@base", "models": models, "dtype": "float32", **case.keys}
            text = yaml.safe_dump(spec)
            for model in MODELS:
                text = text.replace(f"'@{model}'", json.dumps(str(folder / model)))
            (top / f"{name} {number}.yml").write_text(text)
    done = subprocess.run(
        [str(PYTHON), "-c", RUN, str(top)], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: found(top, name, case) for name, case in CASES.items()}


def found(top: Path, name: str, case: Case) -> Found:
    folders = [top / name / model for model in MODELS]
    own = [load_tensors(folder)[EMBEDDING].double().numpy() for folder in folders]
    plan = plan_vocabulary(folders, [len(rows) for rows in own], base=0, **case.plan)
    files = plan.files
    if case.keys.get("chat_template") == "auto":
        files = with_template(files, commonest_template(folders) or "")
    elif "chat_template" in case.keys:
        files = with_template(files, named_template(case.keys["chat_template"]))
    return Found(
        top,
        [load_tensors(top / f"{name} {number}")[EMBEDDING].double().numpy() for number in range(3)],
        ids_of(top / f"{name} 0"),
        laid_out(plan, own),
        ids_of(write_files(files, top / f"{name} ours")),
        plan,
        [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in folders],
    )


def ids_of(folder: Path) -> dict[str, int]:
    ids: dict[str, int] = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return ids


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_their_rows_are_mergekit_s(name: str, merged: dict[str, Found]) -> None:
    case = merged[name]
    kept = case.tokenizers[1 if name == "model" else 0].get_vocab().items()
    assert case.our_ids.items() >= kept
    assert case.their_ids.items() >= kept
    assert case.our_ids.keys() == case.their_ids.keys()
    assert set(case.our_ids.values()) == set(case.their_ids.values())
    if name != "padding":
        assert len({*map(len, case.theirs), *map(len, case.ours), case.plan.rows}) == 1
    config = json.loads((case.folder / f"{name} 0" / "config.json").read_text())
    assert name == "padding" or config["vocab_size"] == case.plan.rows
    for number, (theirs, ours) in enumerate(zip(case.theirs, case.ours, strict=True)):
        given = json.loads((case.folder / f"{name} {number}" / "config.json").read_text())
        assert given["vocab_size"] == len(theirs)
        their_ids = ids_of(case.folder / f"{name} {number}")
        for token, row in case.our_ids.items():
            np.testing.assert_allclose(ours[row], theirs[their_ids[token]], rtol=1e-6, atol=1e-7, err_msg=token)
        if name == "multiple":
            np.testing.assert_allclose(ours[len(their_ids) :], theirs[len(their_ids) :], rtol=1e-5, atol=1e-6)


def test_added_tokens_keep_the_attributes_that_mergekit_keeps(merged: dict[str, Found]) -> None:
    for name in (f"union {kind}" for kind in KINDS):
        tokenizers = [
            transformers.AutoTokenizer.from_pretrained(merged[name].folder / f"{name} {which}") for which in (0, "ours")
        ]
        theirs, ours = [{token.content: repr(token) for token in t.added_tokens_decoder.values()} for t in tokenizers]
        assert ours == theirs


@pytest.mark.parametrize("name", ["chat auto", "chat chatml"])
def test_chat_templates_render_as_mergekit_s(name: str, merged: dict[str, Found]) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    theirs, ours = [
        transformers.AutoTokenizer.from_pretrained(merged[name].folder / f"{name} {which}").apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        for which in (0, "ours")
    ]
    assert ours == theirs


# Differences, as docs/peers.md names them ----------------------------------------------------------


def test_padding_is_kept(merged: dict[str, Found]) -> None:
    """mergekit cuts the embedding to the number of tokens."""
    case = merged["padding"]
    assert {len(rows) for rows in case.theirs} == {len(case.our_ids)}
    assert case.plan.rows == max(len(case.our_ids), case.tokenizers[0].get_vocab_size() + 4)
