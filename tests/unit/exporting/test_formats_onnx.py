"""ONNX: what timm computes, any number of images at a time, features as `moce features` takes them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from moce_ds.data.transform import ImageInput
from moce_ds.exporting.formats import onnx_file
from moce_ds.exporting.formats.registry import find_format
from moce_ds.exporting.formats.weights import DenseModel
from moce_ds.exporting.write import export_route
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import DecoderShape
from moce_ds.models.vit import Encoder, ViTShape, load_encoder, timm_vit
from moce_ds.selection.routes import choose_cluster
from moce_ds.selection.run_clusters import run_clusters

SHAPES = {
    "base": ViTShape(32, 8, 48, 2, 4),
    "one of each": ViTShape(8, 8, 6, 1, 1),
    "wide MLP, odd head": ViTShape(28, 14, 33, 3, 3, mlp_ratio=48 / 11),
    "narrow MLP": ViTShape(24, 4, 40, 1, 8, mlp_ratio=0.3),
    "pixels left over": ViTShape(35, 16, 32, 1, 2),
}


def written(shape: ViTShape, folder: Path) -> Encoder:
    """An encoder with its files. All its weights matter, and the epsilon of a norm, since what goes in is faint."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * (0.3 if "blocks" in name or "norm" in name else 0.001)
        for name, tensor in timm_vit(shape).state_dict().items()
    }
    spec = ModelSpec(shape, DecoderShape(16, 1, 2), 0.75, ImageInput(shape.image_size), None)
    onnx_file.write(folder, DenseModel(state, spec, {}))
    return Encoder.from_state(state, spec.shape, spec.input, {}, "the test")


def opened(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def same_outputs(encoder: Encoder, session: onnxruntime.InferenceSession, count: int) -> None:
    """Features and tokens of random images."""
    size = encoder.shape.image_size
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
    features, tokens = session.run(["features", "tokens"], {"images": images.numpy()})
    with torch.inference_mode():
        expected = encoder.model.forward_features(images)
    assert tokens.shape == expected.shape == (count, encoder.shape.num_patches + 1, encoder.shape.width)
    assert np.abs(tokens - expected.numpy()).max() < 1e-5 > np.abs(features - encoder.features(images).numpy()).max()


def test_onnx_computes_what_was_trained(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, clusters = run_clusters(tiny_moce_run("experts.combine=prob"))
    route = choose_cluster(checkpoint, 0)
    export_route(checkpoint, clusters, route, tmp_path / "timm", {}, find_format("timm"))
    said = export_route(checkpoint, clusters, route, tmp_path / "onnx", {}, find_format("onnx"))
    assert said["loaded_back"]["library"].startswith("onnxruntime ")
    assert said["loaded_back"]["max_abs_difference"] < 1e-5
    files = json.loads((tmp_path / "onnx" / "export.json").read_text())["files"]
    assert set(files) == {"model.onnx", "model.onnx.data", "provenance.json"}
    shutil.move(tmp_path / "onnx", tmp_path / "elsewhere")
    for count in (1, 5):
        same_outputs(load_encoder(tmp_path / "timm"), opened(tmp_path / "elsewhere"), count)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_graph_is_timms_vit(tmp_path: Path, shape: ViTShape) -> None:
    encoder, session = written(shape, tmp_path), opened(tmp_path)
    for count in (1, 3):
        same_outputs(encoder, session, count)


def test_the_graph_is_valid_and_holds_every_weight(tmp_path: Path) -> None:
    encoder = written(SHAPES["base"], tmp_path)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    (images,) = model.graph.input
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"
    beside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    state = encoder.model.state_dict()
    assert {tensor.name.removesuffix(".T") for tensor in beside} == set(state)
    assert {tensor.name for tensor in beside if ".T" in tensor.name} == {f"{n}.T" for n in state if state[n].ndim == 2}
    offsets = [int(entry.value) for tensor in beside for entry in tensor.external_data if entry.key == "offset"]
    assert len(offsets) == len(state) and not any(offset % 4096 for offset in offsets), "they can be mapped"
