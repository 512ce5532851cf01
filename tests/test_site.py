"""The documentation site builds without a warning, has every page, verb and setting, and needs no network."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moce_ds import __version__
from moce_ds.cli.main import moce
from moce_ds.common.config.settings import keys
from moce_ds.common.config.yaml_text import read_yaml_text
from moce_ds.training.settings import PretrainSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; --strict turns a link or an anchor that leads nowhere into an error."""
    pytest.importorskip("material", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_and_every_verb_is_there(site: Path) -> None:
    start = (site / "index.html").read_text()
    pages = [
        *(path.stem for path in (ROOT / "docs").glob("*.md")),
        *(f"reference/commands/{verb}" for verb in moce.commands),
    ]
    for page in pages:
        assert (site / f"{page}.html").is_file() and f'href="{page}.html"' in start, page
    described = html.unescape((site / "reference/commands/pretrain.html").read_text())
    assert all(f"<code>{key}=" in described for key, _ in keys(PretrainSettings))
    assert "load_expert" in (site / "reference/python.html").read_text()


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    loaded = re.compile(r"""(?:<(?:script|img|iframe)[^>]*\ssrc|<link[^>]*\shref)=["']?(?:https?:)?//""")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"""(url\(|@import )["']?(https?:)?//""", style.read_text()), style


def test_the_citation_is_of_this_version() -> None:
    citation = read_yaml_text(ROOT / "CITATION.cff")
    assert str(citation["version"]) == __version__ and "Cluster-conditional" in citation["preferred-citation"]["title"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs(shell: str) -> None:
    page = (ROOT / "docs/shell-completion.md").read_text()
    assert f"_MOCE_COMPLETE={shell}_source moce" in page
    words = {"COMP_WORDS": "moce pretr", "COMP_CWORD": "pretr" if shell == "fish" else "1"}
    environment = os.environ | words | {"_MOCE_COMPLETE": f"{shell}_complete"}
    command = [str(Path(sys.executable).parent / "moce")]
    assert "pretrain" in subprocess.run(command, env=environment, capture_output=True, text=True).stdout
