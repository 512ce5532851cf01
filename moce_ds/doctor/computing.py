"""Whether the libraries that compute load, fit the driver, and work: torch, DeepSpeed, DALI, faiss, gloo, NCCL."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moce_ds.common.host import gpus
from moce_ds.common.text import counted, in_line
from moce_ds.doctor.finding import Finding, fault, warning
from moce_ds.doctor.packages import DALI, FAISS, installed_of, installed_version, only_one, pip
from moce_ds.doctor.probes import Facts, ProbeError, ask

IMPORT_SECONDS = 120.0  # torch alone takes a minute from a busy file server
GROUP_SECONDS = 120.0


@dataclass(frozen=True)
class Computer:
    """The machine as torch and the driver see it.

    Attributes:
        environment: variables of the processes that use torch.
        torch: what torch says of itself and of the GPUs (`probes.torch_gpus`), or why it says nothing.
        driver: what nvidia-smi says; nothing if the GPUs are hidden.
    """

    environment: Mapping[str, str]
    torch: Facts | ProbeError
    driver: gpus.Driver

    @classmethod
    def here(cls) -> "Computer":
        """Ask torch and the driver of this machine."""
        environment = dict(os.environ)
        torch: Facts | ProbeError
        try:
            torch = ask("torch_gpus", seconds=IMPORT_SECONDS, environment=environment)
        except ProbeError as error:
            torch = error
        return cls(environment, torch, gpus.Driver() if gpus.are_hidden(environment) else gpus.Driver.here(environment))

    @property
    def usable_gpus(self) -> int:
        """How many GPUs torch computes on."""
        facts = {} if isinstance(self.torch, ProbeError) else self.torch
        return sum(not gpu["fault"] for gpu in facts.get("gpus", ()))


def torch_loads(computer: Computer) -> Finding:
    """Whether torch can be imported, and for which CUDA version it was built."""
    if isinstance(computer.torch, ProbeError):
        cure = "Install torch and torchvision again, in the versions of requirements.txt (README.md, Install)."
        return fault("torch", f"does not import: {computer.torch}", cure)
    cuda = computer.torch["cuda"]
    return Finding("torch", f"{computer.torch['version']}, built for {f'CUDA {cuda}' if cuda else 'the CPU only'}")


def gpus_compute(computer: Computer) -> Finding:
    """Whether torch can use all GPUs of this machine."""
    if isinstance(computer.torch, ProbeError):
        return warning("GPUs", "unknown, since torch does not import", "See torch above.")
    return _judged_gpus(computer.torch, computer)


def _judged_gpus(torch: Facts, computer: Computer) -> Finding:
    seen: Sequence[Facts] = torch["gpus"]
    if not seen:
        unused = gpus.unused_gpus(torch["version"], torch["cuda"], computer.environment, computer.driver)
        if unused:
            return fault("GPUs", unused.found.removesuffix("."), unused.cure)
        hidden = gpus.are_hidden(computer.environment)
        return Finding("GPUs", f"{'hidden from this process' if hidden else 'none'}; all verbs compute on the CPU")
    broken = [f"GPU {index} ({in_line(gpu['name'])}): {in_line(gpu['fault'])}" for index, gpu in enumerate(seen)
              if gpu["fault"]]  # fmt: skip
    if broken:
        cure = f"This torch has kernels for {', '.join(torch['kernels'])}: install one that has them for this GPU, or "
        return fault("GPUs", "; ".join(broken), f"{cure}hide it (CUDA_VISIBLE_DEVICES).")
    kinds = ", ".join(dict.fromkeys(f"{in_line(gpu['name'])}, {gpu['gib']:.0f} GiB" for gpu in seen))
    return Finding("GPUs", "; ".join(filter(None, (f"{counted(len(seen), 'GPU')} ({kinds})", str(computer.driver)))))


def deepspeed_loads(computer: Computer) -> Finding:
    """Whether DeepSpeed can be imported."""
    try:
        facts = ask("module", "deepspeed", seconds=IMPORT_SECONDS, environment=computer.environment)
    except ProbeError as error:
        return fault("DeepSpeed", f"does not import: {error}", "`pip install --force-reinstall --no-deps deepspeed`.")
    return Finding("DeepSpeed", in_line(facts["version"]))


def dali_loads(computer: Computer) -> Finding:
    """Whether DALI can be imported, and is built for a CUDA version that the driver supports."""
    if wrong := only_one("DALI", DALI, computer.driver.extra):
        return wrong
    (package,) = installed_of(DALI)
    text = f"{installed_version(package)} ({package})"
    supported, extra = computer.driver.cuda, computer.driver.extra
    if computer.usable_gpus and supported and DALI[package] > supported[0]:
        cure = f"`pip uninstall {package}`, then `{pip(extra)}`."
        return fault("DALI", f"{text}, but the driver supports CUDA up to {supported[0]}.{supported[1]}", cure)
    try:
        ask("module", "nvidia.dali", seconds=IMPORT_SECONDS, environment=computer.environment)
    except ProbeError as error:
        cure = f"`pip install --force-reinstall --no-deps {package}=={installed_version(package)}`."
        return fault("DALI", f"{text} does not import: {error}", cure)
    return Finding("DALI", text)


def faiss_loads(computer: Computer) -> Finding:
    """Whether faiss can be imported, and uses the GPUs that torch uses."""
    if wrong := only_one("faiss", FAISS, computer.driver.extra):
        return wrong
    (package,) = installed_of(FAISS)
    text = f"{installed_version(package)} ({package})"
    try:
        facts = ask("module", "faiss", seconds=IMPORT_SECONDS, environment=computer.environment)
    except ProbeError as error:
        cure = f"`pip install --force-reinstall --no-deps {package}=={installed_version(package)}`."
        return fault("faiss", f"{text} does not import: {error}", cure)
    if not computer.usable_gpus or facts["gpus"]:
        return Finding("faiss", text)
    if package == "faiss-cpu":
        cure = f"`pip uninstall faiss-cpu`, then `{pip(computer.driver.extra)}`."
        return warning("faiss", f"{text}: `moce cluster` computes on the CPU although there are GPUs", cure)
    cure = f"It needs a driver that supports CUDA {FAISS[package]} or newer."
    return warning("faiss", f"{text} sees no GPU: `moce cluster` computes on the CPU", cure)


def gloo_sums(computer: Computer) -> Finding:
    """Whether two processes of this machine can sum a number with gloo."""
    hidden = {**computer.environment, "CUDA_VISIBLE_DEVICES": ""}
    return _summed("gloo", 2, hidden, "Check that programs can open connections on the loopback interface (`lo`).")


def nccl_sums(computer: Computer) -> Finding:
    """Whether two GPUs can sum a number with NCCL, or the only one alone."""
    if not computer.usable_gpus:
        return Finding("NCCL", "not needed: torch computes on no GPU")
    cure = "`NCCL_DEBUG=INFO python -m moce_ds.doctor.probes all_reduce 2` prints the cause; often /dev/shm is small."
    return _summed("NCCL", min(2, computer.usable_gpus), computer.environment, cure)


def _summed(name: str, processes: int, environment: Mapping[str, str], cure: str) -> Finding:
    try:
        total = ask("all_reduce", str(processes), seconds=GROUP_SECONDS, environment=environment)["sum"]
    except ProbeError as error:
        return fault(name, f"{counted(processes, 'process', 'processes')} found no sum: {error}", cure)
    expected = processes * (processes + 1) / 2
    if total != expected:
        return fault(name, f"{counted(processes, 'process', 'processes')} got {total:g}, expected {expected:g}", cure)
    return Finding(name, f"{counted(processes, 'process', 'processes')} started, met and summed a number")
