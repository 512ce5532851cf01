"""`moce finetune`: classification with an encoder and a linear head on the mean of its patch tokens.

The head sees exactly `Encoder.features`, so the result is an encoder folder and a matrix.

Axes: B images, N images of a split, K classes, D width, C channels, H, W pixels.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from moce_ds.checkpoint.run_folder import TUNED, read_result
from moce_ds.checkpoint.settings import RunSettings
from moce_ds.common.compat import repair_torchvision
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ConfigError, DataError
from moce_ds.common.host.program import shared_progress
from moce_ds.common.storage.files import atomic_folder, save_tensors, writes_to
from moce_ds.common.text import encoded, in_line
from moce_ds.data.shards import ShardSet
from moce_ds.data.task_images import labels_of, opened_images
from moce_ds.distributed.runtime import Runtime
from moce_ds.encoders.open import open_encoder
from moce_ds.evaluation.metrics import default_metric, judge
from moce_ds.evaluation.probe import held_out
from moce_ds.evaluation.results_file import known_by
from moce_ds.models.vit import Encoder, save_encoder
from moce_ds.training.engine import DivergedError
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import EngineSettings
from moce_ds.tuning.augmentation import Mixing, centre_transform, seed_item, training_transform
from moce_ds.tuning.labelled_task import Measures, parameter_groups, prepared, tuned_execution
from moce_ds.tuning.settings import AugmentSettings, FinetuneDataSettings, FinetuneSettings, TuneOptimSettings
from moce_ds.tuning.tune import tune

repair_torchvision()
from timm.layers import resample_abs_pos_embed  # noqa: E402  (needs the repair)
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

HEAD = "head.safetensors"
"""The head's file beside the tuned encoder."""

_HEAD_STD = 2e-5  # from MAE's fine-tuning: the first predictions are almost equal
_TEST_BATCH = 64  # images


@dataclasses.dataclass(frozen=True)
class Split:
    """Some images of a shard set.

    Attributes:
        ids_N: indices of the images in the shard set.
        labels: the class of each image [N]; or targets [N, K]: 1 shown, 0 not shown, -1 not counted.
    """

    images: ShardSet
    ids_N: NDArray[np.int64]
    labels: NDArray[np.integer]

    @property
    def count(self) -> int:
        """Number of images, N."""
        return len(self.ids_N)

    def part(self, chosen_N: NDArray[np.bool_]) -> "Split":
        """The images where `chosen_N` holds."""
        return Split(self.images, self.ids_N[chosen_N], self.labels[chosen_N])


@dataclasses.dataclass(frozen=True)
class Splits:
    """The splits of a task: `val`, if there is one, selects the best weights, and `test` measures them."""

    classes: list[str]
    train: Split
    val: Split | None
    test: Split

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes."""
        return self.train.labels.ndim == 2

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of images and labels of all splits."""
        digest = sha256(encoded("\0".join(self.classes)))
        for split in (self.train, self.val, self.test):
            if split is not None:
                digest.update(split.images.fingerprint.encode() + split.ids_N.tobytes() + split.labels.tobytes())
        return digest.hexdigest()


def make_splits(train: ShardSet, val: ShardSet | float | None, test: ShardSet, seed: int) -> Splits:
    """The splits of a task; `val` may be a share of `train`, stratified by class, 0-1.

    Raises:
        DataError: an image has no class; there is one class only; the splits do not have the same kind of labels, or
            one has a class that `train` lacks; a class with a single image would be split between training and
            validation.
    """
    if len(train.classes) < 2:
        raise DataError(
            f"{train.named}: {len(train.classes)} class(es); expected two or more, each a folder of images."
        )
    whole, tested = (_labelled(images, train) for images in (train, test))
    if not isinstance(val, float):
        return Splits(train.classes, whole, _labelled(val, train) if val else None, tested)
    counts_K = np.bincount(whole.labels) if whole.labels.ndim == 1 else np.zeros(0)
    if (counts_K == 1).any():
        alone = train.classes[int((counts_K == 1).argmax())]
        raise DataError(
            f"{train.named}: class {in_line(alone)} has a single image, which cannot both train and validate: add "
            "images of it, or give separate validation images with --val DATA."
        )
    held_N = held_out(whole.labels, val, seed)
    return Splits(train.classes, whole.part(~held_N), whole.part(held_N), tested)


def _labelled(images: ShardSet, train: ShardSet) -> Split:
    return Split(images, np.arange(images.count), labels_of(images, train))


class Batch(NamedTuple):
    """Images with a share of each class, 0-1, and how much each share counts, 0-1 (VOC's "difficult" do not)."""

    images_BCHW: Tensor
    targets_BK: Tensor
    counted_BK: Tensor


class Classification:
    """A `LabelledTask`: the images of `splits`, and `encoder` with a new head."""

    def __init__(
        self,
        encoder: Encoder,
        splits: Splits,
        data: FinetuneDataSettings,
        augment: AugmentSettings,
        optim: TuneOptimSettings,
        engine: EngineSettings,
        run: RunSettings,
        runtime: Runtime,
    ) -> None:
        """
        Raises:
            ConfigError: a setting does not fit the encoder, the labels, or the number of processes.
        """
        self._encoder, self._splits = encoder, splits
        self._data, self._augment, self._optim, self._engine, self._run = data, augment, optim, engine, run
        metric = data.metric or default_metric(splits.train.labels)
        if (metric == "map11") != splits.multi_label:
            labels = "several labels" if splits.multi_label else "one label"
            raise ConfigError(f"data.metric: {metric} does not apply to images with {labels} each: leave it out.")
        self.criterion: str | None = metric if splits.val else None
        self.count = splits.train.count
        self.fingerprint = sha256((splits.fingerprint + encoder.fingerprint).encode()).hexdigest()
        size = data.image_size or encoder.shape.image_size
        self._input = dataclasses.replace(encoder.input, size=size)
        self._shape = dataclasses.replace(encoder.shape, image_size=size)
        if size % encoder.shape.patch_size:
            raise ConfigError(
                f"data.image_size: {size} is not a multiple of the encoder's patch size {encoder.shape.patch_size}."
            )
        self._transform = training_transform(self._input, augment)
        self._mix = Mixing(augment, run.seed)
        if self._mix.in_pairs and batch_arithmetic(optim, runtime.world_size).micro % 2:
            raise ConfigError(
                f"optim.batch_size: {optim.batch_size} gives a process an odd number of images at a time; mixup "
                "and cutmix take them in pairs. Change it, or set augment.mixup=0 augment.cutmix=0."
            )
        self.model = self._built()

    def _built(self) -> VisionTransformer:
        """timm's ViT with the encoder's weights, its positions resized to the image size, and a new head."""
        torch.manual_seed(self._run.seed)
        own = {"num_classes": len(self._splits.classes), "global_pool": "avg", "fc_norm": self._shape.pooled_norm}
        drop_path = self._augment.drop_path
        model = VisionTransformer(**self._shape.timm_arguments() | own, drop_path_rate=drop_path)
        state = self._encoder.model.state_dict()
        side = self._shape.image_size // self._shape.patch_size
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [side, side])
        nn.init.trunc_normal_(model.head.weight, std=_HEAD_STD)
        nn.init.zeros_(model.head.bias)
        model.load_state_dict(state | {f"head.{name}": t for name, t in model.head.state_dict().items()})
        return tuned_execution(model, self._engine)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Layer decay from the head to the patches."""
        return parameter_groups(self.model, self.model, self._optim)

    def batch(self, ids_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> Batch:
        """Training images, augmented and mixed, with their targets. Raises DataError if one cannot be read."""
        train, seed = self._splits.train, self._run.seed
        images = []
        for item, epoch in zip(ids_B.tolist(), epochs_B.tolist(), strict=True):
            image = train.images.decode(int(train.ids_N[item]))
            seed_item(seed, epoch, item)
            images.append(self._transform(image))
        images_BCHW = torch.stack(images)
        shown_BK, counted_BK = self._targets(train.labels[ids_B])
        both_BK2 = torch.cat([shown_BK * counted_BK, counted_BK], dim=1)
        self._mix(images_BCHW, both_BK2, ids_B, epochs_B)
        shown_BK, counted_BK = both_BK2.chunk(2, dim=1)
        # In a mixed image, the share of a class is relative to the part of the image that counts for it.
        return Batch(images_BCHW, shown_BK / counted_BK.clamp(min=1e-6), counted_BK)

    def _targets(self, labels: NDArray[np.integer]) -> tuple[Tensor, Tensor]:
        """Smoothed shares of the classes, and which of them count; both [B, K]."""
        smoothing, K = self._augment.smoothing, len(self._splits.classes)
        if labels.ndim == 1:
            one_hot_BK = nn.functional.one_hot(torch.from_numpy(labels.astype(np.int64)), K).float()
            return one_hot_BK * (1 - smoothing) + smoothing / K, torch.ones_like(one_hot_BK)
        targets_BK = torch.from_numpy(labels)
        return (targets_BK == 1).float() * (1 - smoothing) + smoothing / 2, (targets_BK >= 0).float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy; with several labels an image, binary cross-entropy of every class."""
        device = next(model.parameters()).device
        images_BCHW, targets_BK, counted_BK = (tensor.to(device, non_blocking=True) for tensor in batch)
        logits_BK = model(images_BCHW).float()
        if self._splits.multi_label:
            return binary_cross_entropy_with_logits(logits_BK, targets_BK, weight=counted_BK)
        return cross_entropy(logits_BK, targets_BK)

    def validate(self, model: nn.Module, runtime: Runtime) -> Measures:
        """Measures of the validation split."""
        assert self._splits.val is not None
        scores_NK = self._scores(model, self._splits.val, runtime).numpy()
        return judge(scores_NK, self._splits.val.labels, self.count, {}).figures

    def finish(self, model: nn.Module, runtime: Runtime) -> Measures:
        """Measures of the test split; writes the encoder folder `tuned` with the head.

        Raises:
            DataError, ArtefactError: on all processes.
            DivergedError: the predictions are not finite, although the weights are.
        """
        split = self._splits.test
        scores_NK = self._scores(model, split, runtime)
        if not scores_NK.isfinite().all():
            raise DivergedError(
                "The model's predictions of test images are not finite: its weights have grown beyond what "
                f"engine.precision={self._engine.precision} can compute with. Lower optim.base_lr, in another "
                "run.out."
            )
        found = judge(scores_NK.numpy(), split.labels, self.count, {}).figures
        with runtime.raise_on_all_ranks():
            if runtime.is_main:
                self._save(model, found)
        return found

    def _scores(self, model: nn.Module, split: Split, runtime: Runtime) -> Tensor:
        """Logits of a split, [N, K] float32 on the host of every process; the processes share the images."""
        transform = centre_transform(self._input)
        places = torch.arange(split.count).split(_TEST_BATCH)

        def images_of(index: int) -> Tensor:
            return torch.stack([transform(split.images.decode(int(split.ids_N[i]))) for i in places[index]])

        scores_NK = torch.zeros(split.count, len(self._splits.classes))
        mine = range(runtime.rank, len(places), runtime.world_size)
        bf16 = self._engine.precision == "bf16"
        with runtime.raise_on_all_ranks(), torch.autocast(runtime.device.type, torch.bfloat16, enabled=bf16):
            stream = prepared(images_of, mine, self._data.workers, runtime.device)
            batches = shared_progress(stream, len(mine), len(places), "scoring", unit="batch", leave=False)
            for index, images_BCHW in zip(mine, batches, strict=True):
                scores_NK[places[index]] = model(images_BCHW.to(runtime.device)).float().cpu()
        if runtime.world_size > 1:
            dist.all_reduce(scores_NK)
        return scores_NK

    def _save(self, model: nn.Module, found: Measures) -> None:
        state = model.state_dict()
        head = {name: state.pop(f"head.{name}").float().cpu().contiguous() for name in ("weight", "bias")}
        provenance = {
            "tuned_from": str(self._data.encoder),
            "encoder": self._encoder.provenance,
            "train": str(self._data.train),
            "test": found,
        }
        out: Path = self._run.out / TUNED
        with writes_to(out), atomic_folder(out) as draft:
            save_tensors(draft / HEAD, head, {"classes": json.dumps(self._splits.classes)})
            save_encoder(draft, state, self._shape, self._input, provenance)


def finetune(config: FinetuneSettings, runtime: Runtime) -> dict[str, Any] | None:
    """Run, or resume, fine-tuning; a collective.

    Returns a record for results.json without the names of task and model, or None if the run was stopped.

    Raises:
        ConfigError, ArtefactError, DataError, SupersededError, DivergedError: on all processes.
    """
    with runtime.raise_on_all_ranks():
        encoder = open_encoder(config.data.encoder, torch.device("cpu"))
    with opened_splits(config.data, config.run.seed, runtime) as splits:
        task = Classification(
            encoder, splits, config.data, config.augment, config.optim, config.engine, config.run, runtime
        )
        measures = tune(task, config, runtime)
        if measures is None:
            return None
        result, optim = read_result(config.run.out), config.optim
        trained = [splits.fingerprint, to_tree(optim), to_tree(config.augment), config.run.seed]
        return {
            "verb": "finetune",
            **known_by(encoder, *trained),
            **measures,
            "n_train": splits.train.count + (splits.val.count if splits.val else 0),
            "n_test": splits.test.count,
            "settings": {
                "base_lr": optim.base_lr,
                "epochs": optim.epochs,
                "layer_decay": optim.layer_decay,
                "seed": config.run.seed,
                "step": result["step"],
                **{f"validation_{metric}": value for metric, value in result["validation"].items()},
            },
        }


@contextmanager
def opened_splits(data: FinetuneDataSettings, seed: int, runtime: Runtime) -> Iterator[Splits]:
    """Open the splits of the settings for the length of the block. Raises DataError, ArtefactError."""
    with ExitStack() as stack:

        def opened(path: Path) -> ShardSet:
            return stack.enter_context(opened_images(path, runtime.warn))

        with runtime.raise_on_all_ranks():
            val = opened(data.val) if data.val else data.val_share
            splits = make_splits(opened(data.train), val, opened(data.test), seed)
        yield splits
