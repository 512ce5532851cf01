"""A route as a dense ViT: it computes what MoCE computes for the cluster, or it is not written.

Axes: B images, T tokens, D width, L expert layers, M clusters, E experts.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint, find, publish, step_folder, write_checkpoint
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.data.clusters import Clusters
from moce_ds.encoders.from_checkpoint import DENSE, Mixture, Share, dense_encoder, encoder_state
from moce_ds.encoders.open import open_encoder
from moce_ds.exporting import write as export
from moce_ds.exporting.write import export_dense, export_route
from moce_ds.models.build import ModelSpec, build_model
from moce_ds.models.mae import MaskedAutoencoder, nothing_masked
from moce_ds.models.moce import Moce, Routing
from moce_ds.models.parameters import is_decoder, load_weights_strict
from moce_ds.models.vit import load_encoder, timm_vit
from moce_ds.moe.placement import default_placement
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.moe.routing_plan import make_plan
from moce_ds.selection.routes import SelectedExperts, choose_cluster, choose_route, choose_selected, routes_of
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.selection.vote import Selection
from moce_ds.training.settings import PretrainSettings
from tests.examples.moce_command import refused, run_here

CPU = torch.device("cpu")


def trained(checkpoint: Checkpoint, clusters: Clusters) -> Moce:
    """The model that training left, with all experts in this process."""
    model = build_model(ModelSpec.from_tree(checkpoint.manifest["model"]), clusters, ReferenceMoE)
    load_weights_strict(dict(model.named_parameters()), checkpoint.load(WEIGHTS), "the test")
    assert isinstance(model, Moce)
    return model.eval()


def gate_values(model: Moce, cluster: int, route: tuple[int, ...]) -> list[float]:
    return [model.gate()[layer, cluster, expert].item() for layer, expert in enumerate(route)]


@pytest.fixture
def images(photo_pixels: Tensor) -> Tensor:
    return photo_pixels.float()


@torch.inference_mode()
def test_the_export_of_a_cluster_is_moce_for_its_images(
    tiny_moce_run: Callable[..., Path], images: Tensor, tmp_path: Path
) -> None:
    """By the tokens of its route, and by the reconstruction that training's own forward pass gives."""
    checkpoint, clusters = run_clusters(tiny_moce_run("experts.combine=prob"))
    model = trained(checkpoint, clusters)
    noise = torch.rand(len(images), 16)
    for cluster in range(clusters.num_clusters):
        chosen = choose_cluster(checkpoint, cluster)
        provenance = export_route(checkpoint, clusters, chosen, tmp_path / str(cluster), {})
        exported = load_encoder(tmp_path / str(cluster)).model
        p = gate_values(model, cluster, chosen.experts)
        assert max(p) < 0.999 and provenance["gate_values"] == pytest.approx(p, rel=1e-5)
        expected = model.encode(images, nothing_masked(len(images), 16), model.on_route(chosen.experts, p))
        assert (exported.forward_features(images) - expected).abs().max() < 1e-5

        clusters_WB = np.full((1, len(images)), cluster)
        table = checkpoint.routes.expert_ML[:, :, None]
        routing = Routing(
            torch.from_numpy(clusters_WB[0]), make_plan(clusters_WB, table, default_placement(2, 4), 0, 1), None
        )
        spec = ModelSpec.from_tree(checkpoint.manifest["model"])
        mae = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
        decoder = {name: tensor for name, tensor in model.state_dict().items() if is_decoder(name)}
        mae.load_state_dict(exported.state_dict() | decoder)
        found, wanted = (output.reconstruction for output in (mae(images, noise), model(images, noise, routing)))
        assert (found.patches_BNP - wanted.patches_BNP).abs().max() < 1e-4  # of patches of about 5
        assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)


def test_with_straight_through_nothing_is_folded_in(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, clusters = run_clusters(tiny_moce_run("experts.combine=straight_through"))
    provenance = export_route(checkpoint, clusters, choose_cluster(checkpoint, 3), tmp_path / "out", {})
    assert provenance["gate_values"] == [1.0, 1.0]
    state, weights = load_file(tmp_path / "out/model.safetensors"), checkpoint.load(WEIGHTS)
    expert = choose_cluster(checkpoint, 3).experts[1]
    for rest in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert torch.equal(state[f"blocks.2.mlp.{rest}"], weights[f"blocks.2.mlp.experts.{expert}.{rest}"])


def test_the_folder_says_where_it_comes_from_and_timm_loads_it(
    tiny_moce_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = tiny_moce_run("experts.combine=prob")
    checkpoint, clusters = run_clusters(run)
    out = tmp_path / "deep/er/out"
    returned = export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), out, {"votes": 3})
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance == json.loads(json.dumps(returned))
    assert provenance["checkpoint"] == str(checkpoint.folder) and provenance["step"] == 5 and provenance["votes"] == 3
    assert provenance["clusters"] == {"0": 1.0} and provenance["layers"] == [0, 2] and provenance["combine"] == "prob"
    assert provenance["clusters_hash"] == clusters.hash and provenance["exact_for"] == "every image of the cluster"
    assert provenance["max_difference"] < 1e-5
    config = json.loads((out / "config.json").read_text())
    model = timm.create_model("vit_tiny_patch16_224", **config["timm"], checkpoint_path=str(out / "model.safetensors"))
    assert not any("gate" in name or "experts" in name or is_decoder(name) for name in model.state_dict())


def test_a_route_of_several_clusters_has_their_mean_gate_value(
    tiny_moce_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Weighed by the clusters' shares of the training set, or by the task's votes."""
    checkpoint, clusters = run_clusters(tiny_moce_run("experts.combine=prob"))
    model = trained(checkpoint, clusters)
    table = routes_of(checkpoint)
    route = next(row for row in table if table.count(row) > 1)
    on_route = [cluster for cluster, row in enumerate(table) if row == route]
    sizes = clusters.sizes_M[on_route]
    votes = {cluster: 0.1 * (k + 1) for k, cluster in enumerate(on_route)}
    elsewhere = next(cluster for cluster in range(len(table)) if cluster not in on_route)
    share = sum(votes.values())
    selection = Selection(route, share, [(route, share)], votes | {elsewhere: 1 - share}, 100)
    for name, chosen, weights in (
        ("shares", choose_route(checkpoint, route), sizes / sizes.sum()),
        ("votes", choose_selected(checkpoint, selection), np.array(list(votes.values())) / share),
    ):
        assert chosen.experts == route and list(chosen.clusters) == on_route
        assert list(chosen.clusters.values()) == pytest.approx(weights.tolist(), rel=1e-6)
        provenance = export_route(checkpoint, clusters, chosen, tmp_path / name, {})
        values = np.array([gate_values(model, cluster, route) for cluster in on_route])
        assert provenance["gate_values"] == pytest.approx((weights @ values).tolist(), rel=1e-5)
        assert provenance["exact_for"] == "mean gate value of the clusters"


def without_the_fold(checkpoint: Checkpoint, spec: ModelSpec, mixture: Mixture) -> dict[str, Tensor]:
    return encoder_state(checkpoint, spec, tuple({e: Share() for e in layer} for layer in mixture))


def of_other_experts(checkpoint: Checkpoint, spec: ModelSpec, mixture: Mixture) -> dict[str, Tensor]:
    return encoder_state(
        checkpoint, spec, tuple({(e + 1) % 4: share for e, share in layer.items()} for layer in mixture)
    )


def with_one_number_off(checkpoint: Checkpoint, spec: ModelSpec, mixture: Mixture) -> dict[str, Tensor]:
    state = encoder_state(checkpoint, spec, mixture)
    state["blocks.1.attn.qkv.bias"][40] += 0.01  # of a value; one of a key would change nothing
    return state


@pytest.mark.parametrize("tampered", [without_the_fold, of_other_experts, with_one_number_off])
def test_what_does_not_compute_the_same_is_not_written(
    tiny_moce_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tampered: Callable[..., Any]
) -> None:
    checkpoint, clusters = run_clusters(tiny_moce_run("experts.combine=prob"))
    monkeypatch.setattr(export, "encoder_state", tampered)
    (tmp_path / "exports").mkdir()
    with pytest.raises(ArtefactError, match=r"differs from the trained model by .*: nothing was written"):
        export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), tmp_path / "exports" / "out", {})
    assert list((tmp_path / "exports").iterdir()) == []


def test_an_export_overwrites_nothing(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, clusters = run_clusters(tiny_moce_run())
    (tmp_path / "mine").mkdir()
    for write in (
        lambda: export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), tmp_path / "mine", {}),
        lambda: export_dense(checkpoint, tmp_path / "mine"),
    ):
        with pytest.raises(ConfigError, match="mine exists: export into another folder, or remove it"):
            write()
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_earlier_export_is_replaced_if_asked(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, clusters = run_clusters(tiny_moce_run())
    out, chosen = tmp_path / "mine", choose_cluster(checkpoint, 0)
    out.mkdir()
    with pytest.raises(ConfigError, match="mine exists"):  # this is none
        export_route(checkpoint, clusters, chosen, out, {}, replace=True)
    out.rmdir()
    export_route(checkpoint, clusters, chosen, out, {"votes": "old"})
    said = export_route(checkpoint, clusters, chosen, out, {"votes": "new"}, replace=True)
    assert said["votes"] == json.loads((out / "provenance.json").read_text())["votes"] == "new"


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words", [["--cluster", 0], ["--all"], ["--average", "uniform"], ["--cluster", 1, "--format", "hf-vit"]], ids=str
)
def test_the_same_export_is_kept(tiny_moce_run: Callable[..., Path], tmp_path: Path, words: list[object]) -> None:
    run, out = tiny_moce_run(), tmp_path / "out"
    first = run_here("export", run, out, *words)
    written = files_of(out)
    again = run_here("export", run, out, *words)
    assert (again.status, again.out) == (0, first.out), again
    assert "this export is complete; nothing was written" in again.err and files_of(out) == written
    changed = next(path for path in out.rglob("*.safetensors"))
    *content, last = changed.read_bytes()
    changed.write_bytes(bytes([*content, last ^ 1]))
    assert re.search(r"exists: .*\(--replace.*\n  .*model.safetensors: ", refused("export", run, out, *words))
    assert run_here("export", run, out, *words, "--replace").status == 0 and files_of(out) != written


def test_another_export_is_refused(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    run, out = tiny_moce_run(), tmp_path / "out"
    assert run_here("export", run, out, "--cluster", 0).status == 0
    written = files_of(out)
    for words, difference in (
        (["--cluster", 1], "clusters.1: None there, 1.0 now"),
        (["--cluster", 0, "--format", "hf-vit"], "format: 'timm' there, 'hf-vit' now"),
        (["--all"], ""),
    ):
        told = refused("export", run, out, *words)
        assert f"{out} exists: export into another folder" in told and difference in told
    other = tiny_moce_run("run.seed=9", f"run.out={tmp_path / 'other'}")
    assert "checkpoint_sha256: " in refused("export", other, out, "--cluster", 0)
    assert files_of(out) == written


def test_routes_and_clusters_that_are_not_there(tiny_moce_run: Callable[..., Path]) -> None:
    checkpoint, _ = run_clusters(tiny_moce_run())
    for cluster in (-1, 6):
        with pytest.raises(ConfigError, match=rf"--cluster: got {cluster}; the run has clusters 0 to 5\."):
            choose_cluster(checkpoint, cluster)
    table = set(routes_of(checkpoint))
    listed = ", ".join("-".join(map(str, row)) for row in sorted(table))
    free = next((a, b) for a in range(4) for b in range(4) if (a, b) not in table)
    for route in (free, (0,), (0, 1, 2)):
        with pytest.raises(ConfigError) as caught:
            choose_route(checkpoint, route)
        said = "-".join(map(str, route))
        assert str(caught.value) == f"--route: no cluster takes {said}; routes of this run: {listed}."


def test_only_the_files_of_the_route_are_read(tiny_moce_run: Callable[..., Path]) -> None:
    checkpoint, _ = run_clusters(tiny_moce_run())
    spec = ModelSpec.from_tree(checkpoint.manifest["model"])
    for path in (checkpoint.folder / WEIGHTS).glob("*block-*"):
        needed = re.fullmatch(r"block-\d\d.safetensors", path.name)
        if not needed and path.name not in ("block-00-expert-001.safetensors", "block-02-expert-003.safetensors"):
            path.unlink()
    assert "blocks.2.mlp.fc1.weight" in encoder_state(checkpoint, spec, ({1: Share()}, {3: Share()}))
    with pytest.raises(ArtefactError, match="block-00-expert-002"):
        encoder_state(checkpoint, spec, ({2: Share()}, {3: Share()}))


# Dense runs


@pytest.fixture
def tiny_mae_run(tiny_config: Callable[..., PretrainSettings]) -> tuple[Path, MaskedAutoencoder]:
    config = tiny_config()
    spec = config.model_spec
    torch.manual_seed(3)
    mae = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    manifest = {"step": 9, "config": to_tree(config), "model": spec.to_tree()}
    weights = {name: p.detach() for name, p in mae.named_parameters()}
    write_checkpoint(step_folder(config.run.out, 9), weights, {}, manifest)
    return config.run.out, mae


def test_a_dense_run_s_encoder_by_every_road(
    tiny_mae_run: tuple[Path, MaskedAutoencoder], images: Tensor, tmp_path: Path
) -> None:
    run, mae = tiny_mae_run
    provenance = export_dense(find(run), tmp_path / "out")
    assert provenance["route"] is None and provenance["step"] == 9
    encoders = [open_encoder(path, CPU) for path in (run, step_folder(run, 9), tmp_path / "out")]
    assert len({encoder.fingerprint for encoder in (*encoders, dense_encoder(find(run)))}) == 1
    for name, tensor in encoders[0].model.state_dict().items():
        assert torch.equal(tensor, mae.state_dict()[name])
    assert torch.equal(encoders[0].features(images), encoders[2].features(images))


def test_what_is_no_dense_encoder_is_refused(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    run = tiny_moce_run()
    for path, message in (
        (run, "holds experts: choose one with `moce export` and use what it writes"),
        (tmp_path / "absent", "absent not found: expected an encoder folder, the run of a dense MAE, or a .pth"),
        (tmp_path, "holds no checkpoint"),
    ):
        with pytest.raises(ArtefactError, match=message):
            open_encoder(path, CPU)
    with pytest.raises(ArtefactError, match="is a dense run: it has no routes to select from"):
        run_clusters(dense_only(run))


def rewrite_manifest(run: Path, **changes: object) -> Path:
    """Give the checkpoint of a run another manifest, as if it had been written so."""
    checkpoint = find(run)
    publish(checkpoint.folder.rename(run / "draft"), checkpoint.folder, {**checkpoint.manifest, **changes})
    return run


def dense_only(run: Path) -> Path:
    """A checkpoint whose manifest says that it has no experts."""
    return rewrite_manifest(run, model=find(run).manifest["model"] | {"experts": None})


def test_a_run_is_passed_on_without_its_optimizer(tiny_mae_run: tuple[Path, MaskedAutoencoder], tmp_path: Path) -> None:
    run, mae = tiny_mae_run
    weights = {name: p.detach() for name, p in mae.named_parameters()}
    moments = {f"{name}.exp_avg": tensor for name, tensor in weights.items()}
    manifest = {**find(run).manifest, "step": 10, "images_read": 7}
    folder = write_checkpoint(step_folder(run, 10), weights, moments, manifest).folder
    assert "no run can resume" not in run_here("inspect", folder).out
    shutil.rmtree(folder / "optimizer")
    assert run_here("export", run, tmp_path / "out").status == 0
    assert "no run can resume" in run_here("inspect", folder).out
    verified = run_here("inspect", folder, "--verify")
    assert verified.status == 1 and "is damaged: missing" in verified.err + verified.out


def test_half_an_export_is_called_one(
    tiny_mae_run: tuple[Path, MaskedAutoencoder], tiny_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_dense(find(tiny_mae_run[0]), out)
    weights, task = out / "model.safetensors", tiny_images / "digits"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert f"{weights} is damaged (" in refused("inspect", out)
    weights.unlink()
    assert f"{weights} is missing: export it again" in refused("inspect", out)
    message = refused("knn", out, "--train", task, "--test", task)
    assert f"{weights} is missing: {out} is an incomplete export" in message


def test_a_run_whose_clusters_were_exchanged_is_refused(tiny_moce_run: Callable[..., Path]) -> None:
    run = rewrite_manifest(tiny_moce_run(), clusters_hash="0" * 64)
    with pytest.raises(ArtefactError, match=r"these are not the clusters that .* was trained with"):
        run_clusters(run)
    shutil.rmtree(run / "clusters")
    with pytest.raises(ArtefactError, match=r"clusters.json not found"):
        run_clusters(run)


def test_dense_is_the_route_without_experts(tiny_mae_run: tuple[Path, MaskedAutoencoder]) -> None:
    checkpoint = find(tiny_mae_run[0])
    state = encoder_state(checkpoint, ModelSpec.from_tree(checkpoint.manifest["model"]), DENSE)
    assert set(state) == set(timm_vit(tiny_mae_run[1].shape).state_dict())


def test_choosing_by_hand_is_choosing(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    """Shares may be any weights that sum to 1."""
    checkpoint, clusters = run_clusters(tiny_moce_run("experts.combine=prob"))
    chosen = SelectedExperts.of_route((0, 1), {2: 0.25, 5: 0.75})
    provenance = export_route(checkpoint, clusters, chosen, tmp_path / "out", {})
    model = trained(checkpoint, clusters)
    values = np.array([gate_values(model, cluster, (0, 1)) for cluster in (2, 5)])
    assert provenance["gate_values"] == pytest.approx((np.array([0.25, 0.75]) @ values).tolist(), rel=1e-5)
