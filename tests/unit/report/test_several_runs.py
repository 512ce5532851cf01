"""Pages about several folders, results of reconstruction, and what a run records about its starts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moce_ds import __version__
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.checksums import with_checksum
from moce_ds.common.text import without_home
from moce_ds.evaluation.expert_sheet import ExpertRow, ExpertSheet, SheetAbout
from moce_ds.report.build import build_report, distinct_names
from moce_ds.report.comparison import differing_settings
from moce_ds.report.run_chapter import run_chapter
from tests.examples.moce_command import run_here
from tests.examples.report_page import Page


def test_any_number_of_runs_are_compared(study: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(study, tmp_path / "again"))
    config = other / "mae" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 7"))
    out = tmp_path / "compared.html"
    said = run_here("report", study / "mae", other / "mae", study / "moce", other / "mae", "--out", out)
    assert (said.status, said.out) == (0, f"{out}\n")
    page = Page(out)
    names = ["demo/mae", "again/mae", "demo/moce"]
    assert [heading for heading in page.headings if heading.startswith("Run ")] == [f"Run {name}" for name in names]
    assert ["run.seed", "0", "7", "0"] in page.rows
    (curves,) = (alt for alt in page.plots if alt.startswith("Reconstruction error over"))
    assert all(f"{name} from " in curves for name in names)


def test_results_of_several_folders_name_the_folder(study: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(study, tmp_path / "again"))
    page = Page(build_report(study, other, out=tmp_path / "both.html"))
    assert {row[1] for row in page.rows if len(row) == 8 and row[0] == "digits"} == {
        f"{folder}: {model}" for folder in ("demo", "again") for model in ("dense", "expert")
    }


def test_what_one_page_cannot_be_about(study: Path, tmp_path: Path) -> None:
    said = run_here("report", study / "mae", study / "moce")
    assert said.status == 2 or said.status == 1
    assert "name its file with --out" in said.err and not list(tmp_path.glob("*.html"))
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match="grid is a study, whose page compares its cells"):
        build_report(study, tmp_path / "grid", out=tmp_path / "page.html")


def test_names_are_as_short_as_they_can_be() -> None:
    paths = [Path("/a/x/mae"), Path("/a/y/mae"), Path("/b/y/mae")]
    assert distinct_names(paths[:1]) == ["mae"]
    assert distinct_names(paths[:2]) == ["x/mae", "y/mae"]
    assert distinct_names(paths) == ["a/x/mae", "a/y/mae", "b/y/mae"]


def test_settings_that_differ() -> None:
    runs = [{"run": {"seed": 0, "out": "a"}, "optim": {"epochs": 5}}, {"run": {"seed": 1, "out": "b"}}]
    assert differing_settings(runs) == {"run.seed": ["0", "1"], "optim.epochs": ["5", "–"]}


def test_many_runs_share_the_images(made: Path) -> None:
    chapter = run_chapter(RunFolder.open(made / "moce"), "moce", sharing=100)
    cards = {section.title: len(section.cards) for section in chapter.sections if section.cards}
    assert cards == {"Images by cluster": 4, "Images by expert, block 3": 2, "Images by expert, block 5": 2}


def test_a_page_says_how_its_runs_were_started(study: Path) -> None:
    words = ["moce", "pretrain", "/home/ann/exp/a b.yaml", "run.out=/Users/ann/runs/x"]
    first = {"host": "node7", "pid": 1, "job": None, "started": "2026-11-30T09:08:07+0000"}
    second = {**first, "version": "0.1.0", "command": words, "processes": 4, "device": "NVIDIA H200", "job": "815"}
    (study / "mae" / "attempts").mkdir()
    for number, record in enumerate((first, second), 1):
        path = study / "mae" / "attempts" / f"{number:04d}.json"
        path.write_text(json.dumps(with_checksum(record)))
    page = Page(build_report(study / "mae"))
    command = "moce pretrain &#39;~/exp/a b.yaml&#39; run.out=~/runs/x"
    assert ["2", "2026-11-30 09:08:07+0000", "0.1.0", "node7, job 815", "4 on NVIDIA H200", command] in page.rows
    assert ["1", "2026-11-30 09:08:07+0000", "–", "node7", "–", "–"] in page.rows
    assert f"by moce_ds {__version__}</small>" in page.text and "/ann" not in page.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/x", "~/x"),
        ("a=[/root/x,/home/b]", "a=[~/x,~]"),
        ("/cluster/home/ann/x", "~/x"),
        ("/data/homes/ann", "/data/homes/ann"),
        ("/rooted/x", "/rooted/x"),
        ("'/home/ann'", "'~'"),
    ],
)
def test_home_folders_are_not_named(text: str, shown: str) -> None:
    assert without_home(text) == shown


def test_psnr_of_every_task_and_system(study: Path) -> None:
    records = json.loads((study / "results.json").read_text())
    for task, dense in (("digits", 0.5), ("textile", None), ("plain", 0.0)):
        found = {"selected": 0.25, "own": 0.45, "dense": dense, "n_images": 60, "route": [1, 3]}
        records.append({"verb": "evaluate", "task": task, "model": "moce", **found})
    (study / "results.json").write_text(json.dumps(records))
    page = Page(build_report(study))
    assert ["digits", "moce", "0.5000", "<b>0.2500</b>", "0.4500", "+3.01", "+0.46", "60"] in page.rows
    assert ["textile", "moce", "–", "<b>0.2500</b>", "0.4500", "–", "–", "60"] in page.rows
    (told,) = (alt for alt in page.plots if alt.startswith("PSNR relative to the dense MAE"))
    assert "digits, selected route: +3.01; digits, own routes: +0.46." in told and "textile" not in told


def sheet(task: str = "digits") -> ExpertSheet:
    rows = [ExpertRow(2, 40, 16, [5, 9], [0.25, 0.5]), ExpertRow(3, 20, 16, [7], [0.75, 0.5])]
    picture = np.random.default_rng(0).integers(0, 256, (3 * 32, 4 * 32, 3)).astype(np.uint8)
    return ExpertSheet(SheetAbout(task, "moce", 5, 32, 60, rows), picture)


def test_experts_are_shown_beside_the_others(study: Path) -> None:
    sheet().write(study / "pictures" / "digits.png")
    Image.new("RGB", (4, 4)).save(study / "pictures" / "holiday.png")
    page = Page(build_report(study))
    assert "Experts on held-out images" in page.headings
    assert ["expert 2", "16", "<b>0.2500</b>", "0.5000"] in page.rows
    alts = [image["alt"] for image in page.images if "reconstructed by experts" in image["alt"]]
    assert alts == [
        "2 images of expert 2, reconstructed by experts 2, 3",
        "1 images of expert 3, reconstructed by experts 2, 3",
    ]


def test_a_sheet_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "digits.png"
    sheet().write(path)
    found = ExpertSheet.read(path)
    assert found is not None and found.about == sheet().about
    np.testing.assert_array_equal(found.picture, sheet().picture)
    assert [len(strip) for strip in found.strips()] == [64, 32]
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(b'"side": 32', b'"side": 33'), b"PNG"):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=str(path)):
            ExpertSheet.read(path)
