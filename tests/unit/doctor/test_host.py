"""What the machine gives its processes, on this machine and on others."""

import os
import resource
from pathlib import Path

import pytest

from moce_ds.common.host.outside import Outcome
from moce_ds.doctor import host
from moce_ds.doctor.probes import ask

GIB = 2**30
FAST = {"free": 100 * GIB, "size": 200 * GIB, "written": 64e6, "write_s": 0.1, "read_s": 0.1}


def test_only_linux_on_x86_64_has_wheels() -> None:
    assert host.judged_system("Linux", "x86_64", "Debian").status == "ok"
    assert host.judged_system("Linux", "aarch64", "Debian").status == "fault"
    assert host.judged_system("Darwin", "x86_64", "macOS").status == "fault"
    assert os.uname().release in host.operating_system().text


@pytest.mark.parametrize(
    ("allowed", "cpus", "chosen", "status"),
    [
        (8, 8, None, "ok"),
        (4, 64, "4", "ok"),
        (1, 1, None, "ok"),
        (4, 64, "64", "warning"),
        (4, 4, "two", "warning"),
        (4, 4, "0", "warning"),
        (1, 64, None, "warning"),
    ],
)
def test_threads_fit_the_cpus(allowed: int, cpus: int, chosen: str | None, status: str) -> None:
    found = host.judged_cpus(allowed, cpus, chosen)
    assert found.status == status and bool(found.cure) == (status != "ok")


def test_threads_that_moce_chose_are_not_the_users() -> None:
    ours = {"OMP_NUM_THREADS": "10000", "MOCE_THREADS": "10000"}
    assert host.cpus_and_threads(ours).text.endswith("OMP_NUM_THREADS is unset")
    assert host.cpus_and_threads({"OMP_NUM_THREADS": "10000"}).status == "warning"


@pytest.mark.parametrize(
    ("limit", "most", "cure"),
    [
        (1024, 4096, ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, ""),
        (256, resource.RLIM_INFINITY, "`ulimit -n 4096`"),
        (256, 2048, "`ulimit -n 2048`"),
        (256, 512, "Ask an administrator for 4096; users can set 512 at most."),
    ],
)
def test_a_low_limit_on_open_files_is_a_warning(limit: int, most: int, cure: str) -> None:
    found = host.judged_files(limit, most)
    assert found.status == ("warning" if cure else "ok") and cure in found.cure


def test_shared_memory_of_a_container_is_too_small(tmp_path: Path) -> None:
    assert "in /dev/shm" in host.shared_memory().text
    small = host.shared_memory(Path("/proc"))  # a file system without any space
    assert small.status == "warning" and "--shm-size" in small.cure
    assert "No such file" in host.shared_memory(tmp_path / "none").text


def test_a_folder_is_measured_and_left_empty(tmp_path: Path) -> None:
    facts = ask("folder", str(tmp_path), seconds=60)
    assert facts["written"] >= 4 * 2**20 and 0 < facts["free"] < facts["size"] and not list(tmp_path.iterdir())
    assert min(facts["write_s"], facts["read_s"]) > 0


def test_a_folder_that_cannot_be_used_is_a_fault(tmp_path: Path) -> None:
    found = host.disk(tmp_path / "none")
    assert found.status == "fault" and f"{tmp_path}/none cannot be used" in found.text
    assert "No such file or directory" in found.text and "--folder" in found.cure


@pytest.mark.parametrize(
    ("other", "status", "cure"),
    [
        ({}, "ok", ""),
        ({"free": GIB}, "warning", "free some space"),
        ({"write_s": 10.0}, "warning", "Slow"),
        ({"read_s": 10.0}, "warning", "Slow"),
        ({"read_s": 0.0}, "ok", ""),
    ],
)
def test_a_full_or_slow_disk_is_a_warning(other: dict[str, float], status: str, cure: str) -> None:
    found = host.judged_disk(Path("x"), FAST | other)
    assert found.status == status and cure in found.cure


def test_slurm_is_asked(tmp_path: Path) -> None:
    for name, text in (("sbatch", "slurm-wlm 22.05.8"), ("sinfo", "gpu up 16 3-00:00:00\nold down 1 infinite")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    found = host.slurm({"PATH": f"{tmp_path}"})
    assert (
        found.text == ("version 22.05.8; partitions: gpu (16 nodes, 3-00:00:00), old (1 node, infinite, down)")
        and found.status == "ok"
    )
    (tmp_path / "sinfo").unlink()
    assert host.slurm({"PATH": f"{tmp_path}"}).status == "warning"
    assert host.slurm({"PATH": f"{tmp_path}/none"}).status == "ok"  # only one verb needs it


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Outcome(1, "", "sinfo: error: x\nsinfo: fatal: no \x1b[31mconfiguration\n"), "fatal: no \ufffd[31mconf"),
        (Outcome(None), "no answer within 10 s"),
    ],
)
def test_a_cluster_that_does_not_answer_is_a_warning(answer: Outcome, why: str) -> None:
    found = host.judged_slurm("version 23", answer)
    assert found.status == "warning" and why in found.text and "login node" in found.cure
