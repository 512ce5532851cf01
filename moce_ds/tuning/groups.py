"""AdamW's groups of a model around a ViT: learning rates that fall from the head to the patches (layer decay)."""

from typing import Any

from torch import nn

from moce_ds.compat import repair_torchvision
from moce_ds.tuning.settings import TuneOptimSettings

repair_torchvision()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402  (needs the repair)
from timm.optim import param_groups_layer_decay  # noqa: E402


def parameter_groups(model: nn.Module, vit: VisionTransformer, optim: TuneOptimSettings) -> list[dict[str, Any]]:
    """The groups of timm for `vit`, a part of `model` or all of it, and the rest of `model` at the full learning rate.

    With depth N, block b (from 0) has `layer_decay ** (N - b)` of the learning rate (`lr_scale`), embeddings
    `layer_decay ** (N + 1)`, final norm and head all of it, as in BEiT and MAE. Weight decay is on matrices only.
    """
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        vit, optim.weight_decay, no_weight_decay_list=vit.no_weight_decay(), layer_decay=optim.layer_decay
    )
    own = {id(parameter) for parameter in vit.parameters()}
    rest = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    for decay, params in (
        (optim.weight_decay, [p for p in rest if p.ndim > 1]),
        (0.0, [p for p in rest if p.ndim <= 1]),
    ):
        if params:
            groups.append({"params": params, "weight_decay": decay, "lr_scale": 1.0})
    return groups
