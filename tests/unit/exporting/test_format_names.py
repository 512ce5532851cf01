"""Files for libraries that cannot be installed here, held against the names of their state dicts (tests/fixtures)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moce_ds.common.storage.files import read_json
from moce_ds.exporting.formats.registry import find_format
from moce_ds.exporting.write import export_route
from moce_ds.models.build import ModelSpec
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.selection.routes import choose_cluster
from moce_ds.selection.run_clusters import run_clusters

FIXTURES = Path(__file__).parents[2] / "fixtures" / "state_dicts"
KEYS = {"detectron2": "model", "mmdet": "model", "mmseg": "state_dict", "mmpretrain": "state_dict"}
SIZES = {"1": 1, "3": 3, "D": 16, "3D": 48, "H": 64, "T": 17, "P": 4}
DEPTH = 3


def names_of(fixture: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every pre-trained parameter, at the size of the tiny model."""
    return {
        name.format(i=block): tuple(SIZES[size] for size in shape)
        for name, shape in fixture["names"].items()
        for block in range(DEPTH if "{i}" in name else 1)
    }


def exported(run: Path, out: Path, format: str, part: str = "encoder") -> dict[str, Tensor]:
    checkpoint, clusters = run_clusters(run)
    said = export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), out, {}, find_format(format, part))
    assert (
        said["loaded_back"] == {"library": None, "reason": f"{format} cannot be installed as a package"}
        or part == "full"
    )
    return torch.load(out / "model.pth", weights_only=True)


def test_fixtures_say_where_their_names_were_read() -> None:
    for format in KEYS:
        source = read_json(FIXTURES / f"{format}.json", "names", "hand")["source"]
        assert source and all(url.startswith("https://github.com/") for url in source)


@pytest.mark.parametrize("format", KEYS)
def test_names_and_shapes_are_those_of_the_library(
    tiny_moce_run: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    content = exported(tiny_moce_run(), tmp_path / "out", format)
    assert set(content) == {KEYS[format]}
    found = {name: tuple(tensor.shape) for name, tensor in content[KEYS[format]].items()}
    prefix = "backbone.net." if format == "detectron2" else ""  # which its heuristics find
    fixture = read_json(FIXTURES / f"{format}.json", "names", "hand")
    assert {prefix + name: shape for name, shape in found.items()} == names_of(fixture)


def test_detectron2_matches_each_name_with_one_parameter(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    """By the end of its name: a final norm would go to the norms of the pyramid."""
    state = exported(tiny_moce_run(), tmp_path / "out", "detectron2")["model"]
    fixture = read_json(FIXTURES / "detectron2.json", "names", "hand")
    left = [name.format(i=block) for name in fixture["not_pretrained"] for block in range(DEPTH)]

    def matches(parameter: str) -> list[str]:
        return [name for name in [*state, "norm.weight"] if parameter == name or parameter.endswith(f".{name}")]

    assert all(len(matches(parameter)) == 1 for parameter in names_of(fixture))
    assert {name for parameter in left for name in matches(parameter)} == {"norm.weight"}, "the trap, were it left in"
    assert "norm.weight" not in state


def test_values_go_where_they_belong(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    run = tiny_moce_run("experts.combine=straight_through")
    checkpoint, _ = run_clusters(run)
    experts, weights = choose_cluster(checkpoint, 0).experts, checkpoint.load("weights")
    assert experts is not None
    state = exported(run, tmp_path / "out", "mmpretrain")["state_dict"]
    for ours, theirs in (
        (f"blocks.2.mlp.experts.{experts[1]}.fc1.weight", "layers.2.ffn.layers.0.0.weight"),
        (f"blocks.2.mlp.experts.{experts[1]}.fc2.bias", "layers.2.ffn.layers.1.bias"),
        ("blocks.1.norm2.weight", "layers.1.ln2.weight"),
        ("norm.weight", "ln1.weight"),
        ("blocks.1.attn.proj.weight", "layers.1.attn.proj.weight"),
    ):
        assert torch.equal(state[f"backbone.{theirs}"], weights[ours]), theirs


def test_the_public_mae_s_file_holds_the_decoder(tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    run = tiny_moce_run()
    state = exported(run, tmp_path / "out", "timm", "full")["model"]
    spec = ModelSpec.from_tree(run_clusters(run)[0].manifest["model"])
    mae = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    assert mae.state_dict().keys() == state.keys()
    mae.load_state_dict(state, strict=True)
