"""What models do on a fake GPU: each process of `scenario.py` trains several, and its results serve many tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.device.guard_library import guard_library, why_not

ROOT = Path(__file__).parents[2]

PHASES = ("", "prepare", "forward", "backward", "step")
"""Of a training step: those of engine and router (`fake_training.py`), and the rest."""

_EXPERTS = "model.arch=moce experts.clusters=none"
_PROCESSES = [  # a process can have one size of expert-parallel groups
    {
        "mae": "model.arch=mae",
        "moce": f"{_EXPERTS} experts.ep_size=1",
        "moce_accumulated": f"{_EXPERTS} experts.ep_size=1 optim.accumulation=2",
        "sdr": "model.arch=sdr experts.clusters=none run.init_from=none",
    },
    {"moce_ep8": f"{_EXPERTS} experts.ep_size=8", "token_moe": "model.arch=token_moe experts.ep_size=8"},
]


@pytest.fixture(scope="session")
def fake_gpu(request: pytest.FixtureRequest) -> Path:
    """`cuda_guard.cpp`, compiled."""
    if reason := why_not():
        pytest.skip(reason)
    return guard_library(request.config.cache.mkdir("fake_gpu"))


@dataclass(frozen=True)
class Found:
    """What was seen on the fake GPU.

    Attributes:
        models: of training steps of each model, as `fake_training.train` returns it.
        programs: of each program of `examples.py`.
    """

    models: dict[str, dict[str, Any]] = field(repr=False)
    programs: dict[str, dict[str, Any]] = field(repr=False)

    def step(self, model: str, kind: str, phases: Iterable[str] = PHASES, name: str = "ordinary") -> list[Any]:
        """All `waits`, `copies`, `collectives` or `low_sums` of a step of a model: "ordinary", "recorded", "saved" or
        "after_save"."""
        of_phases = self.models[model]["steps"][name]
        return [one for phase in phases for one in of_phases.get(phase, {}).get(kind, [])]


@pytest.fixture(scope="session")
def found(fake_gpu: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The programs of `scenario.py` and `examples.py`, each run once."""
    models: dict[str, Any] = {}
    for runs in _PROCESSES:
        words = {name: settings.split() for name, settings in runs.items()}
        command = [sys.executable, "-m", "tests.device.scenario", str(fake_gpu), str(tmp_path_factory.mktemp("runs"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, json.dumps(words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout.splitlines()[-1])
        models |= seen["runs"]
    return Found(models, seen["examples"])
