"""Sets in ADE20K's format: what is read as it is stored, and what is refused since it could be read in two ways."""

import io
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moce_ds.common.errors import DataError
from moce_ds.data.containers import Png
from moce_ds.data.sources.ade20k import IGNORED, Ade20kSet, Palettes, read_mask
from tests.examples.dense_sets import write_ade
from tests.examples.images import png_chunk, png_of

CLASSES_HW = np.tile(np.array([0, 1, 2, 3], np.uint8), (8, 2))
COLOURS = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
SIZE = (8, 8)


def test_zero_is_no_class(tmp_path: Path) -> None:
    image, labels_HW = Ade20kSet.open(write_ade(tmp_path), 2, reduce_zero_label=True).read(0)
    assert image.size == (48, 32) and labels_HW.shape == (32, 48)
    assert [int(labels_HW[row, 0]) for row in (0, 8, 24)] == [1, 0, IGNORED]


def test_zero_is_a_class(tmp_path: Path) -> None:
    _, labels_HW = Ade20kSet.open(write_ade(tmp_path, value=IGNORED), 2, reduce_zero_label=False).read(0)
    assert [int(labels_HW[row, 0]) for row in (0, 8, 24)] == [IGNORED, 1, 0]


def test_the_layout_of_the_release(tmp_path: Path) -> None:
    """images/training and annotations/training."""
    written = write_ade(tmp_path / "written")
    for part in ("images", "annotations"):
        (tmp_path / part).mkdir()
        (written / part).rename(tmp_path / part / "training")
    assert len(Ade20kSet.open(tmp_path / "images" / "training", 2, True)) == 1


@pytest.mark.parametrize(("reduce", "told"), [(True, "class 9; data.classes=3 from 1"), (False, "class 9; .* from 0")])
def test_a_class_beyond_the_last(tmp_path: Path, reduce: bool, told: str) -> None:
    data = Ade20kSet.open(write_ade(tmp_path, value=9), 3, reduce)
    with pytest.raises(DataError, match=rf"a\.png holds the {told}"):
        data.read(0)


def test_a_mask_that_is_missing_or_of_another_size(tmp_path: Path) -> None:
    data, path = Ade20kSet.open(write_ade(tmp_path), 2, True), tmp_path / "annotations" / "a.png"
    first = data.fingerprint
    Image.fromarray(np.ones((32, 40), np.uint8)).save(path)
    assert data.fingerprint != first
    for look in (partial(data.read, 0), partial(data.check_headers, [0])):
        with pytest.raises(DataError, match=r"a\.png holds 40 x 32 pixels; expected the 48 x 32 of its image"):
            look()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png not found: the mask of .*a\.jpg; 1 of 1 image has none"):
        Ade20kSet.open(tmp_path, 2, True)


def test_folders_that_are_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images is not a folder"):
        Ade20kSet.open(tmp_path, 2, True)
    for part in ("images", "annotations"):
        (tmp_path / part).mkdir()
    with pytest.raises(DataError, match=r"holds no \.jpg or \.png"):
        Ade20kSet.open(tmp_path, 2, True)


def png(depth: int, colour: int, before: bytes = b"", rows: int = 8) -> bytes:
    """A PNG of `CLASSES_HW` in so few bits, of which `rows` are there."""
    weights = 2 ** (depth * np.arange(8 // depth)[::-1])
    packed = (CLASSES_HW.reshape(8, -1, 8 // depth) * weights).sum(2).astype(np.uint8)
    pixels = b"".join(b"\0" + row.tobytes() for row in packed[:rows])
    return png_of((8, 8, depth, colour, 0), zlib.compress(pixels), before)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def painted(palette: list[int]) -> Image.Image:
    image = Image.fromarray(CLASSES_HW)
    image.putpalette(palette)
    return image


GRAY = Image.fromarray(CLASSES_HW)
PALETTE = png_chunk(b"PLTE", bytes(COLOURS))
LARGE_TEXT = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20)))


@pytest.mark.parametrize(
    "data",
    [
        saved(GRAY),
        png(8, 0),
        png(8, 0, LARGE_TEXT),
        saved(painted(COLOURS)),  # as VOC's: of 2 bits, since Pillow packs it
        saved(painted(COLOURS), transparency=0),
        saved(painted([shade for shade in range(256) for _ in range(3)])),  # each shade is its own number
        png(2, 3, PALETTE),
        png(4, 3, PALETTE),
        png(8, 3, PALETTE),
    ],
)
def test_values_are_read_as_they_are_stored(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    mask = read_mask(tmp_path / "a.png", SIZE)
    np.testing.assert_array_equal(mask.values_HW, CLASSES_HW)
    assert set(mask.colours) in (set(), {0, 1, 2, 3})


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (saved(GRAY.quantize(256)), "a palette of grays in which . shows as ."),
        (saved(painted([0, 0, 0, 85, 85, 85, 170, 170, 170, 255, 255, 255])), "grays in which 1 shows as 85"),
        (png(2, 0), "2-bit gray; expected 8-bit gray, or a palette: some programs"),
        (png(4, 0), "4-bit gray; expected"),
        (saved(Image.fromarray(CLASSES_HW > 0)), "1-bit gray; expected"),
        (saved(Image.fromarray(CLASSES_HW.astype(np.uint16))), "16-bit gray; expected"),
        (saved(GRAY.convert("LA")), "8-bit gray with transparency; expected"),
        (saved(GRAY.convert("RGB")), "8-bit RGB; expected"),
        (saved(GRAY.convert("RGBA")), "8-bit RGB with transparency; expected"),
        (saved(GRAY, "JPEG", quality=100), "holds JPEG, whose compression invents classes; expected PNG"),
        (saved(GRAY, "WEBP"), "holds WEBP, whose compression"),
        (saved(GRAY, "TIFF"), "holds TIFF; expected PNG"),
        (saved(GRAY, "BMP"), "holds BMP; expected PNG"),
        (saved(GRAY, save_all=True, append_images=[GRAY.rotate(90)]), "holds an animation"),
        (saved(GRAY.resize((9, 8))), "9 x 8 pixels; expected the 8 x 8"),
        (saved(Image.new("L", (3000, 3000))), "3000 x 3000 pixels; expected the 8 x 8"),
        (png(8, 0, rows=7), "is damaged: its pixels end after 63 of 72 bytes"),
        (png(8, 0)[:-13] + b"\0" + png(8, 0)[-12:], "is damaged: its checksums are wrong"),
        (saved(GRAY)[:60], "(is not a readable mask|is damaged)"),
        (b"no mask", "is not a readable mask .its format is not supported"),
    ],
)
def test_what_could_be_read_in_two_ways_or_is_damaged_is_refused(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.png .*{told}"):
        read_mask(tmp_path / "a.png", SIZE)


def test_checksums_are_verified_before_training_and_not_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Ade20kSet.open(write_ade(tmp_path), 2, True)
    Image.new("RGB", (48, 32)).save(tmp_path / "images" / "a.jpg", "PNG")
    inflated = []
    monkeypatch.setattr(Png, "inflated", property(lambda png: inflated.append(png) or (png.pixel_bytes, True)))
    data.read(0)
    assert not inflated
    data.look(0)
    assert len({id(png) for png in inflated}) == 2  # the image and the mask


def test_a_mask_with_a_wrong_checksum_is_refused_when_it_is_looked_at(tmp_path: Path) -> None:
    data, path = Ade20kSet.open(write_ade(tmp_path), 2, True), tmp_path / "annotations" / "a.png"
    content = path.read_bytes()
    path.write_bytes(content[:-13] + bytes([content[-13] ^ 1]) + content[-12:])
    with pytest.raises(DataError, match=r"a\.png is damaged: its checksums are wrong"):
        data.look(0)


def test_an_interlaced_mask(tmp_path: Path) -> None:
    """Of one pixel, since Pillow writes none: all passes but the first are empty."""
    (tmp_path / "a.png").write_bytes(png_of((1, 1, 8, 0, 1), zlib.compress(b"\0\5")))
    assert read_mask(tmp_path / "a.png", (1, 1)).values_HW.tolist() == [[5]]


def turned(pixels: np.ndarray) -> Image.Image:
    """Stored lying, to be turned a quarter by EXIF's orientation 6."""
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))


@pytest.mark.parametrize("lying", [False, True], ids=["an upright mask", "a mask that lies as its image does"])
def test_image_and_mask_are_both_turned_as_their_exif_says(tmp_path: Path, lying: bool) -> None:
    folder = write_ade(tmp_path)
    classes_HW = np.ones((48, 32), np.uint8)
    classes_HW[:8] = 2
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 32)).save(folder / "images" / "a.jpg", exif=exif)
    mask = turned(classes_HW) if lying else Image.fromarray(classes_HW)
    mask.save(folder / "annotations" / "a.png", exif=exif if lying else b"")
    data = Ade20kSet.open(folder, 2, True)
    data.check_headers()
    image, labels_HW = data.read(0)
    assert image.size == (32, 48)
    np.testing.assert_array_equal(labels_HW, classes_HW - 1)


def test_palettes_of_a_set_must_agree() -> None:
    palettes = Palettes()
    palettes.add("a.png", {0: (0, 0, 0), 1: (128, 0, 0)})
    palettes.add("b.png", {1: (128, 0, 0), 2: (0, 128, 0)})
    with pytest.raises(DataError, match=r"c\.png: the palette shows 2 as \(9, 9, 9\), that of b\.png as \(0, 128, 0\)"):
        palettes.add("c.png", {2: (9, 9, 9)})
