"""A folder that is replaced is the old one or the new one, whatever is killed when; what kills leave is cleared."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moce_ds.common.errors import MoceError
from moce_ds.common.storage import drafts
from moce_ds.common.storage.drafts import clear_leftovers, restore, scratch_folder
from moce_ds.common.storage.files import atomic_file, atomic_folder, save_tensors
from moce_ds.data.clusters import Clusters
from moce_ds.encoders.open import open_encoder
from moce_ds.exporting.existing_export import check_free

ROOT = Path(__file__).parents[4]

# Replace the folder "barrel", and be killed before the n-th change of the file system from when the draft is whole.
KILLED = """
import ctypes, errno, os, shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace
from moce_ds.common.storage.files import atomic_folder
dies_before, exchanges, changes = int(sys.argv[1]), sys.argv[2] == "exchange", 0

def counted(change):
    def counting(*words, **more):
        global changes
        changes += 1
        if changes == dies_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*words, **more)
    return counting

def refuse(*words):
    ctypes.set_errno(errno.EPERM)
    return -1

exchange = counted(ctypes.CDLL(None, use_errno=True).renameat2) if exchanges else refuse
with atomic_folder(Path("barrel")) as draft:
    (draft / "wine").write_text("new")
    ctypes.CDLL = lambda *words, **more: SimpleNamespace(renameat2=exchange)
    os.replace, rmtree = counted(os.replace), shutil.rmtree
    removed = counted(rmtree)
    shutil.rmtree = lambda path, **how: (removed if os.path.lexists(path) else rmtree)(path, **how)
"""


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses to exchange two names, as old profiles of seccomp do: they answer unknown calls with EPERM."""

    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=refuse))


def write_folder(path: Path, content: str) -> None:
    with atomic_folder(path) as draft:
        (draft / "wine").write_text(content)


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: (path / "wine").read_text() for path in folder.iterdir()}


@pytest.mark.parametrize(("how", "changes"), [("exchange", 2), ("renames", 3)])
def test_a_kill_at_any_change_leaves_the_old_or_the_new(tmp_path: Path, how: str, changes: int) -> None:
    for dies_before in range(1, changes + 2):
        write_folder(tmp_path / "barrel", "old")
        command = [sys.executable, "-c", KILLED, str(dies_before), how]
        status = subprocess.run(command, cwd=tmp_path, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert status.returncode == (-signal.SIGKILL if dies_before <= changes else 0)
        if how == "exchange":
            assert (tmp_path / "barrel").exists(), "at every moment"
        restore(tmp_path / "barrel")  # as who reads it
        clear_leftovers(tmp_path, again=True)  # as a new process that writes beside it
        (found,) = content_of(tmp_path).items()
        assert found in {("barrel", "old"), ("barrel", "new")} and (found[1] == "new") is (dies_before > changes - 1)


def test_an_error_leaves_the_old(tmp_path: Path) -> None:
    write_folder(tmp_path / "barrel", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "barrel") as draft:
        (draft / "wine").write_text("new")
        raise KeyboardInterrupt
    assert content_of(tmp_path) == {"barrel": "old"}


@pytest.mark.usefixtures("no_exchange")
def test_an_interruption_between_two_renames_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "barrel", "old")
    renamed, rename = [], os.replace

    def interrupted(old: Path, new: Path) -> None:
        renamed.append(old)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "barrel", "new")
    assert content_of(tmp_path) == {"barrel": "old"} and len(renamed) == 3


def leftover(place: Path, kind: str, machine: str, pid: int, changed: float = 0.0) -> Path:
    """A folder as a process has left it, that many seconds ago."""
    path = place.with_name(f".{place.name}.{machine}-{pid}.{kind}")
    path.mkdir()
    (path / "wine").write_text("left")
    for one in (path / "wine", path):
        os.utime(one, (time.time() - changed,) * 2)
    return path


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


DAY = 25 * 3600.0


def test_only_what_nobody_writes_is_cleared(tmp_path: Path, gone: int) -> None:
    here, there, place = drafts._machine(), "0123abcd", tmp_path / "barrel"
    kept = [
        leftover(place, "tmp", here, os.getppid(), DAY),
        leftover(place, "tmp", here, 1, DAY),
        leftover(place, "tmp", there, gone, 3600.0),  # the same number on another machine
        tmp_path / ".barrel.tmp",
        tmp_path / ".barrel.1234.tmp",
        tmp_path / "barrel.0123abcd-1.tmp",
    ]
    for path in kept[3:]:
        path.touch()
    cleared = [leftover(place, "tmp", here, gone), leftover(place, "tmp", there, 1, DAY)]
    cleared += [tmp_path / f".cask.{here}-{gone}.tmp"]
    cleared[-1].write_text("half")
    with atomic_file(tmp_path / "other") as draft:
        draft.write_text("x")
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "other"])
    assert not any(path.exists() for path in cleared)


def test_one_entry_that_cannot_be_looked_at_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [leftover(tmp_path / name, "tmp", "0123abcd", 1, DAY) for name in ("a", "b", "c")]
    lstat, refused = os.lstat, []

    def refusing(path: Path, **how: int) -> os.stat_result:
        if not refused:
            refused.append(path)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return lstat(path, **how)

    monkeypatch.setattr(os, "lstat", refusing)
    clear_leftovers(tmp_path)
    assert refused[0] in left and list(tmp_path.iterdir()) == refused


def test_hosts_of_one_name_are_disambiguated_by_their_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    read, boots = Path.read_text, {"a" * 36, "b" * 36}
    machines = set()
    for boot in boots:
        monkeypatch.setattr(Path, "read_text", lambda path, boot=boot: boot if path.name == "boot_id" else read(path))
        machines.add(drafts._machine.__wrapped__())
    assert len(machines) == 2


@pytest.mark.usefixtures("no_exchange")
def test_a_container_that_refuses_to_exchange_names_gets_two_renames(tmp_path: Path) -> None:
    write_folder(tmp_path / "barrel", "old")
    write_folder(tmp_path / "barrel", "new")
    assert content_of(tmp_path) == {"barrel": "new"}


def test_what_was_moved_aside_comes_back_if_nothing_took_its_place(tmp_path: Path, gone: int) -> None:
    here, place = drafts._machine(), tmp_path / "barrel"
    leftover(place, "old", "0123abcd", 1)
    restore(place)
    assert not place.exists(), "a process of another machine may be between its two renames"
    leftover(place, "old", here, gone)
    restore(place)
    assert (place / "wine").read_text() == "left"
    (place / "wine").write_text("present")
    leftover(place, "old", here, gone)
    clear_leftovers(tmp_path, again=True)
    assert (place / "wine").read_text() == "present" and len(list(tmp_path.iterdir())) == 2


READERS = {
    "encoder": lambda path: open_encoder(path, torch.device("cpu")),
    "clusters": Clusters.open,
    "export": lambda path: check_free(path, replace=True),
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_put_back_what_was_moved_aside(reader: str, tmp_path: Path, gone: int) -> None:
    place = tmp_path / "barrel"
    leftover(place, "old", drafts._machine(), gone)
    with pytest.raises(MoceError):  # it holds wine
        READERS[reader](place)
    assert (place / "wine").exists()


def test_scratch_folders_of_the_dead_are_removed(tmp_path: Path, gone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = [tmp_path / f"moce-{drafts._machine()}-{os.getppid()}-abc", tmp_path / "moce-mine", tmp_path / "link"]
    for path in kept[:2]:
        path.mkdir()
    (tmp_path / f"moce-{drafts._machine()}-{gone}-abc/deep").mkdir(parents=True)
    (tmp_path / f"moce-{drafts._machine()}-{gone}-lnk").symlink_to(kept[1])
    with scratch_folder() as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        assert {path.name.rpartition("-")[2] for path in tmp_path.glob(f"moce-*-{gone}-*")} == {"lnk"}
    assert not folder.exists() and kept[1].exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_tensors_are_as_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        for name, tensor in (("torch", torch.ones(2)), ("numpy", torch.ones(2).numpy())):
            save_tensors(tmp_path / name, {"x": tensor}, {"format": "pt"})
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("torch", "numpy")] == [mode] * 2
