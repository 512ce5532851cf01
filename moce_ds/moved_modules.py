"""Modules under the names that they had before the layout of docs/architecture.md.

Scripts written for these names keep working: importing an old name gives the module of the new name, and a
DeprecationWarning says which that is.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_SOURCES = "ade20k coco coco_api demo_images image_folder listing miniature public"
_SLURM = "slurm_job slurm_profile local"

# New folder: old folder, and the modules that kept their own name.
_FOLDERS: dict[str, tuple[str, str]] = {
    "moce_ds.data.sources": ("moce_ds.data", _SOURCES),
    "moce_ds.common": ("moce_ds", "compat config errors host storage text"),
    "moce_ds.cli": ("moce_ds", "launch main stages workflow"),
    "moce_ds.common.config": ("moce_ds", "values yaml_text"),
    "moce_ds.common.host": ("moce_ds", "interrupts machine program threads"),
    "moce_ds.common.storage": ("moce_ds", "checksums drafts encoder_folder files locks metrics_file"),
    "moce_ds.distributed": ("moce_ds", "randomness rendezvous runtime"),
    "moce_ds.evaluation": ("moce_ds.transfer", "knn metrics probe settings"),
    "moce_ds.exporting": ("moce_ds.transfer", "formats"),
    "moce_ds.selection": ("moce_ds.transfer", "selection_report"),
    "moce_ds.cli.launch": ("launchers", _SLURM),
    "moce_ds.cli.workflow": ("launchers", "demo pipeline study"),
}

MOVED: dict[str, str] = {
    **{f"{old}.{name}": f"{new}.{name}" for new, (old, names) in _FOLDERS.items() for name in names.split()},
    "moce_ds.training.task": "moce_ds.training.training_task",
    "moce_ds.training.import_deepspeed": "moce_ds.training.import_deepspeed_checkpoint",
    "moce_ds.export": "moce_ds.exporting",
    "moce_ds.export.earlier": "moce_ds.exporting.existing_export",
    "moce_ds.moe.plan": "moce_ds.moe.routing_plan",
    "launchers.cell": "moce_ds.cli.workflow.study",
    "launchers.grid": "moce_ds.cli.workflow.study_grid",
    "launchers.launch": "moce_ds.cli.workflow.submit",
    "launchers.slurm": "moce_ds.cli.launch.slurm_queue",
    "launchers.slurm_end": "moce_ds.cli.launch.slurm_job",
    "launchers.slurm_rank": "moce_ds.cli.launch.slurm_job",
    "launchers.snapshot": "moce_ds.cli.launch.slurm_queue",
    "launchers.stage": "moce_ds.cli.workflow.stage",
    "launchers.stages": "moce_ds.cli.workflow.pipeline",
    "moce_ds.analysis": "moce_ds.report",
    "moce_ds.analysis.gallery": "moce_ds.report.page",
    "moce_ds.analysis.inspection": "moce_ds.inspection.inspection",
    "moce_ds.analysis.pipeline_folder": "moce_ds.inspection.pipeline_folder",
    "moce_ds.analysis.report": "moce_ds.report.build",
    "moce_ds.analysis.routing": "moce_ds.report.run_chapter",
    "moce_ds.analysis.run_findings": "moce_ds.checkpoint.run_folder",
    "moce_ds.analysis.run_folder": "moce_ds.checkpoint.run_folder",
    "moce_ds.analysis.study_folder": "moce_ds.inspection.study_folder",
    "moce_ds.analysis.study_plots": "moce_ds.report.plots",
    "moce_ds.artefacts": "moce_ds.inspection",
    "moce_ds.bench.processes": "moce_ds.bench.timing",
    "moce_ds.bench.routing": "moce_ds.bench.cases",
    "moce_ds.bench.step": "moce_ds.bench.layer",
    "moce_ds.bench.verbs": "moce_ds.cli.stages.bench",
    "moce_ds.checkpoint.parameters": "moce_ds.models.parameters",
    "moce_ds.checkpoint_files": "moce_ds.checkpoint.format",
    "moce_ds.stages.config": "moce_ds.cli.config_verbs",
    "moce_ds.stages.options": "moce_ds.cli.options",
    "moce_ds.stages.table": "moce_ds.cli.stages.registry",
    "moce_ds.cli.verbs": "moce_ds.cli.stages.registry",
    "moce_ds.clustering.clusters": "moce_ds.data.clusters",
    "moce_ds.clustering.feature_store": "moce_ds.data.feature_store",
    "moce_ds.clustering.store": "moce_ds.data.feature_store",
    "moce_ds.config.families": "moce_ds.common.config.model_kinds",
    "moce_ds.config.faults": "moce_ds.common.validation",
    "moce_ds.config.words": "moce_ds.common.config.command_line",
    "moce_ds.console": "moce_ds.common.host.program",
    "moce_ds.data.canvas": "moce_ds.data.scale_jitter",
    "moce_ds.data.class_mask": "moce_ds.data.sources.ade20k",
    "moce_ds.data.coco_checks": "moce_ds.data.sources.coco",
    "moce_ds.data.left_out": "moce_ds.data.task_images",
    "moce_ds.data.png_file": "moce_ds.data.containers",
    "moce_ds.data.public.found": "moce_ds.data.sources.public.readers",
    "moce_ds.data.public.mat_files": "moce_ds.data.sources.public.readers",
    "moce_ds.data.public.text_lists": "moce_ds.data.sources.public.readers",
    "moce_ds.data.public.unlisted": "moce_ds.data.sources.public.readers",
    "moce_ds.data.saved_dataset": "moce_ds.data.sources.tables",
    "moce_ds.data.sources.saved_dataset": "moce_ds.data.sources.tables",
    "moce_ds.data.walk": "moce_ds.data.sources.image_folder",
    "moce_ds.export.routes": "moce_ds.selection.routes",
    "moce_ds.export.select": "moce_ds.selection.vote",
    "moce_ds.export.selection_report": "moce_ds.selection.selection_report",
    "moce_ds.faults": "moce_ds.common.config.composition",
    "moce_ds.host.place": "moce_ds.common.host.rank",
    "moce_ds.liveness": "moce_ds.distributed.watchdog",
    "moce_ds.manifest": "moce_ds.checkpoint.records",
    "moce_ds.models.dense": "moce_ds.encoders.from_checkpoint",
    "moce_ds.models.encode": "moce_ds.encoders.features",
    "moce_ds.models.encode_settings": "moce_ds.encoders.settings",
    "moce_ds.models.encoders": "moce_ds.encoders.from_checkpoint",
    "moce_ds.models.public_mae": "moce_ds.encoders.public_mae",
    "moce_ds.models.spec": "moce_ds.models.build",
    "moce_ds.models.token_encoder": "moce_ds.encoders.from_checkpoint",
    "moce_ds.models.warm_start": "moce_ds.training.initial_weights",
    "moce_ds.moe.exchange": "moce_ds.moe.expert_layer",
    "moce_ds.moe.experts": "moce_ds.moe.expert_layer",
    "moce_ds.moe.layer": "moce_ds.moe.deepspeed_layer",
    "moce_ds.moe.token_layer": "moce_ds.moe.deepspeed_token_layer",
    "moce_ds.old_names": "moce_ds.moved_modules",
    "moce_ds.place": "moce_ds.common.host.rank",
    "moce_ds.planning": "moce_ds.forecast",
    "moce_ds.planning.dry_run": "moce_ds.forecast.preflight",
    "moce_ds.planning.fitting": "moce_ds.forecast.preflight",
    "moce_ds.planning.report": "moce_ds.forecast.prediction",
    "moce_ds.planning.work": "moce_ds.forecast.step_cost",
    "moce_ds.results_file": "moce_ds.evaluation.results_file",
    "moce_ds.sealing": "moce_ds.distributed.rendezvous",
    "moce_ds.training.agreement": "moce_ds.training.trainer",
    "moce_ds.training.attempt": "moce_ds.checkpoint.lease",
    "moce_ds.training.board": "moce_ds.training.metric_logger",
    "moce_ds.training.checkpoint": "moce_ds.checkpoint.deepspeed_state",
    "moce_ds.training.locality": "moce_ds.training.inputs",
    "moce_ds.training.loop": "moce_ds.training.pretrain",
    "moce_ds.training.metrics": "moce_ds.training.metric_logger",
    "moce_ds.training.model": "moce_ds.training.placed_model",
    "moce_ds.training.native": "moce_ds.training.import_deepspeed_checkpoint",
    "moce_ds.training.saver": "moce_ds.checkpoint.manager",
    "moce_ds.training.skipping": "moce_ds.training.engine",
    "moce_ds.transfer": "moce_ds.exporting",
    "moce_ds.transfer.api": "moce_ds.api",
    "moce_ds.transfer.campaign": "moce_ds.cli.workflow.transfer",
    "moce_ds.transfer.campaign_table": "moce_ds.cli.workflow.transfer",
    "moce_ds.transfer.chosen": "moce_ds.selection.routes",
    "moce_ds.transfer.evaluate": "moce_ds.evaluation.reconstruction",
    "moce_ds.transfer.export": "moce_ds.exporting.write",
    "moce_ds.transfer.export_request": "moce_ds.exporting.request",
    "moce_ds.transfer.finetuning": "moce_ds.cli.workflow.transfer_tasks",
    "moce_ds.transfer.formats.onnx_graph": "moce_ds.exporting.formats.onnx_file",
    "moce_ds.transfer.formats.pth": "moce_ds.exporting.formats.weights",
    "moce_ds.transfer.formats.target": "moce_ds.exporting.formats.registry",
    "moce_ds.transfer.formats.timm_folder": "moce_ds.exporting.formats.weights",
    "moce_ds.transfer.frozen": "moce_ds.evaluation.frozen_features",
    "moce_ds.transfer.lars": "moce_ds.evaluation.probe",
    "moce_ds.transfer.linear": "moce_ds.evaluation.probe",
    "moce_ds.transfer.protocol_verbs": "moce_ds.cli.workflow.workflow_verbs",
    "moce_ds.transfer.results": "moce_ds.evaluation.results_file",
    "moce_ds.transfer.select": "moce_ds.selection.vote",
    "moce_ds.transfer.selection_picture": "moce_ds.selection.selection_report",
    "moce_ds.transfer.subjects": "moce_ds.cli.workflow.transfer_models",
    "moce_ds.transfer.task_data": "moce_ds.data.task_images",
    "moce_ds.transfer.tasks": "moce_ds.cli.workflow.transfer_tasks",
    "moce_ds.transfer.trained": "moce_ds.exporting.reference_model",
    "moce_ds.transfer.typicality": "moce_ds.selection.vote",
    "moce_ds.transfer.verbs": "moce_ds.cli.stages.evaluation",
    "moce_ds.tuning.dense_settings": "moce_ds.tuning.settings",
    "moce_ds.tuning.dense_verbs": "moce_ds.cli.stages.tuning",
    "moce_ds.tuning.detector": "moce_ds.tuning.detection",
    "moce_ds.tuning.feed": "moce_ds.tuning.labelled_task",
    "moce_ds.tuning.finetune": "moce_ds.tuning.classification",
    "moce_ds.tuning.groups": "moce_ds.tuning.labelled_task",
    "moce_ds.tuning.labelled": "moce_ds.tuning.classification",
    "moce_ds.tuning.loop": "moce_ds.tuning.tune",
    "moce_ds.tuning.result": "moce_ds.checkpoint.run_folder",
    "moce_ds.tuning.seeding": "moce_ds.tuning.augmentation",
    "moce_ds.tuning.segmenter": "moce_ds.tuning.segmentation",
    "moce_ds.tuning.task": "moce_ds.tuning.labelled_task",
    "moce_ds.tuning.verbs": "moce_ds.cli.stages.tuning",
    "moce_ds.workflow.verbs": "moce_ds.cli.workflow.workflow_verbs",
}
"""New name by old name. What lies in a package that moved is found under the package's new name."""


def new_name(name: str) -> str | None:
    """The name of a module today, given an old one; None where it has not moved."""
    if name in MOVED:
        return MOVED[name]
    package, _, rest = name.rpartition(".")
    above = new_name(package) if package else None
    return f"{above}.{rest}" if above else None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules under their old names. It must come before Python's own finders, which would load a module of a
    package that moved a second time."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec that gives the module of the new name; None for all other names."""
        return importlib.machinery.ModuleSpec(fullname, self) if new_name(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of an empty one."""
        new = new_name(module.__name__)
        assert new is not None
        warnings.warn(f"{module.__name__} is now {new}.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """Let `import` find old names, in this process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
