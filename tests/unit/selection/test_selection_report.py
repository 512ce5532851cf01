"""`moce select`: what it prints, what it draws, what it exports."""

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from moce_ds.checkpoint.format import find
from moce_ds.data.clusters import load_ids
from moce_ds.data.shards import ShardSet
from moce_ds.models.vit import load_encoder
from moce_ds.selection.selection_report import selection_report, write_picture
from moce_ds.selection.training_images import draw_by_votes
from moce_ds.selection.vote import Selection, Typicality, count_votes
from tests.examples.moce_command import Said, refused, run_here

MoceRun = Callable[..., Path]


def printed(selection: Selection, routes: list[tuple[int, ...]], top: int = 5) -> list[str]:
    console = Console(file=StringIO(), width=100)
    console.print(selection_report(selection, "birds", routes, top))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def cells(lines: list[str]) -> list[list[str]]:
    return [line.replace("│", " ").replace("┃", " ").split() for line in lines]


def test_the_first_routes_are_named_and_the_others_summed() -> None:
    ids_N = np.repeat(np.arange(8), [30, 20, 15, 12, 10, 6, 4, 3])
    table = np.arange(16).reshape(8, 2)
    lines = printed(count_votes(ids_N, table), [tuple(row) for row in table.tolist()], top=3)
    rows = cells(lines)
    assert rows[0] == ["birds:", "votes", "of", "100", "images"]
    first = [row for row in rows[: rows.index(["Images", "in", "8", "of", "8", "clusters"])] if row[-1].endswith("%")]
    assert first == [["0-1", "30.0%"], ["2-3", "20.0%"], ["4-5", "15.0%"], ["5", "others", "35.0%"]]
    assert lines[-1] == "Winner: route 0-1, with 30.0% of the votes."


def test_bars_are_as_long_as_the_shares_and_small_clusters_are_summed() -> None:
    counts = [40, 20, 10, *[3] * 10]
    routes = [(0, 1)] * 2 + [(2, 2)] * 12
    lines = printed(count_votes(np.repeat(np.arange(13), counts), np.array(routes)), routes)
    rows = cells(lines)
    assert ["Images", "in", "13", "of", "14", "clusters"] in rows
    bars = [len(row[-1]) for row in rows if row and set(row[-1]) <= {*"█▉▊▋▌▍▎▏"}]
    assert bars == [40, 20, 10, *[3] * 7]  # of ten clusters
    assert any(row[:3] == ["3", "others", "9.0%"] for row in rows)
    assert max(map(len, lines)) <= 100


def test_what_looks_like_nothing_seen_is_said() -> None:
    selection = Selection((0,), 1.0, [((0,), 1.0)], {0: 1.0}, 9, Typicality(0.9, 0.3, 0.8))
    lines = printed(selection, [(0,)])
    assert "How typical: unlike anything in the pre-training set. 90.0% of the images" in " ".join(lines)
    assert max(map(len, lines)) <= 100


@pytest.fixture
def selected(tiny_moce_run: MoceRun, tiny_images: Path, tmp_path: Path) -> tuple[Said, Path]:
    """Everything at once, on the digits; the folder of what was written."""
    out = tmp_path / "out"
    options = ["--results", out / "results.json", "--picture", out / "digits.png", "--export", out / "expert"]
    return run_here("select", tiny_moce_run(), "--data", tiny_images / "digits", *options, "threads=1"), out


def test_the_verb_prints_records_draws_and_exports(selected: tuple[Said, Path]) -> None:
    said, out = selected
    assert said.status == 0, said
    (record,) = json.loads((out / "results.json").read_text())
    route = "-".join(map(str, record["route"]))
    assert f"Winner: route {route}, with {record['share']:.1%} of the votes." in said.out
    assert "How typical: typical." in " ".join(said.out.split())
    assert record["typicality"]["verdict"] == "typical" and record["typicality"]["low_share"] == 0.0
    assert f"{out / 'digits.png'}: written.\n" in said.out
    assert Image.open(out / "digits.png").format == "PNG"
    provenance = json.loads((out / "expert" / "provenance.json").read_text())
    assert provenance["route"] == record["route"]
    identity = {"model_sha256", "made_from", "content_sha256"}
    assert provenance["votes"] == {key: value for key, value in record.items() if key not in identity}
    assert load_encoder(out / "expert").shape.width == 16 and f"route {route} of step 5 as timm" in said.out


def test_a_picture_replaces_one_of_its_own_alone(selected: tuple[Said, Path], tiny_images: Path) -> None:
    _, out = selected
    words = ("select", out.parent / "run", "--data", tiny_images / "digits", "threads=1", "--picture")
    Image.new("RGB", (8, 8)).save(out / "photograph.png")
    before = (out / "photograph.png").read_bytes()
    assert "photograph.png exists and is not a picture of this program" in refused(*words, out / "photograph.png")
    assert (out / "photograph.png").read_bytes() == before
    assert run_here(*words, out / "digits.png").status == 0


def test_what_cannot_be_exported_is_refused_before_images_are_read(tiny_moce_run: MoceRun, tmp_path: Path) -> None:
    run, images = tiny_moce_run(), tmp_path / "not there"
    assert "exists: export into another folder" in refused("select", run, "--data", images, "--export", tmp_path)
    assert "--format" in refused("select", run, "--data", images, "--export", tmp_path / "out", "--format", "gif")


def picture(run: Path, images: ShardSet, selection: Selection, path: Path) -> tuple[Image.Image, str | None]:
    note = write_picture(path, images, "birds", selection, find(run))
    return Image.open(path), note


def test_the_picture_is_the_same_every_time_and_shows_the_route_that_won(
    tiny_moce_run: MoceRun, tiny_shards: Path, tiny_clusters: Path, tmp_path: Path
) -> None:
    run, shards = tiny_moce_run(), ShardSet.open(tiny_shards)
    table = find(run).routes.expert_ML
    ids_N = load_ids(tiny_clusters, shards.fingerprint, shards.count)
    here, there = count_votes(ids_N[:20], table), count_votes(ids_N[20:40], table)
    assert here.route != there.route, "the test needs two routes"
    (first, note), (again, _), (other, _) = (
        picture(run, shards, selection, tmp_path / f"{number}.png")
        for number, selection in enumerate((here, here, there))
    )
    assert note is None and first.tobytes() == again.tobytes()
    titles, middle = 50, first.width // 2
    left, right = (0, titles, middle, first.height), (middle, titles, first.width, first.height)
    assert first.crop(left).tobytes() == other.crop(left).tobytes()
    assert first.crop(right).tobytes() != other.crop(right).tobytes()


def test_the_training_images_of_a_folder_whose_name_has_a_dollar(
    tiny_moce_run: MoceRun, tiny_shards: Path, tmp_path: Path
) -> None:
    shards = ShardSet.open(shutil.copytree(tiny_shards, tmp_path / "a$b"))
    run = tiny_moce_run(f"data.shards={tmp_path}/a$$b")
    selection = count_votes(np.array([2]), find(run).routes.expert_ML)
    _, note = picture(run, shards, selection, tmp_path / "shown.png")
    assert note is None


def test_training_images_are_drawn_by_the_votes_of_their_clusters() -> None:
    ids_N = np.arange(1000) % 5
    drawn = draw_by_votes(ids_N, {1: 0.9, 3: 0.1}, 30)
    assert len(set(drawn)) == len(drawn) == 30 and drawn == sorted(drawn)
    clusters = ids_N[drawn].tolist()
    assert set(clusters) == {1, 3} and clusters.count(1) > 20
    assert draw_by_votes(np.array([0, 1, 2, 1]), {1: 1.0}, 30) == [1, 3]
    assert draw_by_votes(np.array([0, 1]), {4: 1.0}, 30) == []


def test_without_the_training_images_the_picture_says_why(
    tiny_moce_run: MoceRun, tiny_shards: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(tiny_shards, gone)
    run, shards = tiny_moce_run(f"data.shards={gone}"), ShardSet.open(tiny_shards)
    shutil.rmtree(gone)
    table = find(run).routes.expert_ML
    image, note = picture(run, shards, count_votes(np.array([0]), table), tmp_path / "picture.png")
    assert note is not None and note.startswith(f"No training images to show: {gone}")
    assert image.format == "PNG"
