"""A program `nvidia-smi` that prints what the real one prints with a driver of some series; no machine has them all."""

import os
from pathlib import Path

from pytest import MonkeyPatch

TABLES = Path(__file__).parents[1] / "fixtures/nvidia_smi"
_LISTED = {
    470: ["Tesla V100-SXM2-32GB"],
    550: ["NVIDIA H100 80GB HBM3"] * 2,
    580: ["NVIDIA A100-SXM4-40GB"],
    610: ["NVIDIA B200"],
}
NO_GPU = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


def install(patch: MonkeyPatch, folder: Path, series: int | None) -> None:
    """Put it first on PATH, in `folder`. With no series it fails, as on a machine without a driver."""
    folder.mkdir(parents=True, exist_ok=True)
    script = f'echo "{NO_GPU}"; exit 9'
    if series is not None:
        names = "\n".join(f"GPU {n}: {name} (UUID: GPU-1f1a-{n})" for n, name in enumerate(_LISTED[series]))
        script = f"[ \"$1\" = -L ] && echo '{names}' || cat '{TABLES}/driver_{series}.txt'"
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
