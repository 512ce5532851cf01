"""TokenMoE: the masked autoencoder with experts chosen per token, the baseline of the paper.

Axes: B images, N patches, T tokens, D width, L expert layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moce_ds.models.mae import Block, DecoderShape, MaskedAutoencoder, ModelOutput, make_mlp
from moce_ds.models.shapes import NO_WEIGHTS, LossWeights
from moce_ds.models.vit import ViTShape


class TokenMoeAutoencoder(MaskedAutoencoder):
    """A MaskedAutoencoder whose blocks in `layers` have `make_layer(make_mlp)` as MLP: tokens -> (tokens, losses)."""

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
