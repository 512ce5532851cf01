"""Modules that moved: scripts find them under their old names."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from moce_ds.cli.workflow.study_grid import StudySettings
from moce_ds.moved_modules import MOVED

ROOT = Path(__file__).parents[2]


def test_every_new_name_is_a_module_and_no_old_one_is() -> None:
    missing = [new for new in MOVED.values() if importlib.util.find_spec(new) is None]
    assert missing == []
    hidden = [old for old in MOVED if old.startswith("moce_ds.") and (ROOT / f"{old.replace('.', '/')}.py").exists()]
    assert hidden == [], "modules that an old name hides"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("moce_ds.data.coco", "moce_ds.data.sources.coco"),
        ("moce_ds.data.public.mat_files", "moce_ds.data.sources.public.readers"),
        ("moce_ds.analysis.plots", "moce_ds.report.plots"),
        ("moce_ds.analysis.report", "moce_ds.report.build"),
        ("launchers.grid", "moce_ds.cli.workflow.study_grid"),
    ],
)
def test_an_old_name_gives_the_module_itself(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.deprecated_call(match=f"{old} is now {new}"):
        assert importlib.import_module(old) is importlib.import_module(new)


def test_the_former_name_of_a_setting_is_taken_in_python_too() -> None:
    assert StudySettings(out=Path("a"), base=Path("b")).pretrain == Path("b")  # type: ignore[call-arg]
