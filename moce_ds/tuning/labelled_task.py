"""The interface of a labelled task, and functions for all tasks: batches from worker processes, and AdamW's groups.

Classification, detection and segmentation are such tasks.

Axes: B items (images) of a micro-batch of one process.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from moce_ds.common.compat import repair_torchvision
from moce_ds.common.errors import MoceError
from moce_ds.common.host.machine import machine_fault
from moce_ds.data.sampler import ShuffledSampler
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.parameters import encoder_block, is_embedding
from moce_ds.training.settings import EngineSettings
from moce_ds.tuning.settings import TuneOptimSettings

repair_torchvision()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402  (needs the repair)

Measures = dict[str, float]


class LabelledTask(Protocol):
    """A model and the data to tune it on. Every process holds one, made from the same settings and seed.

    Attributes:
        model: on the host, with the same weights on all processes. Parameters with `requires_grad=False` are not saved
            in checkpoints: they must depend only on the settings.
        count: training items, numbered from 0.
        fingerprint: of the data and the first weights; a resumed run must have the same.
        criterion: the measure of `validate` whose largest value chooses the weights; None without a validation split.
    """

    model: nn.Module
    count: int
    fingerprint: str
    criterion: str | None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups, each with `params`, `weight_decay` and `lr_scale`; see `parameter_groups`."""
        ...

    def batch(self, ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> Any:
        """The training items `ids_B`, read in the epochs `epochs_B`, ready for `loss`, on the host.

        Called in worker processes. Depends only on ids, epochs and seed (`augmentation.seed_item`), so that a run can
        be resumed. Returns a named tuple, lists or dictionaries of tensors.

        Raises:
            DataError: an item cannot be read.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch; `model` is `self.model` under DeepSpeed (autocast), in training mode.

        The batch is on the host: the task moves it to the model's device. The global torch generator has been seeded
        by (seed, step, rank).
        """
        ...

    def validate(self, model: nn.Module, runtime: Runtime) -> Measures:
        """Measures on the validation split, the same on every process; `model` in evaluation mode, without gradients.

        A collective. Called only if there is a `criterion`.
        """
        ...

    def finish(self, model: nn.Module, runtime: Runtime) -> Measures:
        """The final measures, of the test split; also writes the task's output, such as an encoder folder.

        A collective, called once, with the final weights, as `validate`. Output must be written completely or not at
        all.
        """
        ...


def feed(task: LabelledTask, sampler: ShuffledSampler, indices: range, workers: int, runtime: Runtime) -> Iterator[Any]:
    """This process's part of the global batches `indices`, on the host. Raises the errors of `task.batch`."""

    def make(index: int) -> Any:
        part = sampler.batch(index).part(runtime.rank, runtime.world_size)
        return task.batch(part.ids, part.epochs)

    return prepared(make, indices, workers, runtime.device)


def prepared(make: Callable[[int], Any], indices: range, workers: int, device: torch.device) -> Iterator[Any]:
    """`make(index)` for each index in order, by `workers` processes (0: by this one), for use on `device`.

    Raises (while iterating):
        MoceError: `make` raised it.
        MachineError: a process died, or there is too little shared memory for its results.
    """
    loader = DataLoader(
        _Made(make),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # the workers inherit data in memory
        pin_memory=device.type == "cuda",
    )
    for item in _unless_one_dies(loader):
        if isinstance(item, MoceError):
            raise item
        yield item


def _unless_one_dies(loader: Iterable[Any]) -> Iterator[Any]:
    items = iter(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            fault = machine_fault(error)
            if fault is None:
                raise
            raise fault from None
        yield item


class _Made(Dataset[Any]):
    """`make(index)` of each index. Returns errors as values, because an error raised in a worker adds a traceback."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> Any:
        try:
            made = self._make(index)
            if get_worker_info() is not None:
                _share(made)
            return made
        except MoceError as error:
            return error
        except (OSError, MemoryError, RuntimeError) as error:
            fault = machine_fault(error)
            if fault is None:
                raise
            return fault


def _share(made: Any) -> None:
    """Move tensors to shared memory.

    Otherwise the worker does it in a thread, which ends without an error if /dev/shm is too small.
    """
    if isinstance(made, Tensor):
        made.share_memory_()
    elif isinstance(made, dict):
        _share(list(made.values()))
    elif isinstance(made, list | tuple):
        for part in made:
            _share(part)


def parameter_groups(model: nn.Module, vit: VisionTransformer, optim: TuneOptimSettings) -> list[dict[str, Any]]:
    """Groups of all parameters of `model` that learn; `vit` is a part of it, or all of it.

    With N blocks, block b (from 0) has `layer_decay ** (N - b)` of the learning rate (`lr_scale`), embeddings
    `layer_decay ** (N + 1)`, all else the full rate. Weight decay is on matrices only, not on tokens and positions.

    timm's groups put the final norm with the last block, and leave the last block at the full rate if the ViT has no
    head, as in a detector. Here the rates are those of BEiT, MAE and ViTDet in both cases.
    """
    inside = {id(parameter): name for name, parameter in vit.named_parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = inside.get(id(parameter), "")
        scale = optim.layer_decay ** _distance(name, len(vit.blocks))
        plain = parameter.ndim < 2 or name in vit.no_weight_decay()
        decay = 0.0 if plain else optim.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def _distance(name: str, depth: int) -> int:
    """Layers between a parameter of the ViT and the head; 0 for parameters after the blocks or outside the ViT."""
    block = encoder_block(name)
    if block is not None:
        return depth - block
    return depth + 1 if is_embedding(name) else 0


def tuned_execution(vit: VisionTransformer, engine: EngineSettings) -> VisionTransformer:
    """Configure how the blocks of a ViT run during tuning, and return it; affects only speed and memory."""
    vit.set_grad_checkpointing(engine.checkpoint_activations)
    if engine.compile:
        for block in vit.blocks:
            block.compile()
    return vit
