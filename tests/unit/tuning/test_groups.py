"""Layer decay: which part of the model learns at which share of the learning rate."""

import pytest
import torch
from torch import nn

from moce_ds.models.vit import ViTShape, timm_vit
from moce_ds.tuning.groups import parameter_groups
from moce_ds.tuning.settings import TuneOptimSettings

DEPTH = 3
OPTIM = TuneOptimSettings(layer_decay=0.5, weight_decay=0.1)


class Around(nn.Module):
    """A ViT with something on top, as detectors are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm_vit(ViTShape(16, 4, 16, DEPTH, 2))
        self.neck = nn.Linear(16, 16)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


@pytest.fixture(scope="module")
def told() -> dict[str, tuple[float, float]]:
    """Share of the learning rate and weight decay of every parameter, each in one group only."""
    model = Around()
    found: dict[int, tuple[float, float]] = {}
    for group in parameter_groups(model, model.encoder, OPTIM):
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr_scale"], group["weight_decay"])
    assert len(found) == sum(parameter.requires_grad for parameter in model.parameters())
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_the_rate_falls_block_by_block(told: dict[str, tuple[float, float]]) -> None:
    for block in range(DEPTH):
        for part in ("attn.qkv", "mlp.fc2"):
            assert told[f"encoder.blocks.{block}.{part}.weight"] == (0.5 ** (DEPTH - block), 0.1)
    for embedding in ("cls_token", "pos_embed"):
        assert told[f"encoder.{embedding}"] == (0.5 ** (DEPTH + 1), 0.0)
    assert told["encoder.patch_embed.proj.weight"] == (0.5 ** (DEPTH + 1), 0.1)
    assert told["encoder.norm.weight"] == (1.0, 0.0)


def test_what_is_around_the_encoder_learns_at_the_full_rate(told: dict[str, tuple[float, float]]) -> None:
    assert told["neck.weight"] == (1.0, 0.1) and told["neck.bias"] == (1.0, 0.0)


def test_only_matrices_decay(told: dict[str, tuple[float, float]]) -> None:
    assert {name for name, (_, decay) in told.items() if not decay} == {
        name
        for name in told
        if name.endswith(("bias", "norm1.weight", "norm2.weight", "norm.weight", "_token", "embed"))
    }
