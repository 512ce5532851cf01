"""Whether a run folder is free, or holds the same run: settings and data that a resumed run must not change."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moce_ds.checkpoint import format as checkpoint_files
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.run_layout import ATTEMPTS, CONFIG, LAUNCHES
from moce_ds.config import settings as configuration
from moce_ds.config.families import translate_tree
from moce_ds.config.values import recorded_path
from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import ArtefactError, ConfigError
from moce_ds.storage.checksums import FileRecord
from moce_ds.storage.made_from import MadeFrom
from moce_ds.text import is_utf8
from moce_ds.training.settings import AnySettings, forbidden_changes, settings_of_run


def check_resumable(config: AnySettings, made_from: list[tuple[str, str, str]], otherwise: str) -> None:
    """Check that the run folder is free, or holds a run that these settings and data resume.

    Args:
        made_from: for each input what it is, the record of it in a manifest, and its hash now.
        otherwise: what to do instead of putting another input back.

    Raises:
        ConfigError: the folder holds something else, or a run with other settings that define the experiment.
        ArtefactError: an input is not the one that the newest checkpoint was made with.
    """
    check_run(config)
    refuse_other(config.run.out, made_from, otherwise)
    check_same_settings(config)


def check_run(config: AnySettings) -> None:
    """Check that the run folder is free, or holds the same run.

    Raises:
        ConfigError: it is not a folder; or it holds something else, or a run whose settings define another experiment,
            which are listed.
    """
    out, path = config.run.out, config.run.out / CONFIG
    if out.exists() and not out.is_dir():
        raise ConfigError(f"run.out: {out} is a file; expected a folder, or nothing, there: choose another one.")
    if not is_utf8(out):
        raise ConfigError(f"run.out: {out} holds bytes that are not UTF-8, which TensorBoard refuses: choose another.")
    if path.exists():
        old = configuration.to_tree(settings_of_run(path, type(config)))
        changed = MadeFrom(configuration.to_tree(config)).compare(old).differences or {}
        forbidden = forbidden_changes(set(changed), type(config))
        if forbidden:
            listed = "\n".join(f"  {key}: {changed[key][0]} -> {changed[key][1]}" for key in sorted(forbidden))
            raise ConfigError(
                f"{out} holds another run; these settings may not change when it is resumed:\n{listed}\n"
                "Give the settings of that run, or another run.out."
            )
    elif out.exists() and {path.name for path in out.iterdir()} - {
        ATTEMPTS,
        LAUNCHES,
    }:  # an earlier start may have failed
        raise ConfigError(f"run.out: {out} is not empty and holds no run (no config.yaml): choose another folder.")


def check_same_settings(config: AnySettings) -> None:
    """Refuse to resume with settings that differ from those of the newest checkpoint, whatever config.yaml contains.

    Raises:
        ConfigError: settings that define the experiment are listed.
    """
    checkpoint = _newest_readable(config.run.out)
    if checkpoint is None:
        return
    now = configuration.to_tree(config)
    different = configuration.differences(_filled(translate_tree(checkpoint.manifest.get("config", {})), now), now)
    changed = {key: pair for key, pair in different.items() if not _one_path(*pair)}
    if forbidden := sorted(forbidden_changes(set(changed), type(config))):
        listed = "\n".join(f"  {key}: {changed[key][0]} -> {changed[key][1]}" for key in forbidden)
        raise ConfigError(
            f"{config.run.out} was trained with other settings up to step {checkpoint.step}:\n{listed}\n"
            f"Put {config.run.out / 'config.yaml'} back as the run wrote it, or give another run.out."
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


def refuse_other(run: Path, found: list[tuple[str, str, str]], otherwise: str) -> None:
    """Refuse to resume with inputs other than those of the newest checkpoint.

    Args:
        found: for each thing what it is, the record of it in a manifest, and its hash now.
        otherwise: what to do instead of putting it back.

    Raises:
        ArtefactError: one has changed; it is named.
    """
    checkpoint = _newest_readable(run)
    if checkpoint is None:
        return
    for named, record, now in found:
        then = checkpoint.manifest.get(record)
        if then not in (now, None):  # None: imported from elsewhere, which did not say
            raise ArtefactError(
                f"{named} is not what the run was trained with ({now[:12]} now, {then[:12]} at step "
                f"{checkpoint.step}): put back what was there, or {otherwise}."
            )


def _newest_readable(run: Path) -> checkpoint_files.Checkpoint | None:
    for step in reversed(checkpoint_files.steps_of(run)):
        with suppress(ArtefactError):  # a damaged one is reported when the run resumes from an earlier one
            return checkpoint_files.Checkpoint.open(checkpoint_files.step_folder(run, step))
    return None


def keep_settings(config: AnySettings, lease: RunLease, runtime: Runtime) -> None:
    """Write the settings into the run folder, which makes it one. Called when nothing is left that can be refused.

    Raises:
        ArtefactError, SupersededError: the folder cannot be written to.
    """
    runtime.barrier()  # everyone has looked before anyone writes
    with runtime.raise_on_all_ranks():
        if runtime.is_main:
            text = configuration.to_yaml(config).encode()
            record = FileRecord(len(text), hashlib.sha256(text).hexdigest())
            lease.note(CONFIG, record, step=0)  # first: a kill leaves settings that some attempt has noted
            with lease.file(config.run.out / CONFIG, step=0) as draft:
                draft.write_bytes(text)
