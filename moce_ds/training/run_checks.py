"""Whether a run folder is free or holds the requested run: settings and data that a resumed run must not change."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moce_ds.checkpoint import format as checkpoint_files
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.run_folder import ATTEMPTS, CONFIG, LAUNCHES
from moce_ds.common.config import settings as configuration
from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.config.model_kinds import translate_tree
from moce_ds.common.config.values import recorded_path
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.checksums import FileRecord
from moce_ds.common.text import is_utf8
from moce_ds.distributed.runtime import Runtime
from moce_ds.training.loggers import check_services
from moce_ds.training.settings import AnySettings, forbidden_changes, settings_of_run


@dataclass(frozen=True)
class RequestedRun:
    """The run that `settings` ask for, to be compared with the content of its folder, `run.out`."""

    settings: AnySettings

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.settings.run.out

    def check_resumable(self, inputs: list[tuple[str, str, str]], otherwise: str) -> None:
        """Check that the folder is free, or holds a run that these settings and inputs resume.

        Args:
            inputs: for each input its description, its key in a manifest, and its hash now.
            otherwise: what to do if the earlier input cannot be restored.

        Raises:
            ConfigError: the folder holds something else, or a run with other settings that define the experiment.
            ArtefactError: an input is not the one that the newest checkpoint was made with.
        """
        self.check_folder()
        check_same_inputs(self.folder, inputs, otherwise)
        self.check_newest_checkpoint()

    def check_folder(self) -> None:
        """Check that the folder is free, or holds the same run according to its config.yaml, and its services.

        Raises:
            ConfigError: the package of a service is missing; the path is not a folder; or it holds something else, or a
                run whose settings define another experiment, which are listed.
        """
        out, path = self.folder, self.folder / CONFIG
        check_services(self.settings.run)
        if out.exists() and not out.is_dir():
            raise ConfigError(f"run.out: {out} is a file; expected a folder, or nothing, there: choose another one.")
        if not is_utf8(out):
            raise ConfigError(
                f"run.out: {out} holds bytes that are not UTF-8, which TensorBoard refuses: choose another."
            )
        if path.exists():
            kind = type(self.settings)
            old = configuration.to_tree(settings_of_run(path, kind))
            changed = MadeFrom(configuration.to_tree(self.settings)).compare(old).differences or {}
            if listed := self._forbidden(changed):
                raise ConfigError(
                    f"{out} holds another run; these settings may not change when it is resumed:\n{listed}\n"
                    "Give the settings of that run, or another run.out."
                )
        elif out.exists() and {path.name for path in out.iterdir()} - {ATTEMPTS, LAUNCHES}:  # of a failed start
            raise ConfigError(f"run.out: {out} is not empty and holds no run (no config.yaml): choose another folder.")

    def check_newest_checkpoint(self) -> None:
        """Refuse settings that differ from those of the newest checkpoint, whatever config.yaml contains.

        Raises:
            ConfigError: settings that define the experiment are listed.
        """
        checkpoint = _newest_readable(self.folder)
        if checkpoint is None:
            return
        now = configuration.to_tree(self.settings)
        different = configuration.differences(_filled(translate_tree(checkpoint.manifest.get("config", {})), now), now)
        if listed := self._forbidden({key: pair for key, pair in different.items() if not _one_path(*pair)}):
            raise ConfigError(
                f"{self.folder} was trained with other settings up to step {checkpoint.step}:\n{listed}\n"
                f"Restore {self.folder / CONFIG} as the run wrote it, or give another run.out."
            )

    def check_optimizer(self) -> None:
        """Refuse to resume from weights alone, as imported ones are. Raises ConfigError."""
        checkpoint = _newest_readable(self.folder)
        if checkpoint is not None and not checkpoint.names(checkpoint_files.OPTIMIZER):
            raise ConfigError(
                f"run.out: {self.folder} holds weights without the optimizer's state, from which no run can resume: "
                f"start a new one in another folder, with run.init_from={self.folder}."
            )

    def write_settings(self, lease: RunLease, runtime: Runtime) -> None:
        """Write config.yaml, which turns the folder into a run. Called when nothing is left to check; a collective.

        Raises:
            ArtefactError, SupersededError: the folder cannot be written to.
        """
        runtime.barrier()  # every process has read the folder before it changes
        with runtime.raise_on_all_ranks():
            if runtime.is_main:
                text = configuration.to_yaml(self.settings).encode()
                record = FileRecord(len(text), hashlib.sha256(text).hexdigest())
                lease.note(CONFIG, record, step=0)  # first: after a kill, the settings are those of a known attempt
                with lease.file(self.folder / CONFIG, step=0) as draft:
                    draft.write_bytes(text)

    def _forbidden(self, changed: Mapping[str, tuple[Any, Any]]) -> str:
        """Lines that list the changes which make it another experiment."""
        forbidden = forbidden_changes(set(changed), type(self.settings))
        return "\n".join(f"  {key}: {changed[key][0]} -> {changed[key][1]}" for key in sorted(forbidden))


def check_same_inputs(run: Path, inputs: list[tuple[str, str, str]], otherwise: str) -> None:
    """Refuse inputs other than those of the newest checkpoint.

    Args:
        inputs: for each input its description, its key in a manifest, and its hash now.
        otherwise: what to do if the earlier input cannot be restored.

    Raises:
        ArtefactError: one has changed; it is named.
    """
    checkpoint = _newest_readable(run)
    if checkpoint is None:
        return
    for described, key, now in inputs:
        then = checkpoint.manifest.get(key)
        if then not in (now, None):  # None: an imported checkpoint whose inputs are unknown
            raise ArtefactError(
                f"{described} is not what the run was trained with ({now[:12]} now, {then[:12]} at step "
                f"{checkpoint.step}): put back what was there, or {otherwise}."
            )


def _filled(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The old values of the new keys, and the new ones of those that an earlier version did not have."""
    return {
        key: _filled(old[key], value)
        if isinstance(value, dict) and isinstance(old.get(key), dict)
        else old.get(key, value)
        for key, value in new.items()
    }


def _one_path(old: Any, new: Any) -> bool:
    """Whether both are texts of one path, which an earlier version wrote with a single `$`."""
    return isinstance(old, str) and isinstance(new, str) and recorded_path(old) == recorded_path(new)


def _newest_readable(run: Path) -> checkpoint_files.Checkpoint | None:
    for step in reversed(checkpoint_files.steps_of(run)):
        with suppress(ArtefactError):  # a damaged one is reported when the run resumes from an earlier one
            return checkpoint_files.Checkpoint.open(checkpoint_files.step_folder(run, step))
    return None
