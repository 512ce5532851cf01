"""Every file of every artefact, with a byte flipped, cut short or deleted: `moce inspect --verify` names the file with
status 1, and so does whoever reads it."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from artefacts import KINDS, STEPS, write_all
from moce_command import run_here

from moce_ds.files import copy_tree


def flip(at: float, path: Path) -> None:
    """Flip a bit of the byte at a share of a file's length; an empty file gets a byte."""
    content = bytearray(path.read_bytes() or b"\0")
    content[int((len(content) - 1) * at)] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leave the first part of a file; an empty one grows."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5] if path.stat().st_size else b"{}\n")


HARMS: dict[str, Callable[[Path], None]] = {
    "flipped early": partial(flip, 0.2),
    "flipped late": partial(flip, 0.7),
    "last byte flipped": partial(flip, 1.0),
    "cut": cut,
    "deleted": Path.unlink,
}


@pytest.fixture(scope="module")
def artefacts(
    tiny_images: Path, tiny_shards: Path, tiny_clusters: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artefacts")
    return write_all(root, tiny_images, tiny_shards, tiny_clusters.parent / "features", tiny_clusters)


def files_of(artefact: Path) -> list[str]:
    """All files but locks and the mirror of metrics.jsonl; weights only where they are not seen in another artefact."""
    if artefact.is_file():
        return [artefact.name]
    found = [str(path.relative_to(artefact)) for path in sorted(artefact.rglob("*")) if path.is_file()]
    seen_elsewhere = () if artefact.name in ("dense", f"step-{STEPS:08d}") else ("/weights/", "/optimizer/")
    return [name for name in found if not any(part in name for part in ("tensorboard/", ".lock", *seen_elsewhere))]


def harmed(artefact: Path, name: str, harm: str, out: Path) -> Path:
    """A copy of an artefact of which one file was harmed."""
    shutil.rmtree(out, ignore_errors=True)
    if artefact.is_file():
        out.mkdir()
        os.link(artefact, out / artefact.name)
    else:
        copy_tree(artefact, out)
    file = out / name
    if harm != "deleted":  # which would harm the file that it is a hard link of
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    HARMS[harm](file)
    return file if artefact.is_file() else out


@pytest.mark.parametrize("kind", KINDS)
def test_every_harm_to_every_file_is_named(artefacts: dict[str, Path], kind: str, tmp_path: Path) -> None:
    artefact = artefacts[kind]
    whole = run_here("inspect", artefact, "--verify")
    assert (whole.status, whole.out.splitlines()[-1]) == (0, "Verified: everything is as it was written."), whole
    missed = []
    for name in files_of(artefact):
        for harm in HARMS:
            place = harmed(artefact, name, harm, tmp_path / "harmed")
            said = run_here("inspect", place, "--verify")
            if said.status != 1 or Path(name).name not in said.out + said.err:
                missed.append((name, harm, said))
    assert missed == []
