"""The program that computes something, by its content: results that are kept belong to this program only."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = ("torch", "timm", "numpy", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
"""Packages whose code decodes images or computes features."""

_PACKAGE = Path(__file__).parents[2]


@cache
def program_identity() -> dict[str, str]:
    """SHA-256 of the source of this package, and the versions of the libraries that decode and compute."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return {"source": digest.hexdigest(), **{name: _version(name) for name in _LIBRARIES}}


@cache
def processor() -> str:
    """The model of the processor: libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else platform.processor()}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
