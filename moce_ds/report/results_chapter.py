"""The report's chapter about tasks: accuracy, reconstruction of held-out images, and selected routes."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from moce_ds.common.text import route_label
from moce_ds.evaluation.results_file import psnr_gain
from moce_ds.report import plots
from moce_ds.report.page import Cell, Chapter, Exhibit, Section, Table

Records = Sequence[dict[str, Any]]

# Columns of the result table: heading, verb and key of the record.
_MEASURES = (
    ("k-NN top-1", "knn", "top1"),
    ("k-NN per class", "knn", "mean_per_class"),
    ("probe top-1", "probe", "top1"),
    ("probe per class", "probe", "mean_per_class"),
    ("k-NN mAP", "knn", "map11"),
    ("probe mAP", "probe", "map11"),
)
_PATHS = {"selected": "selected route", "own": "own routes"}
"""What `moce evaluate` measures of a model with experts."""


def results_chapter(records: Records) -> list[Chapter]:
    """The chapter about the records of `results.json`; none without records."""
    sections = [*_accuracies(records), *_reconstruction(records), *_routes(records)]
    return [Chapter("Results", "results", sections)] if sections else []


def _accuracies(records: Records) -> Iterator[Section]:
    scores = {(r["task"], r["model"], r["verb"]): r for r in records if r["verb"] in ("knn", "probe")}
    measures = [m for m in _MEASURES if any(verb == m[1] and m[2] in r for (*_, verb), r in scores.items())]
    rows = []
    for task in dict.fromkeys(task for task, _, _ in scores):
        models = list(dict.fromkeys(model for named, model, _ in scores if named == task))
        cells = {model: [_score(scores, task, model, verb, key) for _, verb, key in measures] for model in models}
        best = [max(column, key=lambda value: value or 0) for column in zip(*cells.values(), strict=True)]
        for model in models:
            images = next(record for (t, m, _), record in scores.items() if (t, m) == (task, model))
            shown = [
                Cell("–" if value is None else f"{value:.1%}", len(models) > 1 and value is not None and value == top)
                for value, top in zip(cells[model], best, strict=True)
            ]
            rows.append(
                [Cell(task), Cell(model), *shown, Cell(f"{images['n_train']:,}"), Cell(f"{images['n_test']:,}")]
            )
    if rows:
        header = ["task", "model", *(heading for heading, _, _ in measures), "train", "test"]
        caption = "Test accuracy, best of each task in bold. “Per class” averages over classes instead of images."
        text = "Accuracy of frozen features on test images, on which no choice was made."
        yield Section("Accuracy", text, [Table(header, rows, caption, names=2)])


def _score(scores: dict[tuple[str, str, str], Any], task: str, model: str, verb: str, key: str) -> float | None:
    record = scores.get((task, model, verb))
    return None if record is None or key not in record else float(record[key])


def _reconstruction(records: Records) -> Iterator[Section]:
    """The errors of `moce evaluate`, and the PSNR of every task and system relative to the dense MAE."""
    measured = {(record["task"], record["model"]): record for record in records if record["verb"] == "evaluate"}
    if not measured:
        return
    rows = []
    for (task, model), record in measured.items():
        errors = [record.get(key) for key in ("dense", *_PATHS)]
        least = min(error for error in errors if error is not None)
        cells = [Cell("–" if error is None else f"{error:.4f}", error == least) for error in errors]
        gains = [_gain(record, path) for path in _PATHS]
        cells += [Cell("–" if gain is None else f"{gain:+.2f}") for gain in gains]
        rows.append([Cell(task), Cell(model), *cells, Cell(f"{record['n_images']:,}")])
    header = ["task", "model", "dense MAE", *_PATHS.values(), *(f"{name}, dB" for name in _PATHS.values()), "images"]
    caption = (
        "Mean squared error on hidden patches, each normalised to variance 1 (no unit): lower is better, least in "
        "bold. In dB: PSNR minus that of the dense MAE, higher is better."
    )
    text = (
        "Held-out images, with the same masks for all models. The selected route is the one that most of a task's "
        "images vote for, as one deployed ViT; on own routes, each image takes the route of its cluster."
    )
    yield Section("Reconstruction", text, [Table(header, rows, caption, names=2)], list(_gains(measured)))


def _gain(record: dict[str, Any], path: str) -> float | None:
    """In dB; None without a dense MAE, or if an error is 0."""
    gain = math.inf if record.get("dense") is None else psnr_gain(record[path], record["dense"])
    return gain if math.isfinite(gain) else None


def _gains(measured: dict[tuple[str, str], dict[str, Any]]) -> Iterator[Exhibit]:
    tasks = list(dict.fromkeys(task for (task, _), record in measured.items() if record.get("dense") is not None))
    models = list(dict.fromkeys(model for _, model in measured))
    values = {
        f"{model}, {name}" if len(models) > 1 else name: [
            _gain(measured.get((task, model), {}), path) for task in tasks
        ]
        for model in models
        for path, name in _PATHS.items()
    }
    values = {name: gains for name, gains in values.items() if any(gain is not None for gain in gains)}
    if values:
        plot = plots.grouped_bars(tasks, values, "PSNR relative to the dense MAE", "dB above the dense MAE")
        caption = "To the right of 0, the model with experts reconstructs better than the dense MAE."
        yield Exhibit(plot, f"{caption} 3 dB are half the squared error.")


def _routes(records: Records) -> Iterator[Section]:
    rows = []
    selected = [record for record in records if record["verb"] == "select"]
    several = {task for task, count in Counter(record["task"] for record in selected).items() if count > 1}
    for record in selected:
        others = [other for other in record.get("routes", []) if other["route"] != record["route"]]
        clusters = sorted(record.get("clusters", {}).items(), key=lambda item: -item[1])[:3]
        rows.append(
            [
                Cell(f"{record['task']} {record.get('model', '')}" if record["task"] in several else record["task"]),
                Cell(route_label(record["route"]), best=True),
                Cell(", ".join(f"{route_label(other['route'])} {other['share']:.0%}" for other in others[:2]) or "–"),
                Cell(", ".join(f"{cluster} ({share:.0%})" for cluster, share in clusters) or "–"),
                Cell(f"{record['share']:.0%}"),
                Cell(f"{record['n_images']:,}" if "n_images" in record else "–"),
            ]
        )
    if rows:
        caption = (
            "A route names the expert of each expert layer, in order: 3-5 is expert 3 in the first, 5 in the second. "
            "Each image of the task votes for the route of the cluster that it belongs to; “votes” is the winner's "
            "share. A model called “expert” above is this route."
        )
        header = ["task", "selected route", "next routes", "main clusters", "votes", "images"]
        yield Section("Selected routes", tables=[Table(header, rows, caption, names=4)])
