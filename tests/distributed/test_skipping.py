"""Steps whose gradient is not finite: skipped by all, counted, and given up after too many in a row.

The runs are made once, by `made`; the tests compare what they left on disk.
"""

import json
from pathlib import Path

import pytest
import torch
from harness import run_distributed
from jobs import Job, NotFinite, Told, run_jobs
from tiny_run import STEPS, TinyData, assert_same, final_state, losses, tiny_settings

from moce_ds.checkpoint.format import OPTIMIZER, WEIGHTS, Checkpoint, find, step_folder, steps_of
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.inspection.inspection import describe

BAD = 3  # the step (from 1) without an update in the runs that are compared
RUNS = {
    "mae": (["optim.accumulation=2"], NotFinite((BAD - 1,))),
    "mae-zero2": (["engine.zero_stage=2"], NotFinite((BAD - 1,))),
    "moce": (["experts.ep_size=2"], NotFinite((BAD - 1,), expert=True)),
    "moce-zero2": (["experts.ep_size=2", "engine.zero_stage=2"], NotFinite((BAD - 1,), expert=True)),
    "moce-replicas": (["experts.ep_size=1"], NotFinite((BAD - 1,), expert=True)),
}


@pytest.fixture(scope="module")
def made(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Told]]]:
    """The folder of all runs, and what they told each of two ranks: those of RUNS, uninterrupted and `...-resumed`
    after the bad step; and the special ones."""
    runs = tmp_path_factory.mktemp("skipping")

    def words(name: str, *other: str) -> list[str]:
        clusters = tiny_data.clusters if name.startswith("moce") else None
        return tiny_settings(tiny_data.shards, runs / name, *other, clusters=clusters)

    jobs = {}
    for name, (other, fault) in RUNS.items():
        jobs[name] = Job(words(name, *other), not_finite=fault)
        resumed = words(f"{name}-resumed", *other)
        jobs[f"{name}-stopped"] = Job(resumed, stop_after=BAD + 2, not_finite=fault)
        jobs[f"{name}-resumed"] = Job(resumed)  # the same command; the bad step is past
    every_step = ("run.checkpoint_every=1", "run.keep_checkpoints=99", "run.max_skipped=3")
    # Steps 4, 5, and the last one.
    jobs["mae-streaks"] = Job(words("mae-streaks", *every_step), not_finite=NotFinite((3, 4, STEPS - 1)))
    jobs["moce-last"] = Job(
        words("moce-last", *every_step, "experts.ep_size=2"), not_finite=NotFinite((STEPS - 1,), expert=True)
    )
    jobs["mae-given-up"] = Job(words("mae-given-up", *every_step), not_finite=NotFinite((3, 4, 5, 6)))
    jobs["mae-then-well"] = Job(words("mae-given-up", *every_step))
    diverging = ("optim.base_lr=1e30", "optim.warmup_epochs=1", "run.checkpoint_every=1", "run.max_skipped=3")
    jobs["mae-diverged"] = Job(words("mae-diverged", *diverging))
    # All three steps of a run: fewer than run.max_skipped.
    jobs["mae-useless"] = Job(words("mae-useless", "optim.epochs=0.5"), not_finite=NotFinite((0, 1, 2)))
    for balance in ("loss", "sinkhorn"):
        name = f"moce-diverged-{balance}"
        jobs[name] = Job(words(name, *diverging, "experts.ep_size=2", f"experts.balance={balance}"))
    return runs, run_distributed(run_jobs, 2, jobs)


@pytest.mark.parametrize("name", RUNS)
def test_one_rank_alone_makes_all_skip(made: tuple[Path, list[dict[str, Told]]], name: str) -> None:
    runs, told = made
    assert [one[name].steps for one in told] == [STEPS, STEPS]
    records = read_metrics(runs / name / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [0] * (BAD - 1) + [1] * (STEPS - BAD + 1)
    assert told[0][name].text.count("the gradient is not finite; the step was skipped (1 in a row, 1 in all)") == 1
    assert f"WARNING: step {BAD}: " in told[0][name].text and "WARNING" not in told[1][name].text
    assert [record["step"] for record in records if record["grad_norm"] is None] == [BAD]
    without_loss = [] if RUNS[name][1].expert else [BAD]
    assert [record["step"] for record in records if record["loss"] is None] == without_loss
    assert records[-1]["loss"] < records[0]["loss"] - 0.05, "training goes on"
    assert find(runs / name).manifest["skipped"] == 1


def test_the_record_stays_readable(made: tuple[Path, list[dict[str, Told]]]) -> None:
    def no_json(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    path = made[0] / "mae-streaks"
    for line in (path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_json)
    steps_P = RunFolder.open(path).series("loss").steps_P
    assert len(steps_P) == STEPS - 3 and not {4, 5, STEPS} & set(steps_P)
    describe(path)  # whose last record has no loss


@pytest.mark.parametrize("name", RUNS)
def test_a_skip_before_a_stop_changes_nothing_after_it(made: tuple[Path, list[dict[str, Told]]], name: str) -> None:
    """Bit for bit; a wrong count of Adam's updates shows in the first step after it."""
    runs, told = made
    assert BAD < told[0][f"{name}-stopped"].steps < STEPS == told[0][f"{name}-resumed"].steps
    assert_same(runs, name, f"{name}-resumed", tolerance=0)


@pytest.mark.parametrize("name", ["mae-streaks", "moce-last"])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(
    made: tuple[Path, list[dict[str, Told]]], name: str
) -> None:
    runs, _ = made
    before, after = (Checkpoint.open(step_folder(runs / name, step)) for step in (STEPS - 1, STEPS))
    assert after.manifest["skipped"] == before.manifest["skipped"] + 1
    for part in (WEIGHTS, OPTIMIZER):
        old, new = before.load(part), after.load(part)
        assert all(torch.equal(old[key], new[key]) for key in old | new)
    earlier = Checkpoint.open(step_folder(runs / name, STEPS - 2))
    assert not torch.equal(earlier.load(WEIGHTS)["cls_token"], before.load(WEIGHTS)["cls_token"])


def test_no_checkpoint_is_written_while_steps_are_skipped(made: tuple[Path, list[dict[str, Told]]]) -> None:
    runs, told = made
    assert steps_of(runs / "mae-streaks") == [1, 2, 3, 6, 7, 8, 9, 10, 11, 12]
    assert "step 5: the gradient is not finite; the step was skipped (2 in a row, 2 in all)" in (
        told[0]["mae-streaks"].text
    )
    assert f"step {STEPS}: the gradient is not finite; the step was skipped (1 in a row, 3 in all)" in (
        told[0]["mae-streaks"].text
    )


def test_a_short_run_without_an_update_is_not_complete(made: tuple[Path, list[dict[str, Told]]]) -> None:
    runs, told = made
    for one in told:
        assert one["mae-useless"].error.startswith("DivergedError: Step 3, the last one: no step had a finite gradient")
    assert steps_of(runs / "mae-useless") == []


def test_too_many_in_a_row_end_the_run(made: tuple[Path, list[dict[str, Told]]]) -> None:
    runs, told = made
    good = step_folder(runs / "mae-given-up", 3)
    for one in told:
        assert one["mae-given-up"].error.startswith(
            "DivergedError: Step 6: the gradient was not finite in 3 steps in a row (run.max_skipped). "
            f"The last good checkpoint is {good}."
        )
        assert one["mae-then-well"].steps == STEPS
    assert f"Resuming {good.parent.parent} after step 3." in told[0]["mae-then-well"].text
    assert [record["skipped"] for record in read_metrics(runs / "mae-given-up/metrics.jsonl")] == [0] * STEPS
    assert len(losses(runs / "mae-given-up")) == STEPS


@pytest.mark.parametrize("name", ["mae-diverged", "moce-diverged-loss", "moce-diverged-sinkhorn"])
def test_a_run_that_diverges_ends(made: tuple[Path, list[dict[str, Told]]], name: str) -> None:
    runs, told = made
    assert told[0][name].error == told[1][name].error
    assert "DivergedError" in told[0][name].error and "3 steps in a row" in told[0][name].error
    good = find(runs / name)
    assert f"The last good checkpoint is {good.folder}." in told[0][name].error
    assert good.faults() == []
    assert all(torch.isfinite(tensor).all() for tensor in final_state(runs / name).values())
