"""Encoders in files of the public MAE: the features that timm gives with the same weights, and what is refused."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from moce_ds.common.config.settings import load
from moce_ds.common.errors import ArtefactError, ConfigError
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import ImageInput
from moce_ds.encoders.open import open_encoder
from moce_ds.encoders.public_mae import _shape, public_encoder
from moce_ds.models.mae import DecoderShape, MaskedAutoencoder
from moce_ds.models.vit import ViTShape, load_encoder, save_encoder
from moce_ds.tuning.classification import Classification, make_splits
from moce_ds.tuning.pyramid import SimpleFeaturePyramid
from moce_ds.tuning.settings import BackboneSettings, FinetuneSettings
from tests.examples.alone import ALONE
from tests.examples.moce_command import refused, run_here

CPU = torch.device("cpu")
SHAPE = ViTShape(16, 4, 16, 3, 2)
State = dict[str, Tensor]


def public_vit(pooled: bool) -> VisionTransformer:
    """The public `models_vit.py`, with `--global_pool` or without: timm's ViT, as it is given there."""
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, mlp_ratio=4, qkv_bias=True, num_classes=7,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), global_pool="avg" if pooled else "token",
    ).eval()  # fmt: skip


def shaken(model: nn.Module) -> State:
    """Its weights, none of which is what a fresh model would have."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.state_dict()


@pytest.fixture(scope="module")
def full() -> State:
    """Encoder and decoder, as `main_pretrain.py` saves them."""
    return shaken(MaskedAutoencoder(SHAPE, DecoderShape(8, 1, 2), 0.75))


def encoder_part(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(("decoder_", "mask_token"))}


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def as_safetensors(path: Path, state: State) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


KINDS: dict[str, Callable[[Path, State], Path]] = {
    "pretrain": lambda path, full: written(path, {"model": encoder_part(full)}),
    "full": lambda path, full: written(path, {"model": full}),
    "training": lambda path, full: written(
        path, {"model": full, "optimizer": {"state": {}}, "epoch": 799, "args": Namespace(output_dir=path)}
    ),
    "fine-tuned by cls": lambda path, full: written(
        path, {"model": {**encoder_part(full), "head.bias": torch.ones(7)}}
    ),
    "safetensors": lambda path, full: as_safetensors(path, full),
}


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_timm_s(full: State, photo_pixels: Tensor, tmp_path: Path, kind: str) -> None:
    timms, images_BCHW = public_vit(pooled=False), photo_pixels.float()
    timms.load_state_dict(encoder_part(full), strict=False)
    encoder = public_encoder(KINDS[kind](tmp_path / "w.pth", full), heads=2)
    with torch.no_grad():
        expected_BD = timms.forward_features(images_BCHW)[:, 1:].mean(dim=1)
    assert torch.equal(encoder.features(images_BCHW), expected_BD)
    assert (encoder.shape, encoder.input) == (SHAPE, ImageInput(16))
    assert encoder.fingerprint == public_encoder(KINDS["full"](tmp_path / "again.pth", full), heads=2).fingerprint


@pytest.fixture
def fine_tuned(tmp_path: Path) -> tuple[Path, VisionTransformer]:
    """As `main_finetune.py` saves by default: the norm comes behind the mean of the tokens."""
    timms = public_vit(pooled=True)
    state = shaken(timms)
    assert "fc_norm.weight" in state and "norm.weight" not in state
    return written(tmp_path / "tuned.pth", {"model": state}), timms


def test_features_of_a_fine_tuned_model_are_what_its_head_sees(
    fine_tuned: tuple[Path, VisionTransformer], photo_pixels: Tensor, tmp_path: Path
) -> None:
    (path, timms), images_BCHW = fine_tuned, photo_pixels.float()
    encoder = public_encoder(path, heads=2)
    with torch.no_grad():
        expected_BD = timms.forward_head(timms.forward_features(images_BCHW), pre_logits=True)
    assert torch.equal(encoder.features(images_BCHW), expected_BD)
    (folder := tmp_path / "encoder").mkdir()
    save_encoder(folder, encoder.model.state_dict(), encoder.shape, encoder.input, encoder.provenance)
    assert torch.equal(load_encoder(folder).features(images_BCHW), expected_BD)


def test_a_fine_tuned_model_is_tuned_further_but_not_on_pixels(
    fine_tuned: tuple[Path, VisionTransformer], tiny_shards: Path, photo_pixels: Tensor, tmp_path: Path
) -> None:
    encoder, shards = public_encoder(fine_tuned[0], heads=2), ShardSet.open(tiny_shards)
    named = {"data.encoder": fine_tuned[0], "data.train": tiny_shards, "data.test": tiny_shards, "run.out": tmp_path}
    config = load(FinetuneSettings, None, [f"{key}={value}" for key, value in named.items()])
    parts = (config.data, config.augment, config.optim, config.engine, config.run)
    model = Classification(encoder, make_splits(shards, 0.2, shards, 0), *parts, ALONE).model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(photo_pixels.float()), model.head(encoder.features(photo_pixels.float())))
    with pytest.raises(ConfigError, match=r"data.encoder: .*Give the encoder as it was pre-trained"):
        SimpleFeaturePyramid(encoder, BackboneSettings(image_size=32, channels=8))


def on_paper(width: int, depth: int, patch: int, side: int) -> State:
    """The names and shapes that the size of an encoder is told by; no memory."""
    with torch.device("meta"):
        return {
            "patch_embed.proj.weight": torch.empty(width, 3, patch, patch),
            "pos_embed": torch.empty(1, side**2 + 1, width),
            "blocks.0.mlp.fc1.weight": torch.empty(4 * width, width),
            f"blocks.{depth - 1}.norm1.weight": torch.empty(width),
        }


@pytest.mark.parametrize(
    ("width", "depth", "patch", "heads"), [(768, 12, 16, 12), (1024, 24, 16, 16), (1280, 32, 14, 16)]
)
def test_the_sizes_of_the_public_code_are_known(width: int, depth: int, patch: int, heads: int) -> None:
    assert _shape(on_paper(width, depth, patch, 224 // patch), None, "w.pth") == ViTShape(
        224, patch, width, depth, heads
    )


def test_larger_images_are_not_cut(full: State, tmp_path: Path) -> None:
    grown = {**encoder_part(full), "pos_embed": torch.zeros(1, 1 + 57**2, 16)}
    assert public_encoder(written(tmp_path / "w.pth", grown), heads=2).input == ImageInput(228, center_crop=1.0)


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        (lambda s: s, None, r"width 16 and 3 blocks.*768 x 12 \(12\), 1024 x 24 \(16\).*--heads"),
        (lambda s: s, 3, r"width 16, which is not a multiple of 3 heads"),
        (lambda s: {f"module.{n}": t for n, t in s.items()}, 2, r"no patch_embed.*Found: module\.blocks\.0\."),
        (lambda s: {n: t for n, t in s.items() if n != "pos_embed"}, 2, r"holds no pos_embed; expected"),
        (lambda s: {"mask_token": s["mask_token"]}, 2, r"Found: a decoder alone"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][:, 1:]}, 2, r"positions \[1, 16, 16\]; expected"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][0]}, 2, r"positions \[17, 16\]; expected"),
        (lambda s: {**s, "patch_embed.proj.weight": torch.ones(16, 1, 4, 4)}, 2, r"patches \[16, 1, 4, 4\]"),
        (lambda s: {**s, "norm.weight": torch.full((16,), torch.nan)}, 2, r"norm.weight holds NaN"),
        (
            lambda s: {**s, "blocks.0.ls1.gamma": torch.ones(16)},
            2,
            r"does not fit .*unexpected blocks.0.ls1",
        ),
        (lambda s: {n: t for n, t in s.items() if n != "blocks.1.attn.qkv.bias"}, 2, r"missing blocks.1.attn.qkv.bias"),
    ],
)
def test_what_is_no_such_encoder_is_refused(
    full: State, tmp_path: Path, change: Callable[[State], State], heads: int | None, message: str
) -> None:
    path = written(tmp_path / "w.pth", {"model": change(full)})
    with pytest.raises(ArtefactError, match=rf"(?s)ENCODER: .*w\.pth .*{message}"):
        open_encoder(path, CPU, heads)


def test_from_a_foreign_file_to_clusters(full: State, tiny_shards: Path, tmp_path: Path) -> None:
    path = KINDS["training"](tmp_path / "checkpoint-799.pth", full)
    said = run_here("features", path, tiny_shards, tmp_path / "features", "--heads", 2, "threads=1")
    assert said.status == 0 and "read as a ViT of the public MAE: width 16, 3 blocks, 2 heads" in said.err, said
    kept = load_encoder(tmp_path / "features" / "encoder")
    assert kept.fingerprint == public_encoder(path, heads=2).fingerprint
    assert run_here("cluster", tmp_path / "features", tmp_path / "clusters", "num_clusters=4").status == 0
    verbs = ("knn", path, "--train", tiny_shards, "--test", tiny_shards)
    by_file = run_here(*verbs, "--heads", 2, "--model", "same", "threads=1")
    by_folder = run_here("knn", tmp_path / "features" / "encoder", *verbs[2:], "--model", "same", "threads=1")
    assert by_file.out == by_folder.out and by_file.status == 0, by_file
    assert "--heads requires a file" in refused("knn", tmp_path / "features" / "encoder", *verbs[2:], "--heads", 2)
    other = KINDS["training"](tmp_path / "other.pth", {name: tensor + 1e-3 for name, tensor in full.items()})
    said = run_here("features", other, tiny_shards, tmp_path / "features", "--heads", 2)
    assert said.status == 1 and "identity.encoder_fingerprint" in said.err, said
