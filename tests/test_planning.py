"""What can be wrong with a merge is found before a tensor is read, and told with its place and a way out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import load_spec, plan
from mergecore.checkpoint import open_checkpoint
from mergecore.errors import CheckpointError, MergecoreError, SpecError
from mergecore.jobs import TensorJob
from mergecore.planning import MergePlan, with_run
from mergecore.sources import Stored
from tests.models import LLAMA, llama, moved, spec_dict, tensor_bytes, write_model, write_trio


def planned(folder: Path, text: str) -> MergePlan:
    """The plan of a spec file in `folder`."""
    path = folder / "spec.yaml"
    path.write_text(text)
    return plan(load_spec(path))


def refusal(folder: Path, text: str) -> str:
    """The error of planning, which must cost exit code 2."""
    with pytest.raises(MergecoreError) as caught:
        planned(folder, text)
    assert caught.value.exit_code == 2
    return str(caught.value)


def jobs_of(spec: dict[str, Any]) -> dict[str, TensorJob]:
    return {job.name: job for job in plan(load_spec(spec)).jobs}


# ---- Methods and parameters

WIDEN = "merge_method: widen\nbase_model: base\nmodels:\n  - model: near\n  - model: far\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the models base, near and far."""
    write_trio(tmp_path, llama(layers=3, hidden=8, vocabulary=12))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (
            WIDEN.replace("widen", "wieden"),
            1,
            ["merge_method", "'wieden'", "did you mean 'widen'", "mergecore methods"],
        ),
        (WIDEN.replace("widen", "xyzzy"), 1, ["unknown method 'xyzzy'", "mergecore methods"]),
        (WIDEN + "parameters:\n  tt: 1\n", 7, ["parameters.tt", "widen has no such parameter", "did you mean 't'"]),
        (WIDEN + "parameters: {density: 0.5}\n", 6, ["parameters.density", "widen has no such parameter"]),
        (
            WIDEN.replace("near", "near\n    parameters:\n      s: 0.5"),
            6,
            ["models[0].parameters.s", "belongs to the whole merge", "'parameters'"],
        ),
        (WIDEN + "parameters:\n  t: high\n", 7, ["parameters.t", "found 'high'", "expected a number"]),
        (WIDEN + "parameters:\n  t: true\n", 7, ["parameters.t", "expected a number"]),
        (WIDEN + "parameters:\n  calibrate: 1\n", 7, ["parameters.calibrate", "expected true or false"]),
        (WIDEN + "parameters:\n  tie: mean\n", 7, ["parameters.tie", "'mean'", "stable or average"]),
        (WIDEN + "parameters:\n  s: [1, two]\n", 7, ["parameters.s", "'two'", "expected a number"]),
        (
            WIDEN.replace("far", "far\n    parameters:\n      weight: heavy"),
            7,
            ["models[1].parameters.weight", "'heavy'", "expected a number"],
        ),
        (
            "merge_method: linear\nmodels:\n  - {model: near, parameters: {weight: 1}}\n"
            "  - {model: far, parameters: {weight: -1}}\n",
            None,
            ["weights add up to 0", "normalize: false"],
        ),
    ],
)
def test_what_is_wrong_with_a_method_or_parameter_is_told_with_its_line(
    folder: Path, text: str, line: int | None, told: list[str]
) -> None:
    message = refusal(folder, text)
    place = f"{folder}/spec.yaml:" + ("" if line is None else f"{line}: ")
    assert message.startswith(place)
    for part in told:
        assert part in message


def test_a_method_of_deltas_needs_a_base(folder: Path) -> None:
    message = refusal(folder, "models: [{model: near}]\nmerge_method: task_arithmetic\n")
    assert (
        message == f"{folder}/spec.yaml:2: merge_method: task_arithmetic moves away from a base: base_model is missing"
    )


def test_dropping_needs_a_base(folder: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: near}]\nsparsify: {method: dare, drop_rate: 0.5}\n"
    assert refusal(folder, text).startswith(f"{folder}/spec.yaml:3: sparsify: dropping deltas needs a base")


def test_the_base_alone_is_nothing_to_merge(folder: Path) -> None:
    text = "merge_method: widen\nbase_model: base\nmodels: [{model: ./base}, {model: near/../base}]\n"
    assert "every model listed is the base itself" in refusal(folder, text)


def test_more_models_than_the_kernels_take_are_refused(folder: Path) -> None:
    models = "models: [" + ", ".join(["{model: near}"] * 65) + "]\n"
    message = refusal(folder, "merge_method: linear\n" + models)
    assert message == f"{folder}/spec.yaml:2: models: found 65 models, expected at most 64; merge in two steps"
    sixty_four = models.replace("{model: near}, ", "", 1)
    assert len(planned(folder, "merge_method: linear\n" + sixty_four).jobs[0].models) == 64


def test_weights_beyond_any_number_are_refused(folder: Path) -> None:
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: near}]\n"
    message = refusal(folder, text + "parameters: {weight: 1e308, lambda: 1e10}\n")
    assert message.startswith(f"{folder}/spec.yaml:4: parameters: ")
    assert "the weights are too large" in message


def test_names_that_mergekit_configs_carry_for_a_method_change_nothing(folder: Path) -> None:
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: near}]\nparameters: {int8_mask: true}\n"
    assert planned(folder, text).method.name == "task_arithmetic"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"memory": 1 << 20}, "memory: found 1048576, expected at least 16MiB"),
        ({"threads": -1}, "threads: found -1, expected a whole number"),
        ({"device": "gpu"}, "device: found 'gpu', expected auto, cpu, cuda, cuda:N or cuda:N+M"),
    ],
)
def test_settings_from_outside_are_checked_like_the_spec_s_own(settings: dict[str, Any], told: str) -> None:
    spec = load_spec({"merge_method": "linear", "models": [{"model": "a"}]})
    with pytest.raises(SpecError, match=re.escape(told)):
        with_run(spec, **settings)
    assert with_run(spec, memory=None, threads=2).run == spec.run.model_copy(update={"threads": 2})


# ---- Models


def test_a_missing_model_is_told_with_its_line(folder: Path) -> None:
    message = refusal(folder, WIDEN.replace("model: far", "model: farr"))
    assert message.startswith(f"{folder}/spec.yaml:5: models[1].model: farr does not exist (looked for {folder}/farr)")
    message = refusal(folder, WIDEN.replace("base_model: base", "base_model: bass"))
    assert message.startswith(f"{folder}/spec.yaml:2: base_model: bass does not exist (looked for {folder}/bass)")
    message = refusal(folder, WIDEN + "tokenizer_source: nowhere\n")
    assert message.startswith(
        f"{folder}/spec.yaml:6: tokenizer_source: nowhere does not exist (looked for {folder}/nowhere)"
    )


def change(name: str, to: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], None]:
    """Replaces or removes one tensor."""

    def apply(tensors: dict[str, Tensor]) -> None:
        if to is None:
            del tensors[name]
        else:
            tensors[name] = to(tensors[name])

    return apply


def extra(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


def taller(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:4]])


@pytest.mark.parametrize("where", ["base", "near", "far"])
@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (
            change("model.layers.1.mlp.up_proj.weight", taller),
            [r"differs in shape|lacks", r"model.layers.1.mlp.up_proj.weight \[(20|16), 8\] instead of", "of one size"],
        ),
        (
            change("model.embed_tokens.weight", taller),
            [r"model.embed_tokens.weight \[(16|12), 8\] instead of", "vocabularies differ", "tokenizer_source"],
        ),
        (
            change("model.layers.1.mlp.up_proj.weight", None),
            [r"(lacks|has) 1 tensor that", "model.layers.1.mlp.up_proj.weight", "of one architecture"],
        ),
        (
            extra("model.layers.1.mlp.extra.weight", torch.zeros(3)),
            [r"(lacks|has) 1 tensor that", "model.layers.1.mlp.extra.weight", "of one architecture"],
        ),
        (
            change("model.norm.weight", lambda tensor: tensor.to(torch.int8)),
            [r"model.norm.weight \(I8\)", "quantised", "F32, F16, BF16", "convert"],
        ),
    ],
)
def test_models_that_do_not_fit_are_told_with_line_tensor_and_advice(
    tmp_path: Path, where: str, edit: Callable[[dict[str, Tensor]], None], told: list[str]
) -> None:
    base = llama(layers=2, hidden=8, vocabulary=12)
    for name in ("base", "near", "far"):
        tensors = dict(base)
        if name == where:
            edit(tensors)
        write_model(tmp_path / name, tensors, LLAMA)
    message = refusal(tmp_path, WIDEN)
    # The base is the measure: what it has too much, the first model lacks.
    assert re.match(
        rf"{tmp_path}/spec.yaml:[245]: (base_model|models\[[01]\].model): {tmp_path}/(base|near|far) ", message
    )
    if where != "base":
        assert f"models[{['near', 'far'].index(where)}].model: {tmp_path / where}" in message
    for pattern in told:
        assert re.search(pattern, message), (pattern, message)


def test_many_differences_are_told_by_their_number_and_the_first_names(tmp_path: Path) -> None:
    write_model(tmp_path / "base", llama(layers=4, hidden=8), LLAMA)
    write_model(tmp_path / "near", llama(layers=2, hidden=8), LLAMA)
    message = refusal(tmp_path, "merge_method: linear\nbase_model: base\nmodels: [{model: near}]\n")
    assert "lacks 18 tensors" in message
    assert "and 10 more" in message


def test_quantised_weights_are_not_taken_for_constants(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32),
        "model.norm.weight": torch.ones(4),
    }
    config = {**LLAMA, "quantization_config": {"quant_method": "gptq"}}
    write_trio(tmp_path, tensors, config)
    message = refusal(tmp_path, WIDEN)
    assert "up_proj.qweight (I32)" in message
    assert "quantised" in message


def test_a_budget_too_small_for_the_statistics_says_what_is_needed(tmp_path: Path) -> None:
    base = {"model.embed_tokens.weight": torch.zeros(200_000, 2, dtype=torch.bfloat16)}
    write_trio(tmp_path, base)
    message = refusal(tmp_path, WIDEN + "run:\n  memory: 16MiB\n")
    found = re.match(
        rf"{tmp_path}/spec.yaml:7: run.memory: model.embed_tokens.weight \[200000, 2\] needs (.+?) MiB", message
    )
    assert found is not None, message
    assert "--memory" in message
    enough = math.ceil(float(found[1]))
    assert planned(tmp_path, WIDEN + f"run: {{memory: {enough}MiB}}\n").held_bytes <= enough << 20


def test_no_window_of_any_tensor_exceeds_the_budget(tmp_path: Path) -> None:
    write_trio(tmp_path, {"model.embed_tokens.weight": torch.zeros(30_000, 64), "a.weight": torch.zeros(4_000, 800)})
    spec = spec_dict("widen", *(tmp_path / name for name in ("base", "near", "far")))
    for mebibytes in (16, 24, 64, 1024):
        found = plan(load_spec({**spec, "run": {"memory": mebibytes << 20}}))
        assert found.held_bytes <= mebibytes << 20
        for job in found.jobs:
            assert sum(rows for _, rows in job.windows()) == job.rows


# ---- What is read for what


def test_the_base_is_no_model_of_a_method_of_deltas_by_whatever_name_it_is_listed(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "base")
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: near}, {model: link}, {model: base}]\n"
    found = planned(folder, text)
    assert [model.path.name for model in found.models] == ["near"]
    assert found.base is not None
    assert found.base.path == folder / "base"


def test_the_base_is_averaged_if_it_is_listed(folder: Path) -> None:
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: near}, {model: base}]\n"
    assert [model.path.name for model in planned(folder, text).models] == ["near", "base"]


def test_an_unlisted_base_is_averaged_exactly_if_a_weight_is_set_for_all(folder: Path) -> None:
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: near, parameters: {weight: 3}}]\n"
    assert [model.path.name for model in planned(folder, text).models] == ["near"]
    found = planned(folder, text + "parameters: {weight: 0.5}\n")
    assert [model.path.name for model in found.models] == ["near", "base"]
    assert found.jobs[0].parameters is not None
    assert found.jobs[0].parameters["weight"] == (3.0, 0.5)


def test_names_config_and_order_come_from_the_base_or_the_first_model(folder: Path) -> None:
    assert planned(folder, WIDEN).reference.path.name == "base"
    assert planned(folder, "merge_method: linear\nmodels: [{model: far}, {model: near}]\n").reference.path.name == "far"


def test_per_model_weights_filters_and_gradients_mean_what_they_mean_in_mergekit(folder: Path) -> None:
    spec = spec_dict(
        "task_arithmetic",
        folder / "base",
        (folder / "near", {"weight": [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.25}]}),
        (folder / "far", {"weight": 2}),
        parameters={"weight": [{"filter": "norm", "value": 7}], "lambda": [1.0, 0.0, 0.5]},
    )
    jobs = jobs_of(spec)

    def values(name: str) -> tuple[Any, Any]:
        parameters = jobs[name].parameters
        assert parameters is not None
        return parameters["weight"], parameters["lambda"]

    # A gradient runs over the layers: place layer / (layers - 1).
    assert values("model.layers.0.self_attn.q_proj.weight") == ((0.0, 2.0), 1.0)
    assert values("model.layers.1.self_attn.q_proj.weight") == ((0.5, 2.0), 0.0)
    assert values("model.layers.2.self_attn.q_proj.weight") == ((1.0, 2.0), 0.5)
    assert values("model.layers.1.mlp.up_proj.weight") == ((0.25, 2.0), 0.0)
    # No filter of the model's own matches: the spec's decide, then the default. Outside the layers the place is 0.
    assert values("model.norm.weight") == ((7.0, 2.0), 1.0)
    assert values("model.layers.2.input_layernorm.weight") == ((7.0, 2.0), 0.5)
    assert values("model.embed_tokens.weight") == ((1.0, 2.0), 1.0)


def test_a_single_layer_takes_the_end_of_a_gradient(tmp_path: Path) -> None:
    write_trio(tmp_path, llama(layers=1, hidden=8))
    spec = spec_dict("task_arithmetic", tmp_path / "base", tmp_path / "near", parameters={"weight": [0.0, 1.0]})
    jobs = jobs_of(spec)
    weights = {name: job.parameters["weight"] for name, job in jobs.items() if job.parameters is not None}
    assert weights["model.layers.0.mlp.up_proj.weight"] == (1.0,)
    assert weights["model.embed_tokens.weight"] == weights["lm_head.weight"] == weights["model.norm.weight"] == (0.0,)


def test_words_and_switches_can_be_set_by_filter(folder: Path) -> None:
    parameters = {"tie": [{"filter": "mlp", "value": "average"}], "calibrate": [{"filter": "layers.1", "value": False}]}
    jobs = jobs_of(spec_dict("widen", folder / "base", folder / "near", parameters=parameters))
    found = jobs["model.layers.1.mlp.up_proj.weight"].parameters
    assert found is not None
    assert (found["tie"], found["calibrate"]) == ("average", False)
    found = jobs["model.layers.0.self_attn.q_proj.weight"].parameters
    assert found is not None
    assert (found["tie"], found["calibrate"]) == ("stable", True)


# ---- Tensors that not every model stores


def test_a_bias_that_a_model_lacks_is_zeros_and_told(tmp_path: Path) -> None:
    base = llama(layers=1, hidden=8)
    bias = "model.layers.0.self_attn.q_proj.bias"
    write_model(tmp_path / "base", base, LLAMA)
    write_model(tmp_path / "near", base | {bias: torch.ones(8)}, LLAMA)
    write_model(tmp_path / "far", base, LLAMA)
    found = planned(tmp_path, WIDEN)
    job = next(job for job in found.jobs if job.name == bias)
    assert (job.base, job.models[1]) == (None, None)
    assert job.models[0] is not None
    assert [warning for warning in found.warnings if bias in warning] == [
        f"{tmp_path}/{name} lacks 1 bias tensor, read as zeros: {bias}" for name in ("base", "far")
    ]


def test_heads_that_are_all_tied_are_stored_once(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    tied = llama(layers=1, hidden=8, tied=True)
    twice = tied | {"lm_head.weight": tied["model.embed_tokens.weight"].clone()}
    for name, tensors in (("base", tied), ("near", twice), ("far", tied)):
        write_model(tmp_path / name, tensors, config)
    for text in (
        WIDEN,
        WIDEN.replace("base_model: base", "base_model: near").replace("- model: near", "- model: base"),
    ):
        found = planned(tmp_path, text)
        assert "lm_head.weight" not in {job.name for job in found.jobs}
        assert found.config["tie_word_embeddings"] is True
        assert any("lm_head.weight is tied" in warning for warning in found.warnings)


@pytest.mark.parametrize("untied", ["base", "near", "far"])
def test_one_untied_head_unties_the_output(tmp_path: Path, untied: str) -> None:
    for name in ("base", "near", "far"):
        tensors = llama(layers=1, hidden=8, tied=name != untied)
        write_model(tmp_path / name, tensors, {**LLAMA, "tie_word_embeddings": name != untied})
    found = planned(tmp_path, WIDEN)
    head = next(job for job in found.jobs if job.name == "lm_head.weight")
    assert head.base is not None
    stored = {"base": head.base, "near": head.models[0], "far": head.models[1]}
    assert {name: source.info.name for name, source in stored.items() if isinstance(source, Stored)} == {
        name: "lm_head.weight" if name == untied else "model.embed_tokens.weight" for name in stored
    }
    assert found.config["tie_word_embeddings"] is False


def test_constants_are_copied_from_the_base_or_left_out(tmp_path: Path) -> None:
    base = llama(layers=1, hidden=8)
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    mask = "model.layers.0.attn.masked_bias"
    write_model(tmp_path / "base", base | {inv_freq: torch.ones(4, dtype=torch.float64)}, LLAMA)
    write_model(tmp_path / "near", base | {mask: torch.tensor(-1e4)}, LLAMA)
    write_model(tmp_path / "far", base, LLAMA)
    found = planned(tmp_path, WIDEN + "dtype: float32\n")
    jobs = {job.name: job for job in found.jobs}
    assert jobs[inv_freq].parameters is None
    assert jobs[inv_freq].dtype == "F64"
    assert mask not in jobs
    assert [warning for warning in found.warnings if mask in warning] == [
        f"{tmp_path}/near: {mask} is a constant that {tmp_path}/base does not store; left out"
    ]


def test_whole_numbers_are_copied_from_the_base_and_told(tmp_path: Path) -> None:
    base = {"a.weight": torch.ones(4, 4), "a.steps": torch.tensor([3]), "a.mask": torch.ones(2, 2, dtype=torch.bool)}
    write_trio(tmp_path, base, {})
    found = planned(tmp_path, WIDEN)
    assert {job.name for job in found.jobs if job.parameters is None} == {"a.steps", "a.mask"}
    assert any("2 tensors of whole numbers copied" in warning for warning in found.warnings)


# ---- The output, and what decides it


def test_a_plan_reads_no_tensor(folder: Path) -> None:
    before = tensor_bytes(folder / "near")
    file = folder / "near" / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)  # NaN everywhere
    file.write_bytes(content)
    assert tensor_bytes(folder / "near") != before
    stored = [info for name in ("base", "near", "far") for info in open_checkpoint(folder / name).tensors.values()]
    assert planned(folder, WIDEN).bytes_to_read == 2 * sum(info.nbytes for info in stored)


@pytest.mark.parametrize(
    ("keys", "stored"),
    [
        ({}, {"BF16", "F32"}),
        ({"dtype": "float16"}, {"F16"}),
        ({"dtype": "float16", "out_dtype": "float32"}, {"F32"}),
    ],
)
def test_the_output_has_the_dtypes_asked_for_or_the_base_s(
    tmp_path: Path, keys: dict[str, str], stored: set[str]
) -> None:
    base = {"a.weight": torch.zeros(4, 4, dtype=torch.bfloat16), "b.weight": torch.zeros(4, 4)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "near", {name: tensor.half() for name, tensor in base.items()})
    found = plan(load_spec(spec_dict("widen", tmp_path / "base", tmp_path / "near", **keys)))
    assert {job.dtype for job in found.jobs} == stored


def test_the_identity_tells_spec_and_inputs_but_not_how_it_runs(folder: Path) -> None:
    def identity(text: str) -> str:
        return planned(folder, text).identity()

    first = identity(WIDEN)
    assert identity(WIDEN + "run: {memory: 64MiB, threads: 1, read: pread, shard_size: 1MB}\n") == first
    assert identity(WIDEN + "parameters: {t: 1.0}\n") != first  # written down, so that defaults may change
    assert identity(WIDEN + "parameters: {t: 0.5}\n") != identity(WIDEN + "parameters: {t: 1.0}\n")
    assert identity(WIDEN + "seed: 1\n") != first
    assert identity(WIDEN + "dtype: float32\n") != first
    write_model(folder / "far", moved(llama(layers=3, hidden=8, vocabulary=12), 4e-3, 5), LLAMA)
    assert identity(WIDEN) != first


def test_a_caller_can_say_where_models_lie(folder: Path) -> None:
    spec = load_spec({"merge_method": "linear", "models": [{"model": "one"}, {"model": "two"}]})
    places = {"one": folder / "near", "two": folder / "far"}
    assert plan(spec, resolve=lambda name, revision: places[name]).files == [
        places[name] / "model.safetensors" for name in ("one", "two")
    ]


def test_errors_of_inputs_are_checkpoint_errors(folder: Path) -> None:
    with pytest.raises(CheckpointError):
        planned(folder, WIDEN.replace("far", "nowhere"))
