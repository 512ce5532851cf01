"""Exports that other libraries load: what they compute there, and what lies in the folder."""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moce_ds.checkpoint.format import find, step_folder, write_checkpoint
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.exporting import write as export
from moce_ds.exporting.formats import registry
from moce_ds.exporting.formats.registry import FORMATS, NAMES, Format, find_format
from moce_ds.exporting.write import export_dense, export_route
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.parameters import is_decoder
from moce_ds.models.vit import load_encoder
from moce_ds.selection.routes import choose_cluster
from moce_ds.selection.run_clusters import run_clusters
from moce_ds.training.settings import PretrainSettings
from tests.examples.moce_command import refused, run_here

MakeRun = Callable[..., Path]


def write(run: Path, out: Path, format: Format) -> dict[str, Any]:
    checkpoint, clusters = run_clusters(run)
    return export_route(checkpoint, clusters, choose_cluster(checkpoint, 0), out, {}, format)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}-{format.part}")
def test_every_format_computes_what_was_trained(tiny_moce_run: MakeRun, tmp_path: Path, format: Format) -> None:
    out = tmp_path / "out"
    said = write(tiny_moce_run("experts.combine=prob"), out, format)
    assert json.loads((out / "provenance.json").read_text()) == said
    assert said["max_abs_difference"] < 1e-5 and (said["format"], said["part"]) == (format.name, format.part)
    if format.library:
        assert said["loaded_back"]["library"].split()[0] == format.library
        assert said["loaded_back"]["max_abs_difference"] < 1e-5
    seen = run_here("inspect", out, "--verify")
    assert seen.status == 0 and "Verified" in seen.out, seen
    assert (f"{format.name} ({format.part})" in seen.out) is not format.is_encoder_folder
    files = [path for path in out.iterdir() if path.suffix in (".pth", ".safetensors", ".data")]
    flipped = bytearray(files[0].read_bytes())
    flipped[-1] ^= 1
    files[0].write_bytes(flipped)
    assert f"{files[0].name}: is damaged" in run_here("inspect", out, "--verify").out


@torch.inference_mode()
def test_hugging_face_sees_the_same_images_and_gives_the_same_tokens(tiny_moce_run: MakeRun, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification

    run = tiny_moce_run()
    for name in ("timm", "hf-vit"):
        write(run, tmp_path / name, find_format(name))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    seen = AutoImageProcessor.from_pretrained(tmp_path / "hf-vit")(image, return_tensors="pt").pixel_values
    encoder = load_encoder(tmp_path / "timm")
    assert seen.shape == (1, 3, 16, 16)
    assert torch.allclose(
        seen.mean(dim=(0, 2, 3)), (0.5 - torch.tensor(encoder.input.mean)) / torch.tensor(encoder.input.std), atol=0.3
    )
    expected = encoder.model.forward_features(seen)
    model = AutoModel.from_pretrained(tmp_path / "hf-vit").eval()
    assert (model(seen).last_hidden_state - expected).abs().max() < 1e-5
    classifier = ViTForImageClassification.from_pretrained(tmp_path / "hf-vit", num_labels=3).eval()
    assert (classifier.vit(seen).last_hidden_state - expected).abs().max() < 1e-5
    card = (tmp_path / "hf-vit" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "experts of the route: [" in card


@pytest.mark.parametrize(
    ("format", "part", "auto"),
    [("hf-vit", "encoder", "AutoModel"), ("hf-vitmae", "encoder", "AutoModel"),
     ("hf-vitmae", "full", "AutoModelForPreTraining")],
)  # fmt: skip
def test_a_folder_is_ready_for_the_hub(
    tiny_moce_run: MakeRun, tmp_path: Path, format: str, part: str, auto: str
) -> None:
    """A card that the Hub can index, and transformers' own classes load it and save it as `push_to_hub` does."""
    import transformers
    from huggingface_hub import ModelCard

    folder, saved = tmp_path / "out", tmp_path / "saved"
    provenance = write(tiny_moce_run(), folder, find_format(format, part))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert (card.data.license, card.data.license_name) == ("other", "not-stated")
    assert (
        f"experts of the route: {provenance['route']}" in card.text and "clusters and shares: {'0': 1.0}" in card.text
    )
    assert f"{auto}.from_pretrained(" in card.text and "None" not in card.text
    model = getattr(transformers, auto).from_pretrained(folder, local_files_only=True)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    again = getattr(transformers, auto).from_pretrained(saved, local_files_only=True).state_dict()
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert {name: t.sum() for name, t in again.items()} == {name: t.sum() for name, t in model.state_dict().items()}
    kept = transformers.AutoImageProcessor.from_pretrained(saved, local_files_only=True)
    assert kept.to_dict() == processor.to_dict() and kept.crop_size == {"height": 16, "width": 16}


def test_the_card_of_a_dense_run_names_no_route(tiny_mae_run: Path, tmp_path: Path) -> None:
    export_dense(find(tiny_mae_run), tmp_path / "out", find_format("hf-vit"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "# ViTModel: a dense MAE\n" in card and "route" not in card and "MoCE" not in card and "- of step: 3\n" in card
    )


def test_an_encoder_holds_no_decoder(tiny_moce_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_moce_run()
    for name in ("timm", "hf-vit", "hf-vitmae"):
        write(run, tmp_path / name, find_format(name))
        names = load_file(tmp_path / name / "model.safetensors")
        assert not [n for n in names if is_decoder(n) or "decoder" in n or "mask_token" in n or "gate" in n], name


def test_a_dense_run_goes_into_every_format(tiny_config: Callable[..., PretrainSettings], tmp_path: Path) -> None:
    config = tiny_config()
    torch.manual_seed(0)
    mae = MaskedAutoencoder(config.model_spec.shape, config.model_spec.decoder, 0.75)
    manifest = {"step": 1, "config": to_tree(config), "model": config.model_spec.to_tree()}
    weights = {name: p.detach() for name, p in mae.named_parameters()}
    write_checkpoint(step_folder(config.run.out, 1), weights, {}, manifest)
    for name, part in (("timm", "full"), ("hf-vitmae", "full"), ("mmseg", "encoder")):
        said = export_dense(find(config.run.out), tmp_path / f"{name}-{part}", find_format(name, part))
        assert said["route"] is None and said["max_abs_difference"] < 1e-5


def swapped(state: dict[str, Tensor]) -> None:
    """Queries for values."""
    one, other = (f"encoder.layer.1.attention.attention.{name}.weight" for name in ("query", "value"))
    state[one], state[other] = state[other], state[one]


def lacking(state: dict[str, Tensor]) -> None:
    del state["encoder.layer.1.layernorm_after.bias"]


@pytest.mark.parametrize(
    ("spoil", "told"), [(swapped, "differs from the trained"), (lacking, "does not read ViTModel as it was written")]
)
def test_what_the_library_reads_otherwise_is_not_written(
    tiny_moce_run: MakeRun, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], told: str
) -> None:
    """The files are what is checked, not what was in memory."""
    right = find_format("hf-vit")

    def wrongly(folder: Path, model: Any) -> None:
        right.write(folder, model)
        state = load_file(folder / "model.safetensors")
        spoil(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    (tmp_path / "exports").mkdir()
    with pytest.raises(ArtefactError, match=told):
        write(tiny_moce_run(), tmp_path / "exports" / "out", replace(right, write=wrongly))
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_library_that_is_not_installed_is_named(
    tiny_moce_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "installed", lambda library: False)
    said = run_here("export", tiny_moce_run(), tmp_path / "out", "--cluster", 0, "--format", "hf-vit")
    reason = "transformers is not installed: pip install 'moce-ds[formats]'"
    assert said.status == 0 and f"not loaded back: {reason}" in said.out
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["loaded_back"]["reason"] == reason


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--format hf", f"--format: got 'hf'; expected one of {', '.join(NAMES)}."),
        (
            "--format onnx --part full",
            "--format onnx takes encoder; full, with the decoder, is available for timm, hf-vitmae.",
        ),
        ("--part half", "--part: got 'half'; --format timm takes encoder or full;"),
    ],
)
def test_formats_that_are_not_there(tiny_moce_run: MakeRun, tmp_path: Path, words: str, told: str) -> None:
    assert told in refused("export", tiny_moce_run(), tmp_path / "out", "--cluster", 0, *words.split())
    assert not (tmp_path / "out").exists()


def test_what_writes_a_format_is_named_where_it_is_missing() -> None:
    missing = replace(find_format("onnx"), needs=("no_such_package",))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ConfigError, match=r"needs no_such_package: pip install 'moce"),
    ):
        patch.setattr(registry, "FORMATS", (missing,))
        find_format("onnx")


@contextmanager
def small_files() -> Iterator[None]:
    """No file may get larger than 20 kB, which is what a full disk comes to for those who write.

    Only around the call: a log to which the tests themselves write may be larger.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("format", ["timm", "hf-vit", "mmdet", "onnx"])
def test_what_does_not_fit_on_the_disk_is_named(tiny_moce_run: MakeRun, tmp_path: Path, format: str) -> None:
    run = tiny_moce_run()
    with small_files():
        told = refused("export", run, tmp_path / "exports" / "out", "--cluster", 0, "--format", format)
    assert told.startswith(f"{tmp_path / 'exports' / 'out'} cannot be written: ")
    assert list((tmp_path / "exports").iterdir()) == []
