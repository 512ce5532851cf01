"""What all labelled tasks use: worker processes, with their errors, deaths and shared memory; and AdamW's groups."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moce_ds.common.errors import LOST_PEER, DataError, MoceError
from moce_ds.common.host.machine import MachineError, machine_fault
from moce_ds.models.vit import ViTShape, timm_vit
from moce_ds.tuning.labelled_task import parameter_groups, prepared
from moce_ds.tuning.settings import TuneOptimSettings

CPU = torch.device("cpu")
DEPTH = 3
OPTIM = TuneOptimSettings(layer_decay=0.5, weight_decay=0.1)
TOGETHER = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
LARGE = """
import torch
from moce_ds.common.host.program import run_main
from moce_ds.tuning.labelled_task import prepared

def make(index):
    return {"images": [torch.ones(1_000_000)]}

run_main(lambda: list(prepared(make, range(2), 1, torch.device("cpu"))))
"""


def killed(index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused(index: int) -> None:
    raise DataError("a.jpg is damaged.")


def without_memory(index: int) -> torch.Tensor:
    return torch.empty(10**17)


def wrong(index: int) -> None:
    raise RuntimeError("a defect")


def test_a_worker_that_is_killed_is_one_message_with_the_cure() -> None:
    with pytest.raises(
        MachineError, match=r"died, perhaps for lack of memory .*`data.workers`; 0 needs none"
    ) as caught:
        list(prepared(killed, range(4), 1, CPU))
    assert caught.value.status == LOST_PEER


def test_it_is_the_same_where_torch_says_it_in_the_midst_of_something_else() -> None:
    """Its handler of SIGCHLD raises wherever the main thread is."""
    fault = machine_fault(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert fault is not None and fault.status == LOST_PEER


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_as_they_were(workers: int) -> None:
    with pytest.raises(MoceError, match=r"^a.jpg is damaged.$"):
        list(prepared(refused, range(2), workers, CPU))
    with pytest.raises(MachineError, match=r"^Out of memory \(") as caught:
        list(prepared(without_memory, range(2), workers, CPU))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(RuntimeError, match="a defect"):
        list(prepared(wrong, range(2), workers, CPU))


def test_too_little_shared_memory_is_no_silence_without_end(tmp_path: Path) -> None:
    if subprocess.run([*TOGETHER, "true"], capture_output=True).returncode:
        pytest.skip("needs to mount a small /dev/shm")
    (tmp_path / "large.py").write_text(LARGE)
    told = subprocess.run(
        [*TOGETHER, sys.executable, str(tmp_path / "large.py")], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 1 and told.stderr.count("\n") == 1, told.stderr
    assert told.stderr.startswith("Error: Out of shared memory (") and "--shm-size" in told.stderr


class Around(nn.Module):
    """A ViT with something on top, as detectors are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm_vit(ViTShape(16, 4, 16, DEPTH, 2))
        self.neck = nn.Linear(16, 16)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


@pytest.fixture(scope="module")
def groups() -> dict[str, tuple[float, float]]:
    """Share of the learning rate and weight decay of every parameter, each in one group only."""
    model = Around()
    found: dict[int, tuple[float, float]] = {}
    for group in parameter_groups(model, model.encoder, OPTIM):
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr_scale"], group["weight_decay"])
    assert len(found) == sum(parameter.requires_grad for parameter in model.parameters())
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_the_rate_falls_block_by_block(groups: dict[str, tuple[float, float]]) -> None:
    for block in range(DEPTH):
        for part in ("attn.qkv", "mlp.fc2"):
            assert groups[f"encoder.blocks.{block}.{part}.weight"] == (0.5 ** (DEPTH - block), 0.1)
    for embedding in ("cls_token", "pos_embed"):
        assert groups[f"encoder.{embedding}"] == (0.5 ** (DEPTH + 1), 0.0)
    assert groups["encoder.patch_embed.proj.weight"] == (0.5 ** (DEPTH + 1), 0.1)
    assert groups["encoder.norm.weight"] == (1.0, 0.0)


def test_what_is_around_the_encoder_learns_at_the_full_rate(groups: dict[str, tuple[float, float]]) -> None:
    assert groups["neck.weight"] == (1.0, 0.1) and groups["neck.bias"] == (1.0, 0.0)


def test_only_matrices_decay(groups: dict[str, tuple[float, float]]) -> None:
    assert {name for name, (_, decay) in groups.items() if not decay} == {
        name
        for name in groups
        if name.endswith(("bias", "norm1.weight", "norm2.weight", "norm.weight", "_token", "embed"))
    }
