"""Compiles `cuda_guard.cpp`, once for each version of it and of torch."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from moce_ds.common.storage.locks import held

_SOURCE = Path(__file__).parent / "cuda_guard.cpp"
_TORCH = Path(torch.__file__).parent


def why_not() -> str:
    """The reason why there cannot be a fake GPU here; "" if there can."""
    if sys.platform != "linux":
        return "the fake GPU has been tried on Linux only"
    if torch.version.cuda or torch.version.hip:
        return "the fake GPU needs a CPU build of torch (tests/gpu needs a GPU)"
    if _compiler() is None:
        return "the fake GPU needs a C++ compiler: g++, or the one that CXX names"
    return ""


def guard_library(cache: Path) -> Path:
    """The shared library, from `cache` or newly compiled; other processes may ask for it at the same time."""
    command = [
        str(_compiler()), "-std=c++20", "-O0", "-fPIC", "-shared", str(_SOURCE),
        f"-I{_TORCH / 'include'}", f"-I{_TORCH / 'include/torch/csrc/api/include'}",
        f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{_TORCH / 'lib'}",
    ]  # fmt: skip
    made_from = (*command, torch.__version__, _SOURCE.read_text())
    library = cache / f"cuda_guard_{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"
    with held(cache / "lock"):
        if not library.exists():
            draft = library.with_suffix(".draft")
            done = subprocess.run([*command, "-o", str(draft)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            os.replace(draft, library)
    return library


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))
