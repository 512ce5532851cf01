"""Atomic writes: a kill at any moment leaves either the old content or the new one, never a part of it."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from moce_ds.common.errors import ArtefactError, MoceError
from moce_ds.common.host.machine import refused, system_error
from moce_ds.common.storage.drafts import draft_of, put_in_place, restore
from moce_ds.common.text import is_utf8
from moce_ds.common.validation import expectation

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_NO_UTF8 = "holds bytes that are not UTF-8, which the library of safetensors refuses"

# Errors that readers of arrays and tensors raise on damaged files; they have no common base class. `test_files` flips
# every bit.
_DAMAGE = (
    SafetensorError, TokenError, SyntaxError, ValueError, EOFError, OverflowError, LookupError, TypeError,
    RecursionError,
)  # fmt: skip

_HEAD_BYTES = 4096

PICTURE_TEXT = {"Software": "moce_ds"}
"""Text chunk of every PNG that a verb writes to a path from the command line."""
PICTURE_MARK = b"Software\0moce_ds"

_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")  # all that torch.save reports


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = draft_of(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` when the block ends without an error.

    An existing `path` is replaced in one step. If the file system cannot exchange names, a kill between two renames
    leaves the old folder aside, and the next process that opens `path` restores it (`drafts`).

    Raises:
        ArtefactError: `path` did not exist when the block began, and another process has written it since.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    may_replace = path.exists()
    temporary = draft_of(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists() and not may_replace:
            raise ArtefactError(f"{path} was written by another process meanwhile: it was not replaced.")
        put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writes_to(path: Path) -> Iterator[None]:
    """Convert write errors in the block, such as a full disk, to ArtefactError with the path of the artefact."""
    try:
        yield
    except OSError as error:
        raise refused(ArtefactError, f"{path} cannot be written", error, path) from None
    except (SafetensorError, RuntimeError) as error:  # the libraries pass on disk errors in this form
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_WRITER):
            raise
        if cause := system_error(error):
            raise refused(ArtefactError, f"{path} cannot be written", cause) from None
        raise ArtefactError(f"{path} cannot be written: {error}. Check whether the disk is full.") from None


@contextmanager
def reads_from(path: Path, cure: str, kind: type[MoceError] = ArtefactError) -> Iterator[None]:
    """Convert read errors in the block (missing, forbidden or damaged) to an error with the path of the file.

    Args:
        path: the file. It is opened once here, because libraries report any file that they cannot open as missing.
        cure: what to do about a missing or damaged file, such as "write the clusters again with ...".
        kind: the error class to raise.

    Raises:
        ArtefactError, or `kind`: the fault, and what to do.
    """
    try:
        with open(path, "rb"):
            pass
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise kind(f"{path} is missing: {cure}") from None
    except (OSError, *_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno:  # only the system sets errno; errors of libraries mean damage
            raise refused(kind, f"{path} cannot be read", error, path) from None
        if cause := system_error(error):
            raise refused(kind, f"{path} cannot be read", cause) from None
        if not is_utf8(path):
            raise kind(f"{path} {_NO_UTF8}: give its folder another name.") from None
        raise kind(f"{path} is damaged ({_said(error)}): {cure}") from None


@contextmanager
def parses(path: Path, cure: str) -> Iterator[None]:
    """Convert the errors of a block that parses the content of a file, already read, to ArtefactError with its path."""
    try:
        yield
    except _DAMAGE as error:
        raise ArtefactError(f"{path} is damaged ({_said(error)}): {cure}") from None


def _said(error: Exception) -> str:
    """What a library says about a file, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def load_array(
    path: Path, dtype: Any, shape: tuple[int, ...], cure: str, kind: type[MoceError] = ArtefactError
) -> np.ndarray:
    """A `.npy` file, memory-mapped for reading; nothing in it is unpickled.

    Raises:
        ArtefactError, or `kind`: as `reads_from`; or dtype or shape differ.
    """
    with reads_from(path, cure, kind):
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != dtype or array.shape != shape:
        raise kind(f"{path} holds {array.shape} of {array.dtype}, expected {shape} of {np.dtype(dtype)}: {cure}")
    return array


def load_tensors(path: Path, cure: str) -> "dict[str, Tensor]":
    """The tensors of a `.safetensors` file, on the host. Raises ArtefactError as `reads_from`."""
    with reads_from(path, cure):
        from safetensors.torch import (
            load_file,
        )  # imported here, because verbs without torch read records with this module

        return load_file(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file atomically. Raises OSError if the disk refuses it."""
    with atomic_file(path) as temporary, open(temporary, "wb") as opened:
        # numpy writes to real files with C's stdio and then misses the error of a full disk at the end.
        np.lib.format.write_array(SimpleNamespace(write=opened.write), array, allow_pickle=False)


def save_tensors(
    path: Path, tensors: "Mapping[str, Tensor | np.ndarray]", metadata: dict[str, str] | None = None
) -> None:
    """Write a `.safetensors` file of host tensors, all of torch or all of numpy, with the permissions of the umask.

    The library itself makes files readable by their owner only. Raises OSError, or SafetensorError with its text.
    """
    if not is_utf8(path):
        raise OSError(errno.EILSEQ, f"its path {_NO_UTF8}")
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file
    else:
        from safetensors.torch import save_file
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)


def check_writable(path: Path) -> None:
    """Raise ArtefactError if a path cannot be written, before anything is computed for it."""
    above = path.parent
    while not os.access(above, os.F_OK):  # unlike Path.exists, False in an unreadable folder
        above = above.parent
    if not above.is_dir():
        raise ArtefactError(f"{path} cannot be written: {above} is a file. Name a place in a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ArtefactError(f"{path} cannot be written: {above} does not allow it. Name another place.")


def check_output(path: Path, what: str, mark: bytes) -> None:
    """Check the path of an output file before computing it. A file of the same kind may be replaced, any other is kept.

    Args:
        what: kind of the file, such as "a report".
        mark: bytes that every file of the kind contains near its beginning.

    Raises:
        ArtefactError: `path` cannot be written, or holds a file of another kind.
    """
    check_writable(path)
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise ArtefactError(f"{path} is not a regular file: name another path for {what}.")
    with reads_from(path, "name another path."), open(path, "rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if head and mark not in head:
        raise ArtefactError(
            f"{path} exists and is not {what} of this program, so it is not replaced: name another path, or remove it."
        )


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, what: str, made_by: str) -> Any:
    """Read a JSON file. Errors name its kind (`what`) and the verb that writes it (`made_by`).

    Raises:
        ArtefactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except NotADirectoryError:
        raise ArtefactError(
            f"{path.parent} is not a folder: expected {what} in one, as `{made_by}` writes it."
        ) from None
    except FileNotFoundError:
        raise ArtefactError(f"{path} not found: expected {what}, which `{made_by}` writes.") from None
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged ({error}): write {what} again with `{made_by}`.") from None
    except OSError as error:
        raise refused(ArtefactError, f"{path} cannot be read", error, path) from None


def read_record(path: Path, kind: type[T], what: str, made_by: str, **version: object) -> T:
    """Read a JSON object as a dataclass `kind`; unknown keys are ignored.

    Args:
        version: keys that identify the format, with the values that this program reads; checked first.

    Raises:
        ArtefactError: as `read_json`; or another version; or keys are missing or have another type (lists all faults).
    """
    return record_in(read_json(path, what, made_by), path, kind, what, made_by, **version)


def record_in(content: Any, path: Path, kind: type[T], what: str, made_by: str, **version: object) -> T:
    """As `read_record`, for the content of the file at `path`. Raises ArtefactError."""
    stored = {key: content.get(key) for key in version} if isinstance(content, dict) else version
    if stored != version:
        raise ArtefactError(
            f"{path} says {_version_text(stored)}; this program reads {_version_text(version)}: write {what} again "
            f"with `{made_by}`, or use the version of moce that wrote it."
        )
    return valid_record(kind, content, str(path), what, made_by)


def valid_record(kind: type[T], content: Any, source: str, what: str, made_by: str) -> T:
    """Plain data as a `kind`; errors name `source`. Raises ArtefactError as `read_record`."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc'])) or 'content'}: {expectation(fault)}" for fault in error.errors())
        raise ArtefactError(
            f"{source} is damaged ({'; '.join(faults)}): write {what} again with `{made_by}`."
        ) from None


def _version_text(version: dict[str, object]) -> str:
    return " ".join(f"{key} {value!r}" for key, value in version.items())


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder, with hard links if the file system allows them (artefacts are never edited in place)."""

    def link_or_copy(src: str, dst: str) -> None:
        try:
            os.link(src, dst)
        except OSError:
            try:
                shutil.copy2(src, dst)
            except OSError as error:
                faults.append(error)
                raise

    faults: list[OSError] = []  # shutil itself collects only texts
    try:
        shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)
    except shutil.Error as error:  # lists all failures; report the first
        raise (faults or [OSError(error.args[0][0][2])])[0] from None
