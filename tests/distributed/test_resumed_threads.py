"""A run whose number of threads was chosen by the machine's load resumes with that number: bit for bit the same run."""

import signal
import sys
from pathlib import Path

import pytest
from launching import SECONDS, launched, run_to_end, wait_for_step
from tiny_run import TinyData, assert_same, losses, tiny_settings

from moce_ds.checkpoint.format import find
from moce_ds.common.errors import STOPPED
from moce_ds.common.host.threads import allowed_cpus

pytestmark = pytest.mark.skipif(allowed_cpus() < 2, reason="needs two CPUs")


def test_a_resumed_run_keeps_the_number_that_was_chosen(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def free(cpus: int) -> None:
        """What the outermost process of ours finds, which its children share."""
        monkeypatch.setenv("MOCE_CPUS", str(cpus))

    def command(name: str) -> tuple[str, ...]:
        words = tiny_settings(tiny_data.shards, tmp_path / name, "run.checkpoint_every=1")
        return (sys.executable, "-m", "moce_ds", "pretrain", *words)

    for name, cpus in (("one", 1), ("two", 2)):
        free(cpus)
        status, output = run_to_end(*command(name))
        assert status == 0 and f"{cpus} thread{'s' * (cpus > 1)} per process, since" in output, output
        assert find(tmp_path / name).manifest["threads"] == cpus
    assert losses(tmp_path / "one") != losses(tmp_path / "two"), "the number must matter, or this test shows nothing"

    with launched(*command("resumed")) as process:
        wait_for_step(tmp_path / "resumed", 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=SECONDS) == STOPPED
    free(1)
    status, output = run_to_end(*command("resumed"))
    assert status == 0 and "2 threads per process, as this run had before" in output, output
    assert_same(tmp_path, "two", "resumed", tolerance=0)
