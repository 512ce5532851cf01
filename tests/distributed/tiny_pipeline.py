"""A pipeline of tiny runs, as a file."""

from pathlib import Path

import yaml
from tiny_run import EXPERT_LAYERS

from moce_ds.cli.workflow.pipeline import PipelineSettings, stages_of
from moce_ds.cli.workflow.stage import Stage
from moce_ds.common.config.settings import load

TINY = Path(__file__).with_name("tiny.yaml")


def write_pipeline(path: Path, **given: object) -> dict[str, Stage]:
    """Write a pipeline file; returns its stages by name."""
    layers = ",".join(map(str, EXPERT_LAYERS))
    words = {
        "clusters": ["num_clusters=6", "fit_images_per_cluster=null"],
        "moce": ["model.arch=moce", "experts.num=4", f"experts.layers=[{layers}]"],
    }
    tree = {"out": str(path.with_suffix("")), "mae": str(TINY), "moce": str(TINY), "words": words, **given}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return {stage.name: stage for stage in stages_of(load(PipelineSettings, path))}
