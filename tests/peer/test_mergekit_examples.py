"""mergekit's own example files run as they are, on small models of the same names, and give mergekit's results.

In the type that a file asks for, both programs write tensors of the same names, shapes and types, the same number of
layers into config.json, and the same tokenizer. With `dtype: float32` in its place the numbers are compared.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

import mergecore
from mergecore.chat_template import CHATML
from tests.models import LLAMA, llama, load_tensors, write_model
from tests.peer.support import Mergekit, Tensors, distance, moved
from tests.vocabularies import save, trained

OPTIONS = ("--quiet", "--no-write-model-card")  # the card asks the hub which models it has
LAYERS, HIDDEN, VOCABULARY = 40, 16, 60
MODELS = (
    "psmathur/orca_mini_v3_13b",
    "garage-bAInd/Platypus2-13B",
    "WizardLM/WizardLM-13B-V1.2",
    "WizardLM/WizardMath-13B-V1.0",
    "TheBloke/Llama-2-13B-fp16",
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "BioMistral/BioMistral-7B",
    "model_a",
    "model_b",
)


@dataclass(frozen=True)
class Example:
    text: str
    layers: int = LAYERS
    differ: int = 0
    """Entries of a tensor that may differ: one per model where shares are rounded and not cut off (docs/peers.md)."""
    dtype: torch.dtype | None = torch.float16
    """What both programs write; None where mergekit does not write what the file asks for."""
    multi: str | None = None
    """The merge of a file of several that is the result."""


GRADIENT_SLERP = """\
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float16
"""
EXAMPLES = {
    "linear": Example("""\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
"""),
    "gradient-slerp": Example(GRADIENT_SLERP),
    "ties": Example("""\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""", differ=3),
    "bio-merge": Example("""\
models:
  - model: mistralai/Mistral-7B-Instruct-v0.2
    parameters:
      density: 0.5
      weight: 0.5
  - model: BioMistral/BioMistral-7B
    parameters:
      density: 0.5
      weight: 0.5
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: false
  int8_mask: true
dtype: float16
"""),
    "orcamini-platy-44layer": Example("""\
slices:
  - sources:
    - model: psmathur/orca_mini_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: garage-bAInd/Platypus2-13B
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""", layers=44),
    "mega": Example(GRADIENT_SLERP + """\
name: gradient-slerp
---
models:
  - model: gradient-slerp
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
name: gradient-slerp-ties
""", differ=2, multi="gradient-slerp-ties"),
    "arcee_fusion": Example("""\
models:
  - model: model_a
  - model: model_b
merge_method: arcee_fusion
base_model: model_a
dtype: bfloat16
""", differ=3, dtype=None),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mergekit: Mergekit) -> Path:
    """Where the examples lie, and their models under the names that they use; mergekit looks from here too."""
    folder = tmp_path_factory.mktemp("examples")
    config = LLAMA | {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "torch_dtype": "float32",
    }
    base = llama(LAYERS, HIDDEN, VOCABULARY, dtype=torch.float32)
    tokenizer = trained("BPE", size=VOCABULARY)
    for number, name in enumerate(MODELS):
        write_model(folder / name, moved(base, 2e-2, number), config)
        save(folder / name, tokenizer, eos_token="<s>", chat_template=CHATML)
    mergekit.ask("cd", folder)
    return folder


def merged_by_both(
    mergekit: Mergekit, example: Example, folder: Path, out: Path, dtype: str | None = None
) -> tuple[Path, Path]:
    """Folders of the results of mergekit's and our command."""
    file = folder / f"{out.name}.yml"
    file.write_text(example.text if dtype is None else re.sub(r"(?m)^dtype: \w+$", f"dtype: {dtype}", example.text))
    theirs = out / "theirs"
    if example.multi is not None:
        mergekit.ask("multi", file, "--intermediate-dir", theirs, *OPTIONS)
        theirs /= example.multi
    else:
        mergekit.ask("yaml", file, theirs, *OPTIONS)
    mergecore.merge(file, out / "ours", device="cpu")
    return theirs, out / "ours"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_as_they_are(name: str, mergekit: Mergekit, folder: Path, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    theirs, ours = merged_by_both(mergekit, example, folder, tmp_path)
    right, tensors = load_tensors(theirs), load_tensors(ours)
    assert {key: tensor.shape for key, tensor in tensors.items()} == {key: v.shape for key, v in right.items()}
    assert len([key for key in tensors if key.endswith("q_proj.weight")]) == example.layers
    configs = [json.loads((each / "config.json").read_text()) for each in (theirs, ours)]
    assert [config["num_hidden_layers"] for config in configs] == [example.layers] * 2
    if example.dtype is not None:
        assert {v.dtype for v in right.values()} == {v.dtype for v in tensors.values()} == {example.dtype}
        assert [config.get("dtype", config.get("torch_dtype")) for config in configs] == ["float16"] * 2
    tokenizers = [transformers.AutoTokenizer.from_pretrained(each) for each in (theirs, ours)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template == CHATML
    transformers.AutoModelForCausalLM.from_pretrained(ours, dtype="auto")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_give_mergekit_s_numbers(name: str, mergekit: Mergekit, folder: Path, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    theirs, ours = map(load_tensors, merged_by_both(mergekit, example, folder, tmp_path, "float32"))
    if example.differ:
        assert set(theirs) == set(ours)
        assert max(off(theirs, ours, key) for key in ours) <= example.differ
    else:
        assert distance(theirs, ours) <= 1e-6


def test_gpt2_small_runs_as_it_is(mergekit: Mergekit, folder: Path, tmp_path: Path) -> None:
    """The example that leaves out layers of another architecture."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=12, n_head=2))
    model.half().save_pretrained(folder / "gpt2")
    text = """\
slices:
  - sources:
    - model: gpt2
      layer_range: [0, 8]
merge_method: passthrough
dtype: float16
"""
    theirs, ours = merged_by_both(mergekit, Example(text), folder, tmp_path)
    right, tensors = load_tensors(theirs), load_tensors(ours)
    assert right.keys() == tensors.keys()
    assert all(torch.equal(right[name], tensor) for name, tensor in tensors.items())
    configs = [json.loads((each / "config.json").read_text()) for each in (theirs, ours)]
    assert [config["n_layer"] for config in configs] == [8, 8]
    transformers.AutoModelForCausalLM.from_pretrained(ours, dtype="auto")


def off(theirs: Tensors, ours: Tensors, name: str) -> int:
    """How many entries differ by more than 1e-6 of the largest."""
    return int(((theirs[name] - ours[name]).abs() > 1e-6 * theirs[name].abs().max()).sum())
