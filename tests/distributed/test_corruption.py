"""Whatever happens to a file of a checkpoint on the disk is noticed and named, and the checkpoint before it is used.

The matrix of harms and files asks `resume`; the fixture `repaired` resumes damaged runs with two processes.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import run_distributed
from jobs import Job, Told, run_jobs
from tiny_run import STEPS, TinyData, assert_same, tiny_settings

from moce_ds.checkpoint.format import OPTIMIZER, WEIGHTS, Checkpoint, find, step_folder, steps_of, write_checkpoint
from moce_ds.checkpoint.shared_read import SharedReader, Wanted, checkpoint_steps, resume
from moce_ds.common.errors import ArtefactError
from moce_ds.distributed.runtime import Runtime
from tests.examples.moce_command import refused, run_here

ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
EXPERT = "weights/block-03-expert-002.safetensors"
MOMENTS = "optimizer/block-00.safetensors"


def flip(place: int, path: Path) -> None:
    """Flip one bit of the byte at a place of a file, from its end where negative."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(share: float, path: Path) -> None:
    """Leave the first part of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


HARMS: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "emptied": partial(cut, 0),
    "cut": partial(cut, 0.7),
    "size of the header": partial(flip, 0),
    "name in the header": partial(flip, 10),
    "shape in the header": partial(flip, 60),
    "first value": lambda path: flip((8 + int.from_bytes(path.read_bytes()[:8], "little")) % path.stat().st_size, path),
    "last value": partial(flip, -4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two small checkpoints: an embedding, a block, two experts of another one."""
    run = tmp_path_factory.mktemp("whole")
    names = ["cls_token", "blocks.0.norm1.weight", *(f"blocks.1.mlp.experts.{e}.fc1.bias" for e in range(2))]
    for step in (4, 5):
        weights = {name: torch.full((3,), float(step)) for name in names}
        moments = {f"{name}.{kind}": torch.ones(3) for name in names for kind in ("exp_avg", "exp_avg_sq")}
        write_checkpoint(step_folder(run, step), weights, moments, {"step": step, "skipped": 0})
    return run


FILES = ["manifest.json"] + [
    f"{part}/{name}.safetensors"
    for part in (WEIGHTS, OPTIMIZER)
    for name in ("shared", "block-00", "block-01-expert-000", "block-01-expert-001")
]


def resumed(run: Path) -> int:
    """The step of the checkpoint that a run resumes from, having loaded its weights; the other files are checked."""

    def load(reader: SharedReader) -> torch.Tensor:
        return reader.load(WEIGHTS)["cls_token"]

    checkpoint, token = resume(run, checkpoint_steps(run, ALONE), load, ALONE)
    assert (token == checkpoint.step).all()
    return checkpoint.step


def test_the_matrix_holds_every_file(whole: Path) -> None:
    folder = step_folder(whole, 5)
    assert sorted(FILES) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert resumed(whole) == 5


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", HARMS)
def test_every_harm_to_every_file_is_named(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    HARMS[harm](step_folder(run, 5) / name)
    assert resumed(run) == 4
    told = capsys.readouterr().err
    aside = run / "checkpoints" / "damaged-step-00000005"
    assert "WARNING: the checkpoint of step 5 is damaged; resuming from step 4, the newest valid one" in told
    assert f"{step_folder(run, 5)}/{name}" in told and told.count(".safetensors") + told.count("manifest.json") == 1
    assert f"It is kept as {aside}." in told and aside.is_dir()
    assert steps_of(run) == [4] and find(run).step == 4
    assert resumed(run) == 4
    assert capsys.readouterr().err == "", "it is told once"


@pytest.mark.parametrize("harm", HARMS)
def test_where_none_is_whole_nothing_is_touched(whole: Path, tmp_path: Path, harm: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    harmed = [step_folder(run, 4) / FILES[2], step_folder(run, 5) / FILES[0], step_folder(run, 5) / FILES[5]]
    for path in harmed:
        HARMS[harm](path)
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(ArtefactError, match=f"{run} holds no valid checkpoint to resume from") as caught:
            resumed(run)
        assert str(harmed[0]) in str(caught.value) and str(harmed[1]) in str(caught.value)
        assert f"Restore these files, or remove {run / 'checkpoints'} to begin at step 0." in str(caught.value)
    assert before == {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("damaged", [(), (5,)])
def test_the_checkpoint_of_another_model_is_an_error_and_stays(
    whole: Path, tmp_path: Path, damaged: tuple[int, ...]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in damaged:
        HARMS["last value"](step_folder(run, step) / FILES[1])
    before = sorted(run.rglob("*"))

    def load(reader: SharedReader) -> None:
        reader.load(WEIGHTS)
        reader.read([Wanted("weights/block-07.safetensors", None)], lambda name, content: None)

    with pytest.raises(ArtefactError, match=r"holds no weights/block-07.safetensors: it belongs to another model"):
        resume(run, checkpoint_steps(run, ALONE), load, ALONE)
    assert before == sorted(run.rglob("*"))


def test_what_load_refuses_is_an_error_and_stays(whole: Path) -> None:
    def refuse(name: str, content: torch.Tensor) -> None:
        raise ArtefactError(f"{name} does not fit")

    before = sorted(whole.rglob("*"))
    for place in FILES[1], FILES[-1]:
        with pytest.raises(ArtefactError, match=f"{place} does not fit"):
            resume(whole, [4, 5], lambda reader, place=place: reader.read([Wanted(place, None)], refuse), ALONE)
    assert before == sorted(whole.rglob("*"))


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["manifest.json", "weights/block-02-expert-002.safetensors"])
def test_readers_name_the_harm(tiny_moce_run: Callable[..., Path], tmp_path: Path, harm: str, name: str) -> None:
    run = tiny_moce_run()
    (run / "config.yaml").write_text("model: {arch: moce}\ndata: {shards: some}\n")
    assert run_here("inspect", run, "--verify").status == 0
    path = step_folder(run, 5) / name
    HARMS[harm](path)
    said = run_here("inspect", run, "--verify")
    assert said.status == 1 and "Traceback" not in said.err
    assert str(path) in (said.out + said.err).replace("\n", "")
    told = refused("export", run, tmp_path / "out", "--route", "1,2")
    assert str(path) in told and not (tmp_path / "out").exists()


def harm_newest(run: Path, *names: str, harm: str = "last value") -> None:
    """Damage files of the newest checkpoint."""
    for name in names:
        HARMS[harm](step_folder(run, steps_of(run)[-1]) / name)


def harm_all(run: Path) -> None:
    """Damage two files of every checkpoint, each of which another one of two processes reads."""
    for step in steps_of(run):
        for name in (EXPERT, MOMENTS):
            HARMS["last value"](step_folder(run, step) / name)


@pytest.fixture(scope="module")
def repaired(tiny_data: TinyData, runs: Path, two_processes: object) -> list[dict[str, Told]]:
    """What each of two ranks was told by `corrupt`, a run like two-moce-ep2: stopped, damaged, resumed, damaged when it
    was complete, and at last damaged beyond use."""
    other = ("experts.ep_size=2", "run.checkpoint_every=3", "run.keep_checkpoints=4")
    run, words = (
        runs / "corrupt",
        tiny_settings(tiny_data.shards, runs / "corrupt", *other, clusters=tiny_data.clusters),
    )
    jobs = {
        "stopped": Job(words, stop_after=7),
        "resumed": Job(words, before=partial(harm_newest, run, EXPERT, MOMENTS)),
        "again": Job(words, before=partial(harm_newest, run, "manifest.json", harm="cut")),
        "complete": Job(words),
        "lost": Job(words, before=partial(harm_all, run)),
        "still lost": Job(words),
    }
    return run_distributed(run_jobs, 2, jobs)


def test_two_ranks_agree_on_what_either_has_read(runs: Path, repaired: list[dict[str, Told]]) -> None:
    stopped, resumed = repaired[0]["stopped"].steps, repaired[0]["resumed"]
    assert 7 <= stopped < STEPS == resumed.steps == repaired[1]["resumed"].steps
    assert f"WARNING: the checkpoint of step {stopped} is damaged; resuming from step 6, the newest" in resumed.text
    for name in (EXPERT, MOMENTS):
        assert f"  {step_folder(runs / 'corrupt', stopped) / name} is damaged: its checksum" in resumed.text
    assert f"Resuming {runs / 'corrupt'} after step 6." in resumed.text


def test_a_complete_run_whose_last_checkpoint_is_damaged_is_completed_again(
    runs: Path, repaired: list[dict[str, Told]]
) -> None:
    again = repaired[0]["again"]
    assert again.steps == STEPS and "is complete" not in again.text
    assert f"WARNING: the checkpoint of step {STEPS} is damaged; resuming from step 9" in again.text
    assert repaired[0]["complete"].text == f"{runs / 'corrupt'} is complete: {STEPS} steps.\n"


def test_what_was_repaired_is_as_if_nothing_had_happened(runs: Path, repaired: list[dict[str, Told]]) -> None:
    """Up to the last harm, which the weights' last values undo."""
    for step in steps_of(runs / "corrupt"):
        for name in (EXPERT, MOMENTS):
            HARMS["last value"](step_folder(runs / "corrupt", step) / name)
    assert Checkpoint.open(step_folder(runs / "corrupt", STEPS)).faults() == []
    assert_same(runs, "two-moce-ep2", "corrupt", tolerance=0)


def test_what_is_set_aside_is_kept_and_not_counted(runs: Path, repaired: list[dict[str, Told]]) -> None:
    stopped = repaired[0]["stopped"].steps
    found = sorted(path.name for path in (runs / "corrupt" / "checkpoints").iterdir())
    assert found == [
        *sorted({f"damaged-step-{stopped:08d}", f"damaged-step-{STEPS:08d}"}),
        *(f"step-{step:08d}" for step in (3, 6, 9, STEPS)),
    ]


def test_where_none_is_left_all_ranks_say_so(runs: Path, repaired: list[dict[str, Told]]) -> None:
    errors = {told[name].error for told in repaired for name in ("lost", "still lost")}
    assert len(errors) == 1
    for step in (3, 6, 9, STEPS):
        for name in (EXPERT, MOMENTS):
            assert f"  {step_folder(runs / 'corrupt', step) / name} is damaged: its checksum" in errors.copy().pop()
