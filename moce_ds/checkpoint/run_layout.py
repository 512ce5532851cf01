"""The names in a run folder; `run_folder.py` says what each is, and reads them."""

from pathlib import Path

CONFIG = "config.yaml"
ROUTING = "routing.json"
CLUSTERS, TEACHER = "clusters", "teacher"
ATTEMPTS = "attempts"
RECONSTRUCTIONS = "reconstructions"
RESULT, TUNED = "result.json", "tuned"
LAUNCHES = "launches"
"""What launchers leave beside a run."""


def picture_path(run: Path, step: int) -> Path:
    """Where the reconstructions of a step are."""
    return run / RECONSTRUCTIONS / f"step-{step:08d}.png"
