"""A whole optimizer step as in training, without loading: the model under its engine, on random images.

Axes: B images of a micro-batch of a process, C channels, H, W pixels, G images of a micro-batch, N images or patches, M
clusters, D width.
"""

from typing import Any

import numpy as np
import torch

from moce_ds.data.clusters import Clusters
from moce_ds.distributed.device_copy import on_device
from moce_ds.distributed.runtime import Runtime
from moce_ds.forecast.step_cost import Work
from moce_ds.models.build import build_model
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import MakeLayer, Moce
from moce_ds.models.sdr import Teacher
from moce_ds.models.settings import ExpertSettings
from moce_ds.models.shapes import LossWeights
from moce_ds.models.vit import Encoder, timm_vit
from moce_ds.moe.placement import default_placement
from moce_ds.training.engine import Engine, parameter_groups, set_lr, start_engine
from moce_ds.training.inputs import ClusteredData
from moce_ds.training.placed_model import build_for_training, tune_execution
from moce_ds.training.router import Router
from moce_ds.training.schedule import batch_arithmetic

_CLUSTERS, _IMAGES = 64, 4096


class TrainingStep:
    """A callable that takes one optimizer step; images are spread evenly over clusters.

    As in training, masks, routes and noise of the gate come from the host in every step; losses are not read.

    Args:
        work: the model, its optimizer and its engine.
        experts, loss_weights: of the model.
        make_layer: other layers of experts than those of training.

    Attributes:
        engine: the model under DeepSpeed.
    """

    def __init__(
        self,
        work: Work,
        experts: ExpertSettings,
        loss_weights: LossWeights,
        runtime: Runtime,
        make_layer: MakeLayer | None = None,
    ) -> None:
        self._batches, spec = batch_arithmetic(work.optim, runtime.world_size, work.ep_size), work.spec
        data = _random_clusters(spec.shape.width) if spec.model_kind.routes_by_cluster else None
        clusters = data.clusters if data else None
        if make_layer is None:
            model = build_for_training(spec, clusters, work.ep_size, 0, loss_weights)
        else:
            model = build_model(spec, clusters, make_layer, loss_weights)
        tune_execution(model, experts.execution, work.engine, runtime.device)
        groups = parameter_groups(model, work.optim, experts.gate_lr_scale)
        self.engine: Engine = start_engine(model, groups, work.optim, work.engine, self._batches)
        set_lr(self.engine, 1e-4)
        self._router = _router(model, data, experts, runtime) if data else None
        self._ids_G = np.arange(self._batches.micro_global) % _IMAGES
        self._inputs = _inputs(work, self._batches.micro, runtime.device)
        self._device, self._step = runtime.device, 0

    def __call__(self) -> None:
        """Take one step."""
        for _ in range(self._batches.accumulation):
            self.to_update()
            self.engine.step()
        self._step += 1

    def to_update(self) -> None:
        """Compute the gradients of a micro-batch."""
        images_BCHW, noise_BN, *teachers = self._inputs
        if self._router is None:
            inputs = [images_BCHW, on_device(noise_BN, self._device)]
        else:
            inputs = [images_BCHW, *self._router.begin(self._step, self._ids_G, noise_BN)]
        self.engine.backward(self.engine(*inputs, *teachers).loss)


def _router(model: MaskedAutoencoder, data: ClusteredData, experts: ExpertSettings, runtime: Runtime) -> Router:
    assert isinstance(model, Moce)
    slot_LE = default_placement(len(model.experts.layers), model.experts.num_experts)
    return Router(model, data.ids_N, slot_LE, experts, 0, runtime)


def _inputs(work: Work, micro: int, device: torch.device) -> list[Any]:
    """Images, the noise of their masks on the host, and the teacher of a model that has one."""
    shape = work.spec.shape
    images_BCHW = torch.randn(micro, 3, shape.image_size, shape.image_size, device=device)
    noise_BN = torch.rand(micro, shape.num_patches)
    vit = timm_vit(shape).to(device) if work.teacher else None
    return [images_BCHW, noise_BN, *([Teacher(Encoder(vit, shape, work.spec.input, {}))] if vit else [])]


def _random_clusters(width: int) -> ClusteredData:
    """Clusters of equal size in random directions, and the cluster of each image."""
    random, D = np.random.default_rng(0), width
    embeddings_MD = random.standard_normal((_CLUSTERS, D)).astype(np.float32)
    embeddings_MD /= np.linalg.norm(embeddings_MD, axis=1, keepdims=True)
    nothing_M = np.zeros(_CLUSTERS, np.float32)
    clusters = Clusters(
        embeddings_MD=embeddings_MD,
        duals_M=nothing_M,
        mean_D=np.zeros(D, np.float32),
        sizes_M=np.full(_CLUSTERS, _IMAGES // _CLUSTERS),
        cosine_M=nothing_M,
        eps=1.0,
        method="kmeans",
        shards_fingerprint="",
        encoder_fingerprint="",
        encoder_input={},
        provenance={},
    )
    ids_N = random.permutation(np.arange(_IMAGES) % _CLUSTERS).astype(np.int32)
    return ClusteredData(clusters, ids_N)
