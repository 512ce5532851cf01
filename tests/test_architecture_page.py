"""docs/architecture.md is true: its picture is LAYERS, its owners are the artefacts, its main path is the code's."""

import importlib
import re
from pathlib import Path

from tests.test_architecture import LAYERS
from tools.house_rules import step_chain
from tools.source_tree import modules, product, read_tree

ROOT = Path(__file__).parent.parent
NAME = r"^│ ([\w/]+?)(/?) +│"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_the_picture_is_the_table_of_the_import_rules() -> None:
    cells = re.split(r"^[┌├└].*$", PAGE, flags=re.MULTILINE)[1:-1]
    drawn = [{name.replace("/", ".") for name, _ in re.findall(NAME, cell, flags=re.MULTILINE)} for cell in cells]
    assert drawn == [parts - {"__version__"} for parts in reversed(LAYERS)]


def test_the_picture_fits_a_terminal_and_names_folders_as_such() -> None:
    lines = [line for line in PAGE.splitlines() if line[:1] in ("│", "┌", "├", "└")]
    assert len(lines) > 20 and max(map(len, lines)) <= 100
    for name, slash in re.findall(NAME, PAGE, flags=re.MULTILINE):
        path = ROOT / "moce_ds" / name
        assert path.is_dir() if slash else path.with_suffix(".py").is_file(), name


def test_the_owners_are_those_that_inspection_asks() -> None:
    from moce_ds.inspection.inspection import KINDS

    rows = re.findall(r"^\| [\w ]+ \| `([\w/]+)\.py`: `(\w+)` \|", PAGE, flags=re.MULTILINE)
    owners = {getattr(importlib.import_module(f"moce_ds.{path.replace('/', '.')}"), name) for path, name in rows}
    assert owners == set(KINDS)


def test_the_main_path_is_the_way_to_a_training_step() -> None:
    chain = step_chain(product(modules(read_tree())))
    rows = re.findall(r"^\| `([\w/]+)\.py`: `([\w.]+)` \|", PAGE, flags=re.MULTILINE)
    assert [f"moce_ds.{path.replace('/', '.')}:{name}" for path, name in rows] == chain


def test_files_and_names_of_the_page_are_there() -> None:
    files = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", PAGE))
    missing = [name for name in files if not any((ROOT / folder / name).is_file() for folder in ("", "moce_ds"))]
    assert files and not missing
    code = "\n".join(product(modules(read_tree())).values())
    for name in re.findall(r"`([A-Z]\w+)`", PAGE):
        assert re.search(rf"\b{name}\b", code) or name in ("LAYERS", "DOORS", "BARRED"), name
