"""The names of parameters: their places in a model, and the names of DeepSpeed's own checkpoints."""

import pytest

from moce_ds.models.parameters import (
    Place,
    encoder_block,
    expert_key,
    has_experts,
    is_cluster_gate,
    is_decoder,
    is_embedding,
    is_expert,
    is_gate,
    is_replaced,
    lacks_decoder,
    local_expert,
    native_expert,
    place_of,
    with_plain_gate,
)
from moce_ds.moe.deepspeed_layer import NATIVE_EXPERTS

NATIVE = f"blocks.9.mlp.{NATIVE_EXPERTS}1.fc1.weight"
"""As the layer of experts writes it for DeepSpeed."""


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.9.norm1.weight", Place(False, 9, None)),
        ("blocks.9.mlp.experts.0.fc1.weight", Place(False, 9, 0)),
        ("blocks.10.mlp.gate.weight", Place(False, 10, None)),
        ("blocks.9.mlp.shared.fc1.weight", Place(False, 9, None)),
        ("decoder_blocks.3.mlp.fc1.weight", Place(True, 3, None)),
        ("patch_embed.proj.weight", None),
        ("gate.weights.0", None),
    ],
)
def test_the_place_of_a_parameter(name: str, place: Place | None) -> None:
    assert place_of(name) == place
    assert encoder_block(name) == (None if place is None or place.in_decoder else place.block)
    assert is_expert(name) == (place is not None and place.expert is not None)


def test_an_expert_s_name_is_recognised() -> None:
    name = expert_key(9, 3, "fc1.weight")
    assert is_expert(name) and has_experts([name, "norm.weight"]) and not has_experts(["norm.weight"])
    assert local_expert(name) == (9, 3, "fc1.weight") and native_expert(name) is None
    assert local_expert(NATIVE) == native_expert(NATIVE) == (9, 1, "fc1.weight")
    assert local_expert("blocks.9.mlp.fc1.weight") is None


def test_the_parts_outside_the_blocks() -> None:
    decoder = ("decoder_blocks.0.norm1.weight", "decoder_embed.weight", "decoder_pos_embed", "mask_token")
    encoder = ("cls_token", "pos_embed", "patch_embed.proj.bias", "norm.weight")
    assert all(map(is_decoder, decoder)) and not any(map(is_decoder, encoder))
    assert lacks_decoder(encoder) and not lacks_decoder([*encoder, "mask_token"])
    assert [is_embedding(name) for name in encoder] == [True, True, True, False]


def test_gates_of_clusters_and_of_tokens() -> None:
    stock = "blocks.9.mlp.deepspeed_moe.gate.wg.weight"
    assert with_plain_gate(stock) == "blocks.9.mlp.gate.weight" and with_plain_gate("norm.weight") == "norm.weight"
    assert is_gate("gate.weights.0") and is_gate(stock) and not is_gate("blocks.9.mlp.fc1.weight")
    assert is_cluster_gate("gate.embeddings_MC") and not is_cluster_gate("blocks.9.mlp.gate.weight")


def test_experts_replace_the_mlps_of_their_blocks_alone() -> None:
    names = ["blocks.1.mlp.fc1.weight", "blocks.2.mlp.fc1.weight", "blocks.1.norm1.weight", "norm.weight"]
    assert [is_replaced(name, (1, 3)) for name in names] == [True, False, False, False]
    assert not is_replaced("decoder_blocks.1.mlp.fc1.weight", (1, 3))
