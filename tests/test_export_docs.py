"""docs/export.md: its commands and its Python run as printed, one after the other."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.examples.moce_command import run_here
from tests.test_docs import ROOT, shell_commands

PAGE = ROOT / "docs" / "export.md"


@pytest.fixture
def workplace(
    tiny_moce_run: Callable[..., Path], tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder as the page assumes it: `runs/moce` and `task/train`."""
    folder = tmp_path / "here"
    for name, target in (("runs/moce", tiny_moce_run("experts.combine=prob")), ("task/train", tiny_images)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(target)
    monkeypatch.chdir(folder)
    return folder


def test_the_page_runs(workplace: Path) -> None:
    commands = shell_commands(PAGE)
    assert len(commands) >= 6
    for command in commands:
        said = run_here(*shlex.split(command)[1:])
        assert said.status == 0, f"{command}\n{said}"
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))
    found: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    assert found["model"].forward_features(found["pixels"]).shape == found["hidden"].shape == (1, 17, 16)
    expected = found["model"].forward_features(found["pixels"]).detach()
    assert (found["hidden"] - expected).abs().max() < 1e-5, "the same expert in both libraries"
    assert (found["pixels"] - found["transform"](found["image"])[None]).abs().max() < 0.05, "the same pixels"
    assert found["features"].shape == (1, 16) and found["reconstructed"].shape == (1, 3, 16, 16)
    assert len(set(found["labels"].tolist())) == 1, "a path and the image at it"
    assert found["feature"].shape == (1, 16)


def test_every_format_is_on_the_page() -> None:
    from moce_ds.exporting.formats.registry import FORMATS

    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    for format in FORMATS:
        assert any(f"`{format.name}`" in row and format.part in row for row in rows), (format.name, format.part)
