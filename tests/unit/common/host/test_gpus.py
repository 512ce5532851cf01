"""GPUs are never left unused in silence, and each process uses its own. The tables of nvidia-smi are of four series of
drivers; the variables of SLURM are those that a cluster of version 22.05 with two GPUs on each node sets."""

from pathlib import Path

import pytest
import torch

from moce_ds.common.errors import ConfigError
from moce_ds.common.host.gpus import GpuError, apply_choice, check_none_unused, cuda_version, index_of
from tests.examples import nvidia_smi
from tests.examples.moce_command import TINY, refused

BATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,1", "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
SHARED = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1", "SLURM_STEP_GPUS": "0", "CUDA_VISIBLE_DEVICES": "0"}
BOUND = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2", "SLURM_STEP_GPUS": "1", "CUDA_VISIBLE_DEVICES": "1"}
WITHOUT = {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,1", "SLURM_GPUS_PER_TASK": "1"}  # srun --gres=none

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here, so nothing is refused")


@pytest.mark.parametrize(
    ("local_rank", "visible", "environment", "index"),
    [
        (0, 1, {}, 0),
        (3, 4, {}, 3),
        (1, 2, BATCH, 1),  # both tasks see both
        (0, 1, BOUND, 0),
        (1, 1, BOUND, 0),  # --gpus-per-task=1, --gpu-bind=single:1
        (3, 1, BOUND | {"SLURM_GPUS_ON_NODE": "4"}, 0),
    ],
)
def test_a_process_uses_its_own_gpu(local_rank: int, visible: int, environment: dict[str, str], index: int) -> None:
    assert index_of(local_rank, visible, environment) == index


@pytest.mark.parametrize(
    ("local_rank", "visible", "environment"),
    [(1, 1, {}), (1, 1, SHARED), (2, 1, BOUND), (4, 4, {}), (2, 2, BATCH | {"SLURM_GPUS_ON_NODE": "4"})],
)
def test_more_processes_than_gpus_are_refused(local_rank: int, visible: int, environment: dict[str, str]) -> None:
    seen = "1 GPU:" if visible == 1 else f"{visible} GPUs:"
    with pytest.raises(GpuError, match=f"LOCAL_RANK is {local_rank} and this process sees {seen} start at most one"):
        index_of(local_rank, visible, environment)


@pytest.mark.parametrize(
    ("series", "cuda", "found", "cure"),
    [
        (470, "13.0", "1 GPU (Tesla V100-SXM2-32GB); driver 470.256.02, which supports CUDA up to 11.4", "a driver"),
        (550, "13.0", "2 GPUs (NVIDIA H100 80GB HBM3); driver 550.90.12, which supports CUDA up to 12.4", "CUDA 12,"),
        (550, None, "2 GPUs", "for CUDA 12, with the extra cu12"),
        (550, "12.6", "2 GPUs", "These versions fit. `python -c 'import torch; torch.cuda.init()'` prints the cause."),
        (580, None, "1 GPU (NVIDIA A100-SXM4-40GB); driver 580.95.05, which supports CUDA up to 13.0", "extra cu13"),
        (610, None, "1 GPU (NVIDIA B200); driver 610.43.02, which supports CUDA up to 13.3", "with the extra cu13"),
        (610, "13.0", "1 GPU (NVIDIA B200)", "These versions fit."),
    ],
)  # fmt: skip
def test_gpus_that_torch_cannot_use_are_an_error_with_the_wheels_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, series: int, cuda: str | None, found: str, cure: str
) -> None:
    nvidia_smi.install(monkeypatch, tmp_path, series)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    with pytest.raises(GpuError) as caught:
        check_none_unused("2.13.0", cuda, environment)
    message = str(caught.value)
    assert f"PyTorch sees no GPU, but nvidia-smi lists {found}" in message and cure in message, message
    assert f"built for {f'CUDA {cuda}' if cuda else 'the CPU only'}." in message
    assert message.endswith("set MOCE_DEVICE=cpu in the environment, or engine.device=cpu for a training run.")


def test_gpus_that_are_hidden_are_not_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi.install(monkeypatch, tmp_path, 580)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | BATCH
    for value in ("", "-1", "NoDevFiles"):
        check_none_unused("2.13.0", None, environment | {"CUDA_VISIBLE_DEVICES": value})
    chosen = dict(environment)
    apply_choice("cpu", chosen)
    check_none_unused("2.13.0", None, chosen)
    with pytest.raises(GpuError, match=r"prints the cause; CUDA_VISIBLE_DEVICES is '7'\."):
        check_none_unused("2.13.0", "13.0", environment | {"CUDA_VISIBLE_DEVICES": "7"})


def test_a_machine_without_gpus_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_none_unused("2.13.0", None, {"PATH": str(tmp_path)})  # no nvidia-smi
    check_none_unused("2.13.0", None, {"PATH": str(tmp_path)} | WITHOUT)
    check_none_unused("2.13.0", None, {"PATH": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0"})
    nvidia_smi.install(monkeypatch, tmp_path, None)  # no driver, as on the login node of some clusters
    check_none_unused("2.13.0", "13.0", {"PATH": f"{tmp_path}:/usr/bin:/bin"})


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        (BATCH, "SLURM assigned 2 GPUs of this node (SLURM_GPUS_ON_NODE)"),
        (BOUND, "SLURM assigned 2 GPUs of this node (SLURM_GPUS_ON_NODE)"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_GPUS": "1"}, "to this process (SLURM_STEP_GPUS=1)"),
        ({"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0"}, "to this process (CUDA_VISIBLE_DEVICES=0)"),
    ],
)
def test_gpus_of_slurm_are_missed_without_nvidia_smi(tmp_path: Path, environment: dict[str, str], found: str) -> None:
    with pytest.raises(GpuError) as caught:
        check_none_unused("2.13.0", "13.0", {"PATH": str(tmp_path)} | environment)
    assert found in str(caught.value) and "--nv" in str(caught.value) and "Install" not in str(caught.value)


def test_one_process_of_a_machine_reports_it(tmp_path: Path) -> None:
    def reports(**local_rank: str) -> bool:
        with pytest.raises(GpuError) as caught:
            check_none_unused("2.13.0", None, {"PATH": str(tmp_path)} | BATCH | local_rank)
        return caught.value.every_process

    assert reports() and reports(LOCAL_RANK="0") and not reports(LOCAL_RANK="1")


def test_the_version_of_cuda_is_read_from_the_tables_of_all_drivers() -> None:
    tables = sorted(nvidia_smi.TABLES.iterdir())
    assert [cuda_version(table.read_text()) for table in tables] == [(11, 4), (12, 4), (13, 0), (13, 3)]
    assert cuda_version("| NVIDIA-SMI 550.90.12    Driver Version: 550.90.12    CUDA Version: N/A |") is None


def test_the_choice_hides_gpus_and_has_two_values() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    apply_choice("auto", environment)
    apply_choice("auto", environment | {"MOCE_DEVICE": "auto"})
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    for device, choice in (("cpu", ""), ("cpu", "auto"), ("auto", "cpu")):
        hidden = environment | {"MOCE_DEVICE": choice}
        apply_choice(device, hidden)
        assert hidden["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(ConfigError, match=r"MOCE_DEVICE is 'gpu', expected one of auto, cpu\."):
        apply_choice("auto", {"MOCE_DEVICE": "gpu"})


@without_gpu
def test_verbs_refuse_the_cpu_unless_it_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi.install(monkeypatch, tmp_path / "bin", 550)
    run = ("pretrain", TINY, f"data.shards={tmp_path / 'none'}", f"run.out={tmp_path / 'run'}")
    features = ("features", tmp_path / "none", tmp_path / "none", tmp_path / "features")
    tuning = ("finetune", tmp_path / "none", "--train", tmp_path, "--test", tmp_path, "--out", tmp_path / "tuned")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # restored after the test
    for words in (run, (*run, "engine.device=auto"), features, tuning):
        assert "PyTorch sees no GPU, but nvidia-smi lists 2 GPUs" in refused(*words)
    for words in (run, tuning):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert "PyTorch sees no GPU" not in refused(*words, "engine.device=cpu")
    for words in (run, features, tuning):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with monkeypatch.context() as patch:
            patch.setenv("MOCE_DEVICE", "cpu")
            assert "PyTorch sees no GPU" not in refused(*words)
