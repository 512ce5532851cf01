"""All kinds of artefacts."""

from moce_ds.artefacts.pipeline_folder import PipelineFolder
from moce_ds.artefacts.study_folder import StudyFolder
from moce_ds.checkpoint.format import Checkpoint
from moce_ds.checkpoint.run_folder import RunFolder
from moce_ds.clustering.clusters import Clusters
from moce_ds.clustering.feature_store import FeatureSet
from moce_ds.data.shards import ShardSet
from moce_ds.evaluation.results_file import ResultsFile
from moce_ds.storage.artefact import Artefact
from moce_ds.storage.encoder_folder import EncoderFolder, ExportFolder

KINDS: tuple[type[Artefact], ...] = (
    ShardSet, FeatureSet, Clusters, Checkpoint,
    ExportFolder,  # before the files of the library that it is for
    RunFolder,  # before the weights that a run of tuning leaves beside its settings
    EncoderFolder, StudyFolder, PipelineFolder, ResultsFile,
)  # fmt: skip
"""The first that recognises a path is the kind of what is there."""
