"""A route of a trained MoCE as an ordinary dense ViT, checked against the model it comes from before it is written.

Axes: B images, T tokens, D width, L expert layers, M clusters, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce_ds.checkpoint_files import WEIGHTS, Checkpoint
from moce_ds.clustering.clusters import Clusters
from moce_ds.errors import ArtefactError, ConfigError
from moce_ds.files import atomic_folder
from moce_ds.models.dense import DENSE, Route, as_encoder, encoder_state
from moce_ds.models.moce import Moce
from moce_ds.models.spec import ModelSpec, build_model, give_weights
from moce_ds.models.vit import save_encoder
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.transfer.select import Selection

TOLERANCE = 1e-5
"""Largest difference, relative to the largest output, between the export and the model that was trained."""

_CHECK_IMAGES = 4


@dataclass(frozen=True)
class Chosen:
    """A route to export: its experts, and the share of each cluster that speaks for it (summing to 1)."""

    experts: tuple[int, ...]
    clusters: dict[int, float]


def choose_cluster(checkpoint: Checkpoint, cluster: int) -> Chosen:
    """The route of one cluster. Raises ConfigError when there is no such cluster."""
    table = checkpoint.manifest["routing"]["expert_ML"]
    if not 0 <= cluster < len(table):
        raise ConfigError(f"--cluster: got {cluster}; the run has clusters 0 to {len(table) - 1}.")
    return Chosen(tuple(table[cluster]), {cluster: 1.0})


def choose_route(checkpoint: Checkpoint, experts: tuple[int, ...]) -> Chosen:
    """A route by its experts, the clusters on it weighed by their share of the training set.

    Raises:
        ConfigError: the route has the wrong length, or no cluster takes it; those that are taken are listed.
    """
    routing = checkpoint.manifest["routing"]
    table = [tuple(row) for row in routing["expert_ML"]]
    on_route = {c: routing["cluster_share_M"][c] for c, row in enumerate(table) if row == experts}
    total = sum(on_route.values())
    if not total:
        taken = ", ".join("-".join(map(str, route)) for route in sorted(set(table)))
        raise ConfigError(f"--route: no cluster takes {'-'.join(map(str, experts))}; routes of this run: {taken}.")
    return Chosen(experts, {c: share / total for c, share in on_route.items()})


def choose_selected(checkpoint: Checkpoint, selection: Selection) -> Chosen:
    """The route that a task's images voted for, its clusters weighed by those votes."""
    table = checkpoint.manifest["routing"]["expert_ML"]
    on_route = {c: share for c, share in selection.clusters.items() if tuple(table[c]) == selection.route}
    return Chosen(selection.route, {c: share / selection.share for c, share in on_route.items()})


def export_route(
    checkpoint: Checkpoint, clusters: Clusters, chosen: Chosen, out: Path, extra: dict[str, Any], replace: bool = False
) -> dict[str, Any]:
    """Write the dense ViT of a route as an encoder folder; returns its provenance.

    The gate value folded in is that of the cluster, or the mean over `chosen.clusters` by their shares.

    Args:
        out: the folder; must not exist, unless `replace` is given and it holds an earlier export.
        extra: goes into `provenance.json` (the votes, say).

    Raises:
        ConfigError: `out` exists.
        ArtefactError: the export does not compute what the trained model computes; nothing is written.
    """
    _check_free(out, replace)
    spec = ModelSpec.from_tree(checkpoint.manifest["model"])
    assert spec.experts is not None, "the caller opens runs with experts only"
    if spec.experts.k > 1 or spec.experts.shared:
        raise ConfigError(
            f"{checkpoint.folder}: k={spec.experts.k}, shared_expert={spec.experts.shared}: an image goes through "
            "several MLPs a layer: a route is no dense ViT. Export a run with experts.k=1 and no shared expert."
        )
    trained = build_model(spec, clusters, ReferenceMoE)
    give_weights(dict(trained.named_parameters()), checkpoint.load(WEIGHTS), str(checkpoint.folder))
    assert isinstance(trained, Moce)
    route = Route(chosen.experts, _gate_values(trained.eval(), chosen))
    provenance: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "clusters_hash": clusters.hash,
        "layers": list(spec.experts.layers),
        "route": list(route.experts),
        "gate_values": list(route.weights),
        "combine": spec.experts.combine,
        "clusters": {str(cluster): share for cluster, share in chosen.clusters.items()},
        "exact_for": "every image of the cluster" if len(chosen.clusters) == 1 else "mean gate value of the clusters",
        **extra,
    }
    state = encoder_state(checkpoint, spec, route)
    exported = as_encoder(state, spec, provenance, str(checkpoint.folder))
    provenance["max_difference"] = difference(trained, exported.model, route)
    if provenance["max_difference"] > TOLERANCE:
        raise ArtefactError(
            f"The export of route {route.experts} differs from the trained model by "
            f"{provenance['max_difference']:.1e}, more than {TOLERANCE:.0e}: nothing was written. "
            "This is a defect of moce_ds; please report it."
        )
    with atomic_folder(out) as draft:
        save_encoder(draft, state, spec.shape, spec.input, provenance)
    return provenance


def export_dense(checkpoint: Checkpoint, out: Path, replace: bool = False) -> dict[str, Any]:
    """Write the encoder of a dense run as `export_route` does; returns its provenance. Raises ConfigError."""
    _check_free(out, replace)
    spec = ModelSpec.from_tree(checkpoint.manifest["model"])
    provenance = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "route": None}
    with atomic_folder(out) as draft:
        save_encoder(draft, encoder_state(checkpoint, spec, DENSE), spec.shape, spec.input, provenance)
    return provenance


def _check_free(out: Path, replace: bool) -> None:
    if out.exists() and not (replace and (out / "provenance.json").is_file()):
        raise ConfigError(f"{out} exists: export into another folder, or remove it (--replace: an earlier export).")


@torch.inference_mode()
def _gate_values(trained: Moce, chosen: Chosen) -> tuple[float, ...]:
    """The gate value p of each layer's expert; 1 with straight_through, which multiplies by 1 in value."""
    if trained.experts.combine == "straight_through":
        return (1.0,) * len(chosen.experts)
    probs_LME = trained.gate().double()
    return tuple(
        float(sum(share * probs_LME[layer, cluster, expert] for cluster, share in chosen.clusters.items()))
        for layer, expert in enumerate(chosen.experts)
    )


@torch.inference_mode()
def difference(trained: Moce, exported: torch.nn.Module, route: Route) -> float:
    """Largest difference of the output tokens on random images, over the largest output."""
    size = trained.shape.image_size
    images_BCHW = torch.randn(_CHECK_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected_BTD = trained.tokens_on_route(images_BCHW, route.experts, route.weights)
    got_BTD: Tensor = exported.forward_features(images_BCHW)  # type: ignore[operator]
    return float((got_BTD - expected_BTD).abs().max() / expected_BTD.abs().max())
