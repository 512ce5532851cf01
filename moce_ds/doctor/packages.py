"""The installed packages: their versions, whether these are in the ranges that moce_ds needs, and the optional extras.

Everything is read from the metadata of packages; none is imported.
"""

import ast
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from moce_ds import __version__
from moce_ds.common.text import in_line
from moce_ds.doctor.finding import Finding, fault, warning

DALI = {"nvidia-dali-cuda130": 13, "nvidia-dali-cuda120": 12}
FAISS = {"faiss-gpu": 12, "faiss-cpu": None}
"""Packages that provide the same module, one of them has to be installed; with the CUDA version of their libraries."""

EXTRAS = {
    "formats": "`moce export --format` for transformers and ONNX",
    "dense": "`moce detect`, `moce segment`, sets in COCO's format",
    "hf": "Parquet files, and sets that Hugging Face's `datasets` saved",
    "s3": "shard sets in S3",
    "wandb": "`run.wandb=true`: charts at Weights & Biases",
    "mlflow": "`run.mlflow=true`: charts in MLflow",
    "demo": "the real images of the demo",
}
"""The optional extras, and what they are for."""

_OURS = "moce-ds"
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,.-]*\])? *\(?([^;()]*)\)? *(?:; *extra *== *['\"]([\w-]+)['\"])?")
_BOUND = re.compile(r"(>=|<) *([\d.]+)")


@dataclass(frozen=True)
class Requirement:
    """A package that moce_ds needs.

    Attributes:
        name: of the package.
        bounds: of its versions, such as (">=", "2.13"), ("<", "2.14").
        extra: the extra that needs it; "" for the core.
    """

    name: str
    bounds: tuple[tuple[str, str], ...]
    extra: str = ""

    @classmethod
    def read(cls, text: str) -> "Requirement":
        """A requirement from the metadata: `torch<2.14,>=2.13; extra == "cpu"`. Raises ValueError."""
        found = _REQUIREMENT.fullmatch(text.strip())
        bounds = found[2].replace(" ", "").strip(",") if found else ""
        if found is None or any(not _BOUND.fullmatch(bound) for bound in bounds.split(",") if bound):
            raise ValueError(f"{text!r} is no requirement of the form NAME>=A,<B; extra == 'E'")
        return cls(found[1], tuple(sorted(_BOUND.findall(bounds), reverse=True)), found[3] or "")

    def __str__(self) -> str:
        return self.name + ",".join(map("".join, self.bounds))

    def allows(self, installed: str) -> bool:
        """Whether a version is within the bounds; what follows its numbers, as in 2.13.0+cpu, does not count."""
        return all(_precedes(bound, installed) == (sign == ">=") for sign, bound in self.bounds)


def _precedes(earlier: str, later: str) -> bool:
    """Whether a version is the other one or older."""
    for a, b in zip_longest(_numbers(earlier), _numbers(later), fillvalue=0):
        if a != b:
            return a < b
    return True


def _numbers(text: str) -> list[int]:
    found = re.match(r"\d+(\.\d+)*", text)
    return [int(part) for part in found[0].split(".")] if found else []


def installed_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def installed_of(names: Iterable[str]) -> list[str]:
    """Those packages of some that are installed."""
    return [name for name in names if installed_version(name) is not None]


def cuda_of_torch() -> str | None:
    """The CUDA version that torch was built for, such as "13.0"; None: for the CPU only. Reads its file version.py.

    Raises:
        PackageNotFoundError: torch is not installed, or this file is not as expected.
    """
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if file is None or not file.is_file():
        raise PackageNotFoundError("torch")
    for line in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(line, ast.AnnAssign | ast.Assign) and isinstance(line.value, ast.Constant):
            target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
            if isinstance(target, ast.Name) and target.id == "cuda":
                return str(line.value.value) if line.value.value else None
    raise PackageNotFoundError("torch")


def version_lines() -> Iterator[str]:
    """The lines of `moce --version`."""
    yield f"moce_ds {__version__}"
    yield f"Python {platform.python_version()}"
    try:
        cuda = cuda_of_torch()
        yield f"torch {version('torch')} (built for {f'CUDA {cuda}' if cuda else 'the CPU only'})"
    except PackageNotFoundError:
        yield _missing("torch", "pip install torch torchvision")
    deepspeed = installed_version("deepspeed")
    yield f"DeepSpeed {deepspeed}" if deepspeed else _missing("DeepSpeed", "pip install deepspeed")
    for name, packages in (("DALI", DALI), ("faiss", FAISS)):
        present = [f"{installed_version(package)} ({package})" for package in installed_of(packages)]
        yield f"{name} {', '.join(present)}" if present else _missing(name, f"{pip('cpu')}, or with a GPU cu13 or cu12")


def _missing(name: str, command: str) -> str:
    return f"{name} not installed: {command}"


def pip(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{_OURS}[{extra}]'"


def python_version() -> Finding:
    """Whether this Python is one that moce_ds needs."""
    text = f"{platform.python_version()} ({in_line(sys.executable)})"
    try:
        needed = Requirement.read(f"python{metadata(_OURS)['Requires-Python']}")
    except PackageNotFoundError:
        cure = 'Install it: `pip install ".[cpu]"` in the clone (README.md, Install).'
        return warning("Python", f"{text}; moce_ds is not installed in it, so no version is checked", cure)
    if needed.allows(platform.python_version()):
        return Finding("Python", text)
    return fault("Python", text, f"Make a new environment with {needed} (`python3 -m venv .venv`).")


def required_packages() -> Finding:
    """Whether all packages of the core are installed, in the versions that moce_ds needs."""
    core = [needed for needed in _requirements() if not needed.extra]
    wrong = [needed for needed in core if not _is_met(needed)]
    if not wrong:
        return Finding("packages", f"{len(core)} required packages, all in the versions that moce_ds needs")
    found = ", ".join(f"{needed.name} {installed_version(needed.name) or 'is missing'}" for needed in wrong)
    return fault("packages", found, f"`pip install {' '.join(shlex.quote(str(needed)) for needed in wrong)}`.")


def optional_extra(extra: str) -> Finding:
    """Whether an optional extra is installed, and what it is for."""
    needed = [one for one in _requirements() if one.extra == extra]
    missing = [one for one in needed if installed_version(one.name) is None]
    wrong = [one for one in needed if one not in missing and not one.allows(version(one.name))]
    name = f"extra {extra}"
    if wrong:
        found = ", ".join(f"{one.name} {version(one.name)} does not fit" for one in wrong)
        return warning(name, f"{found} ({EXTRAS[extra]})", f"`{pip(extra)}`.")
    if missing:
        return Finding(name, f"not installed; for {EXTRAS[extra]}: {pip(extra)}")
    return Finding(name, f"installed; for {EXTRAS[extra]}")


def only_one(name: str, packages: Iterable[str], fitting: str) -> Finding | None:
    """A fault if none or several of the packages are installed that provide the same module.

    Args:
        name: of the finding.
        packages: their names.
        fitting: the extra for this machine.
    """
    present = installed_of(packages)
    if not present:
        return fault(name, "not installed", f"`{pip(fitting)}`.")
    if len(present) > 1:
        cure = f"`pip uninstall {' '.join(present)}`, then `{pip(fitting)}`."
        return fault(name, f"{' and '.join(present)} are installed, which overwrite each other's files", cure)
    return None


def _is_met(needed: Requirement) -> bool:
    installed = installed_version(needed.name)
    return installed is not None and needed.allows(installed)


def _requirements() -> list[Requirement]:
    """What the metadata of moce_ds requires; empty if it is not installed."""
    try:
        return [Requirement.read(text) for text in requires(_OURS) or ()]
    except PackageNotFoundError:
        return []
