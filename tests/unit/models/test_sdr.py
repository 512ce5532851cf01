"""SDR: the parted MLP is the dense one, a path is a dense ViT, and the teacher is near.

Axes: B images, M clusters, L blocks, E groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moce_ds.checkpoint.format import find
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.data.transform import ImageInput
from moce_ds.encoders.from_checkpoint import Share, encoder_state
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.exporting.formats.registry import find_format
from moce_ds.exporting.request import Request, Target, export_requested
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import DecoderShape, MaskedAutoencoder, sincos_positions
from moce_ds.models.moce import ExpertShape, Routing
from moce_ds.models.sdr import Sdr, Teacher, part_units, path_shape
from moce_ds.models.vit import Encoder, ViTShape, load_encoder, timm_vit
from moce_ds.moe.gate import PathGate, route_table
from moce_ds.moe.placement import default_placement
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.moe.routing_plan import make_plan
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.training.inputs import check_paths, read_teacher
from moce_ds.training.settings import PretrainSettings
from tests.examples.alone import ALONE

SHAPE, DECODER = ViTShape(16, 4, 16, 4, 2), DecoderShape(16, 1, 2)
GROUPS, STAGES, COMMON = 4, 2, 32
PATHS = GROUPS**STAGES
EXPERTS = ExpertShape(GROUPS, (0, 1, 2, 3), gate="path", stages=STAGES, common_units=COMMON)
WORDS = ["model.arch=sdr", "experts.num=3", "sdr.stages=1", "sdr.common=0.25"]


def dense(seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    mae = MaskedAutoencoder(SHAPE, DECODER, 0.75).double()
    with torch.no_grad():
        for parameter in mae.parameters():  # biases begin at 0
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return mae


def sdr_of(mae: MaskedAutoencoder, experts: ExpertShape = EXPERTS) -> Sdr:
    """The second phase as it begins."""
    made = Sdr(SHAPE, DECODER, 0.75, experts, torch.zeros(PATHS, 4), torch.full((PATHS,), 1 / PATHS), ReferenceMoE)
    weights = part_units({name: p.detach() for name, p in mae.named_parameters()}, experts)
    made.double().load_state_dict(weights, strict=False)
    assert set(weights) == set(dict(made.named_parameters()))
    return made


def teacher_of(mae: MaskedAutoencoder) -> Teacher:
    vit = timm_vit(SHAPE).double()
    names = set(vit.state_dict())
    vit.load_state_dict({name: tensor for name, tensor in mae.state_dict().items() if name in names})
    return Teacher(Encoder(vit.eval(), SHAPE, ImageInput(16), {}))


def routing(model: Sdr, clusters: Sequence[int]) -> Routing:
    table = route_table(model.gate, model.gate(), model.share_M, 1, "sinkhorn").numpy()
    slots = default_placement(len(model.experts.layers), model.experts.num_experts)
    return Routing(torch.tensor(clusters), make_plan(np.array(clusters)[None], table, slots, 0, 1), None)


def test_digits_of_the_clusters_number_are_the_path() -> None:
    gate = PathGate(256, 12, 4, stages=4)
    expert_ML = gate().argmax(dim=-1).T
    assert expert_ML[0b11_01_00_10].tolist() == [3] * 3 + [1] * 3 + [0] * 3 + [2] * 3
    assert len({tuple(row) for row in expert_ML.tolist()}) == 256


@pytest.mark.parametrize("largest", [1 / 256, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("clusters", [8, 256])
def test_balance_leaves_a_path_as_it_is(clusters: int, largest: float) -> None:
    """However many images one cluster has, and with groups that none has."""
    gate = PathGate(clusters, 4, 4, stages=4)
    share_M = torch.full((clusters,), (1 - largest) / (clusters - 1))
    share_M[0] = largest
    assert torch.equal(route_table(gate, gate(), share_M, 1, "sinkhorn")[:, :, 0], gate().argmax(dim=-1).T)


def test_the_groups_and_the_common_units_are_the_dense_mlp() -> None:
    mae, model = dense(), sdr_of(dense())
    x = torch.randn(3, 5, SHAPE.width, dtype=torch.float64)
    for block in EXPERTS.layers:
        parted = model.blocks[block].common(x) + sum(group(x) for group in model.blocks[block].mlp.experts)
        assert (parted - mae.blocks[block].mlp(x)).abs().max() < 1e-12


def test_the_common_units_weigh_most() -> None:
    mae, model = dense(), sdr_of(dense())
    weight_H = mae.blocks[1].mlp.fc1.weight.norm(dim=1) * mae.blocks[1].mlp.fc2.weight.norm(dim=0)
    common = model.blocks[1].common
    least = (common.fc1.weight.norm(dim=1) * common.fc2.weight.norm(dim=0)).min()
    assert int((weight_H >= least - 1e-12).sum()) == COMMON
    sums = [g.fc2.weight.abs().sum().item() for g in model.blocks[1].mlp.experts]
    assert max(sums) < 1.2 * min(sums), "the groups are alike"


def test_a_single_path_is_the_dense_run_and_its_teacher(photo_pixels: Tensor) -> None:
    """One group has all that is not common, so student and teacher are the same model."""
    mae = dense()
    model = sdr_of(mae, replace(EXPERTS, num_experts=1, stages=1))
    noise = torch.rand(12, SHAPE.num_patches, dtype=torch.float64)
    output = model(photo_pixels, noise, routing(model, [0] * 12), teacher_of(mae))
    assert output.reconstruction.loss.item() == pytest.approx(mae(photo_pixels, noise).loss.item(), abs=1e-12)
    assert output.losses["distillation"].item() < 1e-12


def test_each_image_computes_its_path_alone(photo_pixels: Tensor) -> None:
    """Groups beside the path get no gradient, the teacher none at all; both losses reach the path."""
    mae, model = dense(), sdr_of(dense(1))
    teacher = teacher_of(mae)
    noise = torch.rand(12, SHAPE.num_patches, dtype=torch.float64)
    output = model(photo_pixels, noise, routing(model, [0b01_10] * 12), teacher)
    assert output.losses["distillation"] > 0.01
    (output.reconstruction.loss * 0 + output.losses["distillation"]).backward()
    for block, path in zip(model.blocks, (1, 1, 2, 2), strict=True):
        for number, group in enumerate(block.mlp.experts):
            gradient = group.fc1.weight.grad
            assert (gradient is not None and bool(gradient.abs().max() > 0)) == (number == path)
        assert block.common.fc1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.model.parameters())


def test_without_a_teacher_nothing_is_distilled(photo_pixels: Tensor) -> None:
    model = sdr_of(dense())
    output = model(photo_pixels, torch.rand(12, SHAPE.num_patches), routing(model, range(12)))
    assert output.losses["distillation"] == 0


def test_hidden_units_survive_the_ratio_that_files_hold() -> None:
    for width in range(4, 200, 4):
        for units in range(1, 4 * width, 7):
            assert ViTShape(16, 4, width, 1, 2).with_hidden(units).hidden == units


def test_a_path_is_exported_as_a_dense_vit(
    tiny_moce_run: Callable[..., Path], tiny_mae_run: Path, tmp_path: Path
) -> None:
    """The export itself compares with the trained model; here the size, and the cluster's own path."""
    run = tiny_moce_run(*WORDS, f"run.init_from={tiny_mae_run}")
    for name, part in (("timm", "encoder"), ("timm", "full"), ("hf-vit", "encoder")):
        out = tmp_path / f"{name}-{part}"
        ((_, said),) = export_requested(
            run, Request(cluster=4), Target(out, find_format(name, part)), EncodeSettings(), torch.device("cpu")
        )
        assert said["route"] == [1, 1, 1] and said["max_difference"] < 1e-6
    encoder = load_encoder(tmp_path / "timm-encoder")
    assert encoder.shape.hidden == 16 + 16 and encoder.shape == path_shape(
        ViTShape(16, 4, 16, 3, 2), ExpertShape(3, (0, 1, 2), gate="path", stages=1, common_units=16)
    )
    checkpoint, _ = run_clusters(run)
    spec = ModelSpec.from_tree(checkpoint.manifest["model"])
    other = encoder_state(find(run), spec, ({2: Share()},) * 3)
    assert (other["blocks.0.mlp.fc1.weight"][:16] == encoder.model.blocks[0].mlp.fc1.weight[:16]).all()
    assert (other["blocks.0.mlp.fc1.weight"][16:] != encoder.model.blocks[0].mlp.fc1.weight[16:]).any()


def test_groups_are_not_averaged(tiny_moce_run: Callable[..., Path], tiny_mae_run: Path, tmp_path: Path) -> None:
    run = tiny_moce_run(*WORDS, f"run.init_from={tiny_mae_run}")
    asked = Request(average="uniform")
    with pytest.raises(ConfigError, match=r"--average: .* is an SDR"):
        list(export_requested(run, asked, Target(tmp_path / "out"), EncodeSettings(), torch.device("cpu")))
    assert not (tmp_path / "out").exists()


def paths_of(config: PretrainSettings) -> ExpertShape:
    experts = config.model_spec.experts
    assert experts is not None
    return experts


def test_more_paths_than_clusters_are_refused(tiny_config: Callable[..., PretrainSettings], tiny_mae_run: Path) -> None:
    words = ["experts.clusters=there", *WORDS, f"run.init_from={tiny_mae_run}"]
    check_paths(paths_of(tiny_config(*words)), clusters=3)
    with pytest.raises(ConfigError, match=r"sdr.stages: 3 groups in 2 stages make 9 paths for 8 clusters"):
        check_paths(paths_of(tiny_config(*words, "sdr.stages=2")), clusters=8)


def test_the_teacher_is_the_dense_run_and_stays_with_the_run(
    tiny_config: Callable[..., PretrainSettings], tiny_mae_run: Path, tiny_moce_run: Callable[..., Path]
) -> None:
    words = ["experts.clusters=there", *WORDS]
    config = tiny_config(*words, f"run.init_from={tiny_mae_run}")
    assert config.wants_teacher
    teacher = read_teacher(config.model_spec, config.run, ALONE)
    weights = find(tiny_mae_run).load("weights")
    for name, tensor in teacher.model.state_dict().items():
        expected = weights[name] if name in weights else sincos_positions(config.vit_shape, 16)
        assert torch.equal(tensor, expected), name
    assert not tiny_config(*words, "sdr.distillation_weight=0").wants_teacher
    other = tiny_config(*words, f"run.init_from={tiny_moce_run()}")
    with pytest.raises(ArtefactError, match="does not fit the model"):
        read_teacher(other.model_spec, other.run, ALONE)
