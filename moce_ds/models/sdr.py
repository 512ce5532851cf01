"""SDR, a baseline: "Scalable Dynamic Routing" (Liu et al., AAAI 2022) adapted to masked autoencoders.

The first phase trains a dense MAE. The second phase splits the hidden units of every MLP into common units and E
groups; an image uses one group. Blocks form stages; the digits of the image's cluster number in base E select the
group of each stage. So E^stages paths share one network, and there is no learned gate. The tokens of the dense MAE are
the teacher.

A group is an expert of `Moce` (blocks.B.mlp), so plan, all-to-all, placement and checkpoints are those of MoCE; the
common units are blocks.B.common.

Axes: B images, N patches, T tokens (cls and visible patches), D width, H hidden units of a dense MLP.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moce_ds.models.mae import Block, Masking, Mlp, ModelOutput, random_masking, visible_tokens
from moce_ds.models.moce import ExpertShape, Moce, Routing
from moce_ds.models.parameters import expert_key, is_replaced
from moce_ds.models.vit import Encoder, ViTShape
from moce_ds.moe.routing_plan import LayerPlan

FC1, FC2 = "fc1.weight", "fc2.weight"
BIAS1, BIAS2 = "fc1.bias", "fc2.bias"
_PARTS = (FC1, BIAS1, FC2, BIAS2)


class Teacher:
    """The encoder of the dense MAE of the first phase, applied to the patches that the student sees."""

    def __init__(self, encoder: Encoder) -> None:
        self.model = encoder.model

    @torch.no_grad()
    def tokens(self, images_BCHW: Tensor, masking: Masking) -> Tensor:
        """Tokens after the final norm, as `MaskedAutoencoder.encode` returns them, [B, T, D]."""
        x_BTD = visible_tokens(self.model, images_BCHW, masking)
        for block in self.model.blocks:
            x_BTD = block(x_BTD)
        tokens_BTD: Tensor = self.model.norm(x_BTD)
        return tokens_BTD


class Sdr(Moce):
    """A MaskedAutoencoder whose blocks have E groups of hidden units as `mlp`, and the common units as `common`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for block in self.experts.layers:
            self.blocks[block].common = Mlp(self.shape.width, self.experts.common_units)

    def make_expert(self) -> nn.Module:
        """One group of hidden units."""
        return Mlp(self.shape.width, group_units(self.shape, self.experts))

    def forward(  # type: ignore[override]
        self, images_BCHW: Tensor, noise_BN: Tensor, routing: Routing, teacher: Teacher | None = None
    ) -> ModelOutput:
        """Reconstruct masked images, each on its path.

        The loss `distillation` is the distance from the teacher's tokens; 0 without a teacher.
        """
        masking = random_masking(noise_BN, self.mask_ratio)
        x_BTD = self.encode(images_BCHW, masking, self.routed(routing, self.gate()))
        reconstruction = self.from_tokens(x_BTD, images_BCHW, masking)
        distillation = torch.zeros_like(reconstruction.loss)
        if teacher is not None:
            distillation = distance(x_BTD, teacher.tokens(images_BCHW, masking))
        loss = reconstruction.loss
        if self.weights.distillation is not None:
            loss = loss + self.weights.distillation * distillation
        losses = {"loss": loss, "reconstruction": reconstruction.loss, "distillation": distillation}
        return ModelOutput(losses, reconstruction)

    def expert_block(self, block: Block, x_BTD: Tensor, plan: LayerPlan, weight_BK: Tensor) -> Tensor:
        """timm's block; its MLP is the sum of the common units and the image's group."""
        x_BTD = x_BTD + block.attn(block.norm1(x_BTD))
        h_BTD = block.norm2(x_BTD)
        return x_BTD + block.common(h_BTD) + block.mlp(h_BTD, plan, weight_BK)


def distance(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Mean squared difference of tokens, each normalised to mean 0 and variance 1 over its D values, in float32."""
    D = student_BTD.shape[-1:]
    return F.mse_loss(F.layer_norm(student_BTD.float(), D), F.layer_norm(teacher_BTD.float(), D))


def group_units(shape: ViTShape, experts: ExpertShape) -> int:
    """Hidden units of a group: those that are not common, divided by E."""
    return (shape.hidden - experts.common_units) // experts.num_experts


def path_shape(shape: ViTShape, experts: ExpertShape) -> ViTShape:
    """The dense ViT of a path: its MLPs have the common units and those of one group."""
    return shape.with_hidden(experts.common_units + group_units(shape, experts))


def part_units(dense: Mapping[str, Tensor], experts: ExpertShape) -> dict[str, Tensor]:
    """Weights of an SDR from those of a dense MAE, whose MLPs are the union of the groups and the common units.

    The common units are those with the largest product of the norms of their row in fc1 and their column in fc2. The
    others are assigned to the groups in turn, so that the groups are similar. The second bias belongs to the common
    units.
    """
    state = {name: tensor for name, tensor in dense.items() if not is_replaced(name, experts.layers)}
    for block in experts.layers:
        mlp = {part: dense[f"blocks.{block}.mlp.{part}"] for part in _PARTS}
        weight_H = mlp[FC1].norm(dim=1) * mlp[FC2].norm(dim=0)
        order_H = weight_H.argsort(descending=True, stable=True)
        common, others = order_H[: experts.common_units], order_H[experts.common_units :]
        state |= {f"blocks.{block}.common.{part}": t for part, t in _units(mlp, common, mlp[BIAS2]).items()}
        for group in range(experts.num_experts):
            units = _units(mlp, others[group :: experts.num_experts], torch.zeros_like(mlp[BIAS2]))
            state |= {expert_key(block, group, part): tensor for part, tensor in units.items()}
    return state


def join_units(state: dict[str, Tensor], block: int, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense MLP of a path: the common units of a block, which are removed from `state`, and those of a group."""
    common = {part: state.pop(f"blocks.{block}.common.{part}") for part in _PARTS}
    return {
        FC1: torch.cat([common[FC1], group[FC1]]),
        BIAS1: torch.cat([common[BIAS1], group[BIAS1]]),
        FC2: torch.cat([common[FC2], group[FC2]], dim=1),
        BIAS2: common[BIAS2] + group[BIAS2],
    }


def _units(mlp: Mapping[str, Tensor], index: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {FC1: mlp[FC1][index], BIAS1: mlp[BIAS1][index], FC2: mlp[FC2][:, index].contiguous(), BIAS2: bias.clone()}
