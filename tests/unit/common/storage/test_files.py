"""Records of ours are checked as they are read, all faults said at once; what is written is whole, or the old stays."""

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moce_ds.common.errors import LOST_PEER, ArtefactError
from moce_ds.common.host.machine import MachineError, machine_fault, reason
from moce_ds.common.storage.files import (
    atomic_folder,
    check_output,
    check_writable,
    load_array,
    load_tensors,
    read_record,
    reads_from,
    save_array,
    writes_to,
)
from tests.examples.alone import ALONE


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
        ({key: GOOD[key] for key in ("format", "version", "wine")}, ["litres: is missing; staves: is missing"]),
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


def test_an_output_replaces_its_own_kind_alone(tmp_path: Path) -> None:
    mark, path = b"<title>MoCE report: ", tmp_path / "report.html"
    for content in (None, b"", b"<!doctype html>\n<title>MoCE report: a</title>"):
        if content is not None:
            path.write_bytes(content)
        check_output(path, "a report", mark)
    for content in (b"<html>my thesis</html>", b"\x89PNG", bytes(10_000) + mark):
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match=f"{path} exists and is not a report of this program"):
            check_output(path, "a report", mark)
        assert path.read_bytes() == content
    for odd in (tmp_path, Path(os.devnull)):
        with pytest.raises(ArtefactError, match=f"{odd} is not a regular file"):
            check_output(odd, "a report", mark)


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def array_of(path: Path) -> np.ndarray:
    return load_array(path, np.float32, (2, 3), "write it again.")


def tensors_of(path: Path) -> object:
    return load_tensors(path, "write it again.")


def write_tensors(path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, path)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "array": (partial(save_array, array=ARRAY), array_of),
    "tensors": (write_tensors, tensors_of),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_happens_to_a_file_is_told_in_one_way(tmp_path: Path, kind: str) -> None:
    """Each bit of the header flipped, and each length: read as it is, or refused with the file's name and the cure."""
    write, read = KINDS[kind]
    path = tmp_path / "file"
    write(path)
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(130) for bit in range(8)]
    refused = 0
    for content in [*flipped, *(whole[:end] for end in range(len(whole)))]:
        path.write_bytes(content)
        try:
            read(path)
        except ArtefactError as error:
            refused += 1
            assert str(error).startswith(str(path)) and str(error).endswith("write it again.")
    assert refused > len(whole)


def test_a_lack_of_memory_is_not_damage(tmp_path: Path) -> None:
    (tmp_path / "whole").touch()
    with pytest.raises(MemoryError), reads_from(tmp_path / "whole", "write it again."):
        raise MemoryError


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_or_no_file(tmp_path: Path, kind: str) -> None:
    _, read = KINDS[kind]
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, told in {
        "absent": "is missing: write it again.",
        "folder": "cannot be read: Is a directory. ",
        "loop": "cannot be read: Too many levels of symbolic links",
        "x" * 300: "cannot be read: File name too long. Choose shorter names.",
    }.items():
        with pytest.raises(ArtefactError) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name} {told}")


def test_nothing_in_an_array_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ArtefactError, match=r"x\.npy is damaged"):
        load_array(tmp_path / "x.npy", object, (1,), "write it again.")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse larger files, as a full disk does, without needing root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10, 130, 500])
@pytest.mark.parametrize("kind", ["array", "tensors"])
def test_a_disk_that_is_full_is_noticed(tmp_path: Path, kind: str, size: int) -> None:
    """Also when it is the last bytes that it does not take; the library for tensors leaves half a file, told all the
    same."""
    tensors, array = {"a": torch.ones(1000)}, np.ones(1000, np.float32)
    path = tmp_path / "x"
    told = f"{path} cannot be written: .*File too large"
    with files_of_at_most(size), pytest.raises(ArtefactError, match=told), writes_to(path):
        save_array(path, array) if kind == "array" else save_file(tensors, path)
    assert kind == "tensors" or list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.EIO, LOST_PEER), (errno.ESTALE, LOST_PEER), (errno.ETIMEDOUT, LOST_PEER), (errno.ENOSPC, 1), (None, 1)],
)
def test_what_may_pass_has_the_status_of_a_lost_process(number: int | None, status: int) -> None:
    with pytest.raises(MachineError) as caught, ALONE.raise_on_all_ranks():
        raise OSError(*((number, os.strerror(number)) if number else ("odd",)))
    assert caught.value.status == status and MachineError.status == 1


@pytest.mark.parametrize("door", [writes_to, partial(reads_from, cure="write it again.")], ids=["writes", "reads"])
@pytest.mark.parametrize("error", [
    OSError(errno.EIO, os.strerror(errno.EIO)),
    SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
], ids=["system", "safetensors"])  # fmt: skip
def test_what_may_pass_keeps_its_status_under_the_name_of_an_artefact(
    tmp_path: Path, door: Any, error: Exception
) -> None:
    path = tmp_path / "x"
    path.touch()
    told = rf"^{path} cannot be (written|read): Input/output error. The disk or its connection is failing"
    with pytest.raises(ArtefactError, match=told) as caught, door(path):
        raise error
    assert caught.value.status == LOST_PEER and ArtefactError.status == 1


def test_reasons_name_the_remedy() -> None:
    told = reason(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/x"))
    assert told.startswith("No space left on device (/disk/x). Free some space there, or name a place on another disk")
    copied = reason(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/source/x", None, "/disk/x"))
    assert copied == told, "not the source of a copy"
    assert "ulimit -n" in reason(OSError(errno.EMFILE, "Too many open files"))
    assert reason(OSError("odd")).startswith("odd. ")
    fault = machine_fault(PermissionError(errno.EACCES, os.strerror(errno.EACCES), "locked/x"))
    assert str(fault).startswith("locked/x: Permission denied. Ask its owner for permission")
    fault = machine_fault(MemoryError())
    assert fault is not None and str(fault).startswith("Out of memory. Use a smaller batch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**17)
    fault = machine_fault(caught.value)
    assert fault is not None and "Out of memory (" in str(fault)
    assert machine_fault(RuntimeError("a defect")) is None and machine_fault(KeyError("x")) is None


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.EIO, LOST_PEER), (errno.ESTALE, LOST_PEER), (errno.ECONNRESET, LOST_PEER), (errno.ENOSPC, 1)],
)
def test_a_machine_that_fails_is_worth_another_try(number: int, status: int) -> None:
    fault = machine_fault(OSError(number, os.strerror(number), "x"))
    assert fault is not None and fault.status == status


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="was written by another process meanwhile"), atomic_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a/theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "theirs"]
