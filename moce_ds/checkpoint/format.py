"""The checkpoint format: the same files for any number of processes, `ep_size` or ZeRO stage.

        step-00001000/
          manifest.json                             step, settings, checksums of the files and of itself; written last
          weights/shared.safetensors                fp32: embeddings, norms, gates, head
          weights/block-03.safetensors              an encoder block without its experts; decoder-block-00 likewise
          weights/block-03-expert-002.safetensors   one *global* expert of one block
          optimizer/...                             the same file names: NAME.exp_avg and NAME.exp_avg_sq
          routing.safetensors                       with experts by cluster: the tables of routes (`records.py`)
          state/...                                 of tuning: NAME.ema (running average), NAME.best (best weights by
                                                    validation), and the statistics of BatchNorm layers

A folder has its final name only when it is complete. Nothing here needs DeepSpeed, a process group, or pickle.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from moce_ds.checkpoint.records import RoutingTable, check_manifest
from moce_ds.checkpoint.tensor_file import RESTORE, checksum, damaged, read_checked, tensors_in, write_tensors
from moce_ds.common.errors import ArtefactError, OtherVersionError
from moce_ds.common.storage.artefact import Rows, is_marked, mebibytes
from moce_ds.common.storage.checksums import Findings
from moce_ds.common.storage.encoder_folder import ModelShape
from moce_ds.common.storage.files import read_json, reads_from, sync, valid_record, writes_to
from moce_ds.models.parameters import place_of

if TYPE_CHECKING:  # verbs without torch read records with this module
    from torch import Tensor

FORMAT = "moce_ds checkpoint 3"
_READABLE = (FORMAT, "moce_ds checkpoint 2")  # which has the tables of routes in the manifest
_ANY_FORMAT = re.compile(r"moce_ds checkpoint \d+")
MANIFEST, ROUTING = "manifest.json", "routing.safetensors"
WEIGHTS, OPTIMIZER, STATE = "weights", "optimizer", "state"
_FILE = re.compile(rf"^(({WEIGHTS}|{OPTIMIZER}|{STATE})/[a-z0-9-]+\.safetensors|{re.escape(ROUTING)})$")
_STEP = re.compile(r"^step-(\d{8})$")
_WRITERS = 4  # threads: some copy and hash while others wait for the disk


def file_of(parameter: str) -> str:
    """The file name (without folder) of a parameter: the file of its expert, of its block, or the shared one."""
    place = place_of(parameter)
    if place is None:
        return "shared.safetensors"
    expert = "" if place.expert is None else f"-expert-{place.expert:03d}"
    return f"{'decoder-' if place.in_decoder else ''}block-{place.block:02d}{expert}.safetensors"


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


class Routes(NamedTuple):
    """The expert of every cluster in every expert layer, int64 [M, L], and the clusters' shares of the training images,
    float64 [M]."""

    expert_ML: NDArray[np.int64]
    cluster_share_M: NDArray[np.float64]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: its folder.
        manifest: `step`, `skipped` (steps without an update), `config` (settings tree), `model`, `clusters_hash`,
            `shards_fingerprint`, `images_read`, `routing`, `files`.
    """

    kind: ClassVar[str] = "checkpoint"
    marks: ClassVar[tuple[str, ...]] = (MANIFEST,)
    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.manifest["step"])

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest, with the checksums of all files: equal for copies of the same checkpoint."""
        return _digest(self.manifest)

    @property
    def made_from(self) -> dict[str, Any]:
        """Settings of the run and digests of the images and clusters; None if the checkpoint does not have them."""
        keys = ("config", "shards_fingerprint", "clusters_hash", "task_fingerprint")
        return {key: self.manifest.get(key) for key in keys}

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether `path` is the folder of a checkpoint."""
        return is_marked(path, cls.marks)

    @classmethod
    def open(cls, folder: Path, /, resumable: bool = False) -> "Checkpoint":
        """Read the manifest and check that every file exists with its size.

        Args:
            folder: its folder.
            resumable: whether a run is to resume from it. If not, its optimizer folder may be missing as a whole, as in
                copies for sharing the weights.

        Raises:
            OtherVersionError: another version wrote it.
            ArtefactError: something is missing or truncated; names it.
        """
        path = folder / MANIFEST
        manifest = read_json(path, "a checkpoint", "moce pretrain")
        stored = manifest.get("format") if isinstance(manifest, dict) else None
        if stored not in _READABLE:
            kind = OtherVersionError if _ANY_FORMAT.fullmatch(str(stored)) else ArtefactError
            raise kind(f"{path}: format {stored!r}; this version reads {FORMAT!r}. Use the version that wrote it.")
        if manifest.pop("sha256", None) != _digest(manifest):
            raise ArtefactError(f"{path} is damaged: its checksum is not the one it was written with.")
        check_manifest(manifest, path)
        without_optimizer = not resumable and not (folder / OPTIMIZER).exists()
        for name, record in manifest["files"].items():
            if not _FILE.match(name):
                raise ArtefactError(f"{path} names {name!r}, which is not a file of a checkpoint.")
            if without_optimizer and name.startswith(f"{OPTIMIZER}/"):
                continue
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != record["bytes"]:
                actual = "missing" if size is None else f"{size} bytes"
                raise ArtefactError(f"{path} is damaged: {actual}, expected {record['bytes']} bytes.")
        return cls(folder, manifest)

    def entry(self, *keys: str) -> Any:
        """The manifest's entry under nested `keys`. Raises ArtefactError if there is none."""
        value: Any = self.manifest
        for key in keys:
            if isinstance(value, dict) and key in value:
                value = value[key]
                continue
            raise ArtefactError(
                f"{self.folder / 'manifest.json'} has no entry {'.'.join(keys)}, which is needed here: name a "
                "checkpoint of `moce pretrain` that holds it."
            )
        return value

    @property
    def experts(self) -> dict[str, Any] | None:
        """`num_experts`, `layers` and `gate` of a model with experts; None for a dense one. Raises ArtefactError."""
        experts: dict[str, Any] | None = self.entry("model", "experts")
        return experts

    @cached_property
    def routes(self) -> Routes:
        """The routes of a model with experts by cluster. Raises ArtefactError if it has none, or they are damaged."""
        name = self.routing_file
        if name is None:
            tables = (self.entry("routing", "expert_ML"), self.entry("routing", "cluster_share_M"))
            return Routes(np.array(tables[0], np.int64), np.array(tables[1], np.float64))
        return self.routes_in(self.content(name).tobytes())

    @property
    def routing_file(self) -> str | None:
        """The file of the routes; None if there are none, or if they are in the manifest, as in earlier versions."""
        name: str | None = (self.manifest.get("routing") or {}).get("file")
        return name

    def routes_in(self, content: bytes) -> Routes:
        """The routes in the content of `routing_file`. Raises ArtefactError."""
        name, experts = str(self.routing_file), self.experts
        table = RoutingTable.parse(content, self.folder / name)
        if experts and (table.layers, table.n_experts) != (tuple(experts["layers"]), experts["num_experts"]):
            raise ArtefactError(f"{self.folder / name} holds the routes of another model: {RESTORE}")
        return Routes(table.expert_ML, table.cluster_share_M)

    def names(self, part: str = WEIGHTS) -> list[str]:
        """Files of `weights`, `optimizer` or `state`, relative to the folder."""
        return sorted(name for name in self.manifest["files"] if name.startswith(f"{part}/"))

    def load(self, part: str, parameters: Iterable[str] | None = None) -> "dict[str, Tensor]":
        """Tensors of `weights`, `optimizer` or `state`; with `parameters`, only from the files that contain those.

        Raises:
            ArtefactError: a file is missing, or its content is not what was written.
        """
        from torch import from_numpy  # imported here, because verbs without torch read records with this module

        wanted = self.names(part) if parameters is None else sorted({f"{part}/{file_of(p)}" for p in parameters})
        self.check_holds(wanted)
        tensors: dict[str, Tensor] = {}
        for name in wanted:
            tensors |= self.tensors(name, from_numpy(self.content(name)))
        return tensors

    def check_holds(self, names: Iterable[str]) -> None:
        """Raise ArtefactError if the checkpoint does not have one of these files."""
        if lacking := [name for name in names if name not in self.manifest["files"]]:
            raise ArtefactError(f"{self.folder} holds no {lacking[0]}: it belongs to another model.")

    def bytes_of(self, name: str) -> int:
        """The size of a file."""
        return int(self.manifest["files"][name]["bytes"])

    def check(self, name: str) -> None:
        """Read a file and compare its checksum. Raises ArtefactError if it is not what was written."""
        if checksum(self.folder / name) != self.manifest["files"][name]["xxh3"]:
            raise damaged(self.folder / name)

    def content(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a file, read once and checked. Raises ArtefactError if they are not what was written."""
        return read_checked(self.folder / name, self.manifest["files"][name])

    def tensors(self, name: str, content: "Tensor") -> "dict[str, Tensor]":
        """The tensors in the `content` of a file, as views of it, wherever it is. Raises ArtefactError."""
        return tensors_in(content, self.folder / name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, read from the headers only. Raises ArtefactError."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.names():
            with reads_from(self.folder / name, RESTORE), safe_open(self.folder / name, "np") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return shapes

    def describe(self) -> Rows:
        """Step, shape, parameters, files, experts and routes. Raises ArtefactError."""
        manifest, shapes = self.manifest, self.shapes()
        model, read = manifest.get("model"), manifest.get("images_read")
        experts = model["experts"] if model else None
        rows = {"step": f"{self.step}" + ("" if read is None else f" ({read} images read)")}
        if model:
            shape = valid_record(ModelShape, model["shape"], f"{self.folder}: shape", "a run", "moce pretrain")
            rows["encoder"] = str(shape)
        rows |= {
            "parameters": f"{sum(int(np.prod(s)) for s in shapes.values()):,} in {len(shapes)} tensors",
            "files": f"{len(manifest['files'])}, {mebibytes(r['bytes'] for r in manifest['files'].values())}",
        }
        if not (self.folder / OPTIMIZER).exists():
            rows["optimizer"] = "none: a new run can start from these weights, no run can resume"
        if experts:
            rows["experts"] = f"{experts['num_experts']} in each of blocks {', '.join(map(str, experts['layers']))}"
        if experts and manifest.get("routing"):
            expert_ML = self.routes.expert_ML
            rows["routes"] = f"{len(np.unique(expert_ML, axis=0))} taken by {len(expert_ML)} clusters"
        return rows

    def verify(self) -> Findings:
        """Everything that differs from what was written; reads all of it.

        Raises:
            ArtefactError: a file is missing or truncated, including those of an optimizer folder that was removed.
        """
        return Findings(Checkpoint.open(self.folder, resumable=True).faults())

    def faults(self) -> list[str]:
        """What is wrong with the files whose checksum differs from the recorded one; reads all of them."""
        faults = []
        for name in sorted(self.manifest["files"]):
            try:
                self.check(name)
            except ArtefactError as error:
                faults.append(str(error))
        return faults


def steps_of(run: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, in rising order."""
    parent = run / "checkpoints"
    matches = (_STEP.match(path.name) for path in parent.iterdir()) if parent.is_dir() else ()
    return sorted(int(match[1]) for match in matches if match)


def find(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest of a run folder, to read its weights (see `resumable`).

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    if (path / MANIFEST).exists():
        return Checkpoint.open(path)
    steps = steps_of(path)
    if not steps:
        raise ArtefactError(f"{path} holds no checkpoint: expected a run folder of `moce pretrain`, or step-NNNNNNNN.")
    try:
        checkpoint = Checkpoint.open(step_folder(path, steps[-1]))
    except ArtefactError as error:
        before = f" {step_folder(path, steps[-2])} is the one before it." if len(steps) > 1 else ""
        error.args = (f"{error}{before}",)
        raise
    if "task_fingerprint" in checkpoint.manifest:
        raise ArtefactError(f"{path} is a tuning run; when complete, its encoder is in {path / 'tuned'}.")
    return checkpoint


def grouped(part: str, tensors: "Mapping[str, Tensor]") -> "dict[str, dict[str, Tensor]]":
    """Tensors of `weights` or `optimizer` by their file; keys of `optimizer` are NAME.exp_avg, ...."""
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(f"{part}/{file_of(name)}", {})[name] = tensor
    return by_file


def write_files(folder: Path, files: "Iterable[tuple[str, Mapping[str, Tensor]]]") -> dict[str, dict[str, Any]]:
    """Write files into a draft, each as soon as `files` yields it; returns size and checksum by file name.

    Processes write different files.

    Raises:
        ArtefactError: a file cannot be written, as on a full disk; names it with the reason.
    """

    def write(item: "tuple[str, Mapping[str, Tensor]]") -> tuple[str, dict[str, Any]]:
        path = folder / item[0]
        with writes_to(path):
            path.parent.mkdir(exist_ok=True)
            return item[0], write_tensors(path, item[1])

    with ThreadPoolExecutor(_WRITERS) as pool:
        return dict(pool.map(write, files))


def write_checkpoint(
    final: Path, weights: "Mapping[str, Tensor]", moments: "Mapping[str, Tensor]", manifest: dict[str, Any]
) -> Checkpoint:
    """Write a complete checkpoint in one process: its tensors by global names, and its manifest without `files`.

    Raises:
        ArtefactError: it cannot be written; nothing of it remains.
    """
    draft = final.with_name(f".{final.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        files = write_files(draft, (grouped(WEIGHTS, weights) | grouped(OPTIMIZER, moments)).items())
        publish(draft, final, {**manifest, "files": files})
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Checkpoint.open(final)


def publish(draft: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into the draft and rename it; one process calls this after all have written.

    A checkpoint of the same step is moved aside first and removed last.

    Args:
        manifest: its `routing`, a `RoutingTable` or None, becomes a file, which the manifest names.

    Raises:
        ArtefactError: the manifest cannot be written, or the draft is missing.
    """
    replaced = final.with_name(f".{final.name}.replaced")
    with writes_to(final):
        # Not `write_json`, which creates folders: a draft that another attempt has removed must not reappear.
        content = {"format": FORMAT, **_with_routing_file(draft, manifest)}
        (draft / MANIFEST).write_text(json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n")
        for written in (draft / MANIFEST, *draft.iterdir(), draft):
            sync(written)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        draft.rename(final)
        sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _with_routing_file(draft: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    table = manifest.get("routing")
    if not isinstance(table, RoutingTable):
        return manifest
    table.write(draft / ROUTING)
    record = {"bytes": (draft / ROUTING).stat().st_size, "xxh3": checksum(draft / ROUTING)}
    return {**manifest, "routing": {"file": ROUTING}, "files": {**manifest["files"], ROUTING: record}}


def _digest(manifest: Mapping[str, Any]) -> str:
    """Checksum of a manifest's content; writing and reading do not change it."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def prune(run: Path, keep: int, every: int | None = None) -> None:
    """Remove all checkpoints except the newest `keep` and those of every `every` steps."""
    with suppress(FileNotFoundError):  # an older attempt that is still running may remove the same
        for left in (run / "checkpoints").glob(".step-*"):  # left by a kill
            shutil.rmtree(left)
        for step in steps_of(run)[:-keep]:
            if not (every and step % every == 0):
                # Rename first, so that a kill leaves no partial checkpoint under its final name.
                shutil.rmtree(step_folder(run, step).rename(run / "checkpoints" / f".step-{step:08d}.removed"))


def set_aside(run: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that it is neither used nor counted; returns its new path."""
    aside = run / "checkpoints" / f"damaged-step-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    return step_folder(run, step).rename(aside)
