"""The tensor files of a checkpoint are safetensors; nothing but what was written is taken for one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moce_ds.checkpoint.tensor_file import checksum, read_checked, tensors_in, write_tensors
from moce_ds.common.errors import ArtefactError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.5), "none": torch.zeros(0, 4)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    record = write_tensors(path, TENSORS)
    assert record == {"bytes": path.stat().st_size, "xxh3": checksum(path)} and same(load_file(path))
    assert same(tensors_in(torch.from_numpy(read_checked(path, record)), path))
    save_file(TENSORS, path, {"some": "metadata"})
    record = {"bytes": path.stat().st_size, "xxh3": checksum(path)}
    assert same(tensors_in(torch.from_numpy(read_checked(path, record)), path))


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"\0", lambda c: c[:-1] + b"\1", lambda c: b""])
def test_other_bytes_than_those_written_are_refused(tmp_path: Path, change: object) -> None:
    path = tmp_path / "own.safetensors"
    record = write_tensors(path, TENSORS)
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ArtefactError, match=f"{path} is damaged: its checksum is not the one it was written with"):
        read_checked(path, record)


HEADERS = {
    "no JSON": b"{",
    "a list": b"[]",
    "a tensor without a type": b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
    "another type": b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}',
    "another size": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "beyond the end": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
    "a negative size": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}',
    "negative sizes": b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    "an odd place": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_fit_no_content_are_refused(header: str) -> None:
    text = HEADERS[header] + b" " * (-len(HEADERS[header]) % 8)
    content = bytearray(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ArtefactError, match="some file is damaged"):
        tensors_in(torch.frombuffer(content, dtype=torch.uint8), Path("some file"))
