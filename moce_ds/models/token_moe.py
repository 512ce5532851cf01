"""TokenMoE: the masked autoencoder with experts chosen per token, the baseline of the paper.

Axes: B images, N patches, T tokens of an image, S = B x T tokens, D width, L expert layers, E experts, K experts per
token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moce_ds.models.mae import Block, DecoderShape, MaskedAutoencoder, ModelOutput, make_mlp
from moce_ds.models.shapes import NO_WEIGHTS, LossWeights
from moce_ds.models.vit import ViTShape


class TokenMoeAutoencoder(MaskedAutoencoder):
    """A MaskedAutoencoder whose blocks in `layers` have `make_layer(make_mlp)` as MLP: tokens -> (tokens, losses)."""

    agrees_before_forward = True

    def __init__(
        self,
        shape: ViTShape,
        decoder: DecoderShape,
        mask_ratio: float,
        layers: tuple[int, ...],
        make_layer: Callable[[Callable[[], nn.Module]], nn.Module],
        weights: LossWeights = NO_WEIGHTS,
    ) -> None:
        super().__init__(shape, decoder, mask_ratio)
        for block in layers:
            self.blocks[block].mlp = make_layer(lambda: make_mlp(shape.width, shape.mlp_ratio))
        self.layers = frozenset(layers)
        self.weights = weights

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> ModelOutput:
        """Reconstruct masked images; V-MoE's two losses, summed over layers, are `importance` and `token_load`."""
        layer_losses_L2: list[Tensor] = []

        def run_block(index: int, block: Block, x_BTD: Tensor) -> Tensor:
            if index not in self.layers:
                return block(x_BTD)
            x_BTD = x_BTD + block.attn(block.norm1(x_BTD))
            y_BTD, losses_2, _ = block.mlp(block.norm2(x_BTD))
            layer_losses_L2.append(losses_2)
            return x_BTD + y_BTD

        reconstruction = self.reconstruct(images_BCHW, noise_BN, run_block)
        importance, load = torch.stack(layer_losses_L2).sum(dim=0)
        loss = reconstruction.loss
        if self.weights.token_balance is not None:
            loss = loss + self.weights.token_balance * (importance + load)
        losses = {"loss": loss, "reconstruction": reconstruction.loss, "importance": importance, "token_load": load}
        return ModelOutput(losses, reconstruction)


class TokenExperts(nn.Module):
    """The expert layer in one process and without DeepSpeed, for evaluation: the K most probable experts of each token.

    If no token is dropped, the result is that of DeepSpeed's layer.
    With K = 1 the output of the expert is multiplied by its probability; with K = 2 by its share of the two.
    """

    def __init__(self, make_expert: Callable[[], nn.Module], width: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(num_experts))
        self.k = k

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_SD = x_BTD.flatten(0, 1)
        weight_SK, expert_SK = self.gate(x_SD.float()).softmax(dim=1).topk(self.k, dim=1)
        if self.k > 1:
            weight_SK = weight_SK / weight_SK.sum(dim=1, keepdim=True)
        y_SD = torch.zeros_like(x_SD)
        for number, expert in enumerate(self.experts):
            token, place = (expert_SK == number).nonzero(as_tuple=True)
            y_SD.index_add_(0, token, expert(x_SD[token]) * weight_SK[token, place, None].to(x_SD.dtype))
        return y_SD.view_as(x_BTD)
