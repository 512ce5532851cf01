"""The checkpoint format: the same files whatever the number of processes, `ep_size` or ZeRO stage.

    step-00001000/
      manifest.json                         step, settings, sizes and checksums of the files; written last
      weights/shared.safetensors            fp32 weights of everything that is not an expert
      weights/block-03-expert-002.safetensors   those of one *global* expert of one block
      optimizer/...                         the same names again: NAME.exp_avg and NAME.exp_avg_sq

A folder appears under its name only when it is whole. Nothing here needs DeepSpeed, a process group, or pickle.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moce_ds.errors import ArtefactError
from moce_ds.files import read_json, sha256_of, write_json

FORMAT = "moce_ds checkpoint 1"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
_EXPERT = re.compile(r"^blocks\.(\d+)\.mlp\.experts\.(\d+)\.")
_STEP = re.compile(r"^step-(\d{8})$")


def file_of(parameter: str) -> str:
    """The file (without folder) that holds a parameter: its expert's own one, or the shared one."""
    match = _EXPERT.match(parameter)
    return f"block-{int(match[1]):02d}-expert-{int(match[2]):03d}.safetensors" if match else "shared.safetensors"


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        folder: where it lies.
        manifest: `step`, `config` (settings tree), `model`, `clusters_hash`, `shards_fingerprint`, `images_read`,
            `routing`, `files`.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.manifest["step"])

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the manifest and check that every file is there with its size.

        Raises:
            ArtefactError: something is missing, cut short, or of another version; it is named.
        """
        manifest = read_json(folder / "manifest.json", "a checkpoint", "moce pretrain")
        if manifest.get("format") != FORMAT:
            raise ArtefactError(f"{folder}: format {manifest.get('format')!r}; this version reads {FORMAT!r}.")
        for name, record in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != record["bytes"]:
                found = "missing" if size is None else f"{size} bytes"
                raise ArtefactError(
                    f"{path} is damaged: {found}, expected {record['bytes']} bytes. Remove {folder} to go on from the "
                    "checkpoint before it."
                )
        return cls(folder, manifest)

    def names(self, part: str = WEIGHTS) -> list[str]:
        """Files of `weights` or `optimizer`, relative to the folder."""
        return sorted(name for name in self.manifest["files"] if name.startswith(f"{part}/"))

    def load(self, part: str, parameters: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors of `weights` or `optimizer`; with `parameters`, only from the files that hold those."""
        wanted = self.names(part) if parameters is None else sorted({f"{part}/{file_of(p)}" for p in parameters})
        tensors: dict[str, Tensor] = {}
        for name in wanted:
            try:
                tensors |= load_file(self.folder / name)
            except (SafetensorError, FileNotFoundError) as error:
                raise ArtefactError(f"{self.folder / name} cannot be read ({error}).") from None
        return tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, read from the headers alone."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.names():
            with safe_open(self.folder / name, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return shapes

    def faults(self) -> list[str]:
        """Files whose content is not what was written, by checksum; reads everything."""
        files = self.manifest["files"].items()
        return [f"{name}: checksum differs" for name, r in files if sha256_of(self.folder / name) != r["sha256"]]


def steps_of(run: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, rising."""
    parent = run / "checkpoints"
    found = (_STEP.match(path.name) for path in parent.iterdir()) if parent.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, None when there is none yet. Raises ArtefactError when it is damaged."""
    steps = steps_of(run)
    return Checkpoint.open(step_folder(run, steps[-1])) if steps else None


def find(path: Path) -> Checkpoint:
    """The checkpoint that `path` names: itself, or the newest of a run folder. Raises ArtefactError."""
    if (path / "manifest.json").exists():
        return Checkpoint.open(path)
    checkpoint = latest(path)
    if checkpoint is None:
        raise ArtefactError(f"{path} holds no checkpoint: expected a run folder of `moce pretrain`, or step-NNNNNNNN.")
    return checkpoint


def write_part(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write tensors to the files they belong to; returns size and checksum by file name.

    For `optimizer`, keys are NAME.exp_avg and NAME.exp_avg_sq. Processes call it with tensors of different files.
    """
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(f"{part}/{file_of(name)}", {})[name] = tensor.contiguous()
    (folder / part).mkdir(parents=True, exist_ok=True)
    records = {}
    for name, content in by_file.items():
        save_file(content, folder / name)
        with open(folder / name, "rb") as written:
            os.fsync(written.fileno())
        records[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    return records


def draft_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return final.with_name(f".{final.name}.draft")


def publish(final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into the draft and give it its name; one process calls this, when all have written."""
    draft = draft_folder(final)
    write_json(draft / "manifest.json", {"format": FORMAT, **manifest})
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and drafts that a kill left behind."""
    for step in steps_of(run)[:-keep]:
        shutil.rmtree(step_folder(run, step))
    for draft in (run / "checkpoints").glob(".step-*.draft"):
        shutil.rmtree(draft)
