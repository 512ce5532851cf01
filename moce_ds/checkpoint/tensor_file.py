"""The tensor files of a checkpoint: safetensors with fp32 tensors, written and read in one pass with their checksum.

The library's own functions would pass over the content twice: its writer copies every tensor, its reader maps the file,
and the checksum would need another pass. Here the bytes that are hashed are those that are written or parsed.
"""

import json
import math
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.files import reads_from

if TYPE_CHECKING:  # verbs without torch read records with this module
    from torch import Tensor

RESTORE = "restore it from a copy, or use another checkpoint."
_CHUNK = 2**20  # bytes read at a time: they are hashed while they are in the processor's cache
_LENGTH = 8  # bytes of the header's length, before the header


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
    """Write float32 host tensors as a safetensors file and sync it; returns its size and checksum.

    Raises OSError.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        assert str(tensor.dtype) == "torch.float32" and not tensor.is_cuda, name
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    digest = xxh3_128()
    with open(path, "wb", buffering=0) as file:
        contents = (memoryview(tensor.contiguous().view(-1).numpy()).cast("B") for tensor in tensors.values())  # type: ignore[arg-type]
        for content in chain((memoryview(len(text).to_bytes(_LENGTH, "little") + text),), contents):
            digest.update(content)
            while content:  # a write may be incomplete
                content = content[file.write(content) :]
        os.fsync(file.fileno())
    return {"bytes": _LENGTH + len(text) + end, "xxh3": digest.hexdigest()}


def checksum(path: Path) -> str:
    """128-bit XXH3 of a file, which detects damage at the speed of memory. Raises ArtefactError as `reads_from`."""
    digest, buffer = xxh3_128(), bytearray(_CHUNK)
    with reads_from(path, RESTORE), open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def read_checked(path: Path, record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The bytes of a file, read once and checked while they are read.

    Args:
        record: its size and checksum, as `write_tensors` returns them.

    Raises:
        ArtefactError: it is missing, cannot be read, or is not what was written.
    """
    content, digest, filled = np.empty(record["bytes"], np.uint8), xxh3_128(), 0
    with reads_from(path, RESTORE), open(path, "rb", buffering=0) as file:
        view = memoryview(content)  # type: ignore[arg-type]
        while count := file.readinto(view[filled : filled + _CHUNK]):
            digest.update(view[filled : filled + count])
            filled += count
        longer = file.read(1)
    if longer or filled < len(content) or digest.hexdigest() != record["xxh3"]:
        raise damaged(path)
    return content


def damaged(path: Path) -> ArtefactError:
    """The error for a file with another checksum than the recorded one."""
    return ArtefactError(f"{path} is damaged: its checksum is not the one it was written with.")


def tensors_in(content: "Tensor", path: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file as views of its bytes, where these are: on the host or on a device.

    Args:
        content: the whole file, uint8, [bytes].
        path: of the file, for errors.

    Raises:
        ArtefactError: the bytes are not a safetensors file with fp32 tensors.
    """
    try:
        begin = _LENGTH + int.from_bytes(content[:_LENGTH].cpu().numpy().tobytes(), "little")
        header = json.loads(content[_LENGTH:begin].cpu().numpy().tobytes())
        header.pop("__metadata__", None)
        return {name: _tensor(content[begin:], **entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise ArtefactError(f"{path} is damaged ({error}): {RESTORE}") from None


def _tensor(data: "Tensor", dtype: str, shape: list[int], data_offsets: list[int]) -> "Tensor":
    import torch  # imported here, because verbs without torch read records with this module

    begin, end = data_offsets
    whole = 0 <= begin <= end <= len(data) and end - begin == 4 * math.prod(shape)
    if dtype != "F32" or not whole or (data.storage_offset() + begin) % 4:
        raise ValueError(f"a tensor of {dtype} and shape {shape} in bytes {begin} to {end} of {len(data)}")
    return data[begin:end].view(torch.float32).view(shape)
