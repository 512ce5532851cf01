"""`moce init`: the file that it writes, its estimate, its questions and its refusals."""

import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.workflow.image_sample import ImageSample
from moce_ds.cli.workflow.init import Gpu, Request, check_gpus, write_pipeline
from moce_ds.cli.workflow.pipeline import PipelineSettings, check_batches, check_folders, stages_of
from moce_ds.cli.workflow.pipeline_plan import check_here
from moce_ds.cli.workflow.recipe import Hardware
from moce_ds.cli.workflow.submit import queued_stages
from moce_ds.common.config.settings import load
from moce_ds.common.errors import ConfigError
from moce_ds.forecast.devices import DEVICES, device_of_gpu
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
    monkeypatch.delenv("MOCE_DEVICE", raising=False)
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
    assert pipeline.reconstruction and stages[-1].outputs and any("--picture" in line for line in stages[-1].commands)
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


def rows_of(out: str) -> dict[str, list[str]]:
    """The cells of the table of the estimate, by stage."""
    return {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if line.startswith("│")}


def test_the_estimate_has_the_runs_and_their_disk(init: Init) -> None:
    out = init("--gpus", "8", "--nodes", "2", "--size", "vit_base").out
    assert "Prediction for 2 x 8 GPUs (a100)" in out and "moce launch slurm cluster.yaml pipeline pipeline.yaml" in out
    rows = rows_of(out)
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


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA RTX A1000", "h100 assumed"),
        ("NVIDIA GH200 480GB", "h100 assumed"),
    ],
)
def test_a_gpu_is_known_by_a_whole_word_of_its_name_and_has_its_own_memory(gpu: str, name: str) -> None:
    told, device = device_of_gpu(gpu, 40e9)
    known = DEVICES[name.split()[0]]
    assert (told, device.memory, device.bf16) == (name, 40e9, known.bf16)
    assert device_of_gpu(gpu, None) == (name, known)


def test_the_memory_of_this_machine_s_gpu_decides(init: Init, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample, parts = ImageSample.of(photos), {}
    for gpu in (None, Gpu("NVIDIA RTX A1000", 16e9)):
        out = Path("known.yaml" if gpu else "none.yaml")
        write_pipeline(Request(photos, sample, Hardware(1, 1, 8), "vit_large", {}, out, None, gpu))
        assert "Prediction for 1 GPU (h100 assumed)" in capsys.readouterr().out
        parts[gpu] = load(PipelineSettings, out).settings["mae"].get("optim.accumulation", 1)
    unknown, known = parts.values()
    assert known > unknown


def test_no_gpus_on_a_machine_that_has_some_is_refused_unless_the_file_is_for_others() -> None:
    for device in (None, "this"):
        with pytest.raises(
            ConfigError, match=r"has 8 GPUs.*`MOCE_DEVICE=cpu moce init.*`MOCE_DEVICE=cpu moce pipeline"
        ):
            check_gpus(0, 8, device)
    check_gpus(0, 8, "a100")
    check_gpus(0, 0, None)
    check_gpus(2, 8, None)


def test_hidden_gpus_are_hidden_from_the_next_command(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the next line makes it
    monkeypatch.setenv("MOCE_DEVICE", "cpu")
    assert init("--gpus", "0").out.endswith("Next:\n  MOCE_DEVICE=cpu moce pipeline pipeline.yaml\n")


def test_the_next_command_is_quoted(init: Init) -> None:
    last = init("--gpus", "0", "--out", "my birds.yaml").out.splitlines()[-1]
    assert shlex.split(last) == ["moce", "pipeline", "my birds.yaml"] and Path("my birds.yaml").exists()


@pytest.mark.parametrize(("gpus", "cpus"), [(0, None), (8, 12), (6, 12)])
def test_the_printed_commands_for_slurm_queue_the_pipeline(init: Init, gpus: int, cpus: int | None) -> None:
    *_, new, launch = init("--gpus", gpus, "--nodes", "2", "--task", "birds=birds").out.splitlines()
    _, *words = shlex.split(new, comments=True)
    assert run_here(*words).status == 0
    assert shlex.split(launch) == ["moce", "launch", "slurm", "cluster.yaml", "pipeline", "pipeline.yaml"]
    profile, pipeline = load(SlurmProfile, Path("cluster.yaml")), load(PipelineSettings, Path("pipeline.yaml"))
    assert (profile.nodes, profile.gpus_per_node) == (2, gpus) and profile.processes_per_node == pipeline.processes
    threads = pipeline.settings["mae"]["data.threads"]
    assert profile.cpus_per_task == (cpus or threads) >= threads
    groups = queued_stages(stages_of(pipeline), profile)
    assert all(group.usable_nodes == [2] for group in groups if group.stages[0].name in ("mae", "moce", "dense"))


def test_the_estimate_can_be_printed_again(init: Init) -> None:
    first = rows_of(init("--gpus", "0").out)
    again = run_here("pipeline", "pipeline.yaml", "--plan", "a100")
    assert rows_of(again.out) == first, "of the images themselves, whose examination takes about no hours"


def test_this_machine_is_measured_for_a_plan(init: Init) -> None:
    assert init("--gpus", "0").status == 0
    small = ["processes=1", "words.mae=[optim.batch_size=4]", "words.moce=[experts.ep_size=1]"]
    this, other = (run_here("pipeline", "pipeline.yaml", *small, "--plan", name) for name in ("this", "a100"))
    assert this.out.startswith("Prediction for 1 process of this machine"), this
    costs = [{name: (row[0], row[-1]) for name, row in rows_of(said.out).items()} for said in (this, other)]
    assert costs[0] == costs[1] and costs[0]["moce"][0].strip(), "steps and disk"
    assert "process-hours" in this.out and "GPU-hours" in other.out


def test_what_a_plan_cannot_be_for(init: Init) -> None:
    assert init("--gpus", "0").status == 0
    assert refused("pipeline", "pipeline.yaml", "--plan", "v100").startswith("--plan: got 'v100'; expected h100, ")
    with pytest.raises(ConfigError, match=r"--nodes: got 2; --plan this is one machine"):
        check_here(2, 1, 0)
    with pytest.raises(ConfigError, match=r"--plan: got this; the pipeline has processes=8, and this machine 1 GPU:"):
        check_here(1, 8, 1)
    check_here(1, 8, 0)


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
