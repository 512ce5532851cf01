"""The output of the trained model for chosen experts, computed with the training modules and only those experts in
memory.

An export is compared with it before it is published.

Axes: B images, N patches, V visible patches, T tokens, D width, P pixels of a patch x 3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint
from moce_ds.data.clusters import Clusters
from moce_ds.encoders.from_checkpoint import Mixture, Share, decoder_state, merged_expert
from moce_ds.models.build import ModelSpec, build_model
from moce_ds.models.mae import MaskedAutoencoder, RunBlock, nothing_masked, random_masking, run_plainly
from moce_ds.models.moce import Moce
from moce_ds.models.parameters import check_fit, expert_key, is_decoder
from moce_ds.moe.reference import ReferenceMoE

Output = Literal["tokens", "visible", "patches"]
"""The compared output: all tokens after the final norm [B, N + 1, D]; the visible ones of masked images [B, V + 1, D];
the decoder's patches [B, N, P]."""

_IMAGES = 4


@dataclass(frozen=True)
class Trial:
    """Random images, and the noise that masks them."""

    images_BCHW: Tensor
    noise_BN: Tensor

    @classmethod
    def of(cls, spec: ModelSpec) -> "Trial":
        """The same input for every export of a size."""
        generator, size = torch.Generator().manual_seed(0), spec.shape.image_size
        images_BCHW = torch.randn(_IMAGES, 3, size, size, generator=generator)
        return cls(images_BCHW, torch.rand(_IMAGES, spec.shape.num_patches, generator=generator))


@torch.inference_mode()
def output_of(model: MaskedAutoencoder, run_block: RunBlock, trial: Trial, output: Output) -> Tensor:
    """An output of a masked autoencoder whose blocks are run by `run_block`."""
    if output == "patches":
        return model.reconstruct(trial.images_BCHW, trial.noise_BN, run_block).patches_BNP
    B, N = trial.noise_BN.shape
    masking = nothing_masked(B, N) if output == "tokens" else random_masking(trial.noise_BN, model.mask_ratio)
    return model.encode(trial.images_BCHW, masking, run_block)


def reference_model(
    checkpoint: Checkpoint, spec: ModelSpec, clusters: Clusters | None, mixture: Mixture
) -> tuple[MaskedAutoencoder, RunBlock]:
    """The model of a checkpoint with one expert per layer, and the function that runs its blocks.

    For a route, the layer contains the trained expert, and its output is multiplied by the gate value. An average of
    several experts has no trained counterpart; the layer then contains the average.

    Raises:
        ArtefactError: the checkpoint's files are damaged, or hold something else.
    """
    layers = spec.experts.layers if spec.experts else ()
    with torch.device("meta"):  # uses the checkpoint's tensors without a copy
        model = build_model(spec, clusters, lambda make_mlp, _, shared: ReferenceMoE(make_mlp, 1, shared))
    names = ["cls_token", *(f"blocks.{block}.norm1.weight" for block in range(spec.shape.depth))]
    weights = {name: tensor for name, tensor in checkpoint.load(WEIGHTS, names).items() if not is_decoder(name)}
    weights |= {name: tensor for name, tensor in decoder_state(checkpoint, spec).items() if "pos_embed" not in name}
    gates = []
    for block, shares in zip(layers, mixture, strict=True):
        alone = next(iter(shares.values())) if len(shares) == 1 else None
        merged = merged_expert(checkpoint, block, {next(iter(shares)): Share()} if alone else shares)
        weights |= {expert_key(block, 0, rest): tensor for rest, tensor in merged.items()}
        gates.append(alone.gate if alone else 1.0)
    check_fit(dict(model.named_parameters()), weights, str(checkpoint.folder))
    model.load_state_dict(weights, strict=False, assign=True)
    run_block = model.on_route((0,) * len(gates), gates) if isinstance(model, Moce) else run_plainly
    return model.eval(), run_block
