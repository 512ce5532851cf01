"""docs/api.md: its Python runs as printed. docs/notebooks/: every cell runs, and no output is committed."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import moce_ds
from tests.examples.moce_command import TINY
from tests.test_docs import ROOT

PAGE = ROOT / "docs" / "api.md"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_of(page: Path) -> str:
    """All ```python blocks of a page."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def test_the_page_runs(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task").mkdir()
    for name in ("images", "task/train", "task/test"):
        (tmp_path / name).symlink_to(tiny_images)
    (tmp_path / "mae.yaml").write_text(f"base: {TINY}\nmodel: {{depth: 2}}\n")
    found: dict[str, Any] = {}
    exec(compile(code_of(PAGE), str(PAGE), "exec"), found)
    run, frame = found["run"], found["frame"]
    assert run.complete and run.step == run.steps == len(found["records"]) == len(frame)
    assert frame.loss.tolist() == found["losses"].tolist() and frame.index.tolist() == found["steps"].tolist()
    assert "layers.1.load.3" in frame.columns
    assert found["table"].shape == (6, 2) and found["ids"].shape == (60,)
    assert found["pictures"] and run.step in found["drawn"]
    assert found["own"].picture.height == 20 * len(found["pictures"])
    assert found["own"].loss > 0 and found["other"].loss > 0


def test_the_page_names_every_function() -> None:
    missing = [name for name in moce_ds.__all__ if name.islower() and not re.search(rf"\b{name}\(", PAGE.read_text())]
    assert missing == ["__version__"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_have_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


def executed(name: str, folder: Path, line: str = "", instead: str = "") -> str:
    """Run a notebook in a folder, with another line in place of one; the text of its outputs.

    Raises CellExecutionError if a cell fails.
    """
    text = (ROOT / "docs" / "notebooks" / name).read_text()
    assert line in text
    notebook = nbformat.reads(text.replace(line, instead) if line else text, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text") or str(output.get("data")) for output in outputs)


def test_from_images_to_an_expert(tmp_path: Path) -> None:
    said = executed("from_images_to_an_expert.ipynb", tmp_path, "EPOCHS = 12", "EPOCHS = 1")
    assert re.search(r"dense MAE +0\.\d+\n", said) and re.search(r"expert +0\.\d+\n", said), said
    assert "step 1" in said and "image/png" in said, "progress, and pictures"
    assert "Warning" not in said
    assert moce_ds.open_run(tmp_path / "notebook" / "moce").complete


def test_what_the_experts_have_learnt(artefacts: dict[str, Path], tmp_path: Path) -> None:
    """On a run that other tests share, which has records, pictures and routes."""
    (tmp_path / "notebook").mkdir()
    (tmp_path / "notebook" / "moce").symlink_to(artefacts["moce run"])
    said = executed("what_the_experts_have_learnt.ipynb", tmp_path)
    assert said.count("image/png") >= 4
    assert "VisionTransformer" in said and "on its own route" in said
