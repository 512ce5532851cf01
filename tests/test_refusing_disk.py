"""What every verb writes, on a disk that is full, nearly full or read-only: one message that names the artefact and the
remedy, status 1, and nothing half written under its name.

The disk is a small file system in memory, which only root can mount. Runs are in tests/distributed/test_full_disk.py.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from moce_ds.common.config.settings import to_yaml
from moce_ds.training.settings import PretrainSettings
from tests.examples.dense_sets import write_ade, write_coco
from tests.examples.disk import Disk
from tests.examples.moce_command import TINY, refused, run_here
from tests.examples.public_folders import cifar10

DISK_SIZE = "512k"
PAGE = 4096
FULL = "No space left on device"


@pytest.fixture
def disk(small_disk: Disk) -> Iterator[Disk]:
    """The file system, empty and writable."""
    yield small_disk
    small_disk.clear()


@dataclass(frozen=True)
class Inputs:
    """What the verbs read, none of it on the disk."""

    images: Path
    shards: Path
    encoder: Path
    features: Path
    run: Path
    others: Path

    def task(self) -> Path:
        """The settings of a task."""
        path = self.others / "kinds.yaml"
        for split in ("train", "test"):
            (self.others / "kinds").mkdir(exist_ok=True)
            (self.others / "kinds" / split).symlink_to(self.shards)
        path.write_text(yaml.safe_dump({"data": str(self.others / "kinds"), "knn": {"threads": 1}}))
        return path

    def dataset(self) -> Path:
        """A public data set as it is distributed."""
        cifar10(self.others / "cifar")
        return self.others / "cifar"

    def coco(self) -> tuple[Path, Path]:
        """A set for detection: its JSON and its images."""
        return write_coco(self.others / "coco")

    def ade(self) -> Path:
        """A set for segmentation."""
        return write_ade(self.others / "ade")


@pytest.fixture
def inputs(
    tiny_images: Path,
    tiny_shards: Path,
    tiny_encoder: Path,
    tiny_clusters: Path,
    tiny_moce_run: Callable[..., Path],
    tiny_config: Callable[..., PretrainSettings],
    tmp_path: Path,
) -> Inputs:
    run = tiny_moce_run()
    config = tiny_config("model.arch=moce", "experts.num=4", f"experts.clusters={tiny_clusters}")
    (run / "config.yaml").write_text(to_yaml(config))
    others = tmp_path / "others"
    others.mkdir()
    return Inputs(tiny_images, tiny_shards, tiny_encoder, tiny_clusters.parent / "features", run, others)


def measured(verb: str, i: Inputs, out: Path) -> list[object]:
    digits = i.images / "digits"
    return [verb, i.encoder, "--train", i.images, "--test", i.images, "--results", out, "--task", digits.name]


def dense(verb: str, i: Inputs, out: Path) -> list[object]:
    small = ["--out", out, "model.image_size=32", "model.channels=8", "optim.batch_size=1"]
    if verb == "segment":
        ade = i.ade()
        return [verb, i.encoder, "--train", ade, "--val", ade, "data.classes=2", *small]
    path, images = i.coco()
    return [verb, i.encoder, "--train", path, "--images", images, "--val", path, *small]


EXPERTS = 'words.moce=["model.arch=moce","experts.num=4"]'

VERBS: dict[str, Callable[[Inputs, Path], list[object]]] = {
    "shards": lambda i, out: ["shards", i.images, out, "workers=1"],
    "features": lambda i, out: ["features", i.encoder, i.shards, out, "threads=1"],
    "cluster": lambda i, out: ["cluster", i.features, out, "num_clusters=4"],
    "export": lambda i, out: ["export", i.run, out, "--cluster", 0],
    "export pth": lambda i, out: ["export", i.run, out, "--cluster", 0, "--format", "mmdet"],
    "report": lambda i, out: ["report", i.run, "--out", out],
    "plan": lambda i, out: ["plan", TINY, f"data.shards={i.shards}", "run.out=none", "--json", out],
    "knn": lambda i, out: measured("knn", i, out),
    "probe": lambda i, out: measured("probe", i, out),
    "evaluate": lambda i, out: ["evaluate", i.run, "--data", i.shards, "--results", out],
    "evaluate picture": lambda i, out: ["evaluate", i.run, "--data", i.shards, "--picture", out],
    "select": lambda i, out: ["select", i.run, "--data", i.images / "digits", "--results", out],
    "pretrain": lambda i, out: ["pretrain", TINY, f"data.shards={i.shards}", f"run.out={out}"],
    "finetune": lambda i, out: [
        "finetune", i.encoder, "--train", i.shards, "--test", i.shards, "--out", out, "optim.batch_size=12"
    ],
    "detect": lambda i, out: dense("detect", i, out),
    "segment": lambda i, out: dense("segment", i, out),
    "transfer": lambda i, out: ["transfer", i.run, "--tasks", i.task(), "--methods", "knn", "--out", out],
    "dataset": lambda i, out: ["dataset", "cifar10", i.dataset(), out, "workers=1"],
    "study": lambda i, out: ["study", f"pretrain={TINY}", f"out={out}", f'set=["data.shards={i.shards}"]'],
    "pipeline": lambda i, out: ["pipeline", f"images={i.images}", f"mae={TINY}", f"moce={TINY}", EXPERTS, f"out={out}"],
}  # fmt: skip
GOES_ON = {"shards": "shards.json", "features": "features.json"}
"""Verbs that keep what is done, and the file that declares it whole."""


LARGE = ("shards", "features", "cluster", "export", "export pth", "report", "transfer")
"""Verbs whose output is larger than two pages."""


@pytest.mark.parametrize(("verb", "pages"), [*((verb, 0) for verb in VERBS), *((verb, 2) for verb in LARGE)])
def test_a_full_disk(inputs: Inputs, disk: Disk, verb: str, pages: int) -> None:
    out = disk.path / "out"
    disk.fill(left=pages * PAGE)
    told = refused(*VERBS[verb](inputs, out))
    assert str(out) in told and (FULL in told or "Check whether the disk is full" in told), told
    assert "Traceback" not in told and "[Errno" not in told
    if verb in GOES_ON:
        assert f"out/{GOES_ON[verb]}" not in disk.files()
    else:
        assert disk.files() == set()


@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_disk(inputs: Inputs, disk: Disk, verb: str) -> None:
    disk.remount("ro")
    out = disk.path / "out"
    told = refused(*VERBS[verb](inputs, out))
    assert str(out) in told and ("read-only" in told or "does not allow it" in told), told
    assert disk.files() == set()


@pytest.mark.parametrize("verb", GOES_ON)
def test_with_space_the_same_command_goes_on(inputs: Inputs, disk: Disk, verb: str) -> None:
    out = disk.path / "out"
    disk.fill(left=2 * PAGE)
    refused(*VERBS[verb](inputs, out))
    disk.free()
    assert run_here(*VERBS[verb](inputs, out)).status == 0
    assert run_here("inspect", out, "--verify").status == 0


def test_temporary_files_have_no_place(inputs: Inputs, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    words = ("knn", inputs.encoder, "--train", inputs.images, "--test", inputs.images)
    disk.fill(left=2 * PAGE)
    told = refused(*words)
    assert str(disk.path) in told and FULL in told and "TMPDIR" in told
    assert disk.files() == set(), "what was begun is removed"
    disk.remount("ro")
    assert f"No temporary folder can be made in {disk.path}: Read-only file system" in refused(*words)


def test_results_that_are_there_stay(inputs: Inputs, disk: Disk) -> None:
    out = disk.path / "out"
    assert run_here(*measured("knn", inputs, out)).status == 0
    before = out.read_bytes()
    disk.fill(left=0)
    assert FULL in refused(*measured("probe", inputs, out))
    assert out.read_bytes() == before and disk.files() == {"out"}


def test_names_that_the_system_refuses(tiny_images: Path, tmp_path: Path) -> None:
    """No writer or reader of ours looks at them first: the net of the command line tells what the system says."""
    loop, long = tmp_path / "loop", tmp_path / ("n" * 300)
    loop.symlink_to(loop)
    for words in (("report", long), ("inspect", long), ("shards", tiny_images, long), ("shards", tiny_images, loop)):
        told = refused(*words)
        assert str(words[-1]) in told
        assert "File name too long. Choose shorter names." in told or "leads back to itself: remove it" in told
