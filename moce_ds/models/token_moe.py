"""TokenMoE: the masked autoencoder with experts chosen token by token, the baseline of the paper.

Axes: B images, N patches, T tokens, D width, L expert layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moce_ds.models.mae import Block, DecoderShape, MaskedAutoencoder, Reconstruction, make_mlp
from moce_ds.models.vit import ViTShape


@dataclass(frozen=True)
class TokenOutput:
    """Reconstruction, and V-MoE's two losses summed over layers, not yet weighted."""

    reconstruction: Reconstruction
    importance: Tensor
    load: Tensor


class TokenMoeAutoencoder(MaskedAutoencoder):
    """A MaskedAutoencoder whose blocks in `layers` hold `make_layer(make_mlp)`: tokens -> (tokens, losses, ...)."""

    def __init__(
        self,
        shape: ViTShape,
        decoder: DecoderShape,
        mask_ratio: float,
        layers: tuple[int, ...],
        make_layer: Callable[[Callable[[], nn.Module]], nn.Module],
    ) -> None:
        super().__init__(shape, decoder, mask_ratio)
        for block in layers:
            self.blocks[block].mlp = make_layer(lambda: make_mlp(shape.width, shape.mlp_ratio))
        self.layers = frozenset(layers)

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> TokenOutput:  # type: ignore[override]
        """Reconstruct masked images; the patches with the lowest noise stay visible."""
        losses: list[Tensor] = []

        def run_block(index: int, block: Block, x_BTD: Tensor) -> Tensor:
            if index not in self.layers:
                return block(x_BTD)
            x_BTD = x_BTD + block.attn(block.norm1(x_BTD))
            y_BTD, layer_losses, _ = block.mlp(block.norm2(x_BTD))
            losses.append(layer_losses)
            return x_BTD + y_BTD

        reconstruction = self.reconstruct(images_BCHW, noise_BN, run_block)
        importance, load = torch.stack(losses).sum(dim=0)
        return TokenOutput(reconstruction, importance, load)
