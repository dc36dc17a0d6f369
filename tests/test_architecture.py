"""What names and config.json tell: a layer's place, embeddings, tied heads, constants, and how tensors are scored."""

from __future__ import annotations

import pytest

from mergecore.architecture import (
    HEAD,
    Architecture,
    embedding_of,
    is_bias,
    is_buffer,
    is_embedding,
    is_linear,
    is_tied,
)


def architecture(*names: str, **config: object) -> Architecture:
    return Architecture.of(config, names, {})


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.{}.mlp.up_proj.weight",
        "transformer.h.{}.attn.c_attn.weight",
        "h.{}.ln_1.bias",
        "layers.{}.attention.wq.weight",
        "bert.encoder.layer.{}.output.dense.weight",
        "visual.blocks.{}.attn.qkv.weight",
        "gpt_neox.layers.{}.attention.dense.weight",
        "model.layers.{}.mlp.experts.3.up_proj.weight",
    ],
)
def test_the_place_of_a_layer_runs_from_0_to_1(pattern: str) -> None:
    names = [pattern.format(i) for i in range(5)]
    known = architecture(*names, "model.embed_tokens.weight", HEAD)
    assert [known.place(name) for name in names] == [0, 0.25, 0.5, 0.75, 1]


def test_tensors_outside_the_layers_stand_at_0() -> None:
    known = architecture("model.layers.0.a.weight", "model.layers.1.a.weight", HEAD, "model.norm.weight")
    assert known.place(HEAD) == known.place("model.norm.weight") == 0


def test_a_stack_of_one_layer_stands_at_1() -> None:
    assert architecture("model.layers.0.a.weight").place("model.layers.0.a.weight") == 1


def test_stacks_are_counted_apart() -> None:
    known = architecture("encoder.layers.1.a", "encoder.layers.0.a", "decoder.layers.0.a", "decoder.layers.4.a")
    assert known.place("encoder.layers.1.a") == 1
    assert (
        architecture("decoder.layers.0.a", "decoder.layers.4.a", "decoder.layers.1.a").place("decoder.layers.1.a")
        == 0.25
    )


@pytest.mark.parametrize(
    ("name", "shape", "embedding"),
    [
        ("model.embed_tokens.weight", (10, 4), True),
        ("transformer.wte.weight", (10, 4), True),
        ("transformer.wpe.weight", (10, 4), True),
        ("bert.embeddings.word_embeddings.weight", (10, 4), True),
        ("bert.embeddings.LayerNorm.weight", (4,), False),
        ("gpt_neox.embed_in.weight", (10, 4), True),
        ("gpt_neox.embed_out.weight", (10, 4), False),
        ("shared.weight", (10, 4), True),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), True),
        ("vision_tower.embeddings.position_embedding.weight", (5, 4), True),
        ("vision_tower.embeddings.patch_embedding.weight", (5, 12), False),
        ("model.visual.pos_embed.weight", (10, 4), True),
        (HEAD, (10, 4), False),
        ("model.layers.0.mlp.up_proj.weight", (10, 4), False),
        ("weight", (10, 4), False),
    ],
)
def test_an_embedding_is_known_by_its_module(name: str, shape: tuple[int, ...], embedding: bool) -> None:
    assert is_embedding(name, shape) is embedding


def test_embeddings_are_scored_per_token_and_linear_layers_per_input_feature() -> None:
    known = architecture(model_type="llama")
    assert known.orientation("model.embed_tokens.weight", (10, 4)) == "rows"
    assert known.orientation(HEAD, (10, 4)) == "columns"
    assert known.orientation("model.layers.0.mlp.up_proj.weight", (10, 4)) == "columns"


def test_gpt2_stores_its_linear_layers_transposed() -> None:
    gpt2 = architecture(model_type="gpt2")
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert gpt2.orientation(f"h.0.{name}.weight", (4, 12)) == "rows"
        assert architecture(model_type="gpt_bigcode").orientation(f"h.0.{name}.weight", (4, 12)) == "columns"
    assert gpt2.orientation("h.0.attn.c_attn.bias", (12,)) == "columns"


def test_the_spec_decides_before_the_name_and_the_first_match_wins() -> None:
    known = Architecture.of({}, [], {"*.up_proj.weight": "rows", "*embed*": "columns", "*": "rows"})
    assert known.orientation("model.layers.0.mlp.up_proj.weight", (10, 4)) == "rows"
    assert known.orientation("model.embed_tokens.weight", (10, 4)) == "columns"
    assert known.orientation(HEAD, (10, 4)) == "rows"


def test_a_vector_is_one_row_of_columns_whatever_the_spec_says() -> None:
    known = Architecture.of({}, [], {"*": "rows"})
    assert known.orientation("model.norm.weight", (8,)) == "columns"
    assert known.orientation("model.scale", ()) == "columns"


@pytest.mark.parametrize(
    ("name", "shape", "matrices"),
    [
        ("norm.weight", (7,), (1, 1, 7)),
        ("scale", (), (1, 1, 1)),
        ("up_proj.weight", (5, 7), (1, 5, 7)),
        ("visual.conv1.weight", (5, 3, 2, 2), (1, 5, 12)),
        ("mlp.experts.gate_up_proj", (4, 5, 7), (4, 5, 7)),
        ("mlp.fused.weight", (4, 5, 7), (1, 4, 35)),
        ("up_proj.weight", (0, 7), (1, 0, 1)),
        ("up_proj.weight", (5, 0), (1, 0, 1)),
        ("norm.weight", (0,), (1, 0, 1)),
        ("mlp.experts.gate_up_proj", (4, 0, 7), (1, 0, 1)),
    ],
)
def test_a_tensor_is_seen_as_matrices(name: str, shape: tuple[int, ...], matrices: tuple[int, int, int]) -> None:
    assert architecture().matrices(name, shape) == matrices


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_fused_experts_are_also_known_by_their_number(key: str) -> None:
    assert architecture(**{key: 4}).matrices("mlp.fused.weight", (4, 5, 7)) == (4, 5, 7)


def test_the_shapes_of_both_projections_tell_how_fused_experts_are_stored() -> None:
    """Also where each of them alone could be either."""
    gate_up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    for hidden, inner in ((16, 12), (16, 16), (16, 8), (8, 16)):
        out_in = {gate_up: (4, 2 * inner, hidden), down: (4, hidden, inner)}
        in_out = {gate_up: (4, hidden, 2 * inner), down: (4, inner, hidden)}
        for shapes, orientation in ((out_in, "columns"), (in_out, "rows")):
            known = Architecture.of({}, shapes, {}, shapes)
            assert {known.orientation(name, shape) for name, shape in shapes.items()} == {orientation}


@pytest.mark.parametrize(
    ("name", "shape", "linear"),
    [
        ("model.layers.0.mlp.up_proj.weight", (10, 4), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 10, 4), True),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (2, 10), False),
        ("model.norm.weight", (4,), False),
        ("model.embed_tokens.weight", (10, 4), False),
        ("gpt_neox.embed_out.weight", (10, 4), False),
        ("language_model.lm_head.weight", (10, 4), False),
        ("model.layers.0.mlp.up_proj.weight", (0, 4), False),
    ],
)
def test_linear_layers_are_matrices_inside_the_model(name: str, shape: tuple[int, ...], linear: bool) -> None:
    assert is_linear(name, shape) is linear


@pytest.mark.parametrize(
    ("name", "shape", "buffer"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,), True),
        ("transformer.h.0.attn.bias", (1, 1, 64, 64), True),
        ("transformer.h.0.attn.masked_bias", (), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 64, 64), True),
        ("gpt_neox.layers.0.attention.masked_bias", (), True),
        ("bert.embeddings.position_ids", (1, 512), True),
        ("h.0.attn.bias", (12,), False),
        ("h.0.attn.c_attn.bias", (12,), False),
        ("model.layers.0.self_attn.q_proj.bias", (12,), False),
        ("model.norm.weight", (12,), False),
    ],
)
def test_constants_of_old_checkpoints_are_no_parameters(name: str, shape: tuple[int, ...], buffer: bool) -> None:
    assert is_buffer(name, shape) is buffer


def test_only_biases_may_be_absent() -> None:
    assert is_bias("model.layers.0.self_attn.q_proj.bias")
    assert not is_bias("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("config", "names", "tied"),
    [
        ({"tie_word_embeddings": True}, [], True),
        ({"tie_word_embeddings": True}, [HEAD], True),
        ({"tie_word_embeddings": False}, [HEAD], False),
        ({"text_config": {"tie_word_embeddings": True}}, [HEAD], True),
        ({"text_config": None}, [HEAD], False),
        ({}, [HEAD], False),
        ({}, [], True),
    ],
)
def test_a_head_is_tied_if_the_config_says_so_or_if_it_is_not_stored(
    config: dict[str, object], names: list[str], tied: bool
) -> None:
    assert is_tied(config, ["model.embed_tokens.weight", *names]) is tied


def test_the_embedding_that_a_tied_head_shares() -> None:
    assert embedding_of(["a.weight", "transformer.wpe.weight", "transformer.wte.weight"]) == "transformer.wte.weight"
    assert embedding_of(["a.weight"]) is None
