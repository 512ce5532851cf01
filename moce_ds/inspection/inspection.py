"""Description and verification of any artefact, for `moce inspect`."""

from pathlib import Path

from rich.table import Table

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.common.storage.artefact import Artefact, recognised
from moce_ds.common.storage.checksums import Findings
from moce_ds.common.storage.encoder_folder import EncoderFolder, ExportFolder
from moce_ds.common.text import in_line
from moce_ds.data.clusters import Clusters
from moce_ds.data.feature_store import FeatureSet
from moce_ds.data.shards import ShardSet
from moce_ds.evaluation.results_file import ResultsFile
from moce_ds.inspection.pipeline_folder import PipelineFolder
from moce_ds.inspection.study_folder import StudyFolder

KINDS: tuple[type[Artefact], ...] = (
    ShardSet, FeatureSet, Clusters, Checkpoint,
    ExportFolder,  # before the files of its library
    RunFolder,  # before the weights in the folder of a tuning run
    EncoderFolder, StudyFolder, PipelineFolder, ResultsFile,
)  # fmt: skip
"""All kinds of artefacts. The first that recognises a path is the kind of the artefact there."""


def describe(path: Path) -> Table:
    """The kind and content of the artefact at `path`, as a table. Raises ArtefactError if there is none, or it is
    damaged."""
    kind = recognised(path, KINDS)
    table = Table(title=f"{in_line(path)}: {kind.kind}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in kind.open(path).describe().items():
        table.add_row(name, value)
    return table


def findings(path: Path) -> Findings:
    """All differences from what was written; reads all files.

    Raises:
        MoceError: as `describe`; or a file that holds checksums of the others is missing or damaged.
    """
    return recognised(path, KINDS).open(path).verify()
