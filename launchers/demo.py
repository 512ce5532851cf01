"""The whole pipeline on one machine, every stage real: from images to expert ViTs and a report.

    python -m launchers.demo [--short] [--out runs/demo]

Each stage is a `moce` command, printed before it runs; pre-training and features run in two processes, the experts
two to a process. Interrupted, the same command goes on.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from launchers.local import run_processes
from moce_ds.errors import MoceError

TASKS = ("digits", "textiles")
SHORT = ["optim.epochs=1", "run.log_every=5"]


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launchers.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--short", action="store_true", help="one epoch a run: shows that everything works, little more"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of everything (default: runs/demo)")
    given = parser.parse_args()
    began = time.monotonic()
    try:
        status = run_demo(given.out, SHORT if given.short else [])
    except MoceError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"{time.monotonic() - began:.0f} s in all.")
    return status


def run_demo(out: Path, overrides: list[str]) -> int:
    """All stages in order; stops at the first that fails."""
    from moce_ds.data.demo_images import write_demo_images

    write_demo_images(out / "images")
    mae = ["configs/demo/mae.yaml", f"data.shards={out}/shards", f"run.out={out}/mae", *overrides]
    moce = ["configs/demo/moce.yaml", f"data.shards={out}/shards", f"run.out={out}/moce", *overrides]
    moce += [f"experts.clusters={out}/clusters", f"run.init_from={out}/mae"]
    clusters = "configs/demo/clusters.yaml"
    return (
        _moce("shards", out / "images/pretrain", out / "shards")
        or _two_processes("pretrain", *mae)
        or _two_processes("features", out / "mae", out / "shards", out / "features")
        or _moce("cluster", out / "features", out / "clusters", "--shards", out / "shards", clusters)
        or _two_processes("pretrain", *moce)
        or any(_task(out, task) for task in TASKS)
        or _moce("report", out)
        or _summary(out)
    )


def _task(out: Path, task: str) -> int:
    """Select and export the task's expert, and measure it beside the dense MAE."""
    results = ("--results", out / "results.json", "--task", task)
    split = {part: out / "tasks" / task / part for part in ("train", "test")}
    for part, shards in split.items():
        if _moce("shards", out / "images/tasks" / task / part, shards):
            return 1
    expert = out / "experts" / task
    if _moce("select", out / "moce", "--data", split["train"], *results):
        return 1
    if not expert.exists() and _moce("export", out / "moce", expert, "--route", _selected(out, task)):
        return 1
    return int(
        any(
            _moce(verb, encoder, "--train", split["train"], "--test", split["test"], "--model", model, *results)
            for model, encoder in (("dense", out / "mae"), ("expert", expert))
            for verb in ("knn", "probe")
        )
    )


def _selected(out: Path, task: str) -> str:
    """The route that `moce select` recorded, as `moce export --route` takes it."""
    from moce_ds.files import read_json

    records = read_json(out / "results.json", "results", "moce select")
    return ",".join(str(expert) for r in records if (r["verb"], r["task"]) == ("select", task) for expert in r["route"])


def _moce(*words: object) -> int:
    """A verb in this process: the packages are imported once for all of them."""
    from moce_ds.cli import moce

    command = [str(word) for word in words]
    print(f"\n$ moce {shlex.join(command)}", flush=True)
    moce(command, standalone_mode=False)
    return 0


def _two_processes(*words: object) -> int:
    command = [str(word) for word in words]
    print(f"\n$ moce launch local --nproc 2 {shlex.join(command)}", flush=True)
    return run_processes([sys.executable, "-m", "moce_ds", *command], 2)


def _summary(out: Path) -> int:
    """The table, and whether each domain has clusters of its own."""
    from moce_ds.clustering.clusters import Clusters, load_ids
    from moce_ds.clustering.quality import cluster_report
    from moce_ds.data.shards import ShardSet
    from moce_ds.files import read_json
    from moce_ds.transfer.results import accuracy_table

    shards, clusters = ShardSet.open(out / "shards"), Clusters.load(out / "clusters")
    ids_N = load_ids(out / "clusters", shards.fingerprint, shards.count)
    report = cluster_report(ids_N, clusters.num_clusters, clusters.cosine_M[ids_N], shards.labels, shards.classes)
    assert report.domains is not None, "the demo's images have classes"
    print()
    Console(width=100).print(accuracy_table(read_json(out / "results.json", "results", "moce knn")))
    for domain, share in sorted(report.domains.majority_share.items()):
        print(f"{share:.1%} of the {domain} fall into clusters that hold mostly {domain}")
    print(f"Report: {out / 'report.html'}   Results: {out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
