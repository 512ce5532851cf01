"""The encoder that a features or clusters folder keeps beside what was made with it: recognised by its weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.checksums import Files, check_file
from moce_ds.common.storage.encoder_folder import WEIGHTS
from moce_ds.common.storage.files import reads_from

ENCODER = "encoder"
"""Folder with the encoder's weights and configuration, inside a features or clusters folder."""


def fingerprint(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and float32 values of an encoder's weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{state[name].shape}".encode())
        digest.update(np.ascontiguousarray(state[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def check_encoder(folder: Path, expected: str, files: Files | None) -> None:
    """Raise ArtefactError if the encoder in a features or clusters folder is not the one it was made with.

    Each file is read once, without loading the weights, if `files` has their checksum.

    Args:
        expected: fingerprint of the encoder's weights.
        files: checksums of the folder's files; None if an earlier version wrote it.

    Raises:
        ArtefactError: the encoder is missing or damaged, or differs from `expected` or `files`.
    """
    recorded = [name for name in files or () if name.startswith(f"{ENCODER}/")]
    try:
        for name in recorded:
            check_file(folder, name, files, f"restore the encoder of {folder}, or write {folder} again.")
    except ArtefactError:
        check_fingerprint(folder, expected)  # it names both encoders if the weights differ
        raise
    if f"{ENCODER}/{WEIGHTS}" not in recorded:
        check_fingerprint(folder, expected)


def check_fingerprint(folder: Path, expected: str) -> None:
    """Raise ArtefactError if the encoder in a features or clusters folder has other weights; loads them.

    Raises:
        ArtefactError: the weights are missing or damaged, or their fingerprint is not `expected`.
    """
    weights = folder / ENCODER / WEIGHTS
    with reads_from(weights, f"restore it, or write {folder} again."):
        actual = fingerprint(load_file(weights))
    if actual != expected:
        raise ArtefactError(
            f"{weights} is another encoder ({actual[:12]}) than the one that {folder} was made with ({expected[:12]}): "
            f"restore that one, or write {folder} again."
        )
