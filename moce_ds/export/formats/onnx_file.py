"""`model.onnx`: images in, features and tokens out, any number of images at a time; its weights in `model.onnx.data`.

A protobuf file ends at 2 GB, and whatever reads one holds all of it in memory. Weights in a file beside it have no such
bound, are written one at a time, and are mapped by onnxruntime.
"""

from pathlib import Path

import torch
from torch import Tensor

from moce_ds.export.formats.target import DenseModel
from moce_ds.export.reference_model import Trial
from moce_ds.models.build import ModelSpec

_GRAPH, _WEIGHTS = "model.onnx", "model.onnx.data"


def write(folder: Path, model: DenseModel) -> None:
    """Both files; the graph names the other relative to itself, so they can be moved together."""
    from moce_ds.export.formats.onnx_graph import vit_model, write_weights  # onnx need not be installed

    weights = write_weights(folder / _WEIGHTS, model.state)
    (folder / _GRAPH).write_bytes(vit_model(model.spec.shape, weights).SerializeToString())


def run(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    """Tokens by onnxruntime, one image and then the others, since the axis of images must be free."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / _GRAPH, providers=["CPUExecutionProvider"])
    images = trial.images_BCHW
    parts = [session.run(["tokens"], {"images": part.numpy()})[0] for part in (images[:1], images[1:])]
    return torch.cat([torch.from_numpy(part) for part in parts])
