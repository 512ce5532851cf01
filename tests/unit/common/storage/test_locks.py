"""Lock files: who waits, who is refused, and file systems that support no locks."""

import errno
import os
from pathlib import Path

import pytest
from filelock import FileLock

from moce_ds.common.errors import ArtefactError
from moce_ds.common.storage.locks import held, is_held, locked


@pytest.fixture(
    params=[None, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP], ids=lambda number: errno.errorcode.get(number)
)
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file, on a file system that supports locks or says that it does not."""
    if request.param is not None:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(FileLock, "acquire", refuse)
    return tmp_path / "folder" / ".lock"


def test_one_holds_and_others_see_it(lock: Path) -> None:
    assert not is_held(lock) and not lock.parent.exists(), "looking makes nothing"
    with held(lock):
        assert is_held(lock)
        with pytest.raises(ArtefactError, match="it is busy"), locked(lock, "it is busy", seconds=0):
            pass
    assert not is_held(lock)
    with held(lock):
        assert is_held(lock)


def test_a_lock_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match=r"\.lock cannot be written: "), held(tmp_path / "file" / ".lock"):
        pass
