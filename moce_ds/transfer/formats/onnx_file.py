"""`model.onnx`: images in, features and tokens out, any number of images at a time.

Axes: B images, T tokens, D width.
"""

import gc
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from moce_ds.models.dense import as_encoder
from moce_ds.models.spec import ModelSpec
from moce_ds.transfer.formats.target import DenseModel
from moce_ds.transfer.trained import Trial

_OPSET = 18
_LARGEST = 2**31  # bytes of a protobuf file; weights beyond go beside it


class _Outputs(nn.Module):
    """The mean of the patch tokens, as `moce features` takes it, [B, D], and all tokens, [B, T, D]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BTD = self.model.forward_features(images)  # type: ignore[operator]
        return tokens_BTD[:, 1:].mean(dim=1), tokens_BTD


def write(folder: Path, model: DenseModel) -> None:
    """Trace timm's ViT. Memory: several times the dense model."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    encoder = as_encoder(model.state, model.spec, model.provenance, "the export")
    size = model.spec.shape.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own use of torch
        torch.onnx.export(
            _Outputs(encoder.model).eval(),
            (torch.zeros(2, 3, size, size),),
            folder / "model.onnx",
            input_names=["images"],
            output_names=["features", "tokens"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=_OPSET,
            external_data=sum(tensor.nbytes for tensor in model.state.values()) > _LARGEST // 2,
            verbose=False,
        )
    gc.collect()  # the exporter leaves cycles behind that hold the weights


def run(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Tokens by onnxruntime, one image and then the others, since the axis of images must be free."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = trial.images_BCHW
    parts = [session.run(["tokens"], {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
    return torch.cat([torch.from_numpy(part) for part in parts])
