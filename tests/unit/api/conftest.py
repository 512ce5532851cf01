"""A run with experts, opened as a caller of the API opens it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import moce_ds
from moce_ds.checkpoint.format import find


@pytest.fixture
def moce_run(tiny_moce_run: Callable[..., Path]) -> moce_ds.Run:
    """`tiny_moce_run` with its settings, which make the folder a run."""
    path = tiny_moce_run()
    (path / "config.yaml").write_text(yaml.safe_dump(find(path).entry("config")))
    return moce_ds.open_run(path)
