"""Files, modules, names in modules and settings that README.md, CHANGELOG.md and docs/ mention exist."""

import pkgutil
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import moce_ds
from moce_ds.cli.config_verbs import KINDS
from moce_ds.common.config.settings import keys
from moce_ds.moved_modules import new_name
from tests.test_docs import DOCUMENTS, ROOT

PAGES = [*DOCUMENTS, ROOT / "CHANGELOG.md"]
PACKAGE = ROOT / "moce_ds"
PARTS = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
FOLDERS = ("configs", "docs", "launchers", "moce_ds", "tests", "tools")
KEYS = {key for kind in KINDS.values() for key, _ in keys(kind.load())}
GROUPS = {key.split(".")[0] for key in KEYS if "." in key}
FILE = re.compile(r".*\.(data|html|json|jsonl|md|npy|onnx|pth|py|safetensors|svg|yaml)")
FORMER = re.compile(r"\(was\s+`[^`]+`\)")
FENCED = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)


def in_backticks(text: str) -> list[str]:
    """What stands in backticks outside of blocks of code, without the former names of what has moved."""
    return re.findall(r"`([^`\n]+)`", FORMER.sub("", FENCED.sub("", text)))


def stale(text: str) -> Iterator[str]:
    """Paths, modules, names in modules and settings of this repository that do not exist."""
    for word in (word for span in in_backticks(text) for word in span.split()):
        first, slash, _ = word.partition("/")
        ours = first in FOLDERS or (first in PARTS and word.endswith(("/", ".py")))
        if slash and ours and not any((root / word).exists() for root in (ROOT, PACKAGE)):
            yield word
        dotted = re.fullmatch(r"(\w+)((?:\.[A-Za-z]\w*)+)(=.*)?", word)
        if dotted is None or FILE.fullmatch(word):
            continue
        name = dotted[1] + dotted[2]
        if name not in KEYS and (dotted[1] in GROUPS or dotted[1] in PARTS) and not resolves(f"moce_ds.{name}"):
            yield word
    for name in re.findall(r"\bmoce_ds(?:\.[A-Za-z]\w*)+", FORMER.sub("", text)):
        if not resolves(name):
            yield name
    for name in re.findall(r"python -m ((?:moce_ds|tools)[\w.]*)", text):
        if find_spec(name) is None:
            yield name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one, and not the former name of a module."""
    if name.removeprefix("moce_ds.") in moce_ds.__all__:
        return True
    if new_name(name):
        return False
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert list(stale(page.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "`training/loop.py`",
        "`tests/unit/test_none.py`",
        "`configs/none.yaml`",
        "`python tests/none.py FOLDER`",
        "`moce_ds.training.none`",
        "`moce_ds.data.shards.NoSet`",
        "`forecast.step_cost.image_flops`",
        "`moce_ds.training.loop`",
        "`optim.epoch=3`",
        "`python -m tools.none`",
    ],
)
def test_a_stale_name_is_found(text: str) -> None:
    assert list(stale(text))


def test_other_names_are_left_alone() -> None:
    assert not list(stale("`data.threads`, `export.json`, `data/images`, `runs/demo`, `torch.optim`"))
    assert not list(stale("`training/trainer.py`, `optim.clip=0`, `model.onnx.data`, `moce_ds.load_expert`"))
    assert not list(stale("`moce_ds.report` (was `moce_ds.analysis`)"))
