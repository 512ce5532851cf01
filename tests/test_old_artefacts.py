"""What an older commit wrote opens with the program of today, which resumes, selects, exports and reports the same.

`tools/write_old_artefacts.py` wrote the archives in `fixtures/old`. Paths in them are relative to the folder that they
are unpacked into, which is the working directory of each test.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from moce_ds import Clusters, load_expert
from moce_ds.checkpoint.format import step_folder, steps_of
from moce_ds.common.storage.metrics_file import read_metrics
from moce_ds.evaluation.results_file import read_results
from tests.examples.moce_command import run_alone, run_here

ARCHIVES = sorted((Path(__file__).parent / "fixtures" / "old").glob("*.tar.xz"))
STEPS, BEFORE = 3, 2
"""Steps of every pre-training run, and the step of its checkpoint before the last."""

KINDS = {
    "pipeline": "pipeline",
    "pipeline/shards": "shard set",
    "pipeline/features": "features",
    "pipeline/clusters": "clusters",
    "pipeline/mae": "run",
    "pipeline/moce": "run",
    f"pipeline/moce/checkpoints/step-{STEPS:08d}": "checkpoint",
    "pipeline/experts/digits": "encoder",
    "pipeline/results.json": "results",
    "token": "run",
    "path": "run",
    "tuning": "run",
    "study": "study",
    "mmseg": "export",
}
RUNS = ("pipeline/mae", "pipeline/moce", "token", "path")


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artefacts of one archive, in the working directory."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_archives() -> None:
    assert ARCHIVES


def test_inspect_verifies_every_artefact(old: Path) -> None:
    for place, kind in KINDS.items():
        said = run_here("inspect", place, "--verify")
        assert (said.status, said.err) == (0, ""), (place, said)
        assert " ".join(said.out.split()).startswith(f"{place}: {kind} "), (place, said.out)
        assert said.out.endswith("Verified: everything is as it was written.\n"), (place, said.out)


@pytest.mark.parametrize("place", ["pipeline", "token", "path", "study"])
def test_report_shows_it(old: Path, place: str) -> None:
    said = run_here("report", place, "--out", "page.html")
    assert said.status == 0, said
    shown = {"pipeline": ["Run mae", "Run moce", "Results"], "study": ["1 of 1 cell done"]}.get(place, [f"Run {place}"])
    page = Path("page.html").read_text()
    assert all(text in page for text in shown), place


@pytest.mark.parametrize("run", RUNS)
def test_a_run_resumes_with_the_losses_that_it_had(old: Path, run: str) -> None:
    """From the checkpoint before the last, by the settings in its own folder."""
    folder = Path(run)
    expected = read_metrics(folder / "metrics.jsonl")
    assert steps_of(folder) == [BEFORE, STEPS] and len(expected) == STEPS
    shutil.rmtree(step_folder(folder, STEPS))
    said = run_alone("pretrain", folder / "config.yaml")
    assert said.status == 0 and steps_of(folder) == [BEFORE, STEPS], said
    found = read_metrics(folder / "metrics.jsonl")
    for key in ("step", "loss", "reconstruction", "grad_norm", "lr"):
        np.testing.assert_allclose([r[key] for r in found], [r[key] for r in expected], rtol=1e-5, err_msg=key)
    assert run_here("inspect", run, "--verify").status == 0


def test_a_tuning_run_resumes_with_the_result_that_it_had(old: Path) -> None:
    expected, weights = json.loads(Path("tuning/result.json").read_text()), tuned_weights()
    *_, before, last = steps_of(Path("tuning"))
    shutil.rmtree(step_folder(Path("tuning"), last))
    shutil.rmtree("tuning/tuned")
    Path("tuning/result.json").unlink()
    splits = [word for part in ("train", "test") for word in (f"--{part}", f"pipeline/tasks/digits/{part}")]
    command = ["finetune", "pipeline/experts/digits", *splits, "--val", "0.25", "--out", "tuning", "tuning/config.yaml"]
    said = run_alone(*command)
    assert said.status == 0 and f"after step {before}" in said.out + said.err, said
    found = json.loads(Path("tuning/result.json").read_text())
    for name, measure in expected.pop("measures").items():
        assert found["measures"][name] == pytest.approx(measure, rel=1e-5), name
    # Processors differ in the last bits of the weights, so their checksums are not compared.
    assert {key: found[key] for key in ("step", "steps")} == {key: expected[key] for key in ("step", "steps")}
    for name, tensor in tuned_weights().items():
        np.testing.assert_allclose(tensor, weights.pop(name), rtol=1e-4, atol=1e-6, err_msg=name)
    assert not weights


def tuned_weights() -> dict[str, np.ndarray]:
    """The weights that the tuning run has written, by file and name."""
    files = Path("tuning/tuned").glob("*.safetensors")
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_select_chooses_the_route_that_it_chose(old: Path) -> None:
    def selected(results: str) -> dict[str, object]:
        (record,) = (record for record in read_results(Path(results)) if record["verb"] == "select")
        return {key: record[key] for key in ("route", "share", "clusters", "model_sha256", "made_from")}

    words = ("--data", "pipeline/tasks/digits/train", "--task", "digits", "--results", "again.json")
    assert run_here("select", "pipeline/moce", *words).status == 0
    assert selected("again.json") == selected("pipeline/results.json")
    said = run_here("select", "path", *words)
    assert said.status == 0, said
    said = run_here("select", "token", *words)
    assert said.status == 1 and "routes by token" in said.err, said


def test_export_writes_the_expert_that_it_wrote(old: Path) -> None:
    words = ("--data", "pipeline/tasks/digits/train")
    assert run_here("export", "pipeline/moce", "again", *words).status == 0
    before, now = (load_file(f"{folder}/model.safetensors") for folder in ("pipeline/experts/digits", "again"))
    assert before.keys() == now.keys() and all(np.array_equal(before[name], now[name]) for name in before)
    for run, choice in (("pipeline/mae", ()), ("path", ("--cluster", "0"))):
        said = run_here("export", run, f"exported-{Path(run).name}", *choice)
        assert said.status == 0, said


def test_an_exported_expert_is_as_accurate_as_it_was(old: Path) -> None:
    splits = ("--train", "pipeline/tasks/digits/train", "--test", "pipeline/tasks/digits/test")
    words = (*splits, "--task", "digits", "--model", "expert", "--results", "again.json")
    assert run_here("knn", "pipeline/experts/digits", *words).status == 0
    (found,) = read_results(Path("again.json"))
    assert found in read_results(Path("pipeline/results.json"))
    assert load_expert("pipeline/experts/digits").embed_dim == 8


def test_clusters_label_the_images_as_they_did(old: Path) -> None:
    ids_N = np.load("pipeline/clusters/ids.npy")
    features_ND = np.load("pipeline/features/block-000000.npy").astype(np.float32)
    for folder in ("pipeline/clusters", "pipeline/moce", "path"):
        assert np.array_equal(Clusters.load(folder).assign(features_ND), ids_N), folder


def test_pipeline_and_study_have_nothing_left_to_do(old: Path) -> None:
    said = run_here("pipeline", "pipeline.yaml")
    assert (said.status, (said.out + said.err).count(" is done\n")) == (0, 7), said
    assert "7 of 7 stages done in pipeline." in said.out + said.err
    words = ("out=study", "base=pretrain.yaml", "grid.run.seed=[0]", "tasks.digits=pipeline/tasks/digits")
    said = run_here("study", *words)
    assert said.status == 0 and "1 of 1 cell done in study." in said.out + said.err, said
    assert "cell 1 of 1" not in said.out + said.err, "which would be run again"
