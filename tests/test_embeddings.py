"""Merges of models with different vocabularies, end to end: rows follow their tokens, loaders take what we wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor

import mergecore
from mergecore.errors import CheckpointError, MergecoreError
from mergecore.spec import parse_spec
from tests.models import llama, load_tensors, moved, tensor_bytes, write_model
from tests.vocabularies import Array, laid_out, save, words

HIDDEN = 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = {
    "base": words("<unk>", "<s>", "a", "b", "c", "d"),
    "near": words("<unk>", "<s>", "b", "a", "d", "c", added=[AddedToken("<|im_end|>", special=True)]),
    "far": words("<unk>", "<s>", "a", "x", added=[AddedToken("<|im_end|>", special=True), "<tool>"]),
}
ROWS = {"base": 8, "near": 7, "far": 6}
"""Of base, two more than tokens: padding."""


def config(rows: int) -> dict[str, Any]:
    made = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=1, dtype="float32",
    )  # fmt: skip
    return {**made.to_dict(), "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = llama(2, HIDDEN, 8, dtype=torch.float32)
    for seed, (name, rows) in enumerate(ROWS.items()):
        tensors = moved(base, 1e-2 * seed, seed)
        for each in (EMBEDDING, HEAD):
            tensors[each] = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed + len(each)))
        write_model(folder / name, tensors, config(rows))
        save(folder / name, TOKENS[name], bos_token="<s>", eos_token="<s>")
    (folder / "base" / "generation_config.json").write_text('{"eos_token_id": 1}')
    return folder


def text(method: str, *extra: str, base: str | None = "base", models: tuple[str, ...] = ("near", "far")) -> str:
    lines = [f"merge_method: {method}", "models: [" + ", ".join(f"{{model: {name}}}" for name in models) + "]"]
    return "\n".join([*lines, *([f"base_model: {base}"] if base else []), *extra]) + "\n"


def merged(folder: Path, spec: str, out: Path, **options: Any) -> dict[str, Tensor]:
    mergecore.merge(parse_spec(spec, path=folder / "spec.yaml"), out, device="cpu", **options)
    return load_tensors(out)


def rows_of(folder: Path, spec: str, name: str) -> list[Array]:
    """Every model's tensor in the output's vocabulary, by the tables: base, near, far."""
    vocabulary = mergecore.plan(parse_spec(spec, path=folder / "spec.yaml")).vocabulary
    assert vocabulary is not None
    return laid_out(vocabulary, [load_tensors(folder / model)[name].double().numpy() for model in ROWS])


@pytest.mark.parametrize("source", ["union", "base", "far"])
@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_rows_are_merged_token_by_token(name: str, source: str, folder: Path, tmp_path: Path) -> None:
    spec = text("task_arithmetic", f"tokenizer_source: {source}", "parameters: {weight: 0.5}", "dtype: float32")
    out = merged(folder, spec, tmp_path / "out")
    base, near, far = rows_of(folder, spec, name)
    expected = base + 0.5 * (near - base) + 0.5 * (far - base)
    assert out[name].shape == base.shape
    assert np.abs(out[name].numpy() - expected).max() <= 1e-6 * np.abs(expected).max()
    whole = "model.layers.0.mlp.up_proj.weight"
    plain = merged(folder, spec, tmp_path / "again")
    assert torch.equal(out[whole], plain[whole])


def test_loaders_take_the_union(folder: Path, tmp_path: Path) -> None:
    merged(folder, text("linear", "tokenizer_source: union", base=None, models=tuple(ROWS)), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    loader: Any = transformers.AutoModelForCausalLM
    model, told = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    ids = tokenizer.get_vocab()
    assert ids.keys() == {token for each in TOKENS.values() for token in each.get_vocab()}
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == len(ids)
    assert ids["<s>"] == model.config.eos_token_id == 1
    output = model(**tokenizer("<s> a x <|im_end|>", return_tensors="pt"))
    assert output.logits.shape[-1] == model.config.vocab_size
    embedding = load_tensors(tmp_path / "out")[EMBEDDING]
    far = load_tensors(folder / "far")[EMBEDDING]
    assert torch.equal(embedding[ids["x"]], far[TOKENS["far"].token_to_id("x")])  # only far has it


@pytest.mark.parametrize("method", ["widen", "slerp", "karcher", "ties", "model_stock", "tsv"])
def test_every_kind_of_method_sees_the_rows_in_order(method: str, folder: Path, tmp_path: Path) -> None:
    """The same as merging checkpoints whose rows were put in order before."""
    models = ("near",) if method == "slerp" else ("near", "far")
    parameters = {"slerp": "parameters: {t: 0.4}", "ties": "parameters: {density: 0.6}"}.get(method, "")
    spec = text(method, "tokenizer_source: base", parameters, "dtype: float32", models=models)
    ordered = tmp_path / "ordered"
    vocabulary = mergecore.plan(parse_spec(spec, path=folder / "spec.yaml")).vocabulary
    assert vocabulary is not None
    used = ("base", *models)
    tensors = {model: load_tensors(folder / model) for model in used}
    for name in (EMBEDDING, HEAD):
        rows = laid_out(vocabulary, [tensors[model][name].double().numpy() for model in used])
        for model, row in zip(used, rows, strict=True):
            tensors[model][name] = torch.from_numpy(row).float()
    for model in used:
        write_model(ordered / model, tensors[model], config(vocabulary.rows))
    plain = text(method, parameters, "dtype: float32", models=models)
    merged(folder, spec, tmp_path / "out")
    merged(ordered, plain, tmp_path / "plain")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(tmp_path / "plain")


def test_tokens_have_rows_from_where_the_spec_says(folder: Path, tmp_path: Path) -> None:
    spec = text(
        "linear",
        "tokenizer: {source: base, pad_to_multiple_of: 4, tokens: {new: {source: {kind: model_token, model: far, "
        "token: x}}, none: {source: {kind: zero}}, a: {source: near, force: true}}}",
        "dtype: float32",
        base=None,
        models=tuple(ROWS),
    )
    out = merged(folder, spec, tmp_path / "out")[EMBEDDING]
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    near, far = (load_tensors(folder / model)[EMBEDDING] for model in ("near", "far"))
    assert torch.equal(out[ids["new"]], far[3])
    assert not out[ids["none"]].any()
    assert torch.equal(out[ids["a"]], near[3])
    assert out.shape[0] % 4 == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == out.shape[0]


def test_rows_that_padding_adds_are_the_mean_of_all(folder: Path, tmp_path: Path) -> None:
    spec = text("passthrough", "tokenizer: {source: base, pad_to_multiple_of: 10}", base=None, models=("far",))
    out, before = merged(folder, spec, tmp_path / "out")[EMBEDDING], load_tensors(folder / "far")[EMBEDDING]
    assert out.shape == (10, HIDDEN)
    assert torch.equal(out[:6], before)
    for row in out[6:]:
        assert torch.equal(row, before.double().mean(dim=0).float())


@pytest.mark.parametrize("memory", [16 << 20, 1 << 30])
def test_the_bytes_do_not_depend_on_memory(memory: int, folder: Path, tmp_path: Path) -> None:
    spec = text("widen", "tokenizer: {source: union, pad_to_multiple_of: 16}")
    merged(folder, spec, tmp_path / "first")
    merged(folder, spec, tmp_path / "second", memory=memory)
    assert tensor_bytes(tmp_path / "first") == tensor_bytes(tmp_path / "second")


def test_models_of_one_vocabulary_are_merged_as_they_stand(tmp_path: Path) -> None:
    base = llama(1, HIDDEN, 9)
    for name, tensors in {"base": base, "near": moved(base, 1e-3, 1)}.items():
        save(write_model(tmp_path / name, tensors, config(9)), TOKENS["base"])
    plain = merged(tmp_path, text("slerp", "parameters: {t: 0.5}", models=("near",)), tmp_path / "plain")
    union = text("slerp", "parameters: {t: 0.5}", "tokenizer_source: union", models=("near",))
    assert (
        tensor_bytes(tmp_path / "plain")
        == (merged(tmp_path, union, tmp_path / "out"), tensor_bytes(tmp_path / "out"))[1]
    )
    assert plain.keys() == base.keys()


def test_without_a_tokenizer_key_other_ids_are_a_warning(tmp_path: Path) -> None:
    base = llama(1, HIDDEN, 6)
    swapped = words("<unk>", "<s>", "b", "a", "c", "d")
    save(write_model(tmp_path / "base", base, config(6)), TOKENS["base"])
    save(write_model(tmp_path / "near", base, config(6)), swapped)
    plan = mergecore.plan(parse_spec(text("linear", base=None, models=("base", "near")), path=tmp_path / "s.yaml"))
    (warning,) = plan.warnings
    assert "'b' in the second" in warning
    assert "tokenizer_source: union" in warning


def test_a_chat_template_goes_into_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    merged(folder, text("linear", "chat_template: chatml", base=None, models=("near",)), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b"}], tokenize=False, add_generation_prompt=True
    )
    assert said == "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("chat_template: llama9", "chat_template: 'llama9' is no chat template: expected auto, chatml"),
        ("tokenizer: {tokens: {a: {source: elsewhere}}}", "elsewhere does not exist"),
        ("tokenizer_source: elsewhere", "tokenizer_source: elsewhere does not exist"),
        ("tokenizer: {tokens: {q: {source: far}}}", "far has no token 'q'"),
    ],
)
def test_what_is_not_there_is_told(extra: str, message: str, folder: Path) -> None:
    with pytest.raises(MergecoreError) as caught:
        mergecore.plan(parse_spec(text("linear", extra), "spec.yaml", path=folder / "spec.yaml"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("spec.yaml:")


def test_a_union_of_models_without_tokenizers_is_refused(tmp_path: Path) -> None:
    for name in ("base", "near"):
        write_model(tmp_path / name, llama(1, HIDDEN, 6), config(6))
    spec = text("linear", "tokenizer_source: union", models=("near",))
    with pytest.raises(CheckpointError, match=r"tokenizer_source: .*base has no tokenizer"):
        mergecore.plan(parse_spec(spec, path=tmp_path / "spec.yaml"))


def test_the_result_of_an_earlier_merge_has_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    spec = (
        "name: first\n" + text("linear", base=None, models=("near",)) + "---\n"
        + text("task_arithmetic", "tokenizer_source: union", models=("first", "far"))
    )  # fmt: skip
    out = merged(folder, spec, tmp_path / "out")
    direct = merged(folder, text("task_arithmetic", "tokenizer_source: union"), tmp_path / "direct")
    assert out.keys() == direct.keys()
    assert all(torch.equal(out[name], direct[name]) for name in out)
