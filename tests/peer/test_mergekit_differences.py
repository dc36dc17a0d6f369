"""Where results differ from mergekit's, and who is right: the rows of docs/peers.md, against exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from torch import Tensor

import mergecore
from tests.models import load_tensors, write_model
from tests.peer.support import CONFIG, Mergekit, MergekitError, Tensors, both, config, write_spec

THREE = ("near", "nearer", "nearest")
NORM = "model.norm.weight"


def changed(base: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> Tensors:
    return {name: tensor + change(name, tensor) for name, tensor in base.items()}


def write(folder: Path, **models: Tensors) -> dict[str, Path]:
    return {name: write_model(folder / name, tensors, CONFIG) for name, tensors in models.items()}


def coarse(models: Mapping[str, Path]) -> Tensors:
    """The base with entries on a grid of 2^-12, so that small steps of powers of two are exact in float32."""
    return {name: torch.round(tensor * 2**12) / 2**12 for name, tensor in load_tensors(models["base"]).items()}


def signs(name: str, tensor: Tensor) -> Tensor:
    """1 and -1 at random, the same for every call with this tensor."""
    random = torch.Generator().manual_seed(len(name) * 7919 + tensor.numel())
    return torch.randint(0, 2, tensor.shape, generator=random).float() * 2 - 1


# Geometry -----------------------------------------------------------------------------------------


def test_small_deltas_keep_their_cosine_in_model_stock(
    mergekit: Mergekit, models: dict[str, Path], tmp_path: Path
) -> None:
    """Two equal deltas have the cosine 1, so their mean is right, whatever their length; mergekit's cosine
    shrinks with lengths whose product is below 1e-6."""
    base = load_tensors(models["base"])
    small = changed(base, lambda name, v: 2.0**-20 * v.abs().max())
    given = models | write(tmp_path, near=small, nearer=small)
    theirs, ours = both(mergekit, config("model_stock", "near", "nearer", base="base"), given, tmp_path)
    for name, right in small.items():
        assert torch.allclose(ours[name], right, rtol=1e-7, atol=0)
    assert float((theirs[NORM] - base[NORM]).abs().max()) < 0.1 * float((small[NORM] - base[NORM]).abs().max())


def test_a_tensor_that_no_model_changed_stays_in_multislerp(
    mergekit: Mergekit, models: dict[str, Path], tmp_path: Path
) -> None:
    """mergekit stops: the weighted sum of the deltas is zero."""
    base = load_tensors(models["base"])
    frozen = {name: load_tensors(models[name]) | {NORM: base[NORM]} for name in THREE}
    given = models | write(tmp_path, **frozen)
    with pytest.raises(MergekitError, match="The weighted sum of the input tensors is zero"):
        both(mergekit, config("multislerp", *THREE, base="base", weights=(1, 1, 1)), given, tmp_path)
    mergecore.merge(tmp_path / "config.yml", tmp_path / "ours", device="cpu")
    assert torch.equal(load_tensors(tmp_path / "ours")[NORM], base[NORM])


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_bfloat16_is_rounded_once(method: str, mergekit: Mergekit, models: dict[str, Path], tmp_path: Path) -> None:
    """mergekit works in bfloat16 throughout."""
    given = {}
    for name in ("far", "other"):
        tensors = {key: v.bfloat16() for key, v in load_tensors(models[name]).items()}
        given[name] = write_model(tmp_path / name, tensors, CONFIG | {"torch_dtype": "bfloat16"})
    weights = () if method == "karcher" else (0.3, 0.9)
    asked = config(method, "far", "other", weights=weights) | {"dtype": "bfloat16"}
    theirs, ours = both(mergekit, asked, given, tmp_path)
    exact = yaml.safe_load((tmp_path / "config.yml").read_text()) | {"dtype": "float32"}
    mergecore.merge(mergecore.load_spec(exact), tmp_path / "exact", device="cpu")
    for name, right in load_tensors(tmp_path / "exact").items():
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], right.bfloat16())
    wrong = [float((theirs[name] != ours[name]).float().mean()) for name in ours]
    assert max(wrong) > 0.1


# Selection ----------------------------------------------------------------------------------------


def test_the_number_of_kept_entries_is_rounded(mergekit: Mergekit, models: dict[str, Path], tmp_path: Path) -> None:
    """A tenth of the 48 entries of a norm is 4.8: 5 are nearer than mergekit's 4."""
    asked = config("ties", "near", base="base", weights=(1,), density=0.1)
    theirs, ours = both(mergekit, asked, models, tmp_path)
    base = load_tensors(models["base"])[NORM]
    assert [int((found[NORM] != base).sum()) for found in (theirs, ours)] == [4, 5]


def test_equal_magnitudes_are_kept_in_the_order_of_their_index(
    mergekit: Mergekit, models: dict[str, Path], tmp_path: Path
) -> None:
    """Both keep half of the entries, all of which moved equally far; mergekit leaves which to an unstable sort."""
    base = coarse(models)
    given = write(tmp_path, base=base, near=changed(base, lambda name, v: signs(name, v) * 2.0**-8))
    asked = config("ties", "near", base="base", weights=(1,), density=0.5)
    theirs, ours = both(mergekit, asked, given, tmp_path)
    for name, tensor in base.items():
        half = tensor.numel() // 2
        assert (ours[name] != tensor).flatten().tolist() == [True] * half + [False] * half
        assert int((theirs[name] != tensor).sum()) == half
    assert any(not torch.equal(theirs[name], ours[name]) for name in base)


def test_weights_of_sce_do_not_depend_on_the_scale_of_the_deltas(
    mergekit: Mergekit, models: dict[str, Path], tmp_path: Path
) -> None:
    """One model moved by h, the other by 3 h everywhere: their weights are 0.1 and 0.9, the result is 2.8 h. Where
    h is 2^-12, mergekit takes 0.5 and 0.5: 2 h."""
    base = coarse(models)
    for h, of_theirs in ((2.0**-8, 2.8), (2.0**-12, 2.0)):
        folder = tmp_path / str(h)
        folder.mkdir()
        moved = {name: {key: v + step for key, v in base.items()} for name, step in (("near", h), ("nearer", 3 * h))}
        theirs, ours = both(
            mergekit, config("sce", "near", "nearer", base="base"), write(folder, base=base, **moved), folder
        )
        for name, tensor in base.items():
            for found, factor in ((theirs, of_theirs), (ours, 2.8)):
                steps = (found[name].double() - tensor.double()) / h
                torch.testing.assert_close(steps, torch.full_like(steps, factor), rtol=0, atol=2.0**-22 / h)


def test_sce_divides_by_the_weights_that_take_part(mergekit: Mergekit, models: dict[str, Path], tmp_path: Path) -> None:
    """Where only a model of little weight moved, by 2^-12, that is the mean there; mergekit divides by 1e-6 or
    more."""
    base = coarse(models)

    def half(v: Tensor) -> Tensor:
        mask = torch.zeros(v.numel())
        mask[::2] = 1
        return mask.view(v.shape)

    given = write(
        tmp_path,
        base=base,
        near=changed(base, lambda _, v: 2.0**-12 * half(v)),
        nearer=changed(base, lambda _, v: 2.0 * (1 - half(v))),
    )
    theirs, ours = both(mergekit, config("sce", "near", "nearer", base="base"), given, tmp_path)
    for name, tensor in base.items():
        moved = half(tensor) == 1
        assert torch.equal((ours[name] - tensor)[moved], torch.full_like(tensor, 2.0**-12)[moved])
        assert float((theirs[name] - tensor)[moved].abs().max()) < 2.0**-15


def test_small_deltas_are_rescaled_too(mergekit: Mergekit, models: dict[str, Path], tmp_path: Path) -> None:
    """Entries move by 1 and by 3, in units of 2^-40; half of them is kept and the sum of |d| restored, so those that
    moved by 3 move by 4. mergekit does nothing where the sum is below 1e-7."""
    unit = 2.0**-40
    base = load_tensors(models["base"]) | {NORM: torch.zeros(48)}
    steps = torch.tensor([1.0, 3.0]).repeat(24)
    given = write(tmp_path, base=base, near=base | {NORM: unit * steps})
    asked = config("ties", "near", base="base", weights=(1,), density=0.5, rescale=True)
    theirs, ours = both(mergekit, asked, given, tmp_path)
    kept = steps == 3
    assert torch.equal(ours[NORM], torch.where(kept, 4 * unit, 0.0))
    assert torch.equal(theirs[NORM], torch.where(kept, 3 * unit, 0.0))


def test_rounding_noise_elects_no_sign(mergekit: Mergekit, models: dict[str, Path], tmp_path: Path) -> None:
    """Of d, d and -d with the weights 0.1, 0.2 and 0.3 the sum is 0, which elects plus: the result is |d| everywhere.
    mergekit's float32 sums are of either sign."""
    base = {name: torch.zeros_like(v) for name, v in load_tensors(models["base"]).items()}
    moved = changed(base, lambda name, v: torch.randn(v.shape, generator=torch.Generator().manual_seed(v.numel())))
    opposite = {name: -v for name, v in moved.items()}
    given = write(tmp_path, base=base, near=moved, nearer=moved, nearest=opposite)
    asked = config("ties", *THREE, base="base", weights=(0.1, 0.2, 0.3))
    theirs, ours = both(mergekit, asked, given, tmp_path)
    for name, tensor in moved.items():
        assert torch.allclose(ours[name], tensor.abs(), rtol=1e-6)
    assert any(bool((theirs[name] < 0).any()) for name in moved)


def test_rows_of_one_entry_are_kept_with_the_density_by_della(
    mergekit: Mergekit, models: dict[str, Path], tmp_path: Path
) -> None:
    """mergekit divides the rank by the number of other entries of the row, of which there are none."""
    narrow = {"model.layers.0.mlp.down_proj.weight": torch.zeros(48, 1)}
    narrow |= {f"model.layers.0.mlp.{name}_proj.weight": torch.zeros(1, 48) for name in ("gate", "up")}
    narrow |= {name.replace("layers.0", "layers.1"): v for name, v in narrow.items()}
    base = load_tensors(models["base"]) | narrow
    config_of = CONFIG | {"intermediate_size": 1}
    given = {
        name: write_model(tmp_path / name, tensors, config_of)
        for name, tensors in (("base", base), ("near", changed(base, lambda _, v: torch.ones_like(v))))
    }
    asked = config("della", "near", base="base", weights=(1,), density=0.5, epsilon=0.25)
    with pytest.raises(MergekitError, match="bernoulli"):
        both(mergekit, asked, given, tmp_path)
    mergecore.merge(tmp_path / "config.yml", tmp_path / "ours", device="cpu")
    for name in narrow:
        if name.endswith("down_proj.weight"):
            assert set(load_tensors(tmp_path / "ours")[name].flatten().tolist()) == {0.0, 2.0}


def test_della_ranks_along_the_last_axis(tmp_path: Path) -> None:
    """Of a tensor of three dimensions, deltas from 1 to 8 along the last one: they are kept more often the larger they
    are, and a row of any other axis, where all are equal, at random."""
    ranks = torch.arange(1.0, 9.0).expand(64, 64, 8)
    given = {
        name: write_model(tmp_path / name, {"experts.gate_up_proj": tensor})
        for name, tensor in (("base", torch.zeros(64, 64, 8)), ("near", ranks))
    }
    asked = config("della", "near", base="base", weights=(1,), density=0.5, epsilon=0.25, rescale=False)
    mergecore.merge(write_spec(asked, given, tmp_path / "config.yml"), tmp_path / "ours", device="cpu")
    kept = (load_tensors(tmp_path / "ours")["experts.gate_up_proj"] != 0).double()
    odds = 0.25 + 0.5 * torch.arange(8) / 7
    assert bool(((kept.mean((0, 1)) - odds).abs() < 4 * (odds * (1 - odds) / 64**2).sqrt()).all())


# Single entries -----------------------------------------------------------------------------------


def test_nearswap_moves_small_deltas_whole(mergekit: Mergekit, models: dict[str, Path], tmp_path: Path) -> None:
    """Deltas of 2^-24 are less than t = 2^-22, so the model is taken; mergekit divides t by at least 1e-6."""
    base = {name: torch.zeros_like(v) for name, v in load_tensors(models["base"]).items()}
    given = write(tmp_path, base=base, near=changed(base, lambda _, v: torch.full_like(v, 2.0**-24)))
    theirs, ours = both(mergekit, config("nearswap", "near", base="base", t=2.0**-22), given, tmp_path)
    for name, tensor in base.items():
        assert torch.equal(ours[name], torch.full_like(tensor, 2.0**-24))
        torch.testing.assert_close(theirs[name], torch.full_like(tensor, 2.0**-24 * 2.0**-22 / 1e-6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_exact_differences_are_compared_with_epsilon(
    method: str, mergekit: Mergekit, models: dict[str, Path], tmp_path: Path
) -> None:
    """From 1 to -1.5 * 2^-8 is 1.00586, more than epsilon = 1.005. In bfloat16 both are 1.00781."""
    base = {name: torch.ones_like(v).bfloat16() for name, v in load_tensors(models["base"]).items()}
    near = {name: torch.full_like(v, -1.5 * 2.0**-8) for name, v in base.items()}
    asked = config(method, "near", base="base", epsilon=1.005) | {"dtype": "bfloat16"}
    theirs, ours = both(mergekit, asked, write(tmp_path, base=base, near=near), tmp_path)
    for name, tensor in base.items():
        assert torch.equal(ours[name], near[name])
        assert torch.equal(theirs[name], tensor)


def test_arcee_fusion_writes_the_type_that_the_spec_asks_for(
    mergekit: Mergekit, models: dict[str, Path], tmp_path: Path
) -> None:
    """mergekit writes float32, whatever `dtype` says."""
    asked = config("arcee_fusion", "near", base="base") | {"dtype": "bfloat16"}
    theirs, ours = both(mergekit, asked, models, tmp_path)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float32}


@pytest.mark.parametrize("scale", [2.0**-5, 2.0**-13])
def test_arcee_fusion_keeps_what_the_exact_quartiles_and_divergences_say(
    scale: float, mergekit: Mergekit, models: dict[str, Path], tmp_path: Path
) -> None:
    """mergekit cuts the quartiles' places off and adds 1e-8 to probabilities in float32, where the divergence of
    nearly equal rows cancels: it keeps other entries, few of them or, where deltas are small, many."""
    base = load_tensors(models["base"])
    near = changed(base, lambda name, v: scale * torch.randn(v.shape, generator=torch.Generator().manual_seed(3)))
    theirs, ours = both(
        mergekit, config("arcee_fusion", "near", base="base"), write(tmp_path, base=base, near=near), tmp_path
    )
    for name, tensor in base.items():
        a, x = tensor.double(), near[name].double()
        log_p, log_q = x.log_softmax(-1), a.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
        importance = ((x - a).abs() * divergence).numpy()
        least, middle, most = np.quantile(importance, [0.25, 0.5, 0.75])
        threshold = middle + 1.5 * (most - least)
        sure = torch.from_numpy(np.abs(importance - threshold) > 1e-4 * threshold)
        kept = torch.from_numpy(importance >= threshold)
        assert torch.equal(ours[name][sure], torch.where(kept, near[name], tensor)[sure])
    differ = max(float((theirs[name] != ours[name]).float().mean()) for name in base)
    assert differ < 0.001 if scale > 2.0**-10 else differ > 0.1


# Architectures ------------------------------------------------------------------------------------


def test_whisper_is_merged_by_the_names_that_it_has(mergekit: Mergekit, tmp_path: Path) -> None:
    """mergekit looks for names of its decoder that lack a dot."""
    sizes: dict[str, Any] = {f"{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "ffn_dim")}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "d_model": 16}
    sizes |= {name: number for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))}
    settings = transformers.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=9, max_target_positions=9)
    given = {}
    for number, name in enumerate(("near", "far")):
        torch.manual_seed(number)
        transformers.WhisperForConditionalGeneration(settings).save_pretrained(tmp_path / name)
        given[name] = tmp_path / name
    with pytest.raises(MergekitError, match=r"Tensor model\.decoder"):
        both(mergekit, config("linear", "near", "far", weights=(1, 1)), given, tmp_path)
    mergecore.merge(tmp_path / "config.yml", tmp_path / "ours", device="cpu")
    near, far, ours = (load_tensors(tmp_path / name) for name in ("near", "far", "ours"))
    assert set(ours) == set(near)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, ((near[name].double() + far[name].double()) / 2).float())
