"""`configs/vit_base_mae.yaml` against the public MAE's `main_pretrain.py`: settings, AdamW's groups, first weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from moce_ds.common.config.settings import load
from moce_ds.models.mae import DecoderShape, MaskedAutoencoder
from moce_ds.models.vit import ViTShape
from moce_ds.training.engine import parameter_groups
from moce_ds.training.settings import PretrainSettings

RECIPE = Path(__file__).parents[3] / "configs" / "vit_base_mae.yaml"


@pytest.fixture(scope="module")
def recipe() -> PretrainSettings:
    return load(PretrainSettings, RECIPE)


def built(config: PretrainSettings) -> MaskedAutoencoder:
    spec = config.model_spec
    return MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)


def decayed(groups: list[dict[str, object]], model: nn.Module) -> dict[str, object]:
    """Weight decay by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]


def test_settings_are_those_of_the_public_command_line(recipe: PretrainSettings) -> None:
    optim, data, spec = recipe.optim, recipe.data, recipe.model_spec
    assert (optim.epochs, optim.batch_size, optim.base_lr, optim.min_lr) == (800, 4096, 1.5e-4, 0)
    assert (optim.warmup_epochs, optim.weight_decay, optim.betas, optim.clip) == (40, 0.05, (0.9, 0.95), 0)
    assert (data.crop_scale, data.flip, spec.mask_ratio) == ((0.2, 1.0), True, 0.75)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    shape, decoder = spec.shape, spec.decoder
    assert (shape.image_size, shape.patch_size, shape.width, shape.depth, shape.heads) == (224, 16, 768, 12, 12)
    assert (shape.mlp_ratio, decoder.width, decoder.depth, decoder.heads) == (4, 512, 8, 16)


def test_weight_decay_is_on_the_parameters_that_timm_chooses(recipe: PretrainSettings) -> None:
    with torch.device("meta"):
        model = built(recipe)
    ours = decayed(parameter_groups(model, recipe.optim, 1.0), model)
    assert ours == decayed(param_groups_weight_decay(model, recipe.optim.weight_decay), model)
    assert ours["cls_token"] == ours["mask_token"] == 0.05


def test_our_default_spares_the_tokens(tiny_config: Callable[..., PretrainSettings]) -> None:
    config = tiny_config()
    model = built(config)
    ours, timms = (
        decayed(groups, model)
        for groups in (
            parameter_groups(model, config.optim, 1.0),
            param_groups_weight_decay(model, config.optim.weight_decay),
        )
    )
    assert {name for name in ours if ours[name] != timms[name]} == {"cls_token", "mask_token"}


def test_first_weights_are_drawn_as_in_the_public_code() -> None:
    """Xavier uniform, zeros, and normal(0.02); the patch projection's bias has torch's own start."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(ViTShape(32, 8, 96, 2, 3), DecoderShape(64, 1, 4), 0.75)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name in ("cls_token", "mask_token"):
            assert values.std() == pytest.approx(0.02, rel=0.25), name
        elif name == "patch_embed.proj.bias":
            assert 0 < values.abs().max() <= 192**-0.5
        elif name.endswith("bias"):
            assert not values.any(), name
        elif "norm" in name:
            assert (values == 1).all(), name
        else:
            matrix = values.flatten(1)
            limit = (6 / sum(matrix.shape)) ** 0.5
            assert 0.98 * limit < matrix.abs().max() <= limit, name
            assert matrix.std() == pytest.approx(limit / 3**0.5, rel=0.05), name
