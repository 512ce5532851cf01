"""The GPUs of this machine: how they are hidden, which one a process uses, and an error if PyTorch cannot use them.

Imports no torch: GPUs can be hidden only before torch looks for them.
"""

import os
import re
import shutil
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from moce_ds.common.errors import ConfigError
from moce_ds.common.text import counted

DEVICE = "MOCE_DEVICE"
"""Environment variable: `cpu` hides all GPUs from every verb, `auto` (the default) does not. Child processes inherit
it."""

_CHOICES = ("auto", "cpu")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_HIDDEN = ("", "-1", "NoDevFiles")  # values of _VISIBLE that leave no GPU; SLURM sets the last one
_ON_NODE = "SLURM_GPUS_ON_NODE"
_PATIENCE = 30.0  # seconds for nvidia-smi, which can hang with its driver
_OLDEST_CUDA, _NEWEST_CUDA = 12, 13  # for which there are extras


class GpuError(ConfigError):
    """A process has no GPU of its own, or PyTorch cannot use the GPUs of this machine."""

    every_process = True


def apply_choice(device: str = "auto", environment: MutableMapping[str, str] = os.environ) -> None:
    """Hide all GPUs from this process and its children if `device` or MOCE_DEVICE is "cpu". Call it before importing
    torch.

    Args:
        device: "auto" or "cpu", as `engine.device`.

    Raises:
        ConfigError: MOCE_DEVICE has another value.
    """
    choice = environment.get(DEVICE) or "auto"
    if choice not in _CHOICES:
        raise ConfigError(f"{DEVICE} is {choice!r}, expected one of {', '.join(_CHOICES)}.")
    if "cpu" in (device, choice):
        environment[_VISIBLE] = ""


def index_of(local_rank: int, visible: int, environment: Mapping[str, str] = os.environ) -> int:
    """The index of the GPU for a process, among the `visible` ones (at least one).

    SLURM can bind one GPU to each task (`--gpus-per-task=1`, `--gpu-bind=single:1`). A task then sees only its own GPU,
    which has index 0. SLURM_GPUS_ON_NODE still counts those of all tasks on the node, so a GPU that several tasks share
    is not mistaken for a bound one.

    Raises:
        GpuError: there are fewer GPUs than processes on this machine.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1 and _count_of_slurm(environment) > local_rank:
        return 0
    raise GpuError(
        f"LOCAL_RANK is {local_rank} and this process sees {counted(visible, 'GPU')}: start at most one process per "
        f"GPU, or make more of them visible ({_VISIBLE})."
    )


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says about this machine.

    Attributes:
        gpus: the GPUs that it lists, as a part of a sentence; "" if it lists none or is not installed.
        version: of the driver; "" if unknown.
        cuda: the newest CUDA version that the driver supports; None if unknown.
    """

    gpus: str = ""
    version: str = ""
    cuda: tuple[int, int] | None = None

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Driver":
        """Ask nvidia-smi. It may hang with its driver: the wait is limited."""
        from moce_ds.common.host.outside import run_for  # most processes ask nothing

        program = shutil.which("nvidia-smi", path=environment.get("PATH"))
        if program is None:
            return cls()
        listed = run_for(_PATIENCE, [program, "-L"])
        if listed.status is None:
            return cls(f"nvidia-smi does not answer within {_PATIENCE:g} s")
        names = re.findall(r"^GPU \d+: (.*?) \(", listed.out, flags=re.MULTILINE)
        if not names:
            return cls()
        gpus = f"nvidia-smi lists {counted(len(names), 'GPU')} ({', '.join(dict.fromkeys(names))})"
        table = run_for(_PATIENCE, [program]).out
        version = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", table)
        return cls(gpus, version[1] if version else "", cuda_version(table))

    @property
    def extra(self) -> str:
        """The extra of this package whose wheels fit: "cpu", "cu12" or "cu13"."""
        usable = self.cuda is not None and self.cuda[0] >= _OLDEST_CUDA
        return f"cu{min(self.cuda[0], _NEWEST_CUDA)}" if self.cuda and usable else "cpu"

    def __str__(self) -> str:
        """Its version and the CUDA version that it supports, as a part of a sentence; "" if unknown."""
        supports = f"which supports CUDA up to {self.cuda[0]}.{self.cuda[1]}" if self.cuda else ""
        return ", ".join(part for part in (self.version and f"driver {self.version}", supports) if part)


@dataclass(frozen=True)
class Unused:
    """GPUs that PyTorch cannot use: what was found, and what to do."""

    found: str
    cure: str


def unused_gpus(
    torch_version: str, cuda: str | None, environment: Mapping[str, str] = os.environ, driver: Driver | None = None
) -> Unused | None:
    """The GPUs of a machine on which torch sees none; None if there are none. Call it only if torch sees no GPU.

    GPUs that are hidden by an empty CUDA_VISIBLE_DEVICES, as `apply_choice` does, are not missed.

    Args:
        torch_version: version of torch.
        cuda: the CUDA version that torch was built for, such as "13.0"; None: for the CPU only.
        driver: the answer of nvidia-smi, if it was asked before.
    """
    if are_hidden(environment):
        return None
    driver = driver or Driver.here(environment)
    listed = driver.gpus or _of_slurm(environment)
    if not listed:
        return None
    listed = "; ".join(part for part in (listed, str(driver)) if part)
    built = f"CUDA {cuda}" if cuda else "the CPU only"
    found = f"PyTorch sees no GPU, but {listed}. PyTorch {torch_version} is built for {built}."
    return Unused(found, _cure(cuda, driver, environment))


def check_none_unused(torch_version: str, cuda: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to compute on the CPU of a machine with GPUs. Call it only if torch sees no GPU: it may run nvidia-smi.

    Args:
        torch_version, cuda: as of `unused_gpus`.

    Raises:
        GpuError: nvidia-smi lists GPUs, or SLURM assigned some. The message names the driver, the CUDA version that it
            supports and that of torch, and the wheels to install.
    """
    unused = unused_gpus(torch_version, cuda, environment)
    if unused is None:
        return
    fault = GpuError(
        f"{unused.found} {unused.cure} To compute on the CPU instead, set {DEVICE}=cpu in the environment, or "
        "engine.device=cpu for a training run."
    )
    fault.every_process = environment.get("LOCAL_RANK", "0") == "0"  # its peers on this machine would repeat it
    raise fault


def are_hidden(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether all GPUs are hidden from this process."""
    return environment.get(_VISIBLE, "0").strip() in _HIDDEN


def cuda_version(table: str) -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports, from the table that nvidia-smi prints; None if it says none.

    Drivers of series 610 call it "CUDA UMD Version", earlier ones "CUDA Version".
    """
    found = re.search(r"CUDA (?:UMD )?Version: *(\d+)\.(\d+)", table)
    return (int(found[1]), int(found[2])) if found else None


def _cure(cuda: str | None, driver: Driver, environment: Mapping[str, str]) -> str:
    """What to install, or where to look."""
    if driver.cuda is None:
        built = "" if cuda else f"Install PyTorch for CUDA {_NEWEST_CUDA} or {_OLDEST_CUDA} (README.md, Install). "
        return f"{built}The driver cannot be reached: a container needs an option for that (`apptainer exec --nv`)."
    supported = driver.cuda[0]
    if supported < _OLDEST_CUDA:
        return f"Install a driver that supports CUDA {_OLDEST_CUDA} or newer."
    if cuda is None or int(cuda.split(".")[0]) > supported:
        fitting = min(supported, _NEWEST_CUDA)
        return f"Install torch and torchvision for CUDA {fitting}, with the extra cu{fitting} (README.md, Install)."
    visible = f"; {_VISIBLE} is {environment[_VISIBLE]!r}" if _VISIBLE in environment else ""
    return f"These versions fit. `python -c 'import torch; torch.cuda.init()'` prints the cause{visible}."


def _of_slurm(environment: Mapping[str, str]) -> str:
    """The GPUs that SLURM assigned to this process, as a part of a sentence; "" if there are none.

    SLURM_JOB_GPUS is not evidence: a step without GPUs (`srun --gres=none`) inherits it from the script of its job.
    """
    if count := _count_of_slurm(environment):
        return f"SLURM assigned {counted(count, 'GPU')} of this node ({_ON_NODE})"
    if "SLURM_JOB_ID" in environment:
        for name in ("SLURM_STEP_GPUS", _VISIBLE):
            if environment.get(name):
                return f"SLURM assigned GPUs to this process ({name}={environment[name]})"
    return ""


def _count_of_slurm(environment: Mapping[str, str]) -> int:
    text = environment.get(_ON_NODE, "")
    return int(text) if text.isascii() and text.isdecimal() else 0
