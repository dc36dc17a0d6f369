"""A merged model is a model: transformers loads it, its tokenizer comes along, and it says what it is made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import load_spec, merge
from mergecore.output.verify import verify_output
from tests.models import LLAMA, llama, load_tensors, moved, spec_dict, tensor_bytes, write_model, write_trio

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: transformers.LlamaConfig(**SMALL),
    "Llama, tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "Qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "Mistral": lambda: transformers.MistralConfig(**SMALL),
    "GPT-2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}
TOKENS = torch.arange(1, 25).reshape(2, 12)


def save_trio(folder: Path, config: Any) -> list[Path]:
    """base, near and far as transformers saves them in bfloat16: random, plus small noise, plus large noise."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    start = {name: tensor.clone() for name, tensor in model.named_parameters()}
    paths = []
    for name, std in (("base", 0.0), ("near", 3e-4), ("far", 4e-3)):
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.copy_(start[parameter_name] + std * torch.randn(parameter.shape))
        model.to(torch.bfloat16).save_pretrained(folder / name)
        model.float()
        paths.append(folder / name)
    return paths


def logits(folder: Path) -> Tensor:
    """What the model in `folder` says to TOKENS; it must load without a missing or an unexpected tensor."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        result: Tensor = model.eval()(TOKENS).logits
    return result


@pytest.fixture(scope="module", params=CONFIGS)
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_trio(tmp_path_factory.mktemp("trio"), CONFIGS[request.param]())


def test_a_widen_merge_loads_and_runs(trio: list[Path], tmp_path: Path) -> None:
    merge(load_spec(spec_dict("widen", *trio)), tmp_path / "out")
    found = logits(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    assert bool(torch.isfinite(found).all())
    assert all(not torch.equal(found, logits(path)) for path in trio)
    assert sorted(load_tensors(tmp_path / "out")) == sorted(load_tensors(trio[0]))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_merge_says_what_the_model_built_by_hand_says(trio: list[Path], tmp_path: Path, method: str) -> None:
    merge(load_spec(spec_dict(method, *trio, run={"shard_size": "20kB"})), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    base, near, far = map(load_tensors, trio)
    by_hand = {
        name: near[name].double() + far[name].double() - tensor.double()
        if method == "task_arithmetic"
        else (near[name].double() + far[name].double()) / 2
        for name, tensor in base.items()
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(trio[0])
    loaded = model.load_state_dict({name: tensor.bfloat16() for name, tensor in by_hand.items()}, strict=False)
    assert set(loaded.missing_keys) <= {"lm_head.weight"}  # tied
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_an_unchanged_model_comes_out_bit_for_bit(trio: list[Path], tmp_path: Path) -> None:
    merge(load_spec(spec_dict("linear", None, trio[2])), tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(trio[2]))


def test_the_dtype_asked_for_is_the_one_that_transformers_loads(trio: list[Path], tmp_path: Path) -> None:
    merge(load_spec(spec_dict("widen", *trio, dtype="float32")), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert logits(tmp_path / "out").dtype == torch.float32


def test_a_tied_base_and_an_untied_model_give_an_untied_output(tmp_path: Path) -> None:
    tied = save_trio(tmp_path / "tied", CONFIGS["Llama, tied"]())
    untied = save_trio(tmp_path / "untied", CONFIGS["Llama"]())
    merge(load_spec(spec_dict("widen", tied[0], tied[1], untied[2])), tmp_path / "out")
    result = load_tensors(tmp_path / "out")
    assert not torch.equal(result["lm_head.weight"], result["model.embed_tokens.weight"])
    model, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(model.lm_head.weight, result["lm_head.weight"])


# ---- What lies beside the weights


def write_tokenizer(folder: Path, words: list[str], template: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.chat_template = template
    fast.save_pretrained(folder)


@pytest.fixture
def chatty(tmp_path: Path) -> list[Path]:
    """A trio with tokenizers, chat templates and generation settings that differ."""
    trio = write_trio(tmp_path, llama(layers=1))
    for path, words in zip(trio, (["one", "two"], ["two", "one"], ["two", "one", "three"]), strict=True):
        write_tokenizer(path, words, f"{path.name}: {{{{ messages[0]['content'] }}}}")
        (path / "generation_config.json").write_text(json.dumps({"temperature": 0.1 * len(words)}))
    return trio


@pytest.mark.parametrize("source", [None, "base", "near", "far"])
def test_tokenizer_and_chat_template_come_from_the_base_or_the_source_named(
    chatty: list[Path], tmp_path: Path, source: str | None
) -> None:
    named = str(tmp_path / source) if source in ("near", "far") else source
    merge(load_spec(spec_dict("linear", *chatty, tokenizer_source=named)), tmp_path / "out")
    origin = transformers.AutoTokenizer.from_pretrained(tmp_path / (source or "base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == origin.get_vocab()
    assert tokenizer("one two three")["input_ids"] == origin("one two three")["input_ids"]
    messages = [{"role": "user", "content": "one"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{source or 'base'}: one"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / (source or "base") / name).read_bytes()


def test_generation_settings_come_from_the_base(chatty: list[Path], tmp_path: Path) -> None:
    merge(load_spec(spec_dict("linear", *chatty, tokenizer_source=str(chatty[2]))), tmp_path / "out")
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (chatty[0] / name).read_bytes()


def test_code_of_a_model_of_its_own_comes_along_and_is_not_run(tmp_path: Path) -> None:
    base = llama(layers=1)
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    trio = write_trio(tmp_path, base, config)
    for path in trio:
        (path / "modeling_own.py").write_text(f"raise RuntimeError({path.name!r})")
        (path / "tokenizer_own.py").write_text(f"raise RuntimeError({path.name!r})")
    merge(load_spec(spec_dict("linear", *trio, tokenizer_source=str(trio[1]))), tmp_path / "out")
    assert (tmp_path / "out" / "modeling_own.py").read_bytes() == (trio[0] / "modeling_own.py").read_bytes()
    assert (tmp_path / "out" / "tokenizer_own.py").read_bytes() == (trio[1] / "tokenizer_own.py").read_bytes()


def test_what_the_base_does_not_have_is_not_made_up(tmp_path: Path) -> None:
    base = {"a.weight": torch.ones(4, 4)}
    models = [write_model(tmp_path / str(i), moved(base, 1e-2, i)) for i in range(2)]
    merge(load_spec(spec_dict("linear", None, *models)), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "mergecore_manifest.json", "model.safetensors"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_json_is_the_base_s_but_for_the_dtype(tmp_path: Path, key: str) -> None:
    config = {**LLAMA, key: "float32", "own": {"nested": [1, "two"]}, "name": "Bär"}
    trio = write_trio(tmp_path, llama(layers=1), config)
    merge(load_spec(spec_dict("linear", *trio)), tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == config
    merge(load_spec(spec_dict("linear", *trio, out_dtype="float16")), tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config.json").read_text()) == {**config, key: "float16"}


def test_an_untied_head_is_told_in_nested_configs_too(tmp_path: Path) -> None:
    config = {"text_config": {"tie_word_embeddings": True, "own": 1}}
    tied = llama(layers=1, tied=True)
    models = [write_model(tmp_path / "base", tied, config), write_model(tmp_path / "near", llama(layers=1), LLAMA)]
    merge(load_spec(spec_dict("widen", *models)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "text_config": {"tie_word_embeddings": False, "own": 1},
        "tie_word_embeddings": False,
    }


def test_the_manifest_tells_spec_inputs_versions_and_checksums(chatty: list[Path], tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("# mine\nmerge_method: widen\nbase_model: base\nmodels: [{model: near}, {model: far}]\n")
    result = merge(spec, tmp_path / "out", threads=1)
    manifest = json.loads((tmp_path / "out" / "mergecore_manifest.json").read_text())
    assert manifest["spec_text"] == spec.read_text()
    assert load_spec(manifest["spec"]).run.threads == 1
    assert [Path(entry["path"]).name for entry in manifest["inputs"]] == ["base", "near", "far"]
    file = chatty[0] / "model.safetensors"
    stored = {"name": file.name, "bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}
    assert manifest["inputs"][0]["files"][0].items() >= stored.items()
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["result"] == {key: value for key, value in result.as_dict().items() if key != "output"}
    assert (
        manifest["tensors_out"]["stored"]["tensors"] == len(manifest["tensors"]) == len(load_tensors(tmp_path / "out"))
    )
    assert verify_output(tmp_path / "out") == []


def test_the_model_card_names_method_models_and_spec(chatty: list[Path], tmp_path: Path) -> None:
    merge(load_spec(spec_dict("widen", *chatty, parameters={"t": 0.75})), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in ("Merge by widen", "Base: base", "- near", "- far", "t: 0.75", "Extend model merging"):
        assert part in card


def test_folders_may_have_any_name_that_the_file_system_takes(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9\xff t\xc3\xa9st"))
    trio = write_trio(folder, llama(layers=1))
    (folder / "spec.yaml").write_text("merge_method: linear\nmodels: [{model: near}, {model: far}]\n")
    merge(folder / "spec.yaml", folder / "out")
    assert verify_output(folder / "out") == []
    assert tensor_bytes(folder / "out").keys() == tensor_bytes(trio[0]).keys()
    code = [sys.executable, "-m", "mergecore.cli"]
    for command, *paths in (("verify", folder / "out"), ("merge", folder / "spec.yaml", folder / "again")):
        ended = subprocess.run([*code, command, *paths], cwd=ROOT, capture_output=True, timeout=60, check=True)
        assert ended.stdout.startswith(os.fsencode(paths[-1]))


def test_a_tokenizer_file_that_cannot_be_read_is_told_and_leaves_nothing(chatty: list[Path], tmp_path: Path) -> None:
    from mergecore.errors import MergecoreError

    (tmp_path / "outputs").mkdir()

    def remove(progress: object) -> None:
        (chatty[0] / "config.json").unlink(missing_ok=True)
        (chatty[0] / "tokenizer.json").unlink(missing_ok=True)
        (chatty[0] / "tokenizer.json").symlink_to("/proc/self/mem")

    with pytest.raises(MergecoreError, match=r"tokenizer\.json"):
        merge(load_spec(spec_dict("linear", *chatty)), tmp_path / "outputs" / "out", progress=remove)
    assert os.listdir(tmp_path / "outputs") == []
