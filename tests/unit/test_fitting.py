"""A run that does not fit into memory is refused before it starts, with what would help; --force starts it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moce_command import TINY, refused

from moce_ds.command_line import FORCE, read_settings
from moce_ds.errors import ConfigError
from moce_ds.planning import fitting
from moce_ds.training.settings import PretrainSettings

FULL = Path("configs/vit_base_mae.yaml")


def config(path: Path, *words: str) -> PretrainSettings:
    return read_settings(PretrainSettings, [str(path), "data.shards=s", "run.out=r", *words])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Says how many bytes this machine has."""
    monkeypatch.setattr(fitting.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(FORCE, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return lambda size: monkeypatch.setattr(fitting, "host_memory", lambda: size)


def test_a_full_size_run_is_refused_on_a_laptop_and_told_what_helps(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host(16 * 2**30)
    with pytest.raises(ConfigError, match=r"needs about \d{3}\.\d+ GiB .*this machine has 16.00 GiB\.") as caught:
        fitting.check_memory(config(FULL), 1)
    said = str(caught.value)
    accumulation = int(said.partition("optim.accumulation=")[2].partition(":")[0])
    assert "moce plan" in said and "--force" in said
    fitting.check_memory(config(FULL, f"optim.accumulation={accumulation}"), 1)  # the advice helps
    monkeypatch.setenv(FORCE, "1")
    fitting.check_memory(config(FULL), 1)


def test_processes_of_one_machine_share_its_memory(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(TINY, "optim.batch_size=16")
    host(12e6)
    fitting.check_memory(run, 1)
    with pytest.raises(ConfigError, match="its share for 16 processes"):
        fitting.check_memory(run, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of 16 machines
    fitting.check_memory(run, 16)


def test_the_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    whole = fitting.host_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert fitting.host_memory(tmp_path) == whole > 2**28
    (tmp_path / "memory.max").write_text("1048576\n")
    assert fitting.host_memory(tmp_path) == 2**20


def test_the_verb_refuses_before_it_opens_anything(host: Any, tmp_path: Path) -> None:
    host(1e6)
    assert "this machine has" in refused("pretrain", TINY, "data.shards=none", f"run.out={tmp_path / 'run'}")
