"""A small study, whole and as a copy."""

import shutil
from pathlib import Path

import pytest

from tests.examples.study_folder import make_study


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that no test changes."""
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    """A copy of the study, to be spoilt; its shard set is the common one."""
    return Path(shutil.copytree(made, tmp_path / "demo"))
