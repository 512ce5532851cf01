"""The whole pipeline on one machine, with real stages: from images to expert ViTs and a report.

    python -m moce_ds.cli.workflow.demo [--short] [--out runs/demo]

This is `moce pipeline` with the files of `configs/demo/`, on images that are written first. It runs from any working
directory: relative paths in these files begin there. Every command is printed before it runs; pre-training and features
run in two processes, each with two experts per layer. Rerun the same command to resume.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from moce_ds.cli.workflow.pipeline import run_pipeline
from moce_ds.common.config.settings import word
from moce_ds.common.config.values import arguments, expanded
from moce_ds.common.host import threads
from moce_ds.common.host.program import run_main, say, show

CONFIGS = Path(__file__).with_name("configs") / "demo"
"""The settings of its stages, which are installed with the package."""

TASKS = ("digits", "textiles")
SHORT = ("optim.epochs=1", "run.log_every=5")


def main() -> int:
    """Run the demo; returns the exit status. Raises MoceError if a stage does."""
    parser = argparse.ArgumentParser(prog="python -m moce_ds.cli.workflow.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="one epoch per run: only to check that everything works")
    parser.add_argument(
        "--out", type=expanded, default=Path("runs/demo"), help="folder of everything (default: runs/demo)"
    )
    given = parser.parse_args()
    threads.apply_choice()
    began = time.monotonic()
    status = run_demo(given.out, given.short)
    logging.getLogger("moce_ds").info(f"{time.monotonic() - began:.0f} s in all.")
    return status


def run_demo(out: Path, short: bool) -> int:
    """Write the images, run all stages on them, and print a summary; returns the exit status."""
    from moce_ds.data.sources.demo_images import write_demo_images

    write_demo_images(out / "images")
    return run_pipeline(pipeline_words(out, short)) or _summary(out)


def pipeline_words(out: Path, short: bool) -> list[str]:
    """The words of `moce pipeline` that run the demo."""
    words = [*arguments([CONFIGS / "pipeline.yaml"]), word("out", out), word("images", out / "images/pretrain")]
    words += [word(stage, CONFIGS / f"{stage}.yaml") for stage in ("mae", "moce")]
    words.append(word("words.clusters", arguments([CONFIGS / "clusters.yaml"])))
    words += [word(f"tasks.{task}", out / "images/tasks" / task) for task in TASKS]
    return words + [word(f"words.{stage}", SHORT) for stage in ("mae", "moce") if short]


def _summary(out: Path) -> int:
    """Print the table of accuracies, and how well the clusters separate the domains; returns 0."""
    from moce_ds.clustering.quality import cluster_report
    from moce_ds.data.clusters import Clusters, load_ids
    from moce_ds.data.shards import ShardSet
    from moce_ds.evaluation.results_file import RESULTS, accuracy_table, read_results

    shards, clusters = ShardSet.open(out / "shards"), Clusters.open(out / "clusters")
    ids_N = load_ids(out / "clusters", shards.fingerprint, shards.count)
    report = cluster_report(ids_N, clusters.num_clusters, clusters.cosine_M, shards.labels, shards.classes)
    assert report.domains is not None, "the demo's images have classes"
    say("")
    show(accuracy_table(read_results(out / RESULTS)))
    for domain, share in sorted(report.domains.majority_share.items()):
        say(f"{share:.1%} of the {domain} fall into clusters that hold mostly {domain}")
    say(f"Report: {out / 'report.html'}   Results: {out / RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
