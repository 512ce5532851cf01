"""`moce init`: the file that it writes, its estimate, its questions and its refusals."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moce_ds.cli.workflow.image_sample import ImageSample
from moce_ds.cli.workflow.pipeline import PipelineSettings, check_batches, check_folders, stages_of
from moce_ds.common.config.settings import load
from tests.examples.images import crop, save
from tests.examples.moce_command import Said, refused, run_here

Init = Callable[..., Said]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs whose shorter side is 40 pixels, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(120):
        save(crop(number % 40), folder / f"{number % 3}/{number:03d}.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def init(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Init:
    """`moce init --images photos` in an empty folder, which contains a task, for a device that is not measured."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        save(crop(0), tmp_path / f"birds/{split}/a/0.jpg")
    return lambda *words: run_here("init", "--images", photos, "--device", "a100", *words)


def test_the_file_is_a_pipeline_that_can_run(init: Init, photos: Path) -> None:
    said = init("--gpus", "0", "--task", "birds=birds")
    assert said.status == 0, said.err
    assert f"{photos}: 120 images, shorter sides of 40 pixels (median)" in said.out
    assert said.out.endswith("pipeline.yaml: written. Next:\n  moce pipeline pipeline.yaml\n")
    assert "120 images are few: about 15 for each of 8 clusters" in said.err
    pipeline = load(PipelineSettings, Path("pipeline.yaml"))
    stages = stages_of(pipeline)
    check_folders(pipeline, stages)
    check_batches(stages, pipeline.processes)
    names = ["shards", "mae", "features", "clusters", "moce", "dense", "export", "evaluation"]
    assert [stage.name for stage in stages] == names
    assert pipeline.tasks == {"birds": Path("birds")} and pipeline.out == Path("runs/pipeline")
    configs = {stage.name: stage.config for stage in stages}
    assert configs["moce"].vit_shape == configs["mae"].vit_shape == configs["dense"].vit_shape
    assert (configs["mae"].data.image_size, configs["mae"].vit_shape.patch_size) == (40, 4)


def test_every_value_has_its_reason_and_every_line_fits(init: Init) -> None:
    assert init("--gpus", "8", "--nodes", "2", "--out", "big.yaml").status == 0
    lines = Path("big.yaml").read_text().splitlines()
    assert max(map(len, lines)) <= 100
    plain = [line.strip() for line in lines if not line.endswith(":") and "#" not in line]
    assert [line.split(":")[0] for line in plain] == [
        "cpus_per_task", "cpus_per_task", "decoder_depth", "decoder_heads", "picture_every", "tolerance",
    ], "only what continues the line above it"  # fmt: skip


def test_the_estimate_has_the_runs_and_their_disk(init: Init) -> None:
    out = init("--gpus", "8", "--nodes", "2", "--size", "vit_base").out
    assert "Prediction for 2 x 8 GPUs (a100)" in out and "moce launch slurm cluster.yaml pipeline pipeline.yaml" in out
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if line.startswith("│")}
    assert list(rows) == ["shards", "mae", "features", "moce", "dense", "sum"]
    disk = {name: float(cells[-1].split()[0]) for name, cells in rows.items()}
    assert disk["mae"] == pytest.approx(2 * 111.7e6 * 12 / 1e9, rel=0.01), "two checkpoints of a ViT-B MAE with AdamW"
    assert disk["moce"] > disk["mae"] == disk["dense"]


def test_memory_decides_the_parts_of_a_batch(init: Init) -> None:
    Path("small.yaml").write_text("{bf16: 1e14, fp32: 1e13, memory: 16e9, bandwidth: 1e12, inside: 1e11, across: 1e10}")
    assert init("--gpus", "1", "--size", "vit_large", "--out", "one.yaml").status == 0
    assert init("--gpus", "1", "--size", "vit_large", "--out", "two.yaml", "--device", "small.yaml").status == 0
    one, two = (load(PipelineSettings, Path(name)).settings["mae"] for name in ("one.yaml", "two.yaml"))
    assert two["optim.accumulation"] > one.get("optim.accumulation", 1)


def test_an_existing_file_is_kept_unless_asked(init: Init, photos: Path) -> None:
    Path("pipeline.yaml").write_text("mine")
    told = refused("init", "--images", photos, "--device", "a100", "--gpus", "0")
    assert "--out: pipeline.yaml exists already" in told and "--replace" in told
    assert Path("pipeline.yaml").read_text() == "mine"
    assert init("--gpus", "0", "--replace").status == 0 and "settings:" in Path("pipeline.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--images: not given, and this is no terminal to ask on. Give --images FOLDER; --gpus,"),
        (["--images", "none"], "none is not a folder"),
        (["--images", "birds/train", "--gpus", "0", "--device", "a100"], "has 1 images; expected at least 100"),
        (["--images", "empty"], "--images: empty: no files; expected what `moce shards` reads"),
        (["--images", "x", "--task", "birds"], "--task: got 'birds'; expected NAME=FOLDER"),
    ],
)
def test_refusals(init: Init, words: list[str], told: str) -> None:
    Path("empty").mkdir()
    assert told in " ".join(refused("init", *words).split())
    assert not Path("pipeline.yaml").exists()


def test_a_missing_task_is_refused_before_anything_is_written(init: Init, photos: Path) -> None:
    told = refused("init", "--images", photos, "--gpus", "0", "--device", "a100", "--task", "cats=cats")
    assert "tasks.cats: cats/train not found" in told and not Path("pipeline.yaml").exists()


def test_a_shard_set_is_used_as_it_is(init: Init, tiny_shards: Path) -> None:
    sample = ImageSample.of(tiny_shards)
    assert (sample.images.count, sample.shards, sample.images.seconds) == (60, tiny_shards, None)
    assert 16 <= sample.images.side < 64


def test_a_sample_of_many_files_tells_their_number(tmp_path: Path, photos: Path) -> None:
    folder = tmp_path / "many"
    for number in range(600):
        path = folder / f"{number:04d}.{'txt' if number % 3 == 0 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        os.link(photos / ("notes.txt" if number % 3 == 0 else "0/000.jpg"), path)
    sample = ImageSample.of(folder)
    assert sample.images.count == pytest.approx(400, rel=0.1) and len(sample.examined) < 256


def test_it_asks_on_a_terminal_and_shows_the_defaults(tmp_path: Path, photos: Path) -> None:
    """In a process of its own, whose standard input and error are a terminal."""
    master, terminal = pty.openpty()
    os.write(master, f"{photos}\n0\n\nvit_small\n\n\n".encode())
    command = [sys.executable, "-m", "moce_ds", "init", "--device", "a100"]
    streams = {"stdin": terminal, "stderr": terminal, "stdout": subprocess.PIPE}
    done = subprocess.run(command, cwd=tmp_path, timeout=300, text=True, **streams)  # type: ignore[call-overload]
    os.close(terminal)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert done.returncode == 0, shown
    for question in ("Folder of images:", r"GPUs of each node, 0 for CPUs \[\d+\]:", r"Nodes \[1\]:",
                     r"Size of the encoder \(.*\) \[vit_tiny\]:", r"File to write \[pipeline.yaml\]:"):  # fmt: skip
        assert re.search(question, shown), shown
    text = (tmp_path / "pipeline.yaml").read_text()
    assert "vit: vit_small_patch16_224" in text and "as given by --size" in text
