"""Where the daemon's worker finds the models that a dropped spec names, and what it keeps out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergecore import load_spec, merge, plan
from mergecore.errors import CheckpointError, MergecoreError
from service.worker import find_model
from tests.models import LLAMA, llama, load_tensors, moved, write_model
from tests.test_references import COMMIT, hub_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_relative_path_is_looked_up_in_every_model_folder_first_ones_first(tmp_path: Path, cache: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one / "a", two / "a", two / "b"):
        path.mkdir(parents=True)
    assert find_model("a", None, [one, two]) == one / "a"
    assert find_model("b", None, [one, two]) == two / "b"
    assert find_model(str(two / "a"), None, [one, two]) == two / "a"


def test_a_path_comes_before_a_name_of_the_cache_and_has_no_revisions(tmp_path: Path, cache: Path) -> None:
    hub_cache(cache, "org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_model("org/name", None, [tmp_path]) == tmp_path / "org" / "name"
    with pytest.raises(CheckpointError, match="a local path, which has no revisions"):
        find_model("org/name", "main", [tmp_path])


def test_a_name_of_the_cache_is_found_below_the_model_folders_only(tmp_path: Path, cache: Path) -> None:
    snapshot = hub_cache(cache, "org/name")
    other = tmp_path / "other"
    other.mkdir()
    for revision in (None, "main", COMMIT):
        assert find_model("org/name", revision, [other, cache]) == snapshot
        with pytest.raises(CheckpointError, match=r"'org/name' does not lie below a model folder"):
            find_model("org/name", revision, [other])
    with pytest.raises(CheckpointError, match=r"was not found; the model folders .*at revision v9"):
        find_model("org/name", "v9", [cache])


def test_a_snapshot_that_is_a_link_out_of_the_model_folders_is_refused(tmp_path: Path, cache: Path) -> None:
    snapshot = hub_cache(cache, "org/name")
    os.rename(snapshot, tmp_path / "elsewhere")
    snapshot.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="does not lie below"):
        find_model("org/name", None, [cache])


def test_a_revision_cannot_lead_out_of_the_cache(tmp_path: Path, cache: Path) -> None:
    hub_cache(cache, "org/name")
    secret = tmp_path / "secret"
    secret.mkdir()
    (tmp_path / "leads").write_text(str(secret))
    for revision in ("../../../leads", str(tmp_path / "leads"), str(secret)):
        with pytest.raises(CheckpointError):
            find_model("org/name", revision, [cache])


def test_without_model_folders_paths_start_at_the_working_directory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_cache(cache, "org/name")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("a", None, []).samefile(tmp_path / "a")
    assert find_model("org/name", "main", []) == snapshot


@pytest.mark.parametrize("name", ["~", "~root", "..", "../x", "/", "/etc", "a\0b", "x" * 5000, "loop", "org/na me"])
def test_what_is_no_model_of_this_server_is_a_clear_error(tmp_path: Path, cache: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"does not lie below|was not found|cannot be looked up"):
        find_model(name, None, [root])


# --- through the plan: every way in which a spec names a model ---


@pytest.fixture
def root(tmp_path: Path, cache: Path) -> Path:
    """Models base, a and b below the root, with an adapter of rank 2, and `cached/model` in a cache below it."""
    root = tmp_path / "root"
    tensors = llama(hidden=16, vocabulary=24)
    config = {**LLAMA, "num_hidden_layers": 2}
    for i, name in enumerate(("base", "a", "b")):
        write_model(root / name, moved(tensors, 1e-3, i), config)
    write_adapter(root / "adapter")
    write_model(tmp_path / "outside", tensors, config)
    write_adapter(tmp_path / "outside-adapter")
    return root


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors = {prefix + "lora_A.weight": torch.ones(2, 16), prefix + "lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")


def linear(*models: str, **keys: Any) -> dict[str, Any]:
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": entries, "dtype": "float32", **keys}


def sliced(model: str) -> dict[str, Any]:
    sources = [[{"model": name, "layer_range": [layer, layer + 1]}] for layer, name in enumerate((model, "a"))]
    return {"merge_method": "passthrough", "slices": [{"sources": source} for source in sources]}


WAYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "models": lambda model: linear("a", model),
    "base": lambda model: {**linear("a"), "merge_method": "task_arithmetic", "base_model": model},
    "slices": sliced,
    "modules": lambda model: {"merge_method": "linear", "modules": {"m": {"models": linear("a", model)["models"]}}},
    "tokenizer_source": lambda model: linear("a", "b", tokenizer_source=model),
    "tokenizer.source": lambda model: linear("a", "b", tokenizer={"source": model}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["{}/outside", "../outside", "link", "a+{}/outside-adapter", "org/name@main"])
def test_no_part_of_a_spec_leads_out_of_the_model_folders(
    tmp_path: Path, cache: Path, root: Path, way: str, model: str
) -> None:
    hub_cache(cache, "org/name")
    (root / "link").symlink_to(tmp_path / "outside")
    spec = load_spec(WAYS[way](model.format(tmp_path)))
    with pytest.raises(MergecoreError, match="does not lie below a model folder"):
        plan(spec, resolve=partial(find_model, roots=[root]))


@pytest.mark.parametrize("way", ["models", "slices"])
def test_adapters_and_models_below_the_model_folders_are_merged(tmp_path: Path, root: Path, way: str) -> None:
    resolve = partial(find_model, roots=[root])
    plain = load_tensors(merge(load_spec(WAYS[way]("b")), tmp_path / "plain", resolve=resolve).output)
    adapted = load_tensors(merge(load_spec(WAYS[way]("b+adapter")), tmp_path / "adapted", resolve=resolve).output)
    changed = {name for name in plain if not torch.equal(plain[name], adapted[name])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}


def test_a_cached_model_at_a_revision_is_merged_with_its_adapter(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
    snapshot = hub_cache(root / "hub", "org/name", ref="v2")
    (snapshot / "config.json").unlink()
    for file in (root / "b").iterdir():
        os.link(file, snapshot / file.name)
    resolve = partial(find_model, roots=[root])
    results = [
        load_tensors(merge(load_spec(linear("a", model)), tmp_path / f"{i}", resolve=resolve).output)
        for i, model in enumerate(("b+adapter", "org/name@v2+adapter"))
    ]
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
