"""What each expert reconstructs: their own images as the run does, and a file that the report shows.

Axes: N images, E experts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moce_ds.data.shards import ShardSet
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.evaluation.expert_pictures import expert_sheet
from moce_ds.evaluation.expert_sheet import ExpertSheet
from moce_ds.evaluation.reconstruction import HeldOut, RoutedImages, evaluate_run
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.selection.vote import count_votes, label_images, recorded_routes
from tests.examples.moce_command import run_here

CPU = torch.device("cpu")


def test_own_experts_reconstruct_as_the_run_does(tiny_moce_run: Callable[..., Path], tiny_shards: Path) -> None:
    checkpoint, clusters = run_clusters(tiny_moce_run("experts.perturbation=0.5"))
    images, config = ShardSet.open(tiny_shards), EncodeSettings(batch_size=16, threads=1)
    clusters_N, _ = label_images(checkpoint, clusters, images, config, CPU)
    expert_ML = recorded_routes(checkpoint)
    task = RoutedImages(images, clusters_N, count_votes(clusters_N, expert_ML).route)
    held_out = HeldOut.of(checkpoint, images, config, CPU)
    about = expert_sheet(checkpoint, clusters, task, held_out, ("mine", "moce"), measured=images.count).about
    own_N = expert_ML[clusters_N, -1]
    assert [row.expert for row in about.rows] == sorted(set(own_N.tolist())) and len(about.rows) > 1
    assert [row.n_images for row in about.rows] == [int((own_N == row.expert).sum()) for row in about.rows]
    assert all(set(own_N[row.shown]) == {row.expert} for row in about.rows)
    own = sum(row.error[place] * row.n_images for place, row in enumerate(about.rows)) / images.count
    assert own == pytest.approx(evaluate_run(checkpoint, clusters, task, None, config, CPU).own, rel=1e-5)
    errors_EE = np.array([row.error for row in about.rows])
    assert (np.ptp(errors_EE, axis=1) > 1e-4).all(), "other experts reconstruct the same images otherwise"


def test_the_verb_writes_a_sheet(tiny_moce_run: Callable[..., Path], tiny_shards: Path, tmp_path: Path) -> None:
    run, picture = tiny_moce_run(), tmp_path / "pictures" / "mine.png"
    words = ("evaluate", run, "--data", tiny_shards, "--task", "mine", "--picture", picture, "threads=1")
    said = run_here(*words)
    assert said.status == 0 and said.out.startswith(f"{picture}: written.\n"), said
    sheet = ExpertSheet.read(picture)
    assert sheet is not None and (sheet.about.task, sheet.about.model) == ("mine", run.name)
    shown = [image for row in sheet.about.rows for image in row.shown]
    assert len(sheet.picture) == len(shown) * sheet.about.side
    assert sheet.about.side == 16 + 2  # the model's images with a margin
    cells = [sheet.picture[:18, 18 * column : 18 * (column + 1)] for column in range(sheet.about.columns)]
    seen = (cells[1] == cells[0]).all(axis=2)
    assert 0.2 < seen.mean() < 0.6, "of 3/4 hidden patches the model sees none"
    assert all((cell[seen] == cells[0][seen]).all() and (cell != cells[0]).any() for cell in cells[1:])
    picture.write_bytes(b"my own")
    said = run_here(*words)
    assert said.status != 0 and "mine.png exists and is not a picture of this program" in said.err


def test_several_experts_of_an_image_cannot_be_exchanged(
    tiny_moce_run: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    said = run_here("evaluate", tiny_moce_run("experts.k=2"), "--data", tiny_shards, "--picture", tmp_path / "a.png")
    assert said.status != 0 and "this run has experts.k=2" in said.err and said.out == ""
