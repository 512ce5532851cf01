"""DALI's pipeline on real images: the pixels that Pillow sees, the order of the sampler, and what damage does.

Axes: B images, H, W pixels, C channels.
"""

import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from moce_ds.common.errors import DataError
from moce_ds.data.loader import Batch, Crop, Loader
from moce_ds.data.reading_order import RandomOrder
from moce_ds.data.sample_table import SAMPLES
from moce_ds.data.sampler import ReadList, SequentialSampler, ShuffledSampler
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.transform import CenterCrop, ImageInput, RandomCrop, Windows
from tests.examples.images import png_of
from tests.examples.shard_tables import exchange_samples

CPU = torch.device("cpu")
HEIGHT, WIDTH = 60, 90


def raw(size: int) -> ImageInput:
    """An input whose normalisation leaves 0 to 255 as they are."""
    return ImageInput(size, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))


@dataclass(frozen=True)
class FixedCrop:
    """The same window for every image."""

    top: int
    left: int
    height: int
    width: int
    mirror: int = 0

    def windows(self, ids_B: np.ndarray, *_: np.ndarray) -> Windows:
        def column(*values: int) -> np.ndarray:
            return np.tile(np.array(values, np.int32), (len(ids_B), 1))

        return Windows(column(self.top, self.left), column(self.height, self.width), column(self.mirror)[:, 0])

    def of(self, image: Image.Image) -> np.ndarray:
        """The window, as Pillow cuts it: [H, W, C] float32."""
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        pixels = np.asarray(image.crop(box), np.float32)
        return pixels[:, ::-1] if self.mirror else pixels


def one_pass(shards: ShardSet, crop: Crop, input: ImageInput, batch_size: int = 4, **options: Any) -> list[Batch]:
    """All images in order."""
    sampler = SequentialSampler(0, shards.count, batch_size)
    return list(loader(shards, sampler.batch, sampler.num_batches, crop, input, batch_size, **options))


def loader(
    shards: ShardSet,
    read_list: Callable[[int], ReadList],
    last: int,
    crop: Crop,
    input: ImageInput,
    batch_size: int,
    **options: Any,
) -> Loader:
    settings: dict[str, Any] = {"first": 0, "threads": 1, "device": CPU} | options
    return Loader(shards, read_list, crop, input, last=last, batch_size=batch_size, **settings)


def pixels(batches: list[Batch]) -> np.ndarray:
    """[B, H, W, C] of all batches."""
    return torch.cat([batch.images_BCHW for batch in batches]).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Crops of 60 x 90 (upright): 8 JPEGs, one of each EXIF orientation, and 2 PNGs."""
    source = tmp_path_factory.mktemp("photos")
    photo = load_sample_images().images[0]
    for number in range(10):
        image = Image.fromarray(photo[30 * number : 30 * number + HEIGHT, 50 * number : 50 * number + WIDTH])
        if number < 8:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = number + 1
            stored = image.rotate(90, expand=True) if number >= 4 else image
            stored.save(source / f"{number}.jpg", exif=exif, quality=92)
        else:
            image.save(source / f"{number}.png")
    write_shards(source, source.parent / "shards", ShardSettings(workers=1))
    shards = ShardSet.open(source.parent / "shards")
    assert set(shards.samples["height"]) == {HEIGHT} and set(shards.samples["width"]) == {WIDTH}
    return shards


@pytest.mark.parametrize("mirror", [0, 1])
def test_an_unscaled_window_is_exactly_pillow_s(photos: ShardSet, mirror: int) -> None:
    """In the upright image, whatever its EXIF orientation is."""
    crop = FixedCrop(top=7, left=51, height=32, width=32, mirror=mirror)  # right of what a turned image would have
    found = pixels(one_pass(photos, crop, raw(32)))
    for image_id in range(photos.count):
        np.testing.assert_array_equal(found[image_id], crop.of(photos.decode(image_id)))


@pytest.mark.parametrize("crop", [FixedCrop(5, 9, 48, 40), FixedCrop(40, 70, 16, 20)])
def test_a_scaled_window_is_pillow_s_bicubic(photos: ShardSet, crop: FixedCrop) -> None:
    """Down with antialiasing, and up. Pillow works in floats here; DALI rounds once at the end, by at most 1/2.

    Within the filter's reach of the border, 3 pixels here, the two differ: Pillow leaves out what lies outside of the
    window, DALI repeats the last pixel.
    """
    found = pixels(one_pass(photos, crop, raw(24)))
    for image_id in range(photos.count):
        channels = [Image.fromarray(channel) for channel in np.moveaxis(crop.of(photos.decode(image_id)), 2, 0)]
        resized = [np.asarray(channel.resize((24, 24), Image.Resampling.BICUBIC)) for channel in channels]
        error = abs(found[image_id] - np.stack(resized, axis=2).clip(0, 255))
        assert error[3:-3, 3:-3].max() < 0.6 and error.mean() < 0.6


def test_windows_of_the_random_crop_are_cut_from_the_upright_image(photos: ShardSet) -> None:
    """Loaded crops are near Pillow's crop of the same windows, and not near those of another epoch."""
    crop, ids = RandomCrop(3), np.arange(photos.count)
    found = pixels(one_pass(photos, crop, raw(16)))
    sizes = photos.samples["height"], photos.samples["width"]
    errors = {}
    for epoch in (0, 1):
        chosen = crop.windows(ids, np.full_like(ids, epoch), *sizes)
        expected = []
        for image_id in ids:
            (top, left), (height, width) = chosen.start_B2[image_id], chosen.shape_B2[image_id]
            window = FixedCrop(top, left, height, width, chosen.mirror_B[image_id])
            cut = Image.fromarray(window.of(photos.decode(int(image_id))).astype(np.uint8))
            expected.append(np.asarray(cut.resize((16, 16), Image.Resampling.BICUBIC), float))
        errors[epoch] = abs(found - np.stack(expected)).mean(axis=(1, 2, 3))
    assert errors[0].max() < 0.5 and (errors[1] > 4 * errors[0]).all()


def test_normalisation(photos: ShardSet) -> None:
    input = ImageInput(32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    crop = FixedCrop(0, 0, 32, 32)
    found = pixels(one_pass(photos, crop, input))
    expected = (pixels(one_pass(photos, crop, raw(32))) / 255 - input.mean) / input.std
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("world_size", "threads"), [(2, 1), (4, 3)])
def test_batches_do_not_depend_on_ranks_or_threads(tiny_shards: Path, world_size: int, threads: int) -> None:
    shards, sampler = ShardSet.open(tiny_shards), ShuffledSampler(RandomOrder(60, seed=5), 16)
    crop, input = RandomCrop(5), ImageInput(16)
    whole = list(loader(shards, sampler.batch, 5, crop, input, 16))
    assert set(np.concatenate([batch.epochs_B for batch in whole])) == {0, 1}
    parts = []
    for rank in range(world_size):

        def mine(index: int, rank: int = rank) -> ReadList:
            return sampler.batch(index).part(rank, world_size)

        parts.append(list(loader(shards, mine, 5, crop, input, 16 // world_size, threads=threads)))
    for index, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[index].images_BCHW for part in parts]), batch.images_BCHW)
        for name in ("ids_B", "epochs_B", "wanted_B"):
            together = np.concatenate([getattr(part[index], name) for part in parts])
            np.testing.assert_array_equal(together, getattr(batch, name))
        np.testing.assert_array_equal(batch.ids_B, sampler.batch(index).ids)


def test_a_resumed_loader_gives_the_same_batches(tiny_shards: Path) -> None:
    shards, sampler = ShardSet.open(tiny_shards), ShuffledSampler(RandomOrder(60, seed=5), 16)
    whole = list(loader(shards, sampler.batch, 6, RandomCrop(5), ImageInput(16), 16))
    resumed = loader(shards, sampler.batch, 6, RandomCrop(5), ImageInput(16), 16, first=4)
    assert len(resumed) == 2
    for batch, again in zip(whole[4:], resumed, strict=True):
        assert torch.equal(batch.images_BCHW, again.images_BCHW)
        np.testing.assert_array_equal(batch.ids_B, again.ids_B)


def test_the_same_image_is_cut_otherwise_in_the_next_epoch(tiny_shards: Path) -> None:
    shards, ids = ShardSet.open(tiny_shards), np.arange(60)
    first, second = loader(
        shards, lambda index: ReadList(ids, np.full(60, index)), 2, RandomCrop(5), ImageInput(16), 60
    )
    assert sum(torch.equal(a, b) for a, b in zip(first.images_BCHW, second.images_BCHW, strict=True)) == 0


def test_the_last_batch_may_be_short_and_batches_keep_their_pixels(tiny_shards: Path) -> None:
    batches = one_pass(ShardSet.open(tiny_shards), CenterCrop(1.0), ImageInput(16), batch_size=7)
    assert [tuple(batch.images_BCHW.shape) for batch in batches] == [(7, 3, 16, 16)] * 8 + [(4, 3, 16, 16)]
    assert batches[0].images_BCHW.dtype == torch.float32
    again = one_pass(ShardSet.open(tiny_shards), CenterCrop(1.0), ImageInput(16), batch_size=60)
    np.testing.assert_array_equal(pixels(batches), pixels(again))  # DALI's buffers were not reused under them


# Damage


@pytest.fixture
def copy(tiny_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_shards, tmp_path / "copy")


def flip_byte(folder: Path, image_id: int) -> None:
    """Change one byte in the middle of an image's file in its tar."""
    shards = ShardSet.open(folder)
    row = shards.samples[image_id]
    with open(folder / shards.shards[row["shard"]].name, "r+b") as tar:
        tar.seek(int(row["offset"] + row["size"] // 2))
        byte = tar.read(1)[0]
        tar.seek(-1, 1)
        tar.write(bytes([byte ^ 0xFF]))


def test_a_damaged_image_is_replaced_counted_and_named(copy: Path, tiny_shards: Path) -> None:
    flip_byte(copy, 7)
    sampler, crop, input = ShuffledSampler(RandomOrder(60, seed=1), 20), RandomCrop(1), ImageInput(16)
    damaged = loader(ShardSet.open(copy), sampler.batch, 12, crop, input, 20)
    intact = loader(ShardSet.open(tiny_shards), sampler.batch, 12, crop, input, 20)
    for batch, whole in zip(damaged, intact, strict=True):
        np.testing.assert_array_equal(batch.wanted_B, whole.ids_B)
        np.testing.assert_array_equal(batch.ids_B, np.where(whole.ids_B == 7, 8, whole.ids_B))
        same = batch.ids_B == batch.wanted_B
        assert torch.equal(batch.images_BCHW[same], whole.images_BCHW[same])
    assert damaged.replaced == {7: 4}  # once an epoch
    assert damaged.replaced_sources() == ["image 7 (china/07.jpg) in shard-000000.tar"]
    assert intact.replaced == {} and intact.replaced_sources() == []


def test_one_damaged_image_never_condemns_a_small_shard(tiny_images: Path, tmp_path: Path) -> None:
    write_shards(tiny_images / "digits", tmp_path / "set", ShardSettings(images_per_shard=4, workers=1))
    flip_byte(tmp_path / "set", 19)  # the last of all: the first takes its place
    ids = np.arange(20)
    eight = loader(ShardSet.open(tmp_path / "set"), lambda k: ReadList(ids, ids * 0 + k), 8, CenterCrop(1), raw(16), 20)
    assert [batch.ids_B[19] for batch in eight] == [0] * 8 and eight.replaced == {19: 8}


def make_undecodable(folder: Path, image_id: int, data: bytes = b"") -> None:
    """Put bytes that are no image, or `data`, in the place of one, with a checksum as if they had been written so."""
    shards, samples = ShardSet.open(folder), np.load(folder / SAMPLES)
    row = shards.samples[image_id]
    data = data.ljust(int(row["size"]), b"\0")
    assert len(data) == row["size"]
    with open(folder / shards.shards[row["shard"]].name, "r+b") as tar:
        tar.seek(int(row["offset"]))
        tar.write(data)
    samples["crc32"][image_id] = zlib.crc32(data)
    exchange_samples(folder, samples)


@pytest.mark.parametrize("bad", [(7,), (7, 8), (59, 0)], ids=["one", "neighbours", "the last and the first"])
def test_images_that_only_dali_cannot_decode_are_replaced_too(copy: Path, tiny_shards: Path, bad: tuple[int]) -> None:
    """Neighbours: what was to replace the one is itself replaced."""
    for image_id in bad:
        make_undecodable(copy, image_id)
    sampler, crop, input = ShuffledSampler(RandomOrder(60, seed=1), 5), RandomCrop(1), ImageInput(16)
    damaged = loader(ShardSet.open(copy), sampler.batch, 24, crop, input, 5)
    intact = loader(ShardSet.open(tiny_shards), sampler.batch, 24, crop, input, 5)
    in_place_of = {7: 9 if 8 in bad else 8, 8: 9, 59: 1, 0: 1}
    for batch, whole in zip(damaged, intact, strict=True):
        np.testing.assert_array_equal(batch.wanted_B, whole.ids_B)
        assert batch.ids_B.tolist() == [in_place_of[i] if i in bad else i for i in whole.ids_B.tolist()]
        same = batch.ids_B == batch.wanted_B
        assert torch.equal(batch.images_BCHW[same], whole.images_BCHW[same])
    assert damaged.replaced == dict.fromkeys(bad, 2)  # once an epoch


def test_an_undecodable_image_among_many_does_not_crash_the_process(copy: Path) -> None:
    """DALI's decoder would, in a batch of this size, if the header cannot be read."""
    make_undecodable(copy, 7)
    ids_B = np.arange(256) % 60
    batches = loader(
        ShardSet.open(copy), lambda k: ReadList(ids_B, ids_B * 0 + k), 3, RandomCrop(1), ImageInput(16), 256
    )
    assert [set(batch.ids_B[batch.wanted_B == 7]) for batch in batches] == [{8}] * 3


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (flip_byte, "is not as written, .*`moce inspect --verify`, .*`moce shards`"),
        (
            make_undecodable,
            "is not a complete image of 16 x 16 pixels .*into another folder, to skip such images",
        ),
    ],
)
def test_where_a_feature_stands_for_its_image_damage_is_an_error(
    copy: Path, harm: Callable[[Path, int], None], told: str
) -> None:
    harm(copy, 30)
    with pytest.raises(DataError, match=rf"^{copy}: image 30 \(digits/10.png\) {told}"):
        one_pass(ShardSet.open(copy), CenterCrop(1.0), ImageInput(16), replace_damaged=False)


GRAY_ROWS = (b"\0" + bytes([90] * 16)) * 16


@pytest.mark.parametrize("replace_damaged", [True, False], ids=["training", "features"])
def test_what_pillow_reads_and_dali_does_not_is_read_by_pillow(copy: Path, replace_damaged: bool) -> None:
    """A PNG without the checksum of its pixels, which earlier versions stored as it was."""
    make_undecodable(copy, 30, png_of((16, 16, 8, 0, 0), zlib.compress(GRAY_ROWS)[:-4]))
    found = one_pass(ShardSet.open(copy), CenterCrop(1.0), raw(16), replace_damaged=replace_damaged)
    assert [batch.ids_B.tolist() for batch in found] == [batch.wanted_B.tolist() for batch in found]
    np.testing.assert_allclose(pixels(found)[30], 90, atol=0.01)


def test_rows_that_are_missing_are_named_once_with_what_helps(copy: Path) -> None:
    make_undecodable(copy, 30, png_of((16, 16, 8, 0, 0), zlib.compress(GRAY_ROWS[:-17])))
    with pytest.raises(DataError, match=r"image 30 .*its pixels end after 255 of 272 bytes.*into another folder"):
        one_pass(ShardSet.open(copy), CenterCrop(1.0), ImageInput(16), replace_damaged=False)


def test_an_altered_shard_is_an_error_that_names_the_file(copy: Path) -> None:
    for image_id in range(26, 50, 3):  # 8 of the 25 images of the second shard
        flip_byte(copy, image_id)
    with pytest.raises(DataError) as caught:
        one_pass(ShardSet.open(copy), CenterCrop(1.0), ImageInput(16))
    said = str(caught.value)
    assert str(copy / "shard-000001.tar") in said and "was altered after it was written" in said
    assert "of 11 images read from it" in said and "write the set again with `moce shards`" in said


def test_nothing_left_to_put_in_place(copy: Path) -> None:
    for image_id in range(60):
        flip_byte(copy, image_id)
    with pytest.raises(DataError, match=r"image 0 \(china/00.png\) and the 59 after it are not as written"):
        one_pass(ShardSet.open(copy), CenterCrop(1.0), ImageInput(16))


def cut(file: Path) -> None:
    with open(file, "r+b") as tar:
        tar.truncate(file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "message"), [(Path.unlink, "is missing: expected"), (cut, "bytes, expected")], ids=["missing", "truncated"]
)
def test_a_missing_or_truncated_shard_is_named_before_anything_starts(
    copy: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(copy / "shard-000001.tar")
    with pytest.raises(DataError) as caught:
        ShardSet.open(copy)
    said = str(caught.value)
    assert said.startswith(str(copy / "shard-000001.tar")) and message in said and "`moce shards`" in said


def replace_by_other_images(file: Path) -> None:
    """Another tar of the same size in its place, as a copy that was made again from other images."""
    file.with_suffix(".new").write_bytes(file.read_bytes()[::-1])
    file.with_suffix(".new").replace(file)


def overwrite(file: Path) -> None:
    file.write_bytes(file.read_bytes()[::-1])


def grow(file: Path) -> None:
    file.with_suffix(".new").write_bytes(bytes(512 * 3) + file.read_bytes())
    file.with_suffix(".new").replace(file)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (replace_by_other_images, "was altered after it was written: "),
        (overwrite, "was altered after it was written: "),
        (grow, "was altered after it was written: "),
        (Path.unlink, "can no longer be read (No such file or directory). Restore it"),
        (make_folder, "can no longer be read (Is a directory). Restore it"),
    ],
)
def test_a_shard_replaced_under_a_running_job_is_named(copy: Path, harm: Callable[[Path], None], told: str) -> None:
    """The set is open, this shard of it is not yet."""
    shards = ShardSet.open(copy)
    harm(copy / "shard-000001.tar")
    with pytest.raises(DataError) as caught:
        one_pass(shards, CenterCrop(1.0), ImageInput(16))
    assert str(caught.value).startswith(f"{copy / 'shard-000001.tar'} {told}")
    assert "`moce shards`" in str(caught.value)


def test_a_shard_that_is_in_use_can_be_replaced(copy: Path, tiny_shards: Path) -> None:
    """A file that is open stays what it was; a job notices nothing until it starts again."""
    shards = ShardSet.open(copy)
    whole = pixels(one_pass(shards, CenterCrop(1.0), ImageInput(16)))
    replace_by_other_images(copy / "shard-000001.tar")
    np.testing.assert_array_equal(pixels(one_pass(shards, CenterCrop(1.0), ImageInput(16))), whole)


def test_a_shard_cut_short_while_in_use_is_named(copy: Path) -> None:
    shards = ShardSet.open(copy)
    cut(copy / "shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001.tar was cut short while in use\. Restore it"):
        one_pass(shards, CenterCrop(1.0), ImageInput(16))
