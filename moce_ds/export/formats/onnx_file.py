"""`model.onnx`: images in, features and tokens out, for any number of images; its weights are in `model.onnx.data`.

A protobuf file is limited to 2 GB, and its readers hold all of it in memory. Weights in a separate file have no such
limit, are written one at a time, and are memory-mapped by onnxruntime.
"""

from pathlib import Path

import torch
from torch import Tensor

from moce_ds.export.formats.target import DenseModel
from moce_ds.export.reference_model import Trial
from moce_ds.models.build import ModelSpec

_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"


def write(folder: Path, model: DenseModel) -> None:
    """Write both files. The graph names the other one by a relative path, so they can be moved together."""
    from moce_ds.export.formats.onnx_graph import vit_model, write_weights  # onnx need not be installed

    weights = write_weights(folder / _WEIGHTS, model.state)
    (folder / _GRAPH).write_bytes(vit_model(model.spec.shape, weights).SerializeToString())


def run(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Tokens by onnxruntime, for one image and then for the others, because the image axis must be dynamic."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / _GRAPH, providers=["CPUExecutionProvider"])
    images = trial.images_BCHW
    parts = [session.run(["tokens"], {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
    return torch.cat([torch.from_numpy(part) for part in parts])
