"""A study on paper, its records, and the numbers of its report; running one is tested in tests/distributed."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moce_ds.cli.launch.slurm_profile import SlurmProfile
from moce_ds.cli.workflow.stage import StageRecord
from moce_ds.cli.workflow.study import cell_stage, measures, run_study, study_workflow
from moce_ds.cli.workflow.study_grid import Cell, StudySettings, cells_of, check_places, check_settings
from moce_ds.cli.workflow.submit import queued_stages
from moce_ds.common.config.settings import load, to_yaml
from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.files import write_json
from moce_ds.common.storage.locks import held, is_held
from moce_ds.forecast.step_cost import Work
from moce_ds.inspection.study_folder import CellRecord, StudyFolder, StudyRecord, series
from moce_ds.report.build import build_report
from moce_ds.report.study_chapter import scalings
from moce_ds.training.settings import PretrainSettings
from tests.examples.moce_command import TINY, refused, run_here

Make = Callable[..., StudySettings]


@pytest.fixture
def make(tmp_path: Path, tiny_shards: Path, tiny_clusters: Path) -> Make:
    """The settings of a study of tiny runs with experts, from a YAML file; call it with what the file says besides."""

    def made(*words: str, **given: Any) -> StudySettings:
        path = tmp_path / "study.yaml"
        fixed = [f"data.shards={tiny_shards}", "model.arch=moce", f"experts.clusters={tiny_clusters}"]
        tree = {"out": str(tmp_path / "study"), "pretrain": str(TINY), "set": fixed} | given
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return load(StudySettings, path, words)

    return made


def names(study: StudySettings) -> list[str]:
    return [cell.name for cell in cells_of(study)]


def test_points_are_crossed_with_the_grid_in_order(make: Make) -> None:
    together = [{"experts.num": 1}, {"experts.num": 4, "experts.ep_size": 2, "processes": 2}]
    study = make(cells=together, grid={"run.seed": [0, 1]}, processes=1)
    cells = cells_of(study)
    assert names(study) == [
        "num=1,seed=0", "num=1,seed=1", "num=4,ep_size=2,processes=2,seed=0", "num=4,ep_size=2,processes=2,seed=1",
    ]  # fmt: skip
    assert [cell.world_size for cell in cells] == [1, 1, 2, 2]
    config = cells[3].config()
    assert (config.experts.num, config.experts.ep_size, config.run.seed) == (4, 2, 1)
    assert config.run.out == study.out / "cells" / cells[3].name / "run"
    check_settings(cells)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ({}, ["only"]),
        ({"experts.layers": [[1, 3], None]}, ["layers=1-3", "layers=null"]),
        ({"experts.clusters": ["runs/a b", "c"]}, ["clusters=runs-a-b", "clusters=c"]),
        ({"model.width": [32], "model.decoder_width": [32]}, ["width=32,decoder_width=32"]),
        ({"a.width": [1], "b.width": [2]}, ["a.width=1,b.width=2"]),
        ({"optim.base_lr": [1e-4], "data.flip": [True]}, ["base_lr=0.0001,flip=true"]),
    ],
)
def test_names_are_short_and_fit_for_files(make: Make, grid: dict[str, Any], expected: list[str]) -> None:
    assert names(make(grid=grid)) == expected


def test_words_replace_what_the_file_says(make: Make) -> None:
    study = make("grid.run.seed=[7]", "processes=2", grid={"run.seed": [0, 1], "experts.num": [2]})
    assert names(study) == ["seed=7,num=2"] and cells_of(study)[0].processes == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"grid": {"run.seed": [0, 0]}}, r"several cells called seed=0"),
        ({"cells": [{"experts.clusters": "a/b"}, {"experts.clusters": "a b"}]}, "several cells called clusters=a-b"),
        ({"grid": {"run.out": ["here"]}}, "run.out: cell out=here cannot choose it"),
        ({"grid": {"processes": [0]}}, "processes: got 0 in cell processes=0; expected a number from 1 on"),
        ({"grid": {"nodes": ["two"]}}, "nodes: got 'two'"),
        ({"grid": {"run.seed": []}}, "grid.run.seed: .*expected at least 1 of them, not 0"),
        ({"task": {}}, "task: no such setting. Did you mean tasks"),
    ],
)
def test_studies_that_are_refused(make: Make, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cells_of(make(**given))


def test_faults_of_all_cells_are_listed_and_nothing_is_run(make: Make) -> None:
    cells = cells_of(make(grid={"experts.num": [2, 3], "experts.ep_size": [2, 3], "model.heads": [2, 5]}, processes=2))
    with pytest.raises(ConfigError) as refusal:
        check_settings(cells)
    text = str(refusal.value)
    assert text.startswith("Nothing was run. num=2,ep_size=2,heads=5 and 3 more cells:")
    assert text.count("model.width: 32 is not a multiple of model.heads 5") == 1, "a fault of four cells, said once"
    assert "num=2,ep_size=3,heads=2:" in text and "experts.num: 2 is not a multiple of experts.ep_size 3" in text
    assert "experts.ep_size: got 3; it must divide the number of processes, 2" in text


def test_what_is_missing_is_told_before_anything_is_run(make: Make, tmp_path: Path) -> None:
    def missing(**given: Any) -> str:
        study = make(**given)
        with pytest.raises(ConfigError) as refusal:
            check_places(study, cells_of(study))
        return str(refusal.value)

    assert f"tasks.digits: {tmp_path}/none/train not found" in missing(tasks={"digits": f"{tmp_path}/none"})
    assert "heldout: none not found" in missing(heldout="none")
    assert "num=2:\n  data.shards: none not found" in missing(set=["data.shards=none"], grid={"experts.num": [2]})
    assert not (tmp_path / "study").exists()


def test_cells_of_several_machines_are_not_run_on_one(make: Make) -> None:
    with pytest.raises(ConfigError, match="takes 2 machines"):
        run_study(make(nodes=2))


def begun(study: StudySettings, cell: Cell) -> StageRecord:
    """The record of a cell whose run has left its settings."""
    cell.run.mkdir(parents=True)
    (cell.run / "config.yaml").write_text(to_yaml(cell.config()))
    record = StageRecord({"evaluations": study.evaluations})
    write_record(study, cell, record)
    return record


def write_record(study: StudySettings, cell: Cell, record: StageRecord) -> None:
    cell_stage(study, cell).records.write(record)


def is_done(study: StudySettings, cell: Cell) -> bool:
    return cell_stage(study, cell).is_done()


def test_a_changed_study_is_refused_where_it_has_begun(make: Make) -> None:
    study = make(grid={"experts.num": [2]})
    begun(study, cells_of(study)[0])
    check_places(study, cells_of(study))
    other = make(set=[*study.set, "run.log_every=2", "optim.epochs=3"], grid={"experts.num": [2, 4]})
    with pytest.raises(ConfigError, match=r"num=2:\n.*may not change.*:\n +optim.epochs: 2.0 -> 3.0\n"):
        check_places(other, cells_of(other))
    faster = make(grid={"experts.num": [2]}, processes=2)
    with pytest.raises(ConfigError, match="was measured with 1 processes on 1 machines, not 2 on 1"):
        check_places(faster, cells_of(faster))


def test_a_cell_is_done_for_what_it_was_evaluated_on(make: Make, tiny_images: Path) -> None:
    study = make()
    (cell,) = cells_of(study)
    assert not is_done(study, cell)
    record = begun(study, cell)
    assert not is_done(study, cell)
    write_record(study, cell, dataclasses.replace(record, state="failed"))
    assert not is_done(study, cell), "what failed is run again"
    write_record(study, cell, dataclasses.replace(record, state="done"))
    assert is_done(study, cell)
    assert not is_done(make(tasks={"digits": str(tiny_images)}), cell)


def test_states_are_listed(make: Make, tmp_path: Path) -> None:
    study = make(grid={"experts.num": [1, 2, 4]})
    one, two, four = cells_of(study)
    write_record(study, one, dataclasses.replace(begun(study, one), state="done", seconds=31.4))
    write_record(study, two, dataclasses.replace(begun(study, two), state="failed"))
    with held(four.lock):
        assert is_held(four.lock) and not is_held(two.lock)
        said = run_here("study", tmp_path / "study.yaml", "--list")
    assert said.status == 0
    for row in (r"num=1 .* done .* 31 ", r"num=2 .* failed ", r"num=4 .* running "):
        assert re.search(row, said.out), said.out
    assert re.search(r"num=4 .* waiting ", run_here("study", tmp_path / "study.yaml", "--list").out)


def test_cells_of_one_size_become_an_array(make: Make) -> None:
    study = make(cells=[{"processes": 1}, {"nodes": 2}], grid={"run.seed": [0, 1]})
    cells = cells_of(study)
    stages = study_workflow(study, cells).stages
    profile = SlurmProfile(nodes=4, min_nodes=2, gpus_per_node=8)
    one, two = queued_stages(stages, profile)
    assert [stage.name for stage in one.stages] == ["processes=1,seed=0", "processes=1,seed=1"] and one.needs == []
    assert [stage.name for stage in two.stages] == ["nodes=2,seed=0", "nodes=2,seed=1"] and two.needs == []
    sizes = [(group.profile.nodes, group.profile.node_counts, group.profile.gpus_per_node) for group in (one, two)]
    assert sizes == [(1, range(1, 2), 1), (2, range(2, 3), 1)], "a cell keeps its size, whatever the profile says"
    write_record(study, cells[0], dataclasses.replace(begun(study, cells[0]), state="done"))
    assert [len(group.stages) for group in queued_stages(stages, profile)] == [1, 2]


def test_a_killed_process_lets_go_of_its_cell(make: Make) -> None:
    (cell,) = cells_of(make())
    code = f"""
import pathlib, time
from moce_ds.forecast.step_cost import Work
from moce_ds.common.storage.locks import held
with held(pathlib.Path({str(cell.lock)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert is_held(cell.lock)
        other.kill()
        other.wait()
        assert not is_held(cell.lock)


def test_no_such_cell(make: Make, tmp_path: Path) -> None:
    make(grid={"experts.num": [2, 4]})
    assert "the study has no cell num=3; it has num=2, num=4." in refused(
        "study", tmp_path / "study.yaml", "--cell", "num=3"
    )
    assert not (tmp_path / "study" / "cells").exists()


def test_measures_of_a_run(make: Make) -> None:
    """Twenty records: speed is the median after the first four, the loss the mean of the last two."""
    (cell,) = cells_of(make(grid={"experts.num": [4]}, set=[*make().set, "experts.layers=[1,3]"]))
    config = cell.config()
    cell.run.mkdir(parents=True)
    rates = [1.0, 1, 1, 1, *[100.0] * 7, *[200.0] * 8, 9000]
    with open(cell.run / "metrics.jsonl", "w") as lines:
        for step, rate in enumerate(rates, 1):
            record = {"step": step, "loss": 1 / step, "reconstruction": step, "images_per_second": rate}
            record |= {"peak_memory": 1000 * min(step, 7), "moved": 0.5 if step > 4 else 0.0}
            lines.write(json.dumps(record) + "\n")
    probe = {"verb": "probe", "task": "digits", "model": "x", "top1": 0.75, "mean_per_class": 0.7}
    write_json(cell.folder / "results.json", [probe | {"n_train": 20, "n_test": 10}])
    mlp = 2 * 32 * 128 + 128 + 32
    found = measures(cell, Work.of(config))
    stored, active = found.pop("stored_parameters"), found.pop("active_parameters")
    assert stored - active == 2 * 3 * mlp
    # 16 images x 2 layers x (4 visible + cls) x width 32 x 4 bytes, there and back, forward and backward.
    assert Work.of(config).all_rows_bytes == 16 * 2 * 5 * 32 * 4 * 4
    assert found == {
        "loss": pytest.approx((1 / 19 + 1 / 20) / 2),
        "reconstruction": 19.5,
        "images_per_second": 200.0,
        "peak_memory": 7000,
        "exchange_bytes": 0.5 * Work.of(config).all_rows_bytes,
        "probe digits": 0.75,
    }


def test_a_loss_that_is_not_finite_at_the_end_is_left_out(make: Make) -> None:
    (cell,) = cells_of(make())
    cell.run.mkdir(parents=True)
    record = {"step": 1, "loss": None, "reconstruction": 0.5, "images_per_second": 1.0, "peak_memory": 1000}
    (cell.run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    found = measures(cell, Work.of(cell.config()))
    assert "loss" not in found and found["reconstruction"] == 0.5


def test_exchange_in_half_precision_of_two_experts_computed_twice(make: Make) -> None:
    words = ["experts.layers=[1,3]", "experts.k=2", "engine.precision=bf16", "engine.checkpoint_activations=true"]
    (cell,) = cells_of(make(set=[*make().set, *words]))
    assert Work.of(cell.config()).all_rows_bytes == 16 * 2 * 2 * 5 * 32 * 2 * 6


def write_study(folder: Path, rows: list[tuple[dict[str, Any], int, int, dict[str, float]]], **settings: Any) -> None:
    """A study as it lies on disk: for each cell its place in the grid, processes, batch size and measures."""
    named = []
    for at, processes, batch, measured in rows:
        name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in at.items())
        tree = {"optim": {"batch_size": batch}}
        record = CellRecord(name, at, processes, 1, tree, {}, "done", 10.0, measured)
        write_json(folder / "cells" / name / "cell.json", dataclasses.asdict(record))
        named.append(name)
    write_json(folder / "study.json", dataclasses.asdict(StudyRecord({"x": None} | settings, named)))


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """Three numbers of experts, two gates, two seeds; ep_size follows from the number of experts."""
    errors = {1: (0.50, 0.52), 4: (0.40, 0.46), 16: (0.30, 0.31)}
    rows = []
    for num, of_seed in errors.items():
        for gate, worse in (("cluster", 0.0), ("random", 0.1)):
            for seed, error in enumerate(of_seed):
                at = {"experts.num": num, "experts.ep_size": min(num, 2), "experts.gate": gate, "run.seed": seed}
                measured = {"reconstruction": error + worse, "images_per_second": 100.0, "peak_memory": 2**30}
                rows.append((at, 1, 64, measured | {"probe digits": 0.9}))
    write_study(tmp_path / "experts", rows)
    return tmp_path / "experts"


def test_means_and_deviations_over_seeds(experts: Path) -> None:
    study = StudyFolder.open(experts)
    assert study.x == "experts.num" and len(study.points) == 6
    lines = series(study.points, lambda point: point.at("experts.num"), ["experts.ep_size", "experts.gate"])
    assert list(lines) == ["gate=cluster", "gate=random"], "ep_size follows from the number of experts"
    found = [point.mean_and_deviation("reconstruction") for point in lines["gate=cluster"]]
    # Two values a, b: the mean is (a + b) / 2, the sample standard deviation |a - b| / sqrt(2).
    for both, (mean, apart) in zip(found, [(0.51, 0.02), (0.43, 0.06), (0.305, 0.01)], strict=True):
        assert both == pytest.approx((mean, apart / 2**0.5))
    assert study.points[0].mean_and_deviation("loss") is None


def test_inspect_tells_of_a_study(experts: Path) -> None:
    record = json.loads((experts / "study.json").read_text())
    write_json(experts / "study.json", record | {"cells": [*record["cells"], "num=32,seed=0"]})
    path = experts / "cells" / record["cells"][0] / "cell.json"
    write_json(path, json.loads(path.read_text()) | {"state": "failed", "told": "no space left"})
    said = run_here("inspect", experts)
    assert said.status == 0 and "1 failed, 11 done, 1 waiting" in said.out and "no space left" in said.out, said


def test_the_report_and_its_csv(experts: Path, tmp_path: Path) -> None:
    record = json.loads((experts / "study.json").read_text())
    record["cells"] += ["num=32,seed=0"]
    write_json(experts / "study.json", record)
    broken = experts / "cells" / record["cells"][0] / "cell.json"
    write_json(broken, json.loads(broken.read_text()) | {"state": "failed", "told": "Traceback\nno space <left>"})
    page = build_report(experts).read_text()
    assert "11 of 13 cells done." in page
    assert "0.4300 ± 0.0424" in page and "0.5300 ± 0.0424" in page
    assert "<td>0.5200</td>" in page, "the deviation of a single seed is not known"
    assert "90.0 ± 0.0" in page and "1.00 ± 0.00" in page
    assert "no space &lt;left&gt;" in page and "num=32,seed=0" in page
    alt = next(alt for alt in re.findall(r'alt="([^"]*)"', page) if alt.startswith("Reconstruction error"))
    assert "gate=cluster 1: 0.52, 4: 0.43, 16: 0.305; gate=random 1: 0.61, 4: 0.53, 16: 0.405" in alt
    with open(experts / "study.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12 and lines[0]["state"] == "failed"
    assert lines[5] | {"cell": ""} == {
        "cell": "", "state": "done", "experts.num": "4", "experts.ep_size": "2", "experts.gate": "cluster",
        "run.seed": "1", "processes": "1", "nodes": "1", "seconds": "10.0", "reconstruction": "0.46",
        "images_per_second": "100.0", "peak_memory": str(2.0**30), "probe digits": "0.9",
    }  # fmt: skip


def test_weak_and_strong_scaling_begin_at_the_same_cell(tmp_path: Path) -> None:
    rates = {(1, 64): 100.0, (2, 64): 180.0, (4, 64): 300.0, (2, 128): 190.0, (4, 256): 360.0}
    rows = [
        ({"processes": world, "experts.ep_size": world, "optim.batch_size": batch, "run.seed": seed}, world, batch,
         {"images_per_second": rate + sign, "peak_memory": 2**30})
        for (world, batch), rate in rates.items()
        for seed, sign in enumerate((-10, 10))
    ]  # fmt: skip
    write_study(tmp_path, rows, x="processes")
    study = StudyFolder.open(tmp_path)
    strong, weak = scalings(study, study.points)
    assert (strong.name, weak.name) == ("strong, 64 images", "weak, 64 images each")
    assert [point.world_size for point in strong.points] == [point.world_size for point in weak.points] == [1, 2, 4]
    assert strong.ideal_P == weak.ideal_P == [100, 200, 400]
    assert [mean for mean, _ in weak.throughput_P] == [100, 190, 360]
    page = build_report(tmp_path).read_text()
    rows_shown = [re.findall("<td.*?>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL)]
    assert ["strong, 64 images", "4", "64", "2", "300 ± 14", "400", "75%"] in rows_shown
    assert ["weak, 64 images each", "4", "256", "2", "360 ± 14", "400", "90%"] in rows_shown
    assert 'id="curves"' not in page, "the number of processes has a chapter of its own"


def test_a_study_of_lists_and_single_cells_can_be_shown(tmp_path: Path) -> None:
    rows = [({"experts.layers": layers}, 1, 64, {"reconstruction": 0.5}) for layers in ([1], [1, 3], None)]
    write_study(tmp_path, rows)
    page = build_report(tmp_path).read_text()
    assert "Reconstruction error against experts.layers" in page and "[1, 3]: 0.5" in page and "0.5000 ±" not in page


def test_a_study_that_has_not_begun_can_be_shown(tmp_path: Path) -> None:
    write_json(tmp_path / "study.json", {"settings": {}, "cells": ["a=1", "a=2"]})
    page = build_report(tmp_path).read_text()
    assert "0 of 2 cells done" in page and page.count("waiting") == 2


def test_cells_keep_their_settings_in_words(make: Make) -> None:
    """The words are those that `moce pretrain` takes: they come back as what was asked for."""
    values = {"experts.layers": [[0, 2]], "run.max_hours": [None, 1.5], "data.flip": [False], "optim.base_lr": [1e-5]}
    for cell, hours in zip(cells_of(make(grid=values)), (None, 1.5), strict=True):
        config = load(PretrainSettings, Path(cell.words[0]), cell.words[1:])
        assert (config.experts.layers, config.run.max_hours, config.data.flip) == ([0, 2], hours, False)
        assert config.optim.base_lr == 1e-5
