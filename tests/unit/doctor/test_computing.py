"""torch, DALI and faiss against the driver, and processes that meet: on this machine, and on described ones."""

from pathlib import Path
from typing import Any

import pytest

from moce_ds.common.host.gpus import Driver
from moce_ds.doctor import computing
from moce_ds.doctor.computing import Computer
from moce_ds.doctor.probes import ProbeError, ask
from tests.examples import nvidia_smi
from tests.unit.doctor.test_packages import install

WITHOUT = {"version": "2.13.0", "cuda": "13.0", "nccl": None, "kernels": [], "gpus": []}
H100 = {"name": "NVIDIA H100 80GB HBM3", "gib": 79.1, "fault": ""}
V100 = {"name": "Tesla V100", "gib": 32.0, "fault": "CUDA error: no kernel image is available"}
CUDA_12, CUDA_13 = Driver("2 GPUs", "550.90.12", (12, 4)), Driver("2 GPUs", "580.95.05", (13, 0))


def with_gpus(*gpus: dict[str, Any], driver: Driver = CUDA_13) -> Computer:
    """A machine on which torch sees these GPUs."""
    return Computer({}, WITHOUT | {"gpus": list(gpus), "kernels": ["sm_80", "sm_90"]}, driver)


def test_gpus_that_compute_are_listed_with_their_driver() -> None:
    found = computing.gpus_compute(with_gpus(H100, H100))
    assert found.status == "ok"
    assert found.text == ("2 GPUs (NVIDIA H100 80GB HBM3, 79 GiB); driver 580.95.05, which supports CUDA up to 13.0")


def test_a_gpu_that_fails_is_a_fault_with_the_kernels_that_torch_has() -> None:
    found = computing.gpus_compute(with_gpus(H100, V100))
    assert found.status == "fault" and "GPU 1 (Tesla V100): CUDA error: no kernel image" in found.text
    assert "sm_80, sm_90" in found.cure


@pytest.mark.parametrize(("series", "cure"), [(550, "extra cu12"), (610, "These versions fit."), (470, "a driver")])
def test_gpus_that_torch_does_not_see_are_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, series: int, cure: str
) -> None:
    nvidia_smi.install(monkeypatch, tmp_path, series)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    found = computing.gpus_compute(Computer(environment, WITHOUT, Driver.here(environment)))
    assert found.status == "fault" and cure in found.cure
    assert found.text.startswith("PyTorch sees no GPU, but nvidia-smi lists") and found.text.endswith("CUDA 13.0")


def test_a_machine_without_gpus_or_with_hidden_ones_is_fine() -> None:
    assert computing.gpus_compute(Computer({"PATH": ""}, WITHOUT, Driver())).text.startswith("none; all verbs")
    hidden = computing.gpus_compute(Computer({"CUDA_VISIBLE_DEVICES": ""}, WITHOUT, Driver()))
    assert hidden.status == "ok" and hidden.text.startswith("hidden from this process")


def test_a_torch_that_does_not_import_is_one_fault() -> None:
    broken = Computer({}, ProbeError("ImportError: libcudart.so.13"), Driver())
    assert computing.torch_loads(broken).status == "fault" and "libcudart" in computing.torch_loads(broken).text
    assert computing.gpus_compute(broken).status == "warning" and computing.nccl_sums(broken).status == "ok"


def test_wheels_of_dali_must_fit_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "nvidia-dali-cuda130", "2.4.0")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = computing.dali_loads(with_gpus(H100, driver=CUDA_12))
    assert found.status == "fault" and "the driver supports CUDA up to 12.4" in found.text
    assert found.cure == "`pip uninstall nvidia-dali-cuda130`, then `pip install 'moce-ds[cu12]'`."


def test_faiss_for_the_cpu_beside_gpus_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Computer.here()
    assert computing.faiss_loads(here).status in ("ok", "warning")
    install(tmp_path, "faiss-cpu", "1.15.1")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = computing.faiss_loads(Computer(here.environment, with_gpus(H100).torch, CUDA_13))
    assert found.status == "warning" and "computes on the CPU although" in found.text and "[cu13]" in found.cure


def test_a_probe_reports_the_last_line_of_its_error() -> None:
    with pytest.raises(ProbeError, match="No module named 'no_such_module'"):
        ask("module", "no_such_module", seconds=60)
    with pytest.raises(ProbeError, match=r"no answer within 0\.01 s"):
        ask("module", "json", seconds=0.01)
    assert ask("module", "json", seconds=60) == {"version": "2.0.9", "gpus": None}
