"""The second use of the same images and encoder decodes and encodes nothing, and yields the same bits."""

import os
import pstats
import shutil
from collections.abc import Callable
from cProfile import Profile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from moce_ds.common.errors import DataError
from moce_ds.common.storage.cache import Cache
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.task_images import opened_images
from moce_ds.data.transform import ImageInput
from moce_ds.encoders.features import encode_in_order
from moce_ds.encoders.kept_features import KeptFeatures
from moce_ds.encoders.settings import EncodeSettings
from moce_ds.models.vit import ViTShape, load_encoder, save_encoder, timm_vit
from tests.examples.disk import mounted_disk
from tests.examples.moce_command import run_here
from tests.unit.common.storage.test_cache import flip_bit
from tests.unit.data.test_loader import flip_byte

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_images: Path, tmp_path: Path) -> Path:
    """Ten images of two classes, as bitmaps: all files have the same size."""
    for label in ("china", "flower"):
        (tmp_path / "task" / label).mkdir(parents=True)
        for path in sorted((tiny_images / label).iterdir())[:5]:
            Image.open(path).convert("RGB").resize((16, 16)).save(tmp_path / "task" / label / f"{path.stem}.bmp")
    return tmp_path / "task"


@pytest.fixture
def encoder(tiny_encoder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_encoder, tmp_path / "encoder")


def encoded(encoder: Path, folder: Path, batch_size: int = 4) -> Tensor:
    with opened_images(folder) as images:
        return torch.cat(
            [*encode_in_order(load_encoder(encoder), images, EncodeSettings(batch_size=batch_size, threads=1), CPU)]
        )


def counted(encoder: Path, folder: Path, batch_size: int = 4) -> tuple[Tensor, int, int]:
    """The features, and how often images were decoded for a set and encoded."""
    profile = Profile()
    found = profile.runcall(encoded, encoder, folder, batch_size)
    calls = {name: numbers[0] for (_, _, name), numbers in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    return found, calls.get("write_shards", 0), calls.get("features", 0)


def test_the_second_use_decodes_and_encodes_nothing(
    encoder: Path, folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first, *work = counted(encoder, folder)
    assert work == [1, 3] and "cache" not in capsys.readouterr().err
    elsewhere = shutil.move(folder, tmp_path / "elsewhere")
    for path in Path(elsewhere).rglob("*.bmp"):
        path.touch()
    second, *work = counted(encoder, Path(elsewhere))
    assert work == [0, 0] and torch.equal(first, second)
    assert capsys.readouterr().err.splitlines() == [
        f"{elsewhere}: {what} from the cache {cache}" for what in ("decoded images", "features")
    ]
    monkeypatch.setenv("MOCE_CACHE", "off")
    assert torch.equal(first, encoded(encoder, Path(elsewhere)))


def change_image(encoder: Path, folder: Path) -> None:
    """Its size and date stay."""
    path = folder / "flower/00.bmp"
    status = path.stat()
    flip_bit(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_order(encoder: Path, folder: Path) -> None:
    (folder / "flower").rename(folder / "a flower")


def change_weights(encoder: Path, folder: Path) -> None:
    opened = load_encoder(encoder)
    with torch.no_grad():
        opened.model.norm.bias[0] += 1
    save_encoder(encoder, opened.model.state_dict(), opened.shape, opened.input, {})


def change_crop(encoder: Path, folder: Path) -> None:
    opened = load_encoder(encoder)
    save_encoder(encoder, opened.model.state_dict(), opened.shape, ImageInput(16, center_crop=0.5), {})


def change_size(encoder: Path, folder: Path) -> None:
    shape = ViTShape(24, 4, 16, 3, 2)
    save_encoder(encoder, timm_vit(shape).state_dict(), shape, ImageInput(24, center_crop=1.0), {})


@pytest.mark.parametrize(
    ("change", "written"),
    [(change_image, 1), (change_order, 1), (change_weights, 0), (change_crop, 0), (change_size, 0)],
)
def test_what_changed_is_encoded_again(
    encoder: Path, folder: Path, cache: Path, change: Callable[[Path, Path], None], written: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = encoded(encoder, folder)
    change(encoder, folder)
    found, *work = counted(encoder, folder)
    assert work == [written, 3] and not torch.equal(before, found)
    monkeypatch.setenv("MOCE_CACHE", "off")
    assert torch.equal(found, encoded(encoder, folder))


def test_batches_of_another_size_have_features_of_their_own(encoder: Path, folder: Path, cache: Path) -> None:
    encoded(encoder, folder)
    assert counted(encoder, folder, batch_size=5)[1:] == (0, 2)


@pytest.mark.parametrize(
    ("entry", "file", "work"), [("features-*", "*.npy", [0, 3]), ("images-*", "*.tar", [1, 0]), ("*", "*", [1, 3])]
)
def test_a_damaged_entry_is_made_again(
    encoder: Path, folder: Path, cache: Path, entry: str, file: str, work: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = encoded(encoder, folder)
    for path in cache.glob(f"{entry}/{file}"):
        if path.stat().st_size:
            flip_bit(path)
    second, *done = counted(encoder, folder)
    assert done == work and torch.equal(first, second)
    assert capsys.readouterr().err.count("is damaged and not used") == sum(map(bool, work))
    assert counted(encoder, folder)[1:] == (0, 0)


def test_features_of_a_shard_set_are_kept_while_it_is_as_it_was(
    encoder: Path, folder: Path, cache: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "set"
    write_shards(folder, shards, ShardSettings(workers=1, images_per_shard=4))
    first, _, _ = counted(encoder, shards)
    second, *work = counted(encoder, shards)
    assert work == [0, 0] and torch.equal(first, second)
    flip_byte(shards, 7)
    with pytest.raises(DataError, match="image 7"):
        encoded(encoder, shards)


def test_what_does_not_fit_is_not_kept(
    encoder: Path, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCE_CACHE_GIB", str(1e-6))
    write_shards(folder, folder.parent / "set", ShardSettings(workers=1))
    for source, written in ((folder, 1), (folder.parent / "set", 0)):
        for _ in range(2):
            assert counted(encoder, source)[1:] == (written, 3)
    assert not list(cache.iterdir())


def test_a_disk_that_fills_costs_the_entry_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "512k") as disk:
        kept = KeptFeatures(Cache(disk.path, 2**20), "features-1", (100, 64), Path("task"))
        with kept.writing() as keep:
            disk.fill(0)
            for _ in range(2):
                keep(torch.ones(50, 64))
        assert capsys.readouterr().err.count("The features are not kept in the cache.") == 1
        assert disk.files() == set()


def test_a_part_of_the_features_is_not_kept(encoder: Path, folder: Path, cache: Path) -> None:
    with opened_images(folder) as images:
        next(encode_in_order(load_encoder(encoder), images, EncodeSettings(batch_size=4, threads=1), CPU))
    assert [path.name[:6] for path in cache.iterdir() if path.name != ".locks"] == ["images"]


def test_every_verb_on_images_can_do_without(
    encoder: Path, folder: Path, cache: Path, tiny_moce_run: Callable[..., Path]
) -> None:
    for verb in ("select", "export", "knn", "probe", "evaluate", "finetune", "transfer"):
        assert "--no-cache" in run_here(verb, "--help").out, verb
    run = tiny_moce_run()
    without = run_here("select", run, "--data", folder / "china", "threads=1", "--no-cache")
    assert without.status == 0 and not cache.exists()
    assert run_here("select", run, "--data", folder, "threads=1").status == 0
    measured = run_here("knn", encoder, "--train", folder, "--test", folder, "threads=1")  # the encoder of the clusters
    assert measured.status == 0 and "features from the cache" in measured.err, measured
    assert {kind: len(list(cache.glob(f"{kind}-*"))) for kind in ("images", "features")} == {"images": 1, "features": 1}
