"""Asynchronous writing of checkpoints.

A save has three parts. `start` gathers what this process writes. A thread copies it to host buffers during the forward
and backward pass of the next step; only the update waits for that (`wait_for_staging`). Other threads write the copies
into a draft. The agreement of each step carries a flag by which all processes learn that everyone has written its part.
Then `finish` renames the draft.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from moce_ds.checkpoint.deepspeed_state import Files, HostBuffers, snapshot
from moce_ds.checkpoint.format import ROUTING, prune, publish, step_folder, write_files
from moce_ds.checkpoint.lease import RunLease
from moce_ds.checkpoint.run_folder import ROUTING_OF_EARLIER_VERSIONS
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.errors import MoceError
from moce_ds.distributed.runtime import Runtime


class CheckpointManager:
    """Writes the checkpoints of one attempt; `start` and `finish` are collectives, `wait_for_staging` is not.

    Args:
        engine: the model under DeepSpeed.
        run: the run folder, and how many checkpoints are kept.
        lease: ownership of that folder.
        made_from: entries of every manifest that say what the run is made from.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        run: RunSettings,
        lease: RunLease,
        runtime: Runtime,
        made_from: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.lease, self.runtime = lease, runtime
        self._engine, self._run, self._made_from = engine, run, made_from
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=self._use_device)
        self._copied = Event()
        self._copied.set()
        self._writing: Future[dict[str, Any]] | None = None
        self._manifest: dict[str, Any] = {}

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread; an unfinished checkpoint remains a draft."""
        self._thread.shutdown()

    @property
    def written(self) -> bool:
        """Whether this process has written its part of the checkpoint, or failed to."""
        return self._writing is not None and self._writing.done()

    def start(self, manifest: dict[str, Any], state: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Begin the checkpoint of `manifest["step"]`; an unfinished one is finished first.

        `state` holds what a resumed run needs besides weights and moments; only an update may change it.

        Raises:
            ArtefactError, SupersededError: as `finish`.
        """
        self.finish()
        self._manifest = {**self._made_from, **manifest}
        draft = self.lease.draft(manifest["step"])
        with self.runtime.raise_on_all_ranks():
            if self.runtime.is_main:
                with self.lease.writing(manifest["step"]):
                    draft.mkdir()
        files = snapshot(self._engine, self.runtime, state)
        ready = torch.cuda.current_stream().record_event() if self.runtime.device.type == "cuda" else None
        self._copied.clear()
        self._writing = self._thread.submit(write_files, draft, self._copies(files, ready))
        self._writing.add_done_callback(lambda _: self._copied.set())  # also if copying failed
        if not self._run.async_checkpoint:
            self.finish()

    def wait_for_staging(self) -> None:
        """Wait until the copies are complete; only then may an update change the originals."""
        self._copied.wait()

    def finish(self) -> None:
        """Wait for the checkpoint in progress, if any, and rename its draft.

        Raises:
            ArtefactError: a process could not write, as on a full disk; the draft is removed.
            SupersededError: a newer attempt owns the run.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        draft = self.lease.draft(self._manifest["step"])
        records: dict[str, Any] = {}
        try:
            with self.runtime.raise_on_all_ranks():
                records = writing.result()
            parts = [json.loads(text) for text in self.runtime.texts(json.dumps(records))]
            with self.runtime.raise_on_all_ranks():
                if self.runtime.is_main:
                    self._publish(draft, {name: record for part in parts for name, record in sorted(part.items())})
        except MoceError:
            if self.runtime.is_main:
                shutil.rmtree(draft, ignore_errors=True)  # it may be what fills the disk
            raise

    def _use_device(self) -> None:
        """Use the process's GPU in the writer's thread: a new thread has device 0, and a context there takes memory."""
        if self.runtime.device.type == "cuda":
            torch.cuda.set_device(self.runtime.device)

    def _copies(self, files: Files, ready: torch.cuda.Event | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from self._buffers.copies(files, ready)
        self._copied.set()

    def _publish(self, draft: Path, files: dict[str, Any]) -> None:
        out, step = self._run.out, self._manifest["step"]
        with self.lease.writing(step):
            publish(draft, step_folder(out, step), {**self._manifest, "files": files})
            prune(out, self._run.keep_checkpoints, self._run.keep_every)
        if self._manifest["routing"]:  # beside the checkpoints, for readers that need no weights
            with self.lease.file(out / ROUTING, step) as routing:
                shutil.copyfile(step_folder(out, step) / ROUTING, routing)
            with self.lease.writing(step):
                (out / ROUTING_OF_EARLIER_VERSIONS).unlink(missing_ok=True)  # of an older step
