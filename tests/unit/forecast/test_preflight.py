"""A run that does not fit into memory is refused before it starts, with what would help; --force starts it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moce_ds.common.config.command_line import read_settings
from moce_ds.common.errors import ConfigError
from moce_ds.forecast import preflight
from moce_ds.forecast.preflight import FORCE
from moce_ds.forecast.step_cost import Work
from moce_ds.training.settings import PretrainSettings
from tests.examples.moce_command import TINY, refused

CPU = torch.device("cpu")
FULL = Path("configs/vit_base_mae.yaml")


def work(path: Path, *words: str) -> Work:
    return Work.of(read_settings(PretrainSettings, [str(path), "data.shards=s", "run.out=r", *words]))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Says how many bytes this machine has."""
    monkeypatch.delenv(FORCE, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return lambda size: monkeypatch.setattr(preflight, "host_memory", lambda: size)


def test_a_full_size_run_is_refused_on_a_laptop_and_told_what_helps(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host(16 * 2**30)
    with pytest.raises(ConfigError, match=r"needs about \d{3}\.\d+ GiB .*this machine has 16.00 GiB\.") as caught:
        preflight.check_memory(work(FULL), 1, CPU)
    said = str(caught.value)
    accumulation = int(said.partition("optim.accumulation=")[2].partition(":")[0])
    assert "moce plan" in said and "--force" in said
    preflight.check_memory(work(FULL, f"optim.accumulation={accumulation}"), 1, CPU)  # the advice helps
    monkeypatch.setenv(FORCE, "1")
    preflight.check_memory(work(FULL), 1, CPU)


def test_processes_of_one_machine_share_its_memory(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = work(TINY, "optim.batch_size=16")
    host(12e6)
    preflight.check_memory(run, 1, CPU)
    with pytest.raises(ConfigError, match="its share for 16 processes"):
        preflight.check_memory(run, 16, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of 16 machines
    preflight.check_memory(run, 16, CPU)


def test_the_limits_of_all_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step").mkdir()
    monkeypatch.setattr(preflight, "control_groups", lambda _: [tmp_path / "step", tmp_path])
    whole = preflight.host_memory()
    (tmp_path / "step/memory.max").write_text("max\n")
    assert preflight.host_memory() == whole > 2**28
    (tmp_path / "memory.max").write_text("1048576\n")
    assert preflight.host_memory() == 2**20
    (tmp_path / "step/memory.limit_in_bytes").write_text("4096\n")  # of version 1
    assert preflight.host_memory() == 4096


def test_the_verb_refuses_before_it_opens_anything(host: Any, tmp_path: Path) -> None:
    host(1e6)
    assert "this machine has" in refused("pretrain", TINY, "data.shards=none", f"run.out={tmp_path / 'run'}")


def test_a_rank_without_a_gpu_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert "LOCAL_RANK is 3 and this process sees 1 GPU:" in refused("pretrain", TINY, "data.shards=s", "run.out=r")
