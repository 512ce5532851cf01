"""What is installed: one package with the files that its verbs need; and what a person starts from the clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moce_ds import __version__
from moce_ds.cli.workflow.demo import CONFIGS, pipeline_words
from moce_ds.cli.workflow.pipeline import PipelineSettings, stages_of
from moce_ds.cli.workflow.transfer_tasks import TASK_FILES, read_task
from moce_ds.common.config.command_line import read_settings

ROOT = Path(__file__).parent.parent
DATA = ("*.yaml", "*.html")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built in a copy without looking for packages."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "moce_ds", "launchers", "tools"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", out, copy], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


def test_only_moce_ds_is_installed_with_all_of_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"moce_ds"}
    data = {str(path.relative_to(ROOT)) for pattern in DATA for path in (ROOT / "moce_ds").rglob(pattern)}
    assert len(data) > 15 and data <= set(names)
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "moce_ds").rglob("*.py")} <= set(names)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The wheel in a new environment, which finds the dependencies of this one, but not its editable installation: a
    .pth file names their folders, and the .pth files in these do not count.

    Call it with a command of the environment: it runs in one folder outside of the repository and returns what it
    prints on standard output.
    """
    root = tmp_path_factory.mktemp("installed")
    run = subprocess.run
    run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True, timeout=300)
    python = root / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, wheel], check=True, timeout=300)
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True)
    folders = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    Path(site.stdout.strip(), "dependencies.pth").write_text("\n".join([*folders, ""]))
    (root / "work").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def command(name: str, *words: object) -> str:
        line = [str(root / "venv/bin" / name), *map(str, words)]
        done = run(line, cwd=root / "work", env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return command


def test_the_installed_command_knows_its_versions_and_finds_no_fault(installed: Callable[..., str]) -> None:
    lines = installed("moce", "--version").splitlines()
    assert lines[0] == f"moce_ds {__version__}" and len(lines) == 6
    document = json.loads(installed("moce", "doctor", "--json"))
    assert document["faults"] == 0 and document["versions"] == lines
    names = [one["name"] for one in document["checks"]]
    assert len(names) == len(set(names)) and {"Python", "disk", "GPUs", "DALI", "gloo", "NCCL", "SLURM"} < set(names)
    assert all(bool(one["cure"]) == (one["status"] != "ok") for one in document["checks"])
    (gloo,) = (one for one in document["checks"] if one["name"] == "gloo")
    assert gloo["text"] == "2 processes started, met and summed a number"


def test_the_installed_package_has_demo_and_tasks(installed: Callable[..., str]) -> None:
    code = """
from moce_ds.common.config.command_line import read_settings
from moce_ds.cli.workflow.demo import CONFIGS, pipeline_words
from moce_ds.cli.workflow.pipeline import PipelineSettings, stages_of
from moce_ds.cli.workflow.transfer_tasks import known_tasks
from pathlib import Path
pipeline = read_settings(PipelineSettings, pipeline_words(Path("o"), short=True))
print(CONFIGS, len(known_tasks()), len(stages_of(pipeline)))
"""
    configs, *counts = installed("python", "-c", code).split()
    assert "/venv/lib/" in configs and not configs.startswith(str(ROOT)) and counts == ["13", "7"]


def test_the_installed_command_runs_the_first_stages_of_the_demo(
    installed: Callable[..., str], tiny_images: Path, tmp_path: Path
) -> None:
    """With the demo's own settings, on few images, up to a report; what the later stages need is imported above."""
    configs = installed("python", "-c", "from moce_ds.cli.workflow.demo import CONFIGS; print(CONFIGS)").strip()
    shards, run = tmp_path / "shards", tmp_path / "mae"
    installed("moce", "shards", tiny_images, shards, "workers=1")
    shortest = ("optim.epochs=1", "optim.batch_size=60", "model.depth=1", "model.decoder_depth=1", "data.threads=1")
    installed("moce", "pretrain", f"{configs}/mae.yaml", f"data.shards={shards}", f"run.out={run}", *shortest)
    page = Path(installed("moce", "report", run).strip()).read_text()
    assert page.startswith("<!doctype html>") and "<style" in page and "picture_every" in page
    starter = tmp_path / "moce.yaml"
    installed("moce", "config", "new", "pretrain", starter, "model.arch=moce")
    assert "experts:" in starter.read_text()


def test_the_demo_has_its_settings_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = stages_of(read_settings(PipelineSettings, pipeline_words(Path("out"), short=False)))
    assert [stage.name for stage in stages] == ["shards", "mae", "features", "clusters", "moce", "export", "evaluation"]
    pretrain = {stage.name: stage.commands[0][1] for stage in stages if stage.name in ("mae", "moce")}
    assert pretrain == {name: str(CONFIGS / f"{name}.yaml") for name in ("mae", "moce")}


def test_a_task_is_found_by_its_name_from_any_folder_and_a_path_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "runs/demo/tasks/digits" / split).mkdir(parents=True)
    task = read_task("digits", None, None)
    assert task.config.finetune.words[0] == "optim.epochs=10" and task.train == Path("runs/demo/tasks/digits/train")
    (tmp_path / "digits.yaml").write_text(f"base: {TASK_FILES}/digits.yaml\nfinetune: {{words: []}}\n")
    assert read_task("digits.yaml", None, None).config.finetune.words == []


@pytest.mark.parametrize(
    ("launcher", "usage"), [("local", "moce launch local"), ("slurm", "moce launch slurm"), ("study", "moce study")]
)
def test_launchers_start_their_verbs(launcher: str, usage: str, tmp_path: Path) -> None:
    """As a person starts them: from the clone, whose package they use."""
    command = [sys.executable, f"launchers/{launcher}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: {usage}"), done.stderr
