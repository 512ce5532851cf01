"""A pipeline as a chain of jobs: each after the one before it; a failed one is found again by the same command."""

import re
from pathlib import Path

from cluster import Cluster
from submitted import SECONDS, moce
from tiny_pipeline import write_pipeline
from tiny_run import write_images

STAGES = ["shards", "mae", "features", "clusters", "moce", "export", "evaluation"]


def queue(pipeline: Path) -> list[str]:
    """Launch a pipeline on two nodes; the stages that were queued."""
    status, output = moce("launch", "slurm", "nodes=2", "minutes=10", "pipeline", pipeline)
    assert status == 0, output
    return re.findall(r"^Job \d+ is queued: (\w+),", output, re.M)


def test_a_failed_stage_is_resumed_by_the_same_command(cluster: Cluster, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    for part in ("train", "test"):
        write_images(tmp_path / "task" / part, 30)
    test = tmp_path / "task/test"
    test.rename(tmp_path / "elsewhere")
    test.mkdir()  # in which the stage of the export will find no image
    pipeline = tmp_path / "pipeline.yaml"
    task = {"some": str(tmp_path / "task")}
    stages = write_pipeline(pipeline, images=str(tmp_path / "images"), tasks=task)

    assert queue(pipeline) == STAGES
    status, output = moce("launch", "slurm", "nodes=2", "pipeline", pipeline)
    assert status == 1 and "has work in the queue" in output, output
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader"), 2 * SECONDS, "the chain has ended")
    states = {name: record.state if (record := stage.record()) else "waiting" for name, stage in stages.items()}
    assert states == dict.fromkeys(STAGES[:5], "done") | {"export": "failed", "evaluation": "waiting"}
    failed = stages["export"].record()
    assert failed is not None and "No image to write" in failed.message

    test.rmdir()
    (tmp_path / "elsewhere").rename(test)
    assert queue(pipeline) == ["export", "evaluation"]
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader"), SECONDS, "the chain has ended")
    assert all(stage.is_done() for stage in stages.values())
    assert (tmp_path / "pipeline/report.html").exists()
    assert queue(pipeline) == []
