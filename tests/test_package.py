"""What is installed: one package with the files that its verbs need; and what a person starts from the clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_tasks_and_demo_are_found_in_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """In a process that imports the package from the unpacked wheel, in a folder that holds nothing else."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    code = """
from moce_ds.common.config.command_line import read_settings
from moce_ds.cli.workflow.demo import CONFIGS, pipeline_words
from moce_ds.cli.workflow.pipeline import PipelineSettings, stages_of
from moce_ds.cli.workflow.transfer_tasks import known_tasks
from pathlib import Path
pipeline = read_settings(PipelineSettings, pipeline_words(Path("o"), short=True))
print(CONFIGS.parent, len(known_tasks()), len(stages_of(pipeline)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == [f"{tmp_path}/site/moce_ds/cli/workflow/configs", "13", "7"], done.stderr


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
