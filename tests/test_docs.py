"""The commands of the README run as printed, one after the other; links in the documentation lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import chdir
from pathlib import Path

import pytest

from moce_ds.common.storage.files import read_json
from moce_ds.data.sources.demo_images import write_demo_images
from tests.examples.moce_command import Said, run_here

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_commands(document: Path) -> list[str]:
    """Lines of the ```sh blocks; one that ends with a backslash continues in the next."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README assumes it: `images/`, `task/train`, `task/test`, and the project's configs."""
    folder = tmp_path_factory.mktemp("readme")
    write_demo_images(folder / "demo")
    few = {"images": ("pretrain", 12), "task/train": ("tasks/digits/train", 6), "task/test": ("tasks/digits/test", 3)}
    for target, (source, count) in few.items():
        for image_class in sorted(p for p in (folder / "demo" / source).rglob("*") if p.is_dir()):
            for image in sorted(p for p in image_class.iterdir() if p.is_file())[:count]:
                place = folder / target / image.relative_to(folder / "demo" / source)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(image.read_bytes())
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


FEW_STEPS = {
    "init": ["--device", "a100"],  # which need not be measured
    "pipeline": ["settings.mae.optim.epochs=1", "settings.moce.optim.epochs=1", "settings.mae.model.depth=2"],
    "pretrain": ["optim.epochs=2"],
    "cluster": ["num_clusters=8"],  # fewer than there are images
}
"""Words that make a command short: what is tested is the command."""


def run_documented(document: Path, workplace: Path) -> list[str]:
    """Run the `moce` commands of a document's ```sh blocks in turn; returns their output. Training gets processes of
    its own."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    outputs = []
    for command in (command for command in shell_commands(document) if command.startswith("moce ")):
        words = shlex.split(command)
        words += [word for verb, more in FEW_STEPS.items() if verb in words and "--list" not in words for word in more]
        if words[1] not in ("pretrain", "launch", "pipeline"):
            with chdir(workplace):
                said = run_here(*words[1:])
        else:
            done = subprocess.run(words, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300)
            said = Said(done.returncode, done.stdout, done.stderr)
        assert said.status == 0, f"{command}\n{said.out}\n{said.err}"
        outputs.append(said.out)
    return outputs


def test_commands_of_the_readme_run(workplace: Path) -> None:
    assert len(run_documented(ROOT / "README.md", workplace)) >= 3
    out = workplace / "runs/pipeline"
    records = read_json(out / "results.json", "results", "moce knn")
    compared = {(record["verb"], record["model"]) for record in records if record["verb"] != "select"}
    accuracies = {(verb, model) for verb in ("knn", "probe") for model in ("dense", "expert")}
    assert compared == accuracies | {("evaluate", "moce")}
    assert (out / "experts/birds/model.safetensors").exists()
    assert "</html>" in (out / "report.html").read_text()


def test_the_stages_of_the_pipeline_run_one_by_one(workplace: Path) -> None:
    assert len(run_documented(ROOT / "docs/pipeline.md", workplace)) >= 14
    records = read_json(workplace / "runs/results.json", "results", "moce knn")
    assert {record["verb"] for record in records} == {"knn", "probe"}
    assert all(0 <= record["top1"] <= 1 for record in records)
    assert (workplace / "expert/model.safetensors").exists()
    assert "</html>" in (workplace / "runs/report.html").read_text()


def test_the_readme_installs_extras_that_there_are_and_no_editable_copy() -> None:
    text = (ROOT / "README.md").read_text()
    extras = re.findall(r'"\.\[(\w+)\]"', text)
    assert extras == ["cpu", "cu13", "cu12"]
    assert set(extras) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    # A clone called as the package would hide an editable copy of it from a Python that is started beside the clone.
    assert "git clone <this repository> moce-ds && cd moce-ds" in text and "pip install -e" not in text


def test_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in shell_commands(ROOT / "README.md"):
        if command.startswith("make "):
            assert command.split()[1] in targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_dependency_is_justified() -> None:
    justified = (ROOT / "docs/dependencies.md").read_text()
    required = re.findall(r"^([A-Za-z0-9-]+)[<>=]", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert required
    missing = [name for name in required if f"| {name}" not in justified]
    assert not missing
