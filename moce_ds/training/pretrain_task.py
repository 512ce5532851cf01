"""Pre-training as a task: masked images, the routes of their clusters, and what the log says of both.

Axes: B images of a micro-batch of this process, G those over all processes, C channels, H, W pixels, N patches,
L expert layers, E experts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.checkpoint.format import Checkpoint
from moce_ds.checkpoint.lease import RunLease
from moce_ds.data.loader import Batch, Loader
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.data.transform import ImageInput, RandomCrop
from moce_ds.distributed.randomness import GATE_NOISE, hashed
from moce_ds.distributed.runtime import Runtime
from moce_ds.host.threads import keep
from moce_ds.models.mae import MaskedAutoencoder, mask_noise
from moce_ds.models.moce import Moce, Routing
from moce_ds.models.sdr import Teacher
from moce_ds.text import counted
from moce_ds.training.engine import Engine
from moce_ds.training.inputs import Inputs
from moce_ds.training.metric_logger import MetricLogger
from moce_ds.training.pictures import RunPictures
from moce_ds.training.router import LocalSampler, Router, RouteStatistics, StepTable
from moce_ds.training.schedule import Schedule
from moce_ds.training.settings import BatchArithmetic, DataSettings, ExpertSettings, PretrainRunSettings
from moce_ds.training.skipping import SkippedSteps
from moce_ds.training.task import Task

_DEAL_EVERY = 32  # steps after which images are dealt to ranks by a new route table


class PretrainTask(Task):
    """Random crops of a shard set, of which a masked autoencoder reconstructs the hidden patches.

    Args:
        model: with its experts in their places, slot_LE.
        inputs: the images, and the clusters that route them.
        input: size and normalisation of an image.
        teacher: what an SDR is also compared with.
        data, experts, run: settings of crops, of routes, and of seed and pictures.
        lease: of the run folder, where pictures go.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        slot_LE: NDArray[np.int64],
        inputs: Inputs,
        input: ImageInput,
        teacher: Teacher | None,
        *,
        data: DataSettings,
        experts: ExpertSettings,
        run: PretrainRunSettings,
        schedule: Schedule,
        batches: BatchArithmetic,
        lease: RunLease,
        runtime: Runtime,
    ) -> None:
        shards, clustered = inputs.shards, inputs.clustered
        self.count = shards.count
        self._shards, self._data, self._input, self._teacher = shards, data, input, teacher
        self._seed, self._num_patches = run.seed, model.shape.num_patches
        self._schedule, self._batches, self._runtime = schedule, batches, runtime
        self._pictures = RunPictures(model, shards, input, run.seed, run.picture_every, lease, runtime)
        self._sampler: ShuffledSampler | LocalSampler = ShuffledSampler(shards.count, batches.micro_global, run.seed)
        self._router: Router | None = None
        if clustered is not None:
            assert isinstance(model, Moce)
            self._router = Router(model, clustered.ids_N, slot_LE, experts, run.seed, runtime)
            if experts.loader_locality and experts.ep_size > 1:
                world_size, ep_size = runtime.world_size, experts.ep_size
                self._sampler = LocalSampler(self._sampler, clustered.ids_N, slot_LE, world_size, ep_size)
        self._statistics: RouteStatistics | None = None
        self._loader: Loader | None = None
        self._table: StepTable | None = None
        self._routing: Routing | None = None
        self._moved_parts: list[float] = []

    def restore(self, checkpoint: Checkpoint) -> None:
        """Compute with as many threads as before, and deal images by the same tables."""
        if message := keep(checkpoint.manifest.get("threads")):
            self._runtime.say(message)
        same_parts = checkpoint.entry("config", "optim", "accumulation") == self._batches.accumulation
        if isinstance(self._sampler, LocalSampler) and same_parts:  # else a table's first micro-batch is another one
            self._sampler.tables = LocalSampler.tables_from_tree(checkpoint.entry("dealt_by"))

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Images on this process's device."""
        first = first_step * self._batches.accumulation
        if self._router is not None:
            if isinstance(self._sampler, LocalSampler) and not self._sampler.tables:
                self._sampler.tables = [(first, self._router.prepare(None).expert_MLK[:, :, 0])]
            self._statistics = RouteStatistics(self._router)
        self._loader = Loader(
            self._shards,
            lambda index: self._sampler.batch(index).part(self._runtime.rank, self._runtime.world_size),
            RandomCrop(self._seed, self._data.crop_scale, flip=self._data.flip),
            self._input,
            first=first,
            last=self._schedule.steps * self._batches.accumulation,
            batch_size=self._batches.micro,
            threads=self._data.threads,
            device=self._runtime.device,
        )
        return iter(self._loader)

    def plan(self, step: int, part: int) -> int:
        """Plan the routes of a micro-batch; the digest is that of the plan."""
        if part == 0:
            self._begin_step(step)
        if self._router is None or self._table is None:
            return 0
        # Planned from the ids that were asked for: the same on every process, also where one replaces an image.
        ids_G = self._sampler.batch(step * self._batches.accumulation + part).ids
        share = self._schedule.imbalance_share(step)
        self._routing = self._router.route(self._table, ids_G, share)
        plan = self._routing.plan
        self._moved_parts.append(float(np.mean([layer.moved / len(layer.image_N) for layer in plan.layers])))
        return plan.digest

    def _begin_step(self, step: int) -> None:
        # Only the token gate draws from torch's generator; seeded by the step, its noise does not depend on resuming.
        torch.manual_seed(int(hashed(GATE_NOISE, self._seed, step, self._runtime.rank)[()] >> np.uint64(1)))
        self._moved_parts = []
        self._table = self._router.table(step) if self._router else None

    def losses(self, engine: Engine, batch: Batch, step: int, part: int) -> dict[str, Tensor]:
        """The model's own."""
        noise_BN = mask_noise(self._seed, batch.ids_B, batch.epochs_B, self._num_patches)
        inputs: list[Any] = [batch.images_BCHW, noise_BN.to(self._runtime.device, non_blocking=True)]
        inputs += [further for further in (self._routing, self._teacher) if further is not None]
        losses: dict[str, Tensor] = engine(*inputs).losses
        return losses

    def sums(self) -> dict[str, float]:
        """The share of rows that moved between processes, and the images that were replaced."""
        assert self._loader is not None
        shares = self._batches.accumulation * self._runtime.world_size
        return {"moved": sum(self._moved_parts) / shares, "images_replaced": float(len(self._loader.replaced))}

    def after_step(self, step: int, skips: SkippedSteps, *, last: bool) -> None:
        """Start on the route table of the next step: it reaches the host while this step is recorded."""
        if self._router is not None and not last:
            self._router.prepare(step)

    def record(self, step: int, sums: Mapping[str, float]) -> dict[str, Any]:
        """What moved, and what each expert layer did with the last micro-batch."""
        own: dict[str, Any] = {}
        if self._statistics is not None and self._table is not None:
            ids_G = self._sampler.batch(step * self._batches.accumulation - 1).ids
            layers = self._statistics.of_step(self._table, ids_G)
            own = {"moved": round(sums["moved"], 5), "layers": layers}
            if step >= self._schedule.imbalance_steps:
                self._warn_of_dead_experts(step, self._statistics)
        return own | {"images_replaced": int(sums["images_replaced"])}

    def _warn_of_dead_experts(self, step: int, statistics: RouteStatistics) -> None:
        for block, expert in statistics.newly_dead():
            self._runtime.warn(
                f"step {step}: no cluster chooses expert {expert} of block {block}. Raise "
                "experts.balance_weight, or set experts.balance=sinkhorn."
            )

    def after_record(self, step: int, logger: MetricLogger, *, last: bool) -> None:
        """Deal images by a new table, and draw pictures, where they are due."""
        if isinstance(self._sampler, LocalSampler) and step % _DEAL_EVERY == 0:
            assert self._router is not None
            table = self._router.prepare(None).expert_MLK[:, :, 0]
            self._sampler.use(table, step * self._batches.accumulation)
        if self._pictures.due(step) or last:
            self._pictures.draw(self._router, step, logger)

    def manifest(self, step: int) -> dict[str, Any]:
        """Threads, the routes without noise, and the tables that images are dealt by."""
        return {
            "threads": torch.get_num_threads(),
            "routing": self._router.record(step) if self._router else None,
            "dealt_by": self._sampler.to_tree() if isinstance(self._sampler, LocalSampler) else [],
        }

    def report_replaced(self) -> None:
        """Name the images of all processes that had to be replaced; a collective."""
        sources = self._loader.replaced_sources() if self._loader else []
        listed = [line for text in self._runtime.texts("\n".join(sources)) for line in text.split("\n")]
        named = sorted({line for line in listed if line})
        if named:
            shown = "\n  ".join(named[:20]) + (f"\n  and {len(named) - 20} more" if len(named) > 20 else "")
            were = "was" if len(named) == 1 else "were"
            self._runtime.say(f"{counted(len(named), 'damaged image')} {were} replaced:\n  {shown}")
