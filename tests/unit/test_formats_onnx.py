"""ONNX: any number of images, features as `moce features` takes them."""

from collections.abc import Callable
from pathlib import Path

import torch

from moce_ds.models.vit import load_encoder
from moce_ds.transfer.chosen import choose_cluster
from moce_ds.transfer.export import export_route
from moce_ds.transfer.formats.registry import find_format
from moce_ds.transfer.select import run_clusters


def test_onnx_computes_what_was_trained(moce_run: Callable[..., Path], tmp_path: Path) -> None:
    import onnxruntime

    checkpoint, clusters = run_clusters(moce_run("experts.combine=prob"))
    for name in ("timm", "onnx"):
        said = export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), tmp_path / name, {}, find_format(name))
    assert said["loaded_back"]["library"].startswith("onnxruntime ")
    assert said["loaded_back"]["max_abs_difference"] < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    encoder = load_encoder(tmp_path / "timm")
    for count in (1, 5):
        images = torch.randn(count, 3, 16, 16)
        features, tokens = session.run(["features", "tokens"], {"images": images.numpy()})
        assert (torch.from_numpy(features) - encoder.features(images)).abs().max() < 1e-5
        assert tokens.shape == (count, 17, 16)
