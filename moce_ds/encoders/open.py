"""Open an encoder, whatever holds it."""

import logging
from pathlib import Path

import torch

from moce_ds.checkpoint.format import find
from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.drafts import restore
from moce_ds.common.storage.encoder_folder import CONFIG, WEIGHTS
from moce_ds.encoders.from_checkpoint import dense_encoder
from moce_ds.encoders.public_mae import public_encoder
from moce_ds.models.vit import Encoder, load_encoder

_logger = logging.getLogger(__name__)


def open_encoder(path: Path, device: torch.device, heads: int | None = None) -> Encoder:
    """Open an encoder folder, the run folder or a checkpoint of a dense MAE, or a file of the public MAE, whose size is
    a guess that is logged.

    Args:
        heads: attention heads, if a file of the public MAE requires them (see `public_encoder`).

    Raises:
        ArtefactError: `path` is none of these.
    """
    restore(path)
    if path.is_file():
        encoder = public_encoder(path, heads)
        _logger.info(f"{path}: read as {encoder.provenance['taken_for']}")
        encoder.model.to(device)
        return encoder
    if heads is not None:
        raise ArtefactError(f"--heads requires a file of the public MAE; {path} is not one.")
    if not path.is_dir():
        raise ArtefactError(
            f"{path} not found: expected an encoder folder, the run of a dense MAE, or a .pth file of the public MAE."
        )
    if any((path / name).exists() for name in (WEIGHTS, CONFIG)):  # one of them alone is an incomplete export
        return load_encoder(path, device)
    encoder = dense_encoder(find(path))
    encoder.model.to(device)
    return encoder
