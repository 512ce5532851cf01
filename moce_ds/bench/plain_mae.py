"""A plain PyTorch loop that pre-trains a masked autoencoder, the peer of `moce bench peers`.

It follows the recipe of the paper and the public MAE (He et al., 2022, appendix A.1, table 8): image folder, random
resized crops and flips of torchvision, DataLoader workers, AdamW without weight decay on vectors, half a cosine after a
linear warm-up set per iteration, autocast on a GPU, the loss read and logged in every iteration. The model is that of
`moce pretrain`, so that only the programs around it differ.

    python -m moce_ds.bench.plain_mae FILE.json          a `PlainRun`

Axes: B images, C channels, H, W pixels, N patches.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.tensorboard import SummaryWriter

from moce_ds.common.compat import repair_torchvision
from moce_ds.common.errors import MoceError
from moce_ds.common.host.program import run_main
from moce_ds.common.storage.files import valid_record
from moce_ds.data.transform import IMAGENET_MEAN, IMAGENET_STD
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.shapes import DecoderShape, ViTShape
from moce_ds.training.loggers import LOSS_TAG

_BASE_LR, _WEIGHT_DECAY, _BETAS, _WARMUP = 1.5e-4, 0.05, (0.9, 0.95), 0.05


@dataclass(frozen=True)
class PlainRun:
    """One run of the loop.

    Attributes:
        images: a folder with a folder of files for each class.
        log: the folder of the TensorBoard files.
        crop_scale: area of a random crop.
        workers: of the DataLoader.
    """

    images: str
    log: str
    steps: int
    batch_size: int
    workers: int
    crop_scale: tuple[float, float]
    flip: bool
    shape: ViTShape
    decoder: DecoderShape

    def write(self, file: Path) -> None:
        """Write the run to a file for `main`."""
        file.write_text(json.dumps(asdict(self)), "utf-8")


def main() -> None:
    """Take all steps of the run in the file that is the only argument."""
    tree = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    train(valid_record(PlainRun, tree, sys.argv[1], "a plain run", "moce bench peers"))


def train(run: PlainRun) -> None:
    """Take all steps. Raises MoceError: the loss is not finite."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = MaskedAutoencoder(run.shape, run.decoder, 0.75).to(device)
    peak = _BASE_LR * run.batch_size / 256
    optimizer = torch.optim.AdamW(_groups(model), lr=peak, betas=_BETAS)
    with SummaryWriter(run.log) as board:
        for step, (images_BCHW, _) in enumerate(_loader(run, pinned=device.type == "cuda")):
            for group in optimizer.param_groups:
                group["lr"] = lr = _lr(step / run.steps, peak)
            images_BCHW = images_BCHW.to(device, non_blocking=True)
            loss = _step(model, optimizer, images_BCHW)
            if not math.isfinite(loss):
                raise MoceError(f"The plain loop: the loss of step {step + 1} is {loss}.")
            board.add_scalar(LOSS_TAG, loss, step + 1)
            board.add_scalar("lr", lr, step + 1)


def _step(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, images_BCHW: Tensor) -> float:
    device = images_BCHW.device
    noise_BN = torch.rand(len(images_BCHW), model.shape.num_patches, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss: Tensor = model(images_BCHW, noise_BN).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _lr(done: float, peak: float) -> float:
    """Learning rate when a share of all steps is `done`."""
    if done < _WARMUP:
        return peak * done / _WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (done - _WARMUP) / (1 - _WARMUP)))


def _loader(run: PlainRun, pinned: bool) -> "DataLoader[tuple[Tensor, int]]":
    """Batches for all steps, epoch after epoch without a pause."""
    images = plain_images(Path(run.images), run.shape.image_size, run.crop_scale, run.flip)
    sampler = RandomSampler(images, num_samples=run.steps * run.batch_size)  # type: ignore[arg-type]
    return DataLoader(images, run.batch_size, sampler=sampler, num_workers=run.workers, pin_memory=pinned)


def plain_images(folder: Path, size: int, crop_scale: tuple[float, float], flip: bool) -> "Dataset[tuple[Tensor, int]]":
    """Random crops of a folder of images, decoded by PIL and cropped by torchvision."""
    repair_torchvision()
    from torchvision import datasets, transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    steps = transforms.Compose([
        transforms.RandomResizedCrop(size, crop_scale, interpolation=bicubic),
        *([transforms.RandomHorizontalFlip()] if flip else []),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    images: Dataset[tuple[Tensor, int]] = datasets.ImageFolder(folder, steps)
    return images


if __name__ == "__main__":
    run_main(main)
