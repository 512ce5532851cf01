"""The encoder in a file of the public MAE (facebookresearch/mae).

Axes: N patches, D width.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from moce_ds.checkpoint.weight_files import as_float32, read_file
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.files import sha256_of
from moce_ds.data.transform import ImageInput
from moce_ds.models.parameters import CLASSIFIER, encoder_block, is_decoder
from moce_ds.models.vit import Encoder, ViTShape

_READER = "ENCODER"
_SIZES = {(768, 12): 12, (1024, 24): 16, (1280, 32): 16}
"""Heads of the public MAE's encoders by (width, blocks): ViT-B, ViT-L, ViT-H."""

_SHOWN = 5  # names of weights listed in an error


def public_encoder(path: Path, heads: int | None = None) -> Encoder:
    """The encoder in a file of the public MAE (facebookresearch/mae), on the host, without decoder and classifier.

    The file may be "pretrain", "full", fine-tuned, or a training checkpoint; the names of the weights are ours. What it
    does not contain is taken from the public code: the heads from the sizes that it trains, the normalisation of the
    images, and the centre crop.

    Args:
        path: `.pth`, `.pt` or `.safetensors`; nothing in it is executed.
        heads: attention heads, if the size of the encoder is not one of the public MAE's.

    Raises:
        ArtefactError: the file cannot be read, does not hold a plain ViT with the names of the public MAE, or its
            number of heads is unknown; the message lists what was found and expected.
    """
    named = f"{_READER}: {path}"
    tensors = read_file(path, _READER)
    state = as_float32({n: t for n, t in tensors.items() if not is_decoder(n) and n not in CLASSIFIER}, named)
    shape = _shape(state, heads, named)
    input = _input(shape.image_size)
    provenance = {"file": str(path), "sha256": sha256_of(path), "taken_for": _taken_for(shape, input)}
    return Encoder.from_state(state, shape, input, provenance, named)


def _input(size: int) -> ImageInput:
    """The input of the public MAE's evaluation: ImageNet's normalisation, and no cropping above 224 px."""
    return ImageInput(size, center_crop=0.875 if size <= 224 else 1.0)


def _taken_for(shape: ViTShape, input: ImageInput) -> str:
    """Describe the assumptions about what the file does not contain."""
    return (
        f"a ViT of the public MAE: width {shape.width}, {shape.depth} blocks, {shape.heads} heads; images of "
        f"{input.size} px with ImageNet's mean and standard deviation, centre crop {input.center_crop}"
    )


def _shape(state: Mapping[str, Tensor], heads: int | None, named: str) -> ViTShape:
    """The size of the encoder, from its weights. Raises ArtefactError."""
    names = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    lacking = [name for name in names if name not in state]
    if lacking:
        shown = ", ".join(sorted(state)[:_SHOWN]) + (", ..." if len(state) > _SHOWN else "")
        raise ArtefactError(
            f"{named} holds no {' and no '.join(lacking)}; expected a ViT by the names of the public MAE, with its "
            f"position table. Found: {shown or 'a decoder alone'}."
        )
    projection, positions, fc1 = (state[name] for name in names)
    patches = positions.shape[1] - 1 if positions.ndim == 3 else 0
    side = math.isqrt(max(0, patches))
    square = projection.ndim == 4 and projection.shape[1] == 3 and projection.shape[2] == projection.shape[3]
    if not square or fc1.ndim != 2 or not patches or side**2 != patches or 0 in (*projection.shape, *fc1.shape):
        raise ArtefactError(
            f"{named} has patches {list(projection.shape)} and positions {list(positions.shape)}; expected "
            "[D, 3, patch, patch] and [1, 1 + N, D], with N the square of the patches along an image."
        )
    width, patch = projection.shape[0], projection.shape[2]
    depth = 1 + max(block for block in map(encoder_block, state) if block is not None)
    shape = ViTShape(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads or _known_heads(width, depth, named),
        pooled_norm="fc_norm.weight" in state,
    ).with_hidden(fc1.shape[0])
    if width % shape.heads:
        raise ArtefactError(f"{named} has width {width}, which is not a multiple of {shape.heads} heads.")
    return shape


def _known_heads(width: int, depth: int, named: str) -> int:
    if (width, depth) not in _SIZES:
        known = ", ".join(f"{w} x {blocks} ({count})" for (w, blocks), count in _SIZES.items())
        raise ArtefactError(
            f"{named} has width {width} and {depth} blocks, and its number of attention heads is unknown. Known sizes "
            f"(heads): {known}. Pass --heads to `moce features`, `knn` or `probe`; other verbs take the encoder folder "
            "that `moce features` writes, OUT/encoder."
        )
    return _SIZES[width, depth]
