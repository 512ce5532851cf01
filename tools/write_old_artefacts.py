"""Write the archive of tests/test_old_artefacts.py with the program of an older commit.

    git worktree add --detach ../older 878e397
    python -m tools.write_old_artefacts ../older tests/fixtures/old/878e397.tar.xz /srv/old

`moce` itself writes everything, in a few minutes: a pipeline (shards, dense run, features, clusters, run with experts,
exported expert, results), runs of the token and of the path gate, a tuning run and a study. Paths in the records are
relative to the folder that the archive is unpacked into. Each pre-training run has two checkpoints, so that a test can
remove the last one and resume.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import click
import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from moce_ds.common.host.program import run_command, say

STEPS = 3
MODEL = {
    "vit": "vit_tiny_patch16_224", "patch_size": 4, "width": 8, "depth": 2, "heads": 2,
    "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
PRETRAIN = {
    "model": MODEL,
    "data": {"shards": "pipeline/shards", "image_size": 16, "threads": 1},
    "optim": {"epochs": STEPS * 8 / 24, "batch_size": 8, "base_lr": 2e-3, "warmup_epochs": 0.2},
    "engine": {"precision": "fp32"},
    "run": {"log_every": 1, "checkpoint_every": 2, "picture_every": 1000},
}
PIPELINE = {
    "out": "pipeline",
    "images": "images",
    "mae": "pretrain.yaml",
    "moce": "pretrain.yaml",
    "tasks": {"digits": "task"},
    "processes": 1,
    "words": {
        "clusters": ["num_clusters=4", "fit_images_per_cluster=null"],
        "moce": ["model.arch=moce", "experts.num=2", "experts.layers=[1]"],
    },
}
EXPERTS = ("model.arch=moce", "experts.num=2", "experts.layers=[1]")
SPLITS = ("--train", "pipeline/tasks/digits/train", "--test", "pipeline/tasks/digits/test")
COMMANDS: dict[str, tuple[str, ...]] = {
    "pipeline": ("pipeline", "pipeline.yaml"),
    "token run": ("pretrain", "pretrain.yaml", "run.out=token", *EXPERTS, "experts.gate=token"),
    "path run": (
        "pretrain", "pretrain.yaml", "run.out=path", "model.arch=moce", "experts.gate=path", "experts.num=2",
        "experts.stages=2", "experts.clusters=pipeline/clusters", "run.init_from=pipeline/mae",
    ),
    "tuning run": (
        "finetune", "pipeline/experts/digits", *SPLITS, "--val", "0.25", "--out", "tuning", "optim.epochs=3",
        "optim.batch_size=8", "optim.warmup_epochs=1", "optim.ema=0.5", "data.workers=0", "run.checkpoint_every=2",
        "run.log_every=1", "engine.precision=fp32",
    ),
    "study": (
        "study", "out=study", "base=pretrain.yaml", "grid.run.seed=[0]", "tasks.digits=pipeline/tasks/digits",
    ),
    "mmseg export": ("export", "pipeline/mae", "mmseg", "--format", "mmseg"),
}  # fmt: skip
LEFT_OUT = ("tensorboard", "launches", "log.txt", "__pycache__")
"""Mirrors and logs, which nothing reads."""


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.argument("checkout", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(checkout: Path, out: Path, folder: Path) -> None:
    """Write one of each artefact with the program in CHECKOUT into FOLDER, which must not exist, and that folder into
    the archive OUT (.tar.xz). The shard sets record FOLDER as their source."""
    folder.mkdir(parents=True)
    _write_inputs(folder)
    with tempfile.TemporaryDirectory() as hook:
        (Path(hook) / "sitecustomize.py").write_text("import socket\n\nsocket.gethostname = lambda: 'example'\n")
        path = os.pathsep.join([hook, str(checkout.absolute())])
        for what, words in COMMANDS.items():
            say(f"{what}: moce {' '.join(words)}")
            environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-m", "moce_ds", *words], cwd=folder, env=environment, check=True)
    (folder / "pipeline/report.html").write_text("<!DOCTYPE html>\n")  # its pictures would be half of the archive
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:xz", preset=9) as archive:
        archive.add(folder, ".", filter=_member)
    say(f"{out}: {out.stat().st_size / 1024:.0f} KiB")


def _write_inputs(folder: Path) -> None:
    """Images of handwritten digits by class, a task of two splits, and the settings."""
    digits = load_digits(n_class=3)
    parts = {"images": range(24), "task/train": range(24, 48), "task/test": range(48, 60)}
    for part, numbers in parts.items():
        for number in numbers:
            path = folder / part / str(digits.target[number]) / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).resize((16, 16)).save(path)
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(PRETRAIN, sort_keys=False))
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))


def _member(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """A member of the archive that says nothing of the machine, or None."""
    name = member.name.rpartition("/")[2]
    if name in LEFT_OUT or name.endswith(".lock"):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    member.mode = 0o755 if member.isdir() else 0o644
    return member


if __name__ == "__main__":
    run_command(main, "python -m tools.write_old_artefacts")
