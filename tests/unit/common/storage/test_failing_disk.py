"""A disk that fails while a file is read: the error has the status of what may pass, whoever reads the file.

/proc/self/mem is such a file: it opens as a regular one, and reading its beginning is an input/output error.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from moce_ds.checkpoint.weight_files import read_torch_file
from moce_ds.common.config.yaml_text import read_yaml_text
from moce_ds.common.errors import LOST_PEER, MoceError
from moce_ds.common.storage.checksums import FileRecord, check_file, file_findings
from moce_ds.common.storage.files import read_json
from moce_ds.data.image_file import MAX_PIXELS, examine, read_rgb, upright_size
from moce_ds.data.sources.ade20k import read_mask
from moce_ds.data.sources.coco import CocoSet
from moce_ds.data.sources.image_folder import FolderSource
from moce_ds.data.sources.public import readers
from moce_ds.data.sources.source import Entry, examined

FAILING = Path("/proc/self/mem")
pytestmark = pytest.mark.skipif(not FAILING.exists(), reason="needs Linux")

RECORD = {"x": FileRecord(0, "")}


def in_a_worker(path: Path) -> object:
    return list(examined(FolderSource(path.parent), [Entry(path.name, 100)], MAX_PIXELS, 1))


def public(reader: Callable[[Path], object], *names: str) -> Callable[[Path], object]:
    """A public set with the failing file under some of its names."""

    def read(path: Path) -> object:
        for name in names:
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (path.parent / name).symlink_to(path)
        return reader(path.parent)

    return read


def cifar(root: Path) -> object:
    (root / "fine_label_names.txt").write_text("apple\n")
    return readers.cifar100(root, 0, root / "scratch")


READERS: dict[str, Callable[[Path], object]] = {
    "settings": read_yaml_text,
    "record": partial(read_json, what="a run", made_by="moce pretrain"),
    "image": examine,
    "image of a shard set": in_a_worker,
    "image of a task": read_rgb,
    "header of an image": upright_size,
    "mask": partial(read_mask, size=(1, 1)),
    "COCO": lambda path: CocoSet.open(path, path.parent),
    "lists": public(partial(readers.dtd, seed=0), *(f"labels/{split}1.txt" for split in ("train", "val", "test"))),
    "MATLAB": public(partial(readers.flowers102, seed=0), "imagelabels.mat", "setid.mat"),
    "CIFAR": public(cifar, "train.bin", "test.bin"),
    "weights": partial(read_torch_file, named="run.init_from: x"),
    "checked file": lambda path: check_file(path.parent, path.name, RECORD, "write it again."),
}


@pytest.mark.parametrize("name", READERS)
def test_a_disk_that_fails_keeps_its_status(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.symlink_to(FAILING)
    with pytest.raises(
        MoceError, match=r"cannot be read: Input/output error.* The disk or its connection is failing"
    ) as caught:
        READERS[name](path)
    assert caught.value.status == LOST_PEER


def test_verification_lists_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(FAILING)
    assert file_findings(tmp_path, RECORD).faults == ["x: cannot be read (Input/output error)"]
