"""The report of a small real study: what it says, what it needs, and that a telephone can show it."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from PIL import Image

from moce_ds.checkpoint.records import RoutingTable
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.metrics_series import Reduced
from moce_ds.data.shards import ShardSet
from moce_ds.report import run_chapter
from moce_ds.report.build import build_report, read_runs
from moce_ds.report.plots import Line, curves
from tests.examples.moce_command import run_here
from tests.examples.report_page import Page

SECTIONS = (
    "Results",
    "Accuracy",
    "Selected routes",
    "Training",
    "Runs side by side",
    "Run mae",
    "Run moce",
    "Experts in training",
    "Clusters",
    "Routing of clusters",
    "Routing of domains",
    "Routing of classes",
    "Images by cluster",
    "Images by expert, block 3",
    "Images by expert, block 5",
    "Reconstructions",
    "Settings",
)


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    assert build_report(made) == made / "report.html"
    return Page(made / "report.html")


def test_page_holds_every_section(page: Page) -> None:
    assert set(page.headings) == set(SECTIONS)
    assert page.headings.count("Reconstructions") == 2
    assert page.headings[:4] == ["Results", "Accuracy", "Selected routes", "Training"]
    assert page.headings[4:7] == ["Runs side by side", "Run mae", "Reconstructions"]
    assert {link.removeprefix("#") for link in page.links} == set(page.ids)


def test_page_needs_nothing_else(page: Page) -> None:
    assert not page.elements & {"script", "link", "iframe", "object", "embed"}
    assert all(image["src"].startswith("data:image/") for image in page.images)
    assert all(image["alt"] for image in page.images)
    without_data = re.sub(r"data:[^\"]+", "", page.text)
    assert not re.search(r"https?://|url\(|@import", without_data)
    assert len(page.text) < 1.5e6


def test_every_picture_can_be_drawn(page: Page) -> None:
    kinds = {"image/svg+xml": 0, "image/jpeg": 0}
    for image in page.images:
        kind, encoded = re.fullmatch(r"data:([^;]+);base64,(.+)", image["src"]).groups()  # type: ignore[union-attr]
        kinds[kind] += 1
        content = base64.b64decode(encoded)
        if kind == "image/jpeg":
            size = Image.open(io.BytesIO(content)).size
            enlarged = int(image["width"]) / size[0]
            assert enlarged >= 1
            assert enlarged * size[1] == int(image["height"])
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")
    assert [(i["width"], i["height"]) for i in page.images if "Reconstructions" in i["alt"]] == [("288", "576")] * 2
    # 3 of training; imbalance, balance, confidence, 2 loads; sizes; gates, domains, classes in 2 blocks each
    assert kinds["image/svg+xml"] == 3 + 5 + 1 + 6
    assert kinds["image/jpeg"] > 100


def test_result_table(page: Page) -> None:
    rows = page.rows
    assert ["digits", "dense", "91.2%", "90.8%", "94.8%", "94.6%", "2,000", "1,000"] in rows
    assert ["textile", "expert", "86.8%", "86.4%", "<b>91.7%</b>", "<b>91.5%</b>", "800", "400"] in rows
    assert ["digits", "<b>1-3</b>", "0-3 7%", "3 (41%), 7 (32%), 11 (20%)", "93%", "2,000"] in rows


def test_gallery_shows_the_clusters_own_images(page: Page, made: Path) -> None:
    shards = ShardSet.open(made.parent / "shards")
    ids_N = np.load(made / "moce" / "clusters" / "ids.npy")
    cards = re.findall(r"<h4>Cluster (\d+)</h4><span>(\d+) images.*?</span>(.*?)</div>\s*</div>", page.text, re.S)
    assert len(cards) == 16
    for cluster, size, strip in cards:
        members = np.flatnonzero(ids_N == int(cluster))
        assert int(size) == len(members)
        shown = [int(image_id) for image_id in re.findall(r'alt="image (\d+)', strip)]
        assert len(shown) == min(8, len(members))
        assert set(shown) <= set(members.tolist())
    encoded = re.search(r'src="data:image/jpeg;base64,([^"]+)" alt="image (\d+), ([^"]+)"', page.text)
    assert encoded
    thumbnail = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))), float)
    original = np.asarray(shards.decode(int(encoded[2])), float)
    assert thumbnail.shape == original.shape == (32, 32, 3)
    assert abs(thumbnail - original).mean() < 8
    assert shards.classes[shards.labels[int(encoded[2])]] == encoded[3]


def test_agreement_with_domains_is_stated(page: Page) -> None:
    assert re.search(r"mostly of that domain: china \d+\.\d%, digits 100\.0%, flower \d+\.\d%", page.text)


def test_one_run_alone(study: Path, tmp_path: Path) -> None:
    dense = Page(build_report(study / "mae", out=tmp_path / "out" / "dense.html"))
    assert dense.headings == ["Training", "Run mae", "Reconstructions", "Settings"]
    shutil.rmtree(study / "mae" / "reconstructions")
    (study / "mae" / "metrics.jsonl").unlink()
    assert Page(build_report(study / "mae")).headings == ["Run mae", "Settings"]


def test_a_page_replaces_one_of_its_own_alone(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    for _ in range(2):
        build_report(study, out=out)
    out.write_text("<html>my thesis</html>")
    with pytest.raises(ArtefactError, match=f"{out} exists and is not a report of this program"):
        build_report(study, out=out)


def test_report_outlives_its_shard_set(study: Path) -> None:
    config = study / "moce" / "config.yaml"
    config.write_text(re.sub(r"shards: .*", "shards: gone/shards", config.read_text()))
    page = Page(build_report(study / "moce"))
    assert "Images are not shown: " in page.text
    assert "gone/shards" in page.text
    assert {"Clusters", "Routing of clusters"} <= set(page.headings)
    assert not any(heading.startswith("Images by") for heading in page.headings)


def test_names_are_escaped(study: Path) -> None:
    (study / "mae").rename(study / "a<b>&c")
    page = Page(build_report(study / "a<b>&c"))
    assert "Run a<b>&c" in page.headings
    assert "<b>&c" not in page.text


def test_results_of_several_labels_an_image(study: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(study, tmp_path / "study")
    records = json.loads((folder / "results.json").read_text())
    voc = {"verb": "probe", "task": "voc", "model": "dense", "map11": 0.4321, "n_train": 8, "n_test": 2, "settings": {}}
    (folder / "results.json").write_text(json.dumps([*records, voc]))
    page = build_report(folder).read_text()
    assert "probe mAP" in page and "43.2%" in page and "k-NN mAP" not in page


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtefactError, match="is not a run folder"):
        build_report(tmp_path)
    with pytest.raises(ArtefactError, match="is not a run folder"):
        build_report(tmp_path / "missing")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "results.json",
            '[{"verb": "knn", "task": "digits"}]',
            r"record 0, is damaged \(model: is missing; top1: ",
        ),
        ("results.json", '{"digits": 1}', "expected a list"),
        ("results.json", "[{", "damaged"),
        ("mae/config.yaml", "model: [", "not valid YAML"),
        ("mae/config.yaml", "", "holds no settings"),
        ("moce/routing.json", '{"step": 3}', "expected tables of `moce pretrain`"),
        (
            "moce/routing.json",
            '{"step": 3, "layers": [1], "expert_ML": [[0]], "probs_LME": [[[1, 0]]], "cluster_share_M": [0.5, 0.5]}',
            r"expert_ML is \(1, 1\) and probs_LME \(1, 1, 2\) for 1 layers and 2 clusters",
        ),
        ("moce/clusters/clusters.json", "{}", "clusters"),
    ],
)
def test_damaged_files_are_named(study: Path, file: str, content: str, message: str) -> None:
    (study / file).write_text(content, encoding="utf-8")
    with pytest.raises((ArtefactError, ConfigError), match=message) as raised:
        build_report(study)
    assert str(study / Path(file).parent) in str(raised.value)
    assert not (study / "report.html.tmp").exists()


def test_runs_are_dense_first_and_counted_naturally(study: Path) -> None:
    for name, like in (("moce-10", "moce"), ("moce-9", "moce"), ("z-dense", "mae")):
        shutil.copytree(study / like, study / name)
    assert [run.name for run in read_runs(study).runs] == ["mae", "z-dense", "moce", "moce-9", "moce-10"]


def test_values_that_are_not_finite_are_left_out(study: Path) -> None:
    with open(study / "mae" / "metrics.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"step": 401, "reconstruction": NaN, "data_wait": 0.5}\n')
    run = read_runs(study).runs[0]
    assert run.series("reconstruction")[0][-1] == 400
    assert run.series("data_wait")[0][-1] == 401
    build_report(study / "mae")


@pytest.mark.filterwarnings("error")
def test_a_run_with_one_record(study: Path) -> None:
    for run in ("mae", "moce"):
        first, *_ = (study / run / "metrics.jsonl").read_text().splitlines()
        (study / run / "metrics.jsonl").write_text(first + "\n")
    shown = Page(build_report(study))
    pictures = {image["alt"].partition(" over")[0]: image["src"] for image in shown.images if "svg" in image["src"]}
    drawn = base64.b64decode(pictures["Expert load, block 3"].partition(",")[2]).decode()
    areas = re.findall(r'<g id="FillBetweenPolyCollection_\d+">\s*<defs>\s*<path id="\w+" d="([^"]*)"', drawn)
    assert len(areas) > 1
    for area in areas:
        across = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", area)]
        assert max(across) - min(across) > 50, "a band without width cannot be seen"


def test_an_unfinished_run_says_so(study: Path) -> None:
    config = study / "moce" / "config.yaml"
    images, done = RunFolder.open(study / "moce").clusters.sizes_M.sum(), 180  # type: ignore[union-attr]
    for missing, told in ((0, "step 180 of 180, "), (2, "step 180 of 182, unfinished, ")):
        settings = yaml.safe_load(config.read_text())
        settings["optim"] = {"batch_size": 16, "epochs": (16 * (done + missing) - 8) / int(images)}
        config.write_text(yaml.safe_dump(settings))
        build_report(study)
        assert f"moce: MoCE, {told}4 experts" in (study / "report.html").read_text()
        (row,) = [line for line in run_here("inspect", study / "moce").out.splitlines() if " steps " in line]
        assert ("unfinished" in row) == bool(missing) and f"180 of {180 + missing}" in row


def test_long_runs_are_thinned() -> None:
    steps_S = np.arange(200_000, dtype=float)
    values_S = 1 / (1 + steps_S)
    line = Line("long", Reduced(steps_S, values_S, values_S, values_S))
    picture = curves([line], "Long", "error", "log")
    assert len(picture.uri) < 40_000
    assert "long from 1 to 5e-06" in picture.alt


@st.composite
def routings(draw: st.DrawFn) -> RoutingTable:
    layers, m, experts = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    raw_LME = draw(nps.arrays(float, (layers, m, experts), elements=st.floats(0.01, 1)))
    probs_LME = raw_LME / raw_LME.sum(axis=2, keepdims=True)
    return RoutingTable(0, tuple(range(layers)), probs_LME.argmax(axis=2).T, probs_LME, np.full(m, 1 / m))


@given(table=routings())
def test_order_keeps_equal_routes_together(table: RoutingTable) -> None:
    order = table.order()
    assert sorted(order) == list(range(len(table.cluster_share_M)))
    in_order = [table.routes[cluster] for cluster in order]
    assert in_order == sorted(in_order)
    np.testing.assert_allclose(table.confidence_ML, table.probs_LME.max(axis=2).T)


@given(table=routings(), limit=st.integers(1, 12), seed=st.integers(0, 9))
def test_chosen_clusters_cover_the_routes(table: RoutingTable, limit: int, seed: int) -> None:
    sizes_M = np.random.default_rng(seed).integers(1, 50, len(table.routes))
    chosen = run_chapter.choose_clusters(sizes_M, table.routes, limit)
    assert len(chosen) == len(set(chosen)) == min(limit, len(sizes_M))
    if limit >= len(set(table.routes)):
        largest = {max(sizes_M[c] for c in range(len(sizes_M)) if table.routes[c] == r) for r in set(table.routes)}
        assert largest <= {sizes_M[cluster] for cluster in chosen}


def test_images_are_counted_by_group_and_expert() -> None:
    domains, domain_N = run_chapter.group_images(["b/x", "a", "b/y"], np.array([0, 1, 2, -1, 2]))
    assert domains == ["a", "b"]
    assert domain_N.tolist() == [1, 0, 1, -1, 1]
    table_GE = run_chapter.count_by_group(domain_N, np.array([0, 2, 0, 0, 1]), 2, 3)
    assert table_GE.tolist() == [[0, 0, 1], [2, 1, 0]]
    assert run_chapter.row_order(run_chapter.row_shares(table_GE)) == [1, 0]


def test_no_horizontal_scrolling_on_a_telephone(page: Page, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs a browser: neither chromium nor google-chrome is installed")
    # A window is never narrower than 500 pixels, so the page is put in a frame, which is measured from outside.
    measure = "const seen = contentWindow; title = seen.innerWidth + ' ' + seen.document.documentElement.scrollWidth"
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe width="400" height="800" style="border:0" onload="{measure}" srcdoc="{html.escape(page.text)}">',
        encoding="utf-8",
    )
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    switches += f"disable-component-update disable-sync hide-scrollbars dump-dom user-data-dir={tmp_path / 'profile'}"
    command = [browser, *(f"--{switch}" for switch in switches.split()), frame.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    measured = re.search(r'title="(\d+) (\d+)"', dumped)
    assert measured, dumped[-300:]
    assert (measured[1], measured[2]) == ("400", "400")
