"""`moce launch local` and torchrun as a user meets them: Ctrl-C, a killed process, a damaged shard."""

import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import click
import pytest
from jobs import Told
from launching import PATIENT, SECONDS, launched, local, ranks_of, run_to_end, send, wait_for_step, wait_until
from tiny_run import STEPS, TinyData, alter_images, assert_same, tiny_settings

from moce_ds.checkpoint.format import find, steps_of
from moce_ds.cli.main import moce
from moce_ds.common.errors import LOST_PEER, STOPPED, ConfigError
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.shards import ShardSet

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moce_ds")


def test_interrupted_run_goes_on_exactly(tiny_data: TinyData, runs: Path, two_processes: dict[str, Told]) -> None:
    run = runs / "launched"
    command = (
        *local(2),
        "pretrain",
        *tiny_settings(tiny_data.shards, run, "experts.ep_size=2", clusters=tiny_data.clusters),
    )
    with launched(*command) as launcher:
        wait_for_step(run, 2)
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == STOPPED, output
    (stopped,) = steps_of(run)
    assert 2 <= stopped < STEPS
    assert output.count(f"Stopped after step {stopped} as asked") == 1
    assert "Traceback" not in output

    status, output = run_to_end(*command)
    assert status == 0, output
    assert f"Resuming {run} after step {stopped}." in output and "Traceback" not in output
    assert_same(runs, "two-moce-ep2", "launched", tolerance=0)


def test_interrupted_while_starting(tiny_data: TinyData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(*local(2), "pretrain", *tiny_settings(tiny_data.shards, run)) as launcher:
        wait_until(lambda: "libtorch_cpu" in Path(f"/proc/{launcher.pid}/maps").read_text())
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=SECONDS)
    assert (launcher.returncode, output) == (STOPPED, "Interrupted.\n")
    assert not run.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_by_the_signal_was_stopped_as_asked(number: signal.Signals, tmp_path: Path) -> None:
    """Programs without steps; 130 is how many end at a Ctrl-C."""
    said = tmp_path / "said"
    waiting = f"""
import signal, sys, time
open({str(said)!r}, "a").write("waiting,")
try:
    time.sleep({SECONDS})
except KeyboardInterrupt:
    sys.exit(130)
"""
    two = f"run_processes({[sys.executable, '-c', waiting]}, 2)"
    code = f"import sys; from moce_ds.cli.launch.local import run_processes; sys.exit({two})"
    with launched(sys.executable, "-c", code) as launcher:
        wait_until(lambda: said.exists() and said.read_text() == "waiting," * 2)
        launcher.send_signal(number)
        output, _ = launcher.communicate(timeout=SECONDS)
    assert (launcher.returncode, output) == (STOPPED, "")


def test_a_killed_process_is_named(tiny_data: TinyData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(
        *local(2),
        "pretrain",
        *tiny_settings(tiny_data.shards, run, "optim.epochs=50", "run.checkpoint_every=2", PATIENT),
    ) as launcher:
        wait_until(lambda: len(steps_of(run)) > 0)
        ranks = ranks_of(launcher)
        assert sorted(ranks) == [0, 1]
        send(signal.SIGKILL, ranks[1])
        output, _ = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == LOST_PEER and "Restart" not in output, "nobody asked for one"
    assert "Process 1 was killed by SIGKILL." in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert find(run).faults() == [], "what was saved before is whole"


def test_a_damaged_shard_ends_all_processes_alike(tiny_data: TinyData, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_data.shards, shards)
    sampler = ShuffledSampler(RandomOrder(ShardSet.open(shards).count, seed=0), 16)
    alter_images(shards, [i for step in range(3) for i in sampler.batch(step).part(1, 2).ids.tolist()])  # of rank 1
    run = tmp_path / "run"
    command = (*local(2, "--max-restarts", "2"), "pretrain", *tiny_settings(shards, run, "optim.epochs=50", PATIENT))
    status, output = run_to_end(*command)
    assert status == 1 and "Restart" not in output, "it would only occur again"
    assert "was altered after it was written" in output and str(shards) in output
    assert output.count("Error:") == 1
    assert "Traceback" not in output


def test_a_process_whose_launcher_has_died_ends(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # nobody listens there once it is closed
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    words = tiny_settings(tiny_data.shards, tmp_path / "run", "run.peer_timeout=2")
    status, _ = run_to_end(sys.executable, "-m", "moce_ds", "pretrain", *words)
    assert status == LOST_PEER


def test_torchrun(tiny_data: TinyData, runs: Path, two_processes: dict[str, Told]) -> None:
    status, output = run_to_end(*TORCHRUN, "pretrain", *tiny_settings(tiny_data.shards, runs / "torchrun"))
    assert status == 0, output
    assert_same(runs, "two-mae", "torchrun", tolerance=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local", "--processes", "2", "pretrain"], "No such option '--processes'"),
        (["local", "pretrian", "data.shards=s"], "'pretrian' is not a verb of moce. Did you mean pretrain?"),
        (["slurm", "partition=gpu", "--dry-run", "pretrain"], "'--dry-run' is not a verb of moce. Expected one of "),
    ],
)
def test_no_process_is_started_for_what_is_not_a_verb(words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, click.NoSuchOption), match=re.escape(message)):
        moce(["launch", *words], standalone_mode=False)


def test_no_processes_are_refused() -> None:
    with pytest.raises(click.BadParameter, match="0 is not in the range x>=1"):
        moce(["launch", "local", "--nproc", "0", "pretrain"], standalone_mode=False)
