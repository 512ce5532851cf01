"""Real DeepSpeed engines write native checkpoints of trained models, with what shall be found in them again."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from moce_ds.checkpoint.deepspeed_state import global_parameters
from moce_ds.common.config.settings import load, to_yaml
from moce_ds.common.storage.files import write_json
from moce_ds.data.clusters import Clusters
from moce_ds.data.shards import ShardSet
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.models.mae import MaskedAutoencoder, mask_noise
from moce_ds.models.moce import Moce
from moce_ds.moe.placement import default_placement
from moce_ds.training.engine import deepspeed_config, parameter_groups, set_lr, start_engine
from moce_ds.training.import_deepspeed_checkpoint import import_native
from moce_ds.training.inputs import open_inputs
from moce_ds.training.placed_model import build_for_training, first_weights, place_experts, take_weights
from moce_ds.training.router import Router
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import PretrainSettings

STEPS, BATCH = 2, 16
IDS_G = np.arange(0, 80, 80 // BATCH)
ELSEWHERE_LE = np.array([[2, 0, 3, 1], [1, 3, 0, 2]])  # slots of experts, other than in order


def build(config: PretrainSettings, clusters: Clusters | None) -> MaskedAutoencoder:
    """The model of a run, as pre-training builds it."""
    return build_for_training(config.model_spec, clusters, config.experts.ep_size, config.run.seed)


class Session:
    """A model under an engine, its images, and their routes."""

    def __init__(self, config: PretrainSettings, runtime: Runtime, slot_LE: np.ndarray | None = None) -> None:
        if slot_LE is None:
            slot_LE = default_placement(len(config.expert_layers), config.experts.num)
        shards = ShardSet.open(config.data.shards)
        data = open_inputs(config.data, config.model_spec, config.routing_clusters, config.run.seed)
        model = build(config, data.clusters)
        weights, _ = first_weights(model, config.model_spec, config.run, config.experts.perturbation, runtime)
        place_experts(model, slot_LE, runtime.rank)
        take_weights(model, weights, config.run.init_from)
        groups = parameter_groups(model, config.optim, config.experts.gate_lr_scale)
        batches = batch_arithmetic(config.optim, runtime.world_size, config.ep_size)
        self.engine = start_engine(model, groups, config.optim, config.engine, batches)
        self.runtime, self.router = runtime, None
        if data.clustered:
            assert isinstance(model, Moce)
            self.router = Router(model, data.clustered.ids_N, slot_LE, config.experts, seed=0, runtime=runtime)
        ids_B = IDS_G.reshape(runtime.world_size, -1)[runtime.rank]
        pixels = [np.asarray(shards.decode(int(i)).resize((16, 16)), np.float32) for i in ids_B]
        self.images_BCHW = torch.from_numpy(np.stack(pixels) / 127.5 - 1).permute(0, 3, 1, 2)
        self.noise_BN = mask_noise(0, ids_B, np.zeros_like(ids_B), config.vit_shape.num_patches)

    def loss(self) -> Tensor:
        """Reconstruction loss of this rank's images, each on its own route."""
        inputs: list[Any] = [self.images_BCHW, self.noise_BN]
        if self.router:
            inputs.append(self.router.route(self.router.prepare(None), IDS_G))
        return self.engine(*inputs).reconstruction.loss

    def train(self) -> None:
        for _ in range(STEPS):
            set_lr(self.engine, 0.02)
            self.engine.backward(self.loss())
            self.engine.step()

    def final_loss(self) -> float:
        """The loss over all ranks, without the noise of training."""
        self.engine.eval()
        with torch.no_grad():
            return self.runtime.sum([float(self.loss())])[0] / self.runtime.world_size


def save_all(cases: dict[str, list[str]], root: Path) -> None:
    """Save every case in this world."""
    with started() as runtime:
        for name, words in cases.items():
            save(load(PretrainSettings, Path(words[0]), words[1:]), runtime, root / name)


def save_and_import_all(cases: dict[str, list[str]], others: list[str], root: Path) -> dict[str, float]:
    """Save the cases of one process, import all, and tell the loss of models that start from what was imported."""
    losses = {}
    with started() as runtime:
        for name, words in cases.items():
            save(load(PretrainSettings, Path(words[0]), words[1:]), runtime, root / name)
        for name in [*cases, *others]:
            folder = root / name
            import_native(folder / "native", folder / "imported", load(PretrainSettings, folder / "config.yaml"))
            if not name.endswith("bf16"):
                words = [f"run.init_from={folder / 'imported'}", "experts.ep_size=1"]
                losses[name] = Session(load(PretrainSettings, folder / "config.yaml", words), runtime).final_loss()
    return losses


def save(config: PretrainSettings, runtime: Runtime, folder: Path) -> None:
    """Train for two steps; save natively, and what shall be found again: weights, routes and loss."""
    elsewhere = ELSEWHERE_LE if folder.name.endswith("elsewhere") else None
    record: dict[str, Any] = {}
    if folder.name.endswith("bf16"):
        engine = _bf16_engine(config, runtime)
    else:
        session = Session(config, runtime, elsewhere)
        session.train()
        engine, record["loss"] = session.engine, session.final_loss()
        if session.router:
            record["expert_ML"] = session.router.record(STEPS).expert_ML.tolist()
    weights = {key: p.detach().float().clone() for key, p in global_parameters(engine.module)}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / f"expected-{runtime.rank}.safetensors")
    engine.save_checkpoint(str(folder / "native"), client_state={"args": Namespace(lr=0.02)})
    if elsewhere is not None:
        record["loaded"] = _load_natively(config, runtime, elsewhere, folder / "native")
    if runtime.is_main:
        write_json(folder / "expected.json", record)
        (folder / "config.yaml").write_text(to_yaml(config))


def _bf16_engine(config: PretrainSettings, runtime: Runtime) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's own bf16 mode, which casts weights and tables; this program uses autocast instead."""
    model = build(config, None)
    settings = deepspeed_config(
        config.optim, config.engine, batch_arithmetic(config.optim, runtime.world_size, config.ep_size)
    )
    settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    groups = parameter_groups(model, config.optim, config.experts.gate_lr_scale)
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings, dist_init_required=False)[0]


def _load_natively(config: PretrainSettings, runtime: Runtime, slot_LE: np.ndarray, native: Path) -> list[float | str]:
    """The loss of a fresh engine that loads the checkpoint itself, and what it says with its experts elsewhere."""
    session = Session(config, runtime, slot_LE)
    session.engine.load_checkpoint(str(native))
    place_experts(session.engine.module, default_placement(2, 4), runtime.rank)
    try:
        session.engine.load_checkpoint(str(native))
    except RuntimeError as error:
        said = str(error)
    place_experts(session.engine.module, slot_LE, runtime.rank)
    return [session.final_loss(), said]
