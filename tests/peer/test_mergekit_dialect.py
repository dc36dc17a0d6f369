"""Every key of mergekit's dialect means the same to both programs, and none is left out of docs/dialect.md.

The tables here are in float32; numbers agree within 1e-6 of a tensor's largest entry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import mergecore
from tests.models import llama, load_tensors, write_model
from tests.peer.support import CONFIG, Mergekit, both, config, distance, moved, write_spec
from tests.test_dialect import documented
from tests.vocabularies import save, words

CASES = {
    "three slices, some tensors scaled": """
merge_method: passthrough
slices:
  - sources: [{model: "@near", layer_range: [0, 2]}]
  - sources:
      - model: "@far"
        layer_range: [0, 1]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - {value: 1.0}
  - sources: [{model: "@near", layer_range: [1, 2]}]
dtype: float32
""",
    "parameters of a source, a slice and all": """
merge_method: linear
slices:
  - sources:
      - {model: "@near", layer_range: [0, 1], parameters: {weight: {filter: mlp, value: 0.3}}}
      - {model: "@far", layer_range: [1, 2]}
    parameters: {weight: [{filter: q_proj, value: 0.9}], normalize: false}
  - sources:
      - {model: "@near", layer_range: [0, 2], parameters: {weight: [0.1, 0.4]}}
      - {model: "@other", layer_range: [0, 2]}
parameters: {weight: [0.5, 0.25]}
dtype: float32
""",
    "the base of a slice": """
merge_method: task_arithmetic
base_model: "@base"
slices:
  - sources:
      - {model: "@base", layer_range: [0, 1]}
      - {model: "@near", layer_range: [0, 1]}
  - base_model: "@far"
    sources:
      - {model: "@far", layer_range: [0, 1]}
      - {model: "@other", layer_range: [1, 2]}
    residual_weight: 0.5
parameters: {weight: 0.5}
dtype: float32
""",
    "gradients run through a slice": """
merge_method: slerp
base_model: "@far"
slices:
  - sources:
      - {model: "@far", layer_range: [0, 2]}
      - {model: "@other", layer_range: [0, 2]}
  - sources:
      - {model: "@far", layer_range: [1, 2]}
      - {model: "@other", layer_range: [0, 1]}
parameters: {t: [0.2, 0.8]}
dtype: float32
""",
    "models and their own parameters": """
merge_method: task_arithmetic
base_model: {model: {path: "@base"}}
models:
  - model: {model: {path: "@near"}, override_architecture: LlamaForCausalLM}
    parameters: {weight: [{filter: self_attn, value: [0, 1]}, {filter: "*", value: 1e-1}]}
  - model: "@far"
parameters:
  weight: 0.2
  lambda: {value: 0.5}
  normalize: [{filter: mlp, value: true}, {value: false}]
dtype: float32
""",
    "an unlisted base with a weight for all": """
merge_method: linear
base_model: "@base"
models: [{model: "@near"}, {model: "@far"}]
parameters: {weight: 0.5}
dtype: float32
""",
    "words as values": """
merge_method: nuslerp
models: [{model: "@far", parameters: {weight: "0.25"}}, {model: "@other", parameters: {weight: 1}}]
parameters: {nuslerp_flatten: [true, false], nuslerp_row_wise: true}
dtype: float32
""",
    "one module": """
merge_method: linear
modules: {default: {models: [{model: "@near"}, {model: "@far"}], parameters: {weight: 0.5}}}
dtype: float32
""",
    "an adapter on a model": """
merge_method: task_arithmetic
base_model: "@base"
models:
  - {model: "@near+@lora", parameters: {weight: 0.5}}
  - {model: {model: "@far", lora: "@lora"}, parameters: {weight: 1}}
dtype: float32
""",
}  # fmt: skip


@pytest.fixture(scope="module")
def given(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models, and an adapter on their attention."""
    folder = tmp_path_factory.mktemp("lora")
    random = torch.Generator().manual_seed(3)
    factors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{factor}.weight": 0.3
        * torch.randn(shape, generator=random)
        for layer in range(2)
        for factor, shape in (("A", (4, 48)), ("B", (48, 4)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return models | {"lora": folder}


@pytest.mark.parametrize("name", CASES)
def test_files_mean_the_same(name: str, mergekit: Mergekit, given: dict[str, Path], tmp_path: Path) -> None:
    options = ("--lora-merge-cache", str(tmp_path / "lora"))
    theirs, ours = both(mergekit, CASES[name], given, tmp_path, *options)
    assert distance(theirs, ours) <= 1e-6
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("theirs", "ours")]
    assert len({found["num_hidden_layers"] for found in configs}) == 1


def test_out_dtype_is_the_type_of_the_result(mergekit: Mergekit, given: dict[str, Path], tmp_path: Path) -> None:
    spec = """
merge_method: linear
models: [{model: "@near"}, {model: "@far"}]
parameters: {weight: 1.0}
dtype: float32
out_dtype: bfloat16
"""
    theirs, ours = both(mergekit, spec, given, tmp_path)
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype == torch.bfloat16
        assert float((tensor != ours[name]).float().mean()) < 0.01  # a float32 sum near the middle of two numbers
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("theirs", "ours")]
    assert [found.get("dtype", found.get("torch_dtype")) for found in configs] == ["bfloat16"] * 2


def test_merges_of_one_file_read_each_other(mergekit: Mergekit, given: dict[str, Path], tmp_path: Path) -> None:
    """mergekit-multi: named merges, used by a last one without a name."""
    text = """
name: mean
merge_method: linear
models: [{model: "@near"}, {model: "@far"}]
parameters: {weight: 1.0}
dtype: float32
---
merge_method: slerp
base_model: mean
models: [{model: second}]
parameters: {t: 0.4}
dtype: float32
---
name: second
merge_method: task_arithmetic
base_model: "@base"
models: [{model: mean, parameters: {weight: 0.7}}]
dtype: float32
"""
    file = write_spec(text, given, tmp_path / "config.yml")
    mergekit.ask("multi", file, "-I", tmp_path / "stages", "--out-path", tmp_path / "theirs", "--quiet")
    mergecore.merge(file, tmp_path / "ours", device="cpu")
    assert distance(load_tensors(tmp_path / "theirs"), load_tensors(tmp_path / "ours")) <= 1e-6


def test_modules_are_merged_each_in_its_own_way(mergekit: Mergekit, tmp_path: Path) -> None:
    """T5: an encoder, a decoder and what they share."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    sizes |= {"num_layers": 2, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    for number, name in enumerate(("base", "near")):
        model.load_state_dict(moved(model.state_dict(), 1e-2, number))
        model.save_pretrained(tmp_path / name)
    models = {name: tmp_path / name for name in ("base", "near")}
    text = """
merge_method: linear
base_model: "@base"
modules:
  encoder: {models: [{model: "@base"}, {model: "@near"}], parameters: {weight: [0.2, 0.7]}}
  decoder:
    slices:
      - sources: [{model: "@base", layer_range: [0, 3]}, {model: "@near", layer_range: [0, 3], parameters: {weight: 3}}]
      - sources: [{model: "@base", layer_range: [1, 2]}]
  shared: {models: [{model: "@near"}]}
parameters: {weight: 1.0}
dtype: float32
"""
    theirs, ours = both(mergekit, text, models, tmp_path)
    assert distance(theirs, ours) <= 1e-6
    for each in ("theirs", "ours"):
        found = json.loads((tmp_path / each / "config.json").read_text())
        assert (found["num_layers"], found["num_decoder_layers"]) == (2, 4)


def test_weights_of_torch_save_are_read(mergekit: Mergekit, given: dict[str, Path], tmp_path: Path) -> None:
    """pytorch_model.bin, mapped; mergekit does so with --lazy-unpickle."""
    folder = write_model(tmp_path / "near", {}, CONFIG)
    (folder / "model.safetensors").unlink()
    torch.save(load_tensors(given["near"]), folder / "pytorch_model.bin")
    text = config("linear", "near", "far", weights=(1, 1))
    theirs, ours = both(mergekit, text, given | {"near": folder}, tmp_path, "--lazy-unpickle")
    assert distance(theirs, ours) <= 1e-6


def test_architectures_may_differ_in_name(mergekit: Mergekit, given: dict[str, Path], tmp_path: Path) -> None:
    """mergekit wants --allow-crimes for that; here names and shapes of tensors decide."""
    mistral = CONFIG | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder = write_model(tmp_path / "near", load_tensors(given["near"]), mistral)
    text = config("linear", "near", "far", base="far", weights=(1, 1))
    theirs, ours = both(mergekit, text, given | {"near": folder}, tmp_path, "--allow-crimes")
    assert distance(theirs, ours) <= 1e-6


def test_a_union_of_vocabularies_is_laid_out_alike(mergekit: Mergekit, tmp_path: Path) -> None:
    """From the file to the merged rows, which are compared by token."""
    tokens = {"base": "abcd", "near": "bcdef"}
    models = {}
    for number, (name, vocabulary) in enumerate(tokens.items()):
        tensors = moved(llama(1, 48, len(vocabulary), dtype=torch.float32), 1e-2, number)
        small = CONFIG | {"num_hidden_layers": 1, "vocab_size": len(vocabulary)}
        models[name] = save(write_model(tmp_path / name, tensors, small), words(*vocabulary))
    text = """
merge_method: linear
base_model: "@base"
models: [{model: "@base"}, {model: "@near"}]
parameters: {weight: 1.0}
tokenizer:
  source: union
  pad_to_multiple_of: 4
  tokens: {e: {source: "@near", force: true}}
chat_template: chatml
dtype: float32
"""
    theirs, ours = both(mergekit, text, models, tmp_path)
    loaded = [transformers.AutoTokenizer.from_pretrained(tmp_path / each) for each in ("theirs", "ours")]
    ids = [tokenizer.get_vocab() for tokenizer in loaded]
    assert ids[0].keys() == ids[1].keys()
    assert all(tokenizer.chat_template for tokenizer in loaded)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert theirs[name].shape == ours[name].shape == (8, 48)
        for token in ids[0]:
            torch.testing.assert_close(theirs[name][ids[0][token]], ours[name][ids[1][token]], rtol=1e-5, atol=1e-7)
    others = {name for name in theirs if theirs[name].shape[0] != 8}
    assert distance({name: theirs[name] for name in others}, {name: ours[name] for name in others}) <= 1e-6


def test_the_documentation_leaves_no_key_of_mergekit_out(mergekit: Mergekit) -> None:
    described = mergekit.ask("describe")
    keys = {f"{place}.{key}".lstrip(".") for place, names in described["keys"].items() for key in names}
    assert keys <= documented("")
    options = {option for option in described["options"] if option.startswith("-")}
    assert options == documented("-")
