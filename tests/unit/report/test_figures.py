"""Plots as files, chosen experts in heatmaps, and axes that begin where they should."""

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.common.errors import ArtefactError
from moce_ds.report.build import build_report
from moce_ds.report.page import Cell, Table
from moce_ds.report.plots import heatmap, sorted_sizes
from tests.examples.report_page import Page

SVG = "{http://www.w3.org/2000/svg}"


def table(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_every_plot_is_a_file_with_its_numbers(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    plots = Page(build_report(study, out=tmp_path / "page.html", figures=folder)).plots
    header, *rows = table(folder / "figures.csv")
    assert header == ["figure", "chapter", "title", "description"]
    assert {path.name for path in folder.iterdir()} == {
        f"{row[0]}.{kind}" for row in rows for kind in ("svg", "csv")
    } | {"figures.csv"}
    assert {row[3]: (folder / f"{row[0]}.svg").read_text() for row in rows} == plots
    head, *curve = table(folder / "training-reconstruction-error.csv")
    assert head == ["name", "step", "mean", "least", "largest"]
    steps_P, means_P, *_ = RunFolder.open(study / "mae").series("reconstruction")
    of_mae = [row for row in curve if row[0] == "mae"]
    assert [float(row[1]) for row in of_mae] == steps_P.tolist()
    assert [float(row[2]) for row in of_mae] == means_P.tolist()
    routing = RunFolder.open(study / "moce").routing
    assert routing is not None
    head, *gates = table(folder / "run-moce-gate-of-block-3.csv")
    assert head == ["row", *(f"expert {e}" for e in range(4)), "chosen"]
    assert [int(row[-1]) for row in gates] == routing.expert_ML[routing.order(), 0].tolist()


def test_a_folder_of_figures_is_replaced_and_any_other_kept(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    build_report(study, figures=folder)
    build_report(study / "mae", figures=folder)
    assert not list(folder.glob("run-moce-*"))
    (folder / "thesis.tex").write_text("mine")
    page = (study / "report.html").read_bytes()
    with pytest.raises(ArtefactError, match=r"figures holds thesis\.tex, which is not a figure of this program"):
        build_report(study, figures=folder)
    assert (folder / "thesis.tex").read_text() == "mine" and (study / "report.html").read_bytes() == page


@pytest.mark.parametrize(("rows", "frames"), [(5, 5), (100, 0)])
def test_chosen_experts_are_marked(rows: int, frames: int) -> None:
    random = np.random.default_rng(0)
    share_GE, chosen_G = random.random((rows, 3)), random.integers(0, 3, rows)
    picture = heatmap(share_GE, [str(row) for row in range(rows)], "Gate", chosen_G)
    counts = np.bincount(chosen_G, minlength=3)
    assert picture.alt.endswith("Chosen are " + ", ".join(f"expert {e} in {n}" for e, n in enumerate(counts)) + ".")
    assert picture.plot and picture.plot.svg.decode().lower().count("stroke: #d55e00") == frames
    assert len(picture.plot.svg) < 200_000
    plain = heatmap(share_GE, [str(row) for row in range(rows)], "Gate")
    assert plain.plot and plain.plot.svg != picture.plot.svg and "Chosen" not in plain.alt


def test_a_choice_against_the_probabilities_is_explained(study: Path) -> None:
    """As with `balance=sinkhorn`."""
    text = (study / "moce" / "routing.json").read_text()
    routing = RunFolder.open(study / "moce").routing
    assert routing is not None
    assert "not the most probable" not in Page(build_report(study / "moce")).text
    changed = routing.expert_ML.copy()
    changed[:6, 1] = (changed[:6, 1] + 1) % 4
    before, after = str(routing.expert_ML.tolist()), str(changed.tolist())
    (study / "moce" / "routing.json").write_text(text.replace(before, after))
    page = Page(build_report(study / "moce")).text
    assert page.count("It is not the most probable one for 6 of 16 clusters") == 1


@pytest.mark.parametrize("clusters", [1, 2, 16, 64, 1000])
def test_clusters_are_counted_from_one(clusters: int) -> None:
    plot = sorted_sizes(np.arange(1, clusters + 1)).plot
    assert plot and plot.numbers.rows[0] == [1, clusters] and len(plot.numbers.rows) == clusters
    drawn = ElementTree.fromstring(plot.svg)
    ticks = [tick for tick in drawn.iter(f"{SVG}g") if re.fullmatch(r"xtick_\d+", tick.get("id", ""))]
    labels = [text.text for tick in ticks for text in tick.iter(f"{SVG}text")]
    assert labels[0] == "1" and labels[-1] == str(clusters) and len(labels) == len(set(labels))


def test_tables_that_scroll_say_so() -> None:
    def width(*texts: str) -> str:
        return Table(["task", *texts], [[Cell("digits"), *map(Cell, texts)]], "").width

    assert [width("top-1"), width(*["top-1 accuracy"] * 4), width(*["top-1 accuracy"] * 12)] == ["", "broad", "wide"]
