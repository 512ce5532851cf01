"""A cache gives back what was kept, or nothing: never a part, never damage, and never more than its bound."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.cache import FOLDER, GIB, Cache, entry_name
from tests.examples.disk import mounted_disk


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    (tmp_path / "cache").mkdir()
    return Cache(tmp_path / "cache", bound=50_000)


def keep(cache: Cache, name: str, size: int = 10) -> None:
    with cache.own_folder() as folder:
        assert folder is not None
        (folder / "data").write_bytes(name[:1].encode() * size)
        cache.keep(name, folder)


def taken(cache: Cache, name: str) -> bytes | None:
    with cache.own_folder() as folder:
        assert folder is not None
        return (folder / "entry/data").read_bytes() if cache.take(name, folder / "entry") else None


def test_an_entry_is_found_as_it_was_kept(cache: Cache) -> None:
    assert taken(cache, "a") is None
    keep(cache, "a")
    assert taken(cache, "a") == b"a" * 10 and taken(cache, "b") is None
    assert sorted(path.name for path in cache.folder.iterdir()) == ["a"], "no copies are left"


@pytest.mark.parametrize(
    "harm",
    [
        lambda entry: flip_bit(entry / "data"),
        lambda entry: flip_bit(entry / "entry.json"),
        lambda entry: (entry / "data").write_bytes(b"a"),
        lambda entry: (entry / "data").unlink(),
        lambda entry: (entry / "entry.json").unlink(),
    ],
)
def test_a_damaged_entry_is_named_and_removed(
    cache: Cache, harm: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    keep(cache, "a")
    harm(cache.folder / "a")
    assert taken(cache, "a") is None and not (cache.folder / "a").exists()
    assert capsys.readouterr().err.count(f"WARNING: {cache.folder / 'a'} is damaged and not used: ") == 1
    keep(cache, "a")
    assert taken(cache, "a") == b"a" * 10


def test_entries_that_were_not_used_for_longest_are_removed(cache: Cache) -> None:
    for age, name in enumerate("abc"):
        keep(cache, name, 15_000)
        os.utime(cache.folder / name, (age, age))
    assert taken(cache, "a")  # used now
    keep(cache, "d", 15_000)
    assert [name for name in "abcd" if (cache.folder / name).exists()] == ["a", "c", "d"]
    keep(cache, "e", 26_000)  # more than half of the bound
    assert not (cache.folder / "e").exists() and taken(cache, "d")


def test_a_copy_in_use_survives_the_removal_of_its_entry(cache: Cache) -> None:
    keep(cache, "a", 20_000)
    with cache.own_folder() as folder:
        assert folder and cache.take("a", folder / "entry")
        for name in "bcd":
            keep(cache, name, 20_000)
        assert not (cache.folder / "a").exists()
        assert (folder / "entry/data").read_bytes() == b"a" * 20_000


def test_a_copy_that_fails_leaves_nothing(cache: Cache, tmp_path: Path) -> None:
    """Also where another process removes the entry meanwhile: the folder is used for what is then computed."""
    keep(cache, "images-1", size=10_000)
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "512k") as disk:
        disk.fill(4096)
        assert not cache.take("images-1", disk.path / "copy")
        assert not (disk.path / "copy").exists()


def make_once(cache: Cache, made: Path) -> None:
    """Take the entry, or make it."""
    with cache.alone("a"):
        if taken(cache, "a") is None:
            with made.open("a") as log:
                log.write("made\n")
            keep(cache, "a", 20_000)


def test_of_several_processes_one_makes_an_entry(cache: Cache, tmp_path: Path) -> None:
    context = get_context("fork")
    processes = [context.Process(target=make_once, args=(cache, tmp_path / "made")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "made").read_text() == "made\n" and taken(cache, "a")


def test_the_environment_names_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = Cache.here({FOLDER: str(tmp_path / "own"), GIB: "0.5"})
    assert here == Cache(tmp_path / "own", 2**29) and (tmp_path / "own").stat().st_mode & 0o077 == 0
    assert Cache.here({"XDG_CACHE_HOME": str(tmp_path)}) == Cache(tmp_path / "moce_ds", 10 * 2**30)
    assert Cache.here({FOLDER: "off"}) is None
    for text in ("0", "-1", "nan", "inf", "much"):
        with pytest.raises(ConfigError, match=f"MOCE_CACHE_GIB is '{text}', expected a number of GiB above 0"):
            Cache.here({FOLDER: str(tmp_path), GIB: text})
    (tmp_path / "file").touch()
    for _ in range(2):
        assert Cache.here({FOLDER: str(tmp_path / "file/cache")}) is None
    assert capsys.readouterr().err.count("is a file. Name a place in a folder. The cache is not used") == 1


def test_other_inputs_have_other_names() -> None:
    names = {entry_name("x", "a"), entry_name("x", "b"), entry_name("y", "a"), entry_name("x", "a", 1)}
    assert len(names) == 4 and entry_name("x", "a") in names
