"""The common part of detection and segmentation: an encoder as backbone, the check of the data, and the weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from moce_ds.checkpoint.format import steps_of
from moce_ds.common.host.program import shared_progress
from moce_ds.common.storage.encoder_folder import WEIGHTS
from moce_ds.common.storage.files import atomic_file, save_tensors, writes_to
from moce_ds.distributed.randomness import INIT, hashed
from moce_ds.distributed.runtime import Runtime
from moce_ds.encoders.open import open_encoder
from moce_ds.models.vit import Encoder
from moce_ds.training.settings import EngineSettings
from moce_ds.tuning.labelled_task import Measures, parameter_groups, prepared, tuned_execution
from moce_ds.tuning.pyramid import SimpleFeaturePyramid
from moce_ds.tuning.settings import TuneOptimSettings


class DenseModel(Protocol):
    """A model that contains a feature pyramid."""

    backbone: SimpleFeaturePyramid


class DenseData(Protocol):
    """A split."""

    def __len__(self) -> int: ...

    def check_headers(self, numbers: Iterable[int]) -> None:
        """Check the headers of the images `numbers` and of their annotations. Raises DataError."""

    def look(self, number: int) -> Any:
        """Read an image and its annotations, more strictly than training does. Raises DataError."""


M = TypeVar("M", bound=DenseModel)
DataT = TypeVar("DataT", bound=DenseData)


def build(folder: Path, seed: int, engine: EngineSettings, make: Callable[[Encoder], M]) -> tuple[Encoder, M]:
    """An encoder on the host, and the model that `make` builds from it, with the same weights on all processes."""
    encoder = open_encoder(folder, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(hashed(INIT, seed)[()] >> np.uint64(1)))
        model = make(encoder)
    tuned_execution(model.backbone.body.vit, engine)
    return encoder, model


class DenseTask(ABC, Generic[DataT]):
    """The common part of the tasks (`moce_ds.tuning.labelled_task.LabelledTask`) of detection and segmentation.

    Attributes:
        model: the model, which contains a pyramid.
        train: the training split.
        val, test: the splits for measuring, if there are any.
        workers: processes that prepare images.
        precision: of training and measuring, "fp32" or "bf16".
    """

    def __init__(
        self,
        model: Any,
        train: DataT,
        val: DataT | None,
        test: DataT | None,
        *,
        optim: TuneOptimSettings,
        workers: int,
        precision: str,
        out: Path,
    ) -> None:
        self.model, self.train, self.val, self.test = model, train, val, test
        self.workers, self.precision = workers, precision
        self._optim, self._out = optim, out

    def check_data(self, runtime: Runtime) -> None:
        """Check all headers, then read every image of all splits once, before the first step; a collective.

        The processes and their workers share the images. A run with a checkpoint has already passed the check.

        Raises:
            DataError: on all processes.
        """
        if runtime.max([float(bool(steps_of(self._out)))])[0]:
            return
        named = (("train", self.train), ("val", self.val), ("test", self.test))
        splits = {name: data for name, data in named if data is not None}
        mine = {name: range(runtime.rank, len(data), runtime.world_size) for name, data in splits.items()}
        with runtime.raise_on_all_ranks():
            for name, data in splits.items():
                data.check_headers(mine[name])
        for name, data in splits.items():
            seen = prepared(data.look, mine[name], self.workers, torch.device("cpu"))
            bar = shared_progress(seen, len(mine[name]), len(data), f"checking {name}", unit="img")
            self.looked_at(bar, runtime)

    @abstractmethod
    def looked_at(self, seen: Iterable[Any], runtime: Runtime) -> None:
        """Check what `look` returns for each of this process's images of a split; a collective. Raises DataError."""

    @abstractmethod
    def measured(self, model: nn.Module, data: DataT, runtime: Runtime) -> Measures:
        """Measures on a split, whose images the processes share; a collective."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups, with layer decay."""
        return parameter_groups(self.model, self.model.backbone.body.vit, self._optim)

    def validate(self, model: nn.Module, runtime: Runtime) -> Measures:
        """Measures of the validation split; a collective."""
        assert self.val is not None
        return self.measured(model, self.val, runtime)

    def finish(self, model: nn.Module, runtime: Runtime) -> Measures:
        """Measures of the test split; writes the weights to the run's folder. A collective."""
        final = self.test if self.test is not None else self.val
        assert final is not None  # DenseSettings checks it
        found = self.measured(model, final, runtime)
        keep_weights(model, self._out, runtime)
        return found


@contextmanager
def evaluation(precision: str, runtime: Runtime) -> Iterator[None]:
    """Run a block without collectives in the precision of training; an error of one process is raised on all."""
    bf16 = precision == "bf16"
    with runtime.raise_on_all_ranks(), torch.autocast(runtime.device.type, torch.bfloat16, enabled=bf16):
        yield


def keep_weights(model: nn.Module, folder: Path, runtime: Runtime) -> None:
    """Write the model's weights to `folder`; a collective. Raises ArtefactError on all processes."""
    path = folder / WEIGHTS
    with runtime.raise_on_all_ranks(), writes_to(path):
        if runtime.is_main:
            with atomic_file(path) as draft:
                save_tensors(draft, {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()})
