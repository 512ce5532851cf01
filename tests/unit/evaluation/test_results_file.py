"""Records of evaluations, and the tables made of them."""

import json
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.locks import locked
from moce_ds.evaluation.metrics import MultiLabelScore, Score, accuracy_record
from moce_ds.evaluation.results_file import accuracy_table, add_record, disambiguated, read_results
from moce_ds.selection.vote import count_votes
from tests.examples.moce_command import run_here


def score(top1: float) -> Score:
    return Score(top1=top1, mean_per_class=top1 - 0.1, n_train=80, n_test=20, settings={"k": 5})


def printed(table: Table) -> list[list[str]]:
    """Title and rows as words, as the terminal shows them."""
    console = Console(file=StringIO(), width=100)
    console.print(table)
    assert isinstance(console.file, StringIO)
    return [line.replace("│", " ").replace("┃", " ").split() for line in console.file.getvalue().splitlines()]


def one(verb: str, task: str, model: str, by: str) -> dict[str, Any]:
    """A record of a model whose checksum is made of one letter."""
    return accuracy_record(verb, task, model, score(0.5)) | {"model_sha256": by * 64, "made_from": by * 64}


def selection_of(task: str, by: str, route: tuple[int, int] = (2, 3)) -> dict[str, Any]:
    """A selection by one image, from a checkpoint whose checksum is made of one letter."""
    selected = count_votes(np.array([0]), np.array([route]))
    return selected.record(task) | {"model_sha256": by * 64, "made_from": by * 64}


def records(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_a_record_holds_all_of_a_score() -> None:
    assert accuracy_record("knn", "birds", "expert", score(0.75)) == {
        "verb": "knn", "task": "birds", "model": "expert", "top1": 0.75, "mean_per_class": 0.65,
        "n_train": 80, "n_test": 20, "settings": {"k": 5},
    }  # fmt: skip


def test_a_record_of_several_labels_an_image_has_another_metric() -> None:
    assert accuracy_record("probe", "voc", "expert", MultiLabelScore(0.5, 8, 2)) == {
        "verb": "probe", "task": "voc", "model": "expert", "map11": 0.5, "n_train": 8, "n_test": 2, "settings": {},
    }  # fmt: skip


def test_a_record_replaces_that_of_the_same_verb_task_and_model(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    for verb, task, model in (
        ("knn", "a", "dense"),
        ("knn", "a", "expert"),
        ("probe", "a", "dense"),
        ("knn", "b", "dense"),
    ):
        add_record(path, accuracy_record(verb, task, model, score(0.5)))
    selection = count_votes(np.array([0, 1]), np.array([[0], [1]]))
    add_record(path, selection.record("a"))
    assert len(records(path)) == 5
    add_record(path, accuracy_record("knn", "a", "dense", score(0.9)))
    add_record(path, selection.record("a") | {"n_images": 7})
    assert len(records(path)) == 5
    changed = [r for r in records(path) if r.get("top1") == 0.9 or r.get("n_images") == 7]
    assert [(r["verb"], r["task"], r.get("model")) for r in changed] == [("knn", "a", "dense"), ("select", "a", None)]
    assert sorted(tmp_path.rglob("[!.]*")) == [path.parent, path]  # nothing but the lock is left lying beside it


def test_equally_named_models_stand_beside_one_another(tmp_path: Path) -> None:
    path, known = tmp_path / "results.json", [{"model_sha256": c * 64, "made_from": c * 64} for c in "ab"]
    for by, top1 in zip([*known, known[0]], (0.5, 0.75, 0.625), strict=True):
        add_record(path, accuracy_record("knn", "birds", "expert", score(top1)) | by)
    assert [record["top1"] for record in read_results(path)] == [0.75, 0.625], "the same model's was measured again"
    add_record(path, accuracy_record("probe", "birds", "dense", score(0.5)) | known[0])
    shown = {(r["verb"], r["model"]) for r in disambiguated(read_results(path))}
    assert shown == {("knn", "expert (aaaaaaaa)"), ("knn", "expert (bbbbbbbb)"), ("probe", "dense")}
    rows = printed(accuracy_table(read_results(path)))
    assert ["birds", "expert", "(aaaaaaaa)", "62.5%"] in rows and ["birds", "expert", "(bbbbbbbb)", "75.0%"] in rows
    said = run_here("inspect", path).out
    assert "expert (aaaaaaaa)" in said and "expert (bbbbbbbb)" in said


def test_one_name_for_the_model_of_each_task_needs_no_mark() -> None:
    """As a pipeline leaves them: each task has its own expert, whose seeds and methods agree."""
    made = [
        selection_of("birds", "1"),
        *(one("knn", "birds", model, by) for model, by in (("dense", "d"), ("expert", "a"))),
        one("probe", "birds", "expert", "a"),
        selection_of("fish", "1"),
        *(one("knn", "fish", model, by) for model, by in (("dense", "d"), ("expert", "b"))),
    ]
    assert disambiguated(made) == made
    rows = printed(accuracy_table(made))
    assert ["birds", "expert", "2-3", "100.0%", "50.0%", "50.0%"] in rows
    assert ["fish", "expert", "2-3", "100.0%", "50.0%"] in rows


def test_marked_models_keep_what_their_name_means() -> None:
    """Two dense MAEs, and two checkpoints that were selected from: the newer route is that of the newer expert."""
    made = [
        selection_of("birds", "1", route=(1, 1)),
        selection_of("birds", "2"),
        *(one("knn", "birds", model, by) for model in ("dense", "expert") for by in "ab"),
    ]
    rows = printed(accuracy_table(made))
    for row in (["dense", "(aaaaaaaa)"], ["dense", "(bbbbbbbb)"], ["expert", "(aaaaaaaa)"]):
        assert ["birds", *row, "50.0%"] in rows
    assert ["birds", "expert", "(bbbbbbbb)", "2-3", "100.0%", "50.0%"] in rows


def test_two_models_of_a_task_are_disambiguated_whatever_measured_them() -> None:
    shown = disambiguated([one("knn", "birds", "expert", "a"), one("probe", "birds", "expert", "b")])
    assert [record["model"] for record in shown] == ["expert (aaaaaaaa)", "expert (bbbbbbbb)"]


def test_a_record_of_an_earlier_version_gives_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    for model in ("expert", "dense"):
        add_record(path, accuracy_record("knn", "birds", model, score(0.5)))
    assert capsys.readouterr().err == ""
    add_record(path, one("knn", "birds", "expert", "a"))
    assert "knn birds expert replaces one that does not identify its model" in capsys.readouterr().err.replace(
        "\n", " "
    )
    add_record(path, one("knn", "birds", "expert", "b"))
    assert capsys.readouterr().err == ""
    assert [(r["model"], r.get("made_from")) for r in read_results(path)] == [
        ("dense", None), ("expert", "a" * 64), ("expert", "b" * 64),
    ]  # fmt: skip


def test_one_model_measured_otherwise_stands_beside_itself(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for how in "cd":
        add_record(path, accuracy_record("knn", "birds", "x", score(0.5)) | {"model_sha256": "a", "made_from": how * 9})
    assert [record["model"] for record in disambiguated(read_results(path))] == ["x (cccccccc)", "x (dddddddd)"]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: add_record(path, accuracy_record("knn", "a", f"m{n}", score(0.5))), range(24)))
    assert {record["model"] for record in read_results(path)} == {f"m{n}" for n in range(24)}


def test_who_does_not_let_go_is_not_waited_for_without_end(tmp_path: Path) -> None:
    other = locked(tmp_path / ".lock", "it is busy", seconds=0)
    with locked(tmp_path / ".lock", "unused"), pytest.raises(ArtefactError, match="it is busy"), other:
        pass


def test_a_record_that_was_edited_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    add_record(path, accuracy_record("knn", "birds", "expert", score(0.5)))
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(ArtefactError, match="is damaged or was edited"):
        read_results(path)


def test_nowhere_is_a_place_too(tmp_path: Path) -> None:
    add_record(None, accuracy_record("knn", "a", "dense", score(0.5)))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_results_file_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("[{")
    with pytest.raises(ArtefactError, match=r"results.json is damaged .*: write a list of results again"):
        add_record(path, accuracy_record("knn", "a", "dense", score(0.5)))
    assert path.read_text() == "[{"


def test_accuracy_table() -> None:
    selection = count_votes(np.array([0, 0, 0, 1]), np.array([[2, 3], [1, 1]]))
    rows = printed(
        accuracy_table(
            [
                accuracy_record("knn", "birds", "dense", score(0.5)),
                accuracy_record("probe", "birds", "dense", score(0.625)),
                selection.record("birds"),
                accuracy_record("probe", "birds", "expert", score(0.75)),
                accuracy_record("knn", "fish", "expert", score(0.25)),
            ]
        )
    )
    assert ["birds", "dense", "50.0%", "62.5%"] in rows
    assert ["birds", "expert", "2-3", "75.0%", "75.0%"] in rows  # no k-NN was run
    assert ["fish", "expert", "25.0%"] in rows  # nothing was selected for it
    assert accuracy_table([]).row_count == 0


def test_accuracy_table_of_several_labels() -> None:
    record = {"verb": "knn", "task": "voc", "model": "expert", "map11": 0.5, "n_train": 8, "n_test": 2}
    assert ["voc", "expert", "50.0%", "mAP"] in printed(accuracy_table([record]))
