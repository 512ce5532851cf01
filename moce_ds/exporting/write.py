"""Writes experts of a trained MoCE as an ordinary dense ViT, checked against the original model before it is published.

Peak memory is that of the dense model and one expert, for any number of experts: first the output of the trained model
is computed with the chosen experts alone, then the dense model is assembled and written, then it is loaded again.

Axes: T tokens, D width, L expert layers, M clusters, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moce_ds.checkpoint.format import WEIGHTS, Checkpoint
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.encoder_folder import PROVENANCE, replace_provenance
from moce_ds.common.storage.files import atomic_folder, write_json, writes_to
from moce_ds.data.clusters import Clusters
from moce_ds.encoders.from_checkpoint import DENSE, Mixture, Share, decoder_state, encoder_state
from moce_ds.exporting.existing_export import earlier_export
from moce_ds.exporting.formats.registry import EXTRA, TIMM, Format, installed, library_version, write_record
from moce_ds.exporting.formats.weights import DenseModel
from moce_ds.exporting.reference_model import Output, Trial, output_of, reference_model
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import MaskedAutoencoder, run_plainly
from moce_ds.models.moce import make_gate
from moce_ds.models.parameters import is_cluster_gate, load_weights_strict
from moce_ds.models.vit import Encoder, check_state
from moce_ds.selection.routes import ClusterShares, SelectedExperts

TOLERANCE = 1e-5
"""Largest difference, relative to the largest output, between the export and the trained model."""


@dataclass(frozen=True)
class _Source:
    """The model to export: experts of a checkpoint, or a dense model; `label` names it in errors."""

    checkpoint: Checkpoint
    spec: ModelSpec
    clusters: Clusters | None
    mixture: Mixture
    label: str


def export_route(
    checkpoint: Checkpoint,
    clusters: Clusters,
    selected: SelectedExperts,
    out: Path,
    extra: dict[str, Any],
    format: Format = TIMM,
    replace: bool = False,
) -> dict[str, Any]:
    """Write the dense ViT of the selected experts, unless `out` holds it; returns its provenance.

    The folded gate value is that of the cluster, or the mean over the clusters that choose an expert.

    Args:
        out: the folder; must not exist, unless it holds the same export, or any export and `replace` is set.
        extra: further entries of `provenance.json`, such as the votes.

    Raises:
        ConfigError: `out` holds something else, or the run's routes are not dense ViTs.
        ArtefactError: the output of the export differs from the trained model; nothing is written.
    """
    spec = ModelSpec.from_tree(checkpoint.entry("model"))
    assert spec.experts is not None, "the caller opens runs with experts only"
    if spec.experts.k > 1 or spec.experts.shared:
        raise ConfigError(
            f"{checkpoint.folder}: k={spec.experts.k}, shared_expert={spec.experts.shared}: an image passes "
            "several MLPs per layer, so a route is not a dense ViT. Export a run with experts.k=1 and no shared expert."
        )
    mixture = _mixture(selected, _gate_table(checkpoint, spec, clusters))
    facts = {
        "clusters_hash": clusters.hash,
        "layers": list(spec.experts.layers),
        "combine": spec.experts.combine,
        **_facts_about_experts(selected, mixture),
        **extra,
    }
    return _export(_Source(checkpoint, spec, clusters, mixture, selected.label), out, facts, format, replace)


def _facts_about_experts(selected: SelectedExperts, mixture: Mixture) -> dict[str, Any]:
    """The entries of `provenance.json` about the experts, and the images for which the export is exact."""
    clusters = {str(cluster): float(share) for cluster, share in selected.clusters.items()}
    if selected.average:
        return {
            "route": None,
            "clusters": clusters,
            "average": selected.average,
            "experts": [{str(e): vars(share) for e, share in layer.items()} for layer in mixture],
            "exact_for": "nothing: an average of experts is a model that was not trained",
        }
    exact = len(clusters) == 1
    return {
        "route": list(selected.experts or ()),
        "clusters": clusters,
        "gate_values": [share.gate for layer in mixture for share in layer.values()],
        "exact_for": "every image of the cluster" if exact else "mean gate value of the clusters",
    }


def export_dense(checkpoint: Checkpoint, out: Path, format: Format = TIMM, replace: bool = False) -> dict[str, Any]:
    """Write the dense ViT of a dense run; as `export_route`."""
    spec = ModelSpec.from_tree(checkpoint.entry("model"))
    return _export(_Source(checkpoint, spec, None, DENSE, "the dense model"), out, {"route": None}, format, replace)


def _export(source: _Source, out: Path, facts: dict[str, Any], format: Format, replace: bool) -> dict[str, Any]:
    checkpoint, spec, dense = source.checkpoint, source.spec, source.spec.dense
    made_from = {"step": checkpoint.step, "checkpoint_sha256": checkpoint.identity, **facts}
    made_from |= {"format": format.name, "part": format.part}
    if earlier := earlier_export(out, made_from, replace):
        return earlier
    provenance: dict[str, Any] = {"checkpoint": str(checkpoint.folder), **made_from}
    trial = Trial.of(dense)
    before: Output = "patches" if format.part == "full" else "tokens"
    model, run_block = reference_model(checkpoint, spec, source.clusters, source.mixture)
    expected = {output: output_of(model, run_block, trial, output) for output in (before, format.output)}
    del model, run_block
    state = encoder_state(checkpoint, spec, source.mixture)
    if format.part == "full":
        state |= decoder_state(checkpoint, spec)
    provenance |= _compared(_dense_output(state, dense, trial, before), expected[before], source.label)
    with writes_to(out), atomic_folder(out) as draft:
        format.write(draft, DenseModel(state, dense, provenance))
        del state
        provenance["loaded_back"] = _loaded_back(format, draft, source, trial, expected[format.output])
        if format.is_encoder_folder:
            replace_provenance(draft, provenance)
        else:
            write_json(draft / PROVENANCE, provenance)
            write_record(draft, format, dense)
    return provenance


def _gate_table(checkpoint: Checkpoint, spec: ModelSpec, clusters: Clusters) -> Tensor | None:
    """The gate values [L, M, E]; None with straight_through, whose value is 1."""
    assert spec.experts is not None
    if spec.experts.combine == "straight_through":
        return None
    gate = make_gate(spec.experts, torch.from_numpy(clusters.embeddings_MD))
    shared = checkpoint.load(WEIGHTS, ["cls_token"])
    weights = {name.removeprefix("gate."): t for name, t in shared.items() if is_cluster_gate(name)}
    load_weights_strict(dict(gate.named_parameters()), weights, str(checkpoint.folder))
    with torch.inference_mode():
        return gate().double()


def _mixture(selected: SelectedExperts, probs_LME: Tensor | None) -> Mixture:
    """Share and gate value of each expert; the gate value is the mean over the clusters that choose it."""

    def share(layer: int, expert: int, clusters: ClusterShares) -> Share:
        weight = 1.0 if selected.experts else sum(clusters.values())
        if probs_LME is None:
            return Share(weight)
        return Share(weight, sum(part / weight * float(probs_LME[layer, c, expert]) for c, part in clusters.items()))

    return tuple({e: share(layer, e, v) for e, v in experts.items()} for layer, experts in enumerate(selected.layers))


@torch.inference_mode()
def _dense_output(state: dict[str, Tensor], spec: ModelSpec, trial: Trial, output: Output) -> Tensor:
    """The output of the dense model in memory: timm's ViT, or the masked autoencoder if the decoder is exported too."""
    if output == "tokens":
        encoder = Encoder.from_state(state, spec.shape, spec.input, {}, "the export")
        return encoder.model.forward_features(trial.images_BCHW)
    with torch.device("meta"):  # without a second copy
        mae = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    check_state(mae, state, "the export")
    mae.load_state_dict(state, assign=True)
    return output_of(mae.eval(), run_plainly, trial, output)


def _compared(output: Tensor, expected: Tensor, what: str) -> dict[str, float]:
    """The difference of an output from the trained model. Raises ArtefactError if it is too large."""
    largest = float((output - expected).abs().max())
    relative = largest / float(expected.abs().max())
    if not relative <= TOLERANCE:  # also if NaN
        raise ArtefactError(
            f"The export of {what} differs from the trained model by {relative:.1e}, more than {TOLERANCE:.0e}: "
            "nothing was written. This is a defect of moce_ds; please report it."
        )
    return {"max_difference": relative, "max_abs_difference": largest}


def _loaded_back(format: Format, folder: Path, source: _Source, trial: Trial, expected: Tensor) -> dict[str, Any]:
    """The library that loaded the written files and the difference of its output, or the reason why none did.
    Raises ArtefactError."""
    if format.library is None or format.run is None:
        return {"library": None, "reason": f"{format.name} cannot be installed as a package"}
    if not installed(format.library):
        return {"library": None, "reason": f"{format.library} is not installed: pip install '{EXTRA}'"}
    with torch.inference_mode():
        output = format.run(folder, source.spec.dense, trial)
    compared = _compared(output, expected, f"{source.label} as {format.name}")
    return {"library": library_version(format.library), **compared}
