"""What we export is timm's own ViT: it loads strictly, gives the same features, and bad files are refused by name."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.common.storage.checksums import with_checksum
from moce_ds.data.transform import ImageInput
from moce_ds.models.mae import DecoderShape, MaskedAutoencoder, mask_noise, random_masking, visible_tokens
from moce_ds.models.parameters import is_decoder
from moce_ds.models.vit import Encoder, ViTShape, fingerprint, load_encoder, save_encoder, shape_of, timm_vit

NAME = "vit_tiny_patch16_224"
TINY = ViTShape(16, 4, 16, 3, 2)


def encoder_part(mae: MaskedAutoencoder) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in mae.state_dict().items() if not is_decoder(name)}


def tokens(mae: MaskedAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """The encoder's output with everything visible, in the order of the image."""
    masking = random_masking(noise, 0.0)
    x = visible_tokens(mae, images, masking)
    for block in mae.blocks:
        x = block(x)
    x = mae.norm(x)
    order = masking.restore_BN[:, :, None].expand(-1, -1, x.shape[2])
    return torch.cat([x[:, :1], x[:, 1:].gather(1, order)], dim=1)


@pytest.fixture(scope="module")
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    made = MaskedAutoencoder(shape_of(NAME), DecoderShape(16, 1, 2), 0.75).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return made


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(mae: MaskedAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder")
    save_encoder(out, encoder_part(mae), mae.shape, ImageInput(224), {"step": 7})
    return out


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small encoder folder to damage."""
    torch.manual_seed(0)
    save_encoder(tmp_path, timm_vit(TINY).state_dict(), TINY, ImageInput(16, center_crop=1.0), {"route": [1, 2]})
    return tmp_path


@torch.inference_mode()
def test_timm_s_own_model_loads_it_strictly_and_gives_the_same_tokens(
    mae: MaskedAutoencoder, folder: Path, images: Tensor
) -> None:
    model = timm.create_model(NAME, num_classes=0).eval()
    assert model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    expected = tokens(mae, images, torch.rand(2, 196))  # whatever the order in which patches are seen
    assert (model.forward_features(images) - expected).abs().max() < 1e-5
    exact = tokens(deepcopy(mae).double(), images.double(), torch.rand(2, 196))
    assert (model.double().forward_features(images.double()) - exact).abs().max() < 1e-6


@torch.inference_mode()
def test_timm_takes_the_file_as_a_checkpoint(folder: Path, images: Tensor) -> None:
    model = timm.create_model(NAME, num_classes=0, checkpoint_path=str(folder / "model.safetensors")).eval()
    own = load_encoder(folder).model
    assert torch.equal(model.forward_features(images), own.forward_features(images))


def test_the_arguments_in_config_json_build_timm_s_model(tiny: Path) -> None:
    arguments = json.loads((tiny / "config.json").read_text())["timm"]
    model = timm.models.VisionTransformer(**arguments)
    model.load_state_dict(load_file(tiny / "model.safetensors"), strict=True)
    same = timm.create_model(NAME, **arguments, checkpoint_path=str(tiny / "model.safetensors"))
    assert fingerprint(same.state_dict()) == fingerprint(model.state_dict())


def test_features_are_the_mean_of_the_patch_tokens(mae: MaskedAutoencoder, folder: Path, images: Tensor) -> None:
    with torch.inference_mode():
        expected = tokens(mae, images, torch.rand(2, 196))[:, 1:].mean(dim=1)
    found = load_encoder(folder).features(images)
    assert found.shape == (2, 192) and found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5


def test_an_encoder_survives_its_folder(tiny: Path) -> None:
    loaded = load_encoder(tiny)
    assert sorted(path.name for path in tiny.iterdir()) == ["config.json", "model.safetensors", "provenance.json"]
    assert loaded.shape == TINY and loaded.input == ImageInput(16, center_crop=1.0)
    assert loaded.provenance == {"route": [1, 2]} and not loaded.model.training
    again = Encoder(timm_vit(TINY), TINY, loaded.input, {})
    assert again.fingerprint != loaded.fingerprint
    again.model.load_state_dict(loaded.model.state_dict())
    assert again.fingerprint == loaded.fingerprint


def test_the_fingerprint_sees_names_shapes_and_values() -> None:
    state = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    reordered = {"b": torch.zeros(2), "a": torch.arange(6.0)}
    assert fingerprint(reordered) == fingerprint(state)
    others = [state | {"a": torch.arange(6.0).reshape(2, 3)}, {"b": torch.zeros(2), "c": torch.arange(6.0)},
              state | {"b": torch.tensor([0, 1e-30])}]  # fmt: skip
    assert len({fingerprint(one) for one in (state, *others)}) == 4


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_base_patch16_224", ViTShape(224, 16, 768, 12, 12)),
        ("vit_small_patch32_384", ViTShape(384, 32, 384, 12, 6)),
        ("vit_large_patch16_224", ViTShape(224, 16, 1024, 24, 16)),
        ("vit_huge_patch14_224", ViTShape(224, 14, 1280, 32, 16)),
    ],
)
def test_sizes_behind_timm_s_names(name: str, shape: ViTShape) -> None:
    assert shape_of(name) is shape_of(name)  # timm builds a model to answer, and every step asks
    assert shape_of(name) == shape and shape.num_patches == (shape.image_size // shape.patch_size) ** 2
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0).state_dict()
        ours = timm_vit(shape).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("something_else", "expected the name of a ViT in timm. Such as vit_base_patch16_224."),
        ("vit_bse_patch16_224", "Near: vit_base_patch16_224"),
        ("swin_tiny_patch4_window7_224", "is not a plain ViT with one cls token"),
        ("vit_base_patch16_gap_224", "is not a plain ViT with one cls token"),
    ],
)
def test_names_of_other_models_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.vit: .*{name}.*{message}"):
        shape_of(name)


def change_state(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return apply


def wrong(state: dict[str, Tensor]) -> None:
    del state["norm.bias"]
    state["mask_token"] = torch.zeros(1, 1, 16)
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(8, 16)


@pytest.mark.parametrize(
    ("harm", "messages"),
    [
        (lambda f: (f / "config.json").unlink(), ["config.json not found: expected an encoder folder"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json is damaged"]),
        (lambda f: (f / "config.json").write_text('{"format": "other"}'), ["'other'; this program reads format"]),
        (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors is missing", "incomplete"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40), ["safetensors is damaged"]),
        (lambda f: (f / "provenance.json").unlink(), ["provenance.json not found"]),
        (
            change_state(lambda state: state["norm.bias"].add_(1)),
            ["model.safetensors is damaged or exchanged: its checksum is not", "config.json: export it again"],
        ),
        (
            change_state(wrong),
            [
                "model.safetensors does not fit the model:",
                "missing norm.bias (16,)",
                "unexpected mask_token (1, 1, 16)",
                "blocks.0.mlp.fc1.weight is (8, 16), expected (64, 16)",
            ],
        ),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused(tiny: Path, harm: Callable[[Path], None], messages: list[str]) -> None:
    harm(tiny)
    with pytest.raises(ArtefactError) as caught:
        load_encoder(tiny)
    for message in messages:
        assert message in str(caught.value)


def test_differences_are_listed_but_not_without_end(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    deeper = config | {"shape": asdict(ViTShape(16, 4, 16, 9, 2))}
    (tiny / "config.json").write_text(json.dumps(with_checksum(deeper)))
    with pytest.raises(ArtefactError, match="and 52 more missing") as caught:
        load_encoder(tiny)
    assert len(str(caught.value).splitlines()) == 22


def test_masks_of_training_show_timm_s_tokens_too(images: Tensor) -> None:
    """With a quarter visible, the encoder computes what timm's blocks make of those tokens alone."""
    torch.manual_seed(0)
    mae = MaskedAutoencoder(TINY, DecoderShape(16, 1, 2), 0.75).double().eval()
    model = timm_vit(TINY).double().eval()
    model.load_state_dict(encoder_part(mae))
    small = images[:, :, :16, :16].double()
    masking = random_masking(mask_noise(0, torch.arange(2).numpy(), torch.zeros(2).numpy().astype(int), 16), 0.75)
    with torch.inference_mode():
        x = model.patch_embed(small)
        x = model._pos_embed(x)
        kept = torch.stack([x[b, [0, *(1 + masking.visible_BV[b]).tolist()]] for b in range(2)])
        assert (visible_tokens(mae, small, masking) - kept).abs().max() < 1e-12
