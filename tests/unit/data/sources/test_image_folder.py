"""Odd entries of folders: none of them ends a listing, each is listed and left out with its reason."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moce_ds.common.errors import DataError
from moce_ds.data.image_file import MAX_PIXELS, Accepted, Rejected
from moce_ds.data.sources import image_folder
from moce_ds.data.sources.ade20k import Ade20kSet
from moce_ds.data.sources.image_folder import ODD, list_files, list_folder, why_odd
from tests.examples.dense_sets import write_ade
from tests.examples.images import crop, save
from tests.examples.moce_command import run_here

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="closes folders to itself, as root that becomes nobody")


@contextmanager
def nobody() -> Iterator[None]:
    """Without root's right to look everywhere."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def verdicts(source: Path) -> dict[str, str]:
    """Of each entry the reason why it is left out, "" where it is taken."""
    found = {file.path: image_folder.examine_listed(source, file, MAX_PIXELS) for file in list_files(source)}
    return {path: "" if isinstance(verdict, Accepted) else verdict.reason for path, verdict in found.items()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with one image, that anyone can enter."""
    for above in (tmp_path, *tmp_path.parents):
        if above.owner() == "root" and above != Path("/tmp"):
            above.chmod(0o755)
    save(crop(0), tmp_path / "set/x/0.jpg")
    return tmp_path / "set"


def closed(folder: Path) -> Path:
    """A folder with an image that only root can look into."""
    save(crop(1), folder / "1.jpg")
    folder.chmod(0o700)
    return folder


@as_root
def test_closed_folders_and_links_into_them(images: Path, tmp_path: Path) -> None:
    for name in (".Trash-1000", "lost+found", "y"):
        closed(images / name)
    (images / "x/link.jpg").symlink_to(closed(tmp_path / "elsewhere") / "1.jpg")
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "x/mine.jpg").touch(mode=0o600)
    (images / "x/mine.jpg").write_bytes((images / "x/0.jpg").read_bytes())
    with nobody():
        assert verdicts(images) == {
            ".Trash-1000": "not an image",
            "lost+found": "not an image",
            "y": "unreadable",
            "linked": "unreadable",
            "x/link.jpg": "unreadable",
            "x/mine.jpg": "unreadable",
            "x/0.jpg": "",
        }
        assert why_odd(images / "y") == Rejected("unreadable", "PermissionError: Permission denied")


@as_root
def test_a_source_that_is_closed_itself(tmp_path: Path, images: Path) -> None:
    source = closed(tmp_path / "closed")
    with nobody(), pytest.raises(DataError, match=r"closed cannot be listed \(Permission denied\): make it readable"):
        list_files(source)


def test_what_systems_leave_behind(images: Path) -> None:
    jpeg = (images / "x/0.jpg").read_bytes()
    for name in ("x/._0.jpg", "__MACOSX/x/0.jpg", ".git/0.jpg", "x/@eaDir/0.jpg", "x/.DS_Store", "x/Thumbs.db"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(jpeg)
    found = verdicts(images)
    assert found.pop("x/0.jpg") == "" and len(found) == 6 and set(found.values()) == {"not an image"}


def test_links_in_circles_and_names_that_mislead(images: Path) -> None:
    (images / "x/self").symlink_to("self")
    (images / "x/up").symlink_to("..")
    (images / "a").symlink_to("b")
    (images / "b").symlink_to("a")
    save(crop(2), images / "folder.jpg/2.jpg")
    os.mkfifo(images / "pipe.jpg")
    found = verdicts(images)
    assert {path for path, reason in found.items() if not reason} == {"x/0.jpg", "folder.jpg/2.jpg"}
    assert {path for path, reason in found.items() if reason == "not a regular file"} == {
        "x/self", "x/up", "a", "b", "pipe.jpg",
    }  # fmt: skip


def test_a_tree_deeper_than_calls_and_paths() -> None:
    before, in_memory = Path.cwd(), Path("/dev/shm")  # on a disk it takes seconds
    images = Path(tempfile.mkdtemp(dir=in_memory if in_memory.is_dir() else None))
    save(crop(0), images / "0.jpg")
    try:
        os.chdir(images)
        # Python allows 1000 calls within one another, Linux 4096 bytes of path.
        for name in ["d"] * 1100 + ["n" * 250] * 9:
            os.mkdir(name)  # noqa: PTH102 (no path is that long)
            os.chdir(name)
        found = verdicts(images)
        assert found.pop("0.jpg") == ""
        ((deepest, reason),) = found.items()
        assert deepest.count("/") > 1100 and reason == "unreadable"
        assert why_odd(images / deepest).detail == "OSError: File name too long"
    finally:
        os.chdir(before)
        subprocess.run(["rm", "-r", images], check=True)  # shutil.rmtree calls itself once for each folder


def test_names_that_differ_in_case_or_normalisation_are_two(images: Path) -> None:
    for name in ("cafe\u0301", "caf\u00e9", "CAF\u00c9"):
        save(crop(3), images / name / "3.jpg")
    assert len(list_files(images)) == 4 and not any(verdicts(images).values())


def test_an_entry_that_vanishes_while_it_is_listed(images: Path) -> None:
    with os.scandir(images / "x") as entries:
        (entry,) = entries
    (images / "x/0.jpg").unlink()
    assert image_folder._size(entry) == ODD and why_odd(images / "x/0.jpg").reason == "not a regular file"


def test_a_set_of_masks_leaves_out_what_is_odd_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = write_ade(tmp_path) / "images", tmp_path / "annotations"
    for name in ("b.tif", "c.bmp", "d.WEBP"):
        image = crop(0)
        image.save(images / name, "WEBP" if name.endswith("WEBP") else None)
        (masks / f"{name[0]}.png").write_bytes((masks / "a.png").read_bytes())
    (images / "._a.jpg").touch()
    (images / "notes.txt").touch()
    (images / "f.jpg").mkdir()
    os.mkfifo(images / "p.jpg")
    (images / "s.jpg").symlink_to("s.jpg")
    (images / "m.jpg").write_bytes((images / "a.jpg").read_bytes())
    os.mkfifo(masks / "m.png")
    data = Ade20kSet.open(tmp_path, 2, reduce_zero_label=True)
    assert [image.name for image in data.images] == ["a.jpg", "b.tif", "c.bmp", "d.WEBP"]
    said = capsys.readouterr().err
    assert "5 of 9 files are skipped" in said and "f.jpg: not a regular file" in said and "and 2 more" in said


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x is not a folder"):
        list_folder(tmp_path / "x")


def test_the_verb_lists_them(images: Path, tmp_path: Path) -> None:
    (images / "x/self").symlink_to("self")
    said = run_here("shards", images, tmp_path / "out", "workers=1")
    assert said.status == 0 and ": 1 image of 1 class" in said.out and "1 not a regular file" in said.out
