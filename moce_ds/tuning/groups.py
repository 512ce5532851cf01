"""AdamW's groups of a model around a ViT: learning rates that fall from the head to the patches (layer decay).

timm's own groups put the final norm with the last block, and leave the last block at the full rate where the ViT has no
head, as in a detector; here the rates are those of BEiT, MAE and ViTDet in both cases.
"""

from typing import Any

from torch import nn

from moce_ds.checkpoint.parameters import encoder_block, is_embedding
from moce_ds.compat import repair_torchvision
from moce_ds.tuning.settings import TuneOptimSettings

repair_torchvision()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402  (needs the repair)


def parameter_groups(model: nn.Module, vit: VisionTransformer, optim: TuneOptimSettings) -> list[dict[str, Any]]:
    """Groups of all parameters of `model` that learn; `vit` is a part of it, or all of it.

    With N blocks, block b (from 0) has `layer_decay ** (N - b)` of the learning rate (`lr_scale`), embeddings
    `layer_decay ** (N + 1)`, all else the full rate. Weight decay is on matrices only, not on tokens and positions.
    """
    inside = {id(parameter): name for name, parameter in vit.named_parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = inside.get(id(parameter), "")
        scale = optim.layer_decay ** _distance(name, len(vit.blocks))
        plain = parameter.ndim < 2 or name in vit.no_weight_decay()
        decay = 0.0 if plain else optim.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def _distance(name: str, depth: int) -> int:
    """Layers between a parameter of the ViT and the head; 0 for what lies behind the blocks or outside."""
    block = encoder_block(name)
    if block is not None:
        return depth - block
    return depth + 1 if is_embedding(name) else 0
