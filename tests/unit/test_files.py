"""Records of ours are checked as they are read, all faults said at once; what is written is whole, or the old stays."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from moce_ds.errors import ArtefactError
from moce_ds.files import atomic_folder, check_writable, read_record


@dataclass(frozen=True)
class Barrel:
    litres: int
    wine: str
    staves: list[str]


GOOD = {"format": "barrel", "version": 1, "litres": 225, "wine": "red", "staves": ["oak"], "cooper": "unknown"}


def read(path: Path) -> Barrel:
    return read_record(path, Barrel, "a barrel", "moce fill", format="barrel", version=1)


def test_a_record_is_what_it_should_be(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(GOOD))
    assert read(tmp_path / "b.json") == Barrel(225, "red", ["oak"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({**GOOD, "version": 2}, ["says format 'barrel' version 2; this program reads format 'barrel' version 1"]),
        ({}, ["says format None version None"]),
        ({**GOOD, "litres": "many", "wine": None, "staves": [1]}, ["litres: ", "wine: ", "staves.0: "]),
        ({key: GOOD[key] for key in ("format", "version", "wine")}, ["litres: Field required; staves: Field required"]),
        ([GOOD], ["content: "]),
        (None, ["content: "]),
        ("x" * 10, ["content: "]),
    ],
)
def test_every_fault_is_told(tmp_path: Path, content: object, told: list[str]) -> None:
    (tmp_path / "b.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError) as caught:
        read(tmp_path / "b.json")
    for part in [str(tmp_path / "b.json"), *told, "write a barrel again with `moce fill`"]:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", '{"litres": ' + "9" * 5000 + "}"])
def test_what_is_no_json_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtefactError, match=r"b.json is damaged \(.*write a barrel again with `moce fill`"):
        read(tmp_path / "b.json")


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ArtefactError, match=r"b\.json cannot be read"):
        read(tmp_path / "b.json")


def write_folder(path: Path, content: str) -> None:
    with atomic_folder(path) as draft:
        (draft / "wine").write_text(content)


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_folder_that_is_replaced_is_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """Whichever of the two renames the stop comes before."""
    write_folder(tmp_path / "barrel", "old")
    renamed, rename = [], os.replace

    def stopping(old: Path, new: Path) -> None:
        renamed.append(old)
        if len(renamed) == stopped_at:
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "barrel", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["barrel"]
    assert (tmp_path / "barrel/wine").read_text() == "old"
    write_folder(tmp_path / "barrel", "new")
    assert (tmp_path / "barrel/wine").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new/deep/x")
    check_writable(tmp_path / "file")
    for path in (tmp_path / "file/x", tmp_path / "file/deep/x"):
        with pytest.raises(ArtefactError, match=f"{path} cannot be written: {tmp_path}/file is a file"):
            check_writable(path)
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.F_OK)  # root may do everything
    with pytest.raises(ArtefactError, match=f"x cannot be written: {tmp_path} does not allow it"):
        check_writable(tmp_path / "x")
