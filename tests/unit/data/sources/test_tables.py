"""Tables as a source of shards: Parquet files and saved data sets give their images, classes and order."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset

from moce_ds.common.errors import ConfigError, DataError
from moce_ds.common.host.rank import ProcessRank
from moce_ds.data.shard_writer import ShardSettings, share_shards, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.sources.any_source import source_at
from moce_ds.data.sources.tables import TableSource
from moce_ds.data.task_images import opened_images
from tests.examples.images import contents, rejections, save
from tests.examples.images import crop as photo_crop
from tests.examples.moce_command import refused, run_here
from tests.examples.tables import cell, dataset, encoded, write_parquet

KINDS = ClassLabel(names=["small", "large", "none of these"])
SETTINGS = ShardSettings(images_per_shard=5, workers=1)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """23 rows of two classes: images with no class, rows without an image, one image that is damaged."""
    images = [cell(number, ("PNG", "JPEG")[number % 2]) for number in range(23)]
    images[5], images[16], images[17] = None, {"bytes": b"\x89PNG, or not", "path": None}, {"bytes": b"", "path": None}  # type: ignore[call-overload]
    sizes = [-1 if number % 5 == 4 else number % 2 for number in range(23)]
    return dataset(
        {"name": [*"abcdefghijklmnopqrstuvw"], "picture": images, "size": sizes}, name=Value("string"), size=KINDS
    )


@pytest.fixture(scope="module", params=["saved", "parquet"])
def table(request: pytest.FixtureRequest, rows: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These rows, saved in three files, or as Parquet files in a folder data, with row groups of 4 rows."""
    path: Path = tmp_path_factory.mktemp(request.param) / "set"
    if request.param == "saved":
        rows.save_to_disk(path, num_shards=3)
        return path
    for number in range(3):
        (path / "data").mkdir(parents=True, exist_ok=True)
        part = rows.shard(3, number, contiguous=True)
        part.to_parquet(path / f"data/train-{number:05d}-of-00003.parquet", batch_size=4)
    (path / "README.md").write_text("# a set, as on the hub")
    (path / ".cache").mkdir()
    (path / ".cache/train-00000-of-00001.parquet").write_bytes(b"not whole")
    return path


@pytest.fixture(scope="module")
def written(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "set"
    write_shards(source_at(table), out, SETTINGS)
    return out


def fault(path: Path) -> str:
    """What is said where a table cannot be read."""
    with pytest.raises(DataError) as raised, opened_images(path):
        pass
    return str(raised.value)


def test_images_classes_and_order_are_those_of_the_library(rows: Dataset, table: Path, written: Path) -> None:
    shards = ShardSet.open(written)
    kept = [row for row in range(23) if row not in (5, 16, 17)]
    assert [shards.read(i) for i in range(20)] == [encoded(row, ("PNG", "JPEG")[row % 2]) for row in kept]
    assert shards.classes == KINDS.names and shards.labels.tolist() == [rows[row]["size"] for row in kept]
    assert rejections(written) == {
        row_name(table, 5): ("empty", "the row holds no image"),
        row_name(table, 16): ("not an image", "begins with b'\\x89PNG, or not'"),
        row_name(table, 17): ("empty", "0 bytes"),
    }
    assert [shards.source(i) for i in range(20)] == [row_name(table, row) for row in kept]
    assert shards.verify().faults == []


def row_name(table: Path, row: int) -> str:
    """The name of a row among files of 8, 8 and 7 rows."""
    file = "data/train-{:05d}-of-00003.parquet" if (table / "data").exists() else "data-{:05d}-of-00003.arrow"
    return f"{file.format(row // 8)}/{row % 8}"


def test_the_library_reads_the_same_rows_of_a_folder(rows: Dataset, tmp_path: Path) -> None:
    for number in (1, 0, 2):
        rows.shard(3, number).to_parquet(tmp_path / f"set/train-{number:05d}-of-00003.parquet")
    library = load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    names = [KINDS.int2str(size) if size >= 0 else "" for size in library["size"]]
    assert [entry.class_name for entry in source_at(tmp_path / "set").entries()] == names


def test_both_kinds_of_table_give_one_set(rows: Dataset, written: Path, tmp_path: Path) -> None:
    rows.to_parquet(tmp_path / "rows.parquet")
    write_shards(source_at(tmp_path / "rows.parquet"), tmp_path / "set", ShardSettings(workers=1))
    assert ShardSet.open(tmp_path / "set").fingerprint == ShardSet.open(written).fingerprint


def test_several_workers_write_the_same(table: Path, written: Path, tmp_path: Path) -> None:
    for shards, name in ((5, "parts"), (50, "shared")):
        for workers in (1, 2):
            settings = ShardSettings(images_per_shard=shards, workers=workers)
            write_shards(source_at(table), tmp_path / f"{name}{workers}", settings)
        assert contents(tmp_path / f"{name}1") == contents(tmp_path / f"{name}2")
    assert contents(tmp_path / "parts2") == contents(written)


def test_two_processes_write_the_same(table: Path, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    other = threading.Thread(target=share_shards, args=(source_at(table), out, SETTINGS, ProcessRank(1, 2, 1)))
    other.start()
    write_shards(source_at(table), out, SETTINGS, here=ProcessRank(0, 2, 0))
    other.join()
    assert contents(out) == contents(written)


KILLED = """
import os, signal, sys
from pathlib import Path
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.sources.tables import TableSource

class Killed(TableSource):
    def examine(self, entries, max_pixels):
        for entry, verdict in zip(entries, super().examine(entries, max_pixels)):
            if entry.path.endswith(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield verdict

write_shards(Killed(Path(sys.argv[1])), Path(sys.argv[2]), ShardSettings(images_per_shard=5, workers=1))
"""


def test_a_killed_command_resumes(table: Path, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    words = [sys.executable, "-c", KILLED, str(table), str(out), row_name(table, 12)]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    first = (out / "shard-000000.tar").stat()
    write_shards(source_at(table), out, SETTINGS)
    assert contents(out) == contents(written)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first.st_mtime_ns  # kept, not written again
    assert write_shards(source_at(table), out, SETTINGS).already_complete


def test_other_classes_are_another_source(rows: Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "saved")
    write_shards(source_at(tmp_path / "saved"), tmp_path / "set", SETTINGS)
    rows.map(lambda row: {"size": 1}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="was begun with other inputs"):
        write_shards(source_at(tmp_path / "other"), tmp_path / "set", SETTINGS)


def test_listing_reads_no_image(tmp_path: Path) -> None:
    """The bytes of the images are overwritten in the file; only examining them notices."""
    images = [os.urandom(2000) for _ in range(40)]
    columns = {"image": images, "label": [*range(40)]}
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # each image is there once
    write_parquet(tmp_path / "a.parquet", columns, **plain)
    content = (tmp_path / "a.parquet").read_bytes()
    end = content.index(images[-1]) + 2000
    content = content[:4] + bytes(end - 4) + content[end:]  # between the mark of Parquet and the second column
    (tmp_path / "a.parquet").write_bytes(content)
    source = source_at(tmp_path / "a.parquet")
    entries = list(source.entries())
    assert [entry.class_name for entry in entries] == [str(number) for number in range(40)]
    with pytest.raises(DataError, match=r"a\.parquet is damaged .*: copy it again"):
        list(source.examine(entries, 10**6))


@pytest.mark.parametrize(
    ("kind", "values", "classes", "labels"),
    [
        ("int64", [10, 9, -1, None, 10, 7], ["7", "9", "10"], [2, 1, -1, -1, 2]),
        ("uint8", [10, 9, 0, None, 10, 7], ["0", "7", "9", "10"], [3, 2, 0, -1, 3]),
        ("string", ["10", "9", "", None, "b", "a"], ["10", "9", "a", "b"], [0, 1, -1, -1, 3]),
        ("bool", [True, False, None, True, True, False], ["False", "True"], [1, 0, -1, 1, 1]),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
def test_plain_values_called_label_are_classes(
    tmp_path: Path, kind: str, values: list[object], classes: list[str], labels: list[int], saved: bool
) -> None:
    """Also the class of the last row, which has no image."""
    images = [*map(cell, range(5)), None]
    if saved:
        dataset({"image": images, "label": values}, label=Value(kind)).save_to_disk(tmp_path / "set")
    else:
        write_parquet(tmp_path / "set/0.parquet", {"image": images, "label": pyarrow.array(values, kind)})
    with opened_images(tmp_path / "set") as shards:
        assert shards.classes == classes and shards.labels.tolist() == labels


def test_of_several_columns_the_one_of_a_usual_name_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"mask": [cell(8)], "image": [cell(1)], "fine": [2], "coarse": [0]}
    dataset(columns, fine=KINDS, coarse=KINDS).save_to_disk(tmp_path / "saved")
    with opened_images(tmp_path / "saved") as images:
        assert images.read(0) == encoded(1) and images.labels.tolist() == [2]
    assert caplog.text.count("columns mask, image all have type Image; using image.") == 1
    assert caplog.text.count("columns fine, coarse all have type ClassLabel; using fine.") == 1


def test_without_classes_images_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset({"img": [cell(0, "JPEG")]}).save_to_disk(tmp_path / "saved")
    write_parquet(tmp_path / "a.parquet", {"bytes": [encoded(0, "JPEG")], "label": [0.5]})
    for path, told in (("saved", "there is no column label"), ("a.parquet", "label is double")):
        with opened_images(tmp_path / path) as images:
            assert images.classes == [] and images.labels.tolist() == [-1] and images.read(0) == encoded(0, "JPEG")
        said = capsys.readouterr().err
        assert "its images have no classes" in said and told in said


def test_a_path_without_bytes_is_not_opened(tmp_path: Path) -> None:
    save(photo_crop(1), tmp_path / "private.png", "PNG")
    image = {"bytes": None, "path": str(tmp_path / "private.png")}
    write_parquet(tmp_path / "a.parquet", {"image": [image, cell(0)], "label": ["a", "b"]})
    write_shards(source_at(tmp_path / "a.parquet"), tmp_path / "set", SETTINGS)
    reason = f"the row holds no bytes, only the path {tmp_path / 'private.png'}"
    assert rejections(tmp_path / "set") == {"a.parquet/0": ("empty", reason)}
    files = dataset({"image": [image["path"]]})  # of the files, one method of the library stores the paths only
    files.to_parquet(tmp_path / "paths.parquet")
    assert f"paths.parquet/0: empty ({reason})" in fault(tmp_path / "paths.parquet")
    files.save_to_disk(tmp_path / "bytes")
    with opened_images(tmp_path / "bytes") as images:
        assert images.read(0) == (tmp_path / "private.png").read_bytes()


def test_a_class_beyond_the_names_is_named(tmp_path: Path) -> None:
    """The library checks it when it writes, not when it reads."""
    whole = dataset({"image": [cell(0), cell(1)], "label": [2, 1]}, label=KINDS).with_format("arrow")[:]
    table = whole.set_column(1, whole.schema.field("label"), [pyarrow.array([2, 3])])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert fault(tmp_path / "a.parquet").startswith(f"{tmp_path}/a.parquet: row 1 has the class 3 of 3")


def test_a_split_has_to_be_named(rows: Dataset, tmp_path: Path) -> None:
    both, few = tmp_path / "both", rows.select(range(2))
    DatasetDict(train=rows, test=few).save_to_disk(both)
    assert f"{both} holds several splits: name one of them, train, test, such as {both / 'train'}" in fault(both)
    for split in ("train", "test"):
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        few.to_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    named = f"name one of them, data/test, data/train, such as {tmp_path}/hub/data/test."
    assert refused("shards", tmp_path / "hub", tmp_path / "set").strip().endswith(named)
    assert not (tmp_path / "set").exists()
    for split in (both / "test", tmp_path / "hub/data/test"):
        with opened_images(split) as images:
            assert images.count == 2


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set/a.parquet", {"image": [encoded(0)], "label": [0]})
    write_parquet(tmp_path / "set/b.parquet", {"image": [encoded(1)], "label": ["x"]})
    assert f"{tmp_path}/set/b.parquet has images in image and classes in label (text); the files" in fault(
        tmp_path / "set"
    )
    write_parquet(tmp_path / "set/b.parquet", {"text": ["a"], "kind": ["b"]})
    assert fault(tmp_path / "set") == f"{tmp_path}/set/b.parquet has no column of images; its columns: text, kind."


def test_no_image_that_decodes(tmp_path: Path) -> None:
    dataset({"image": [None, {"bytes": b"none", "path": None}]}).save_to_disk(tmp_path / "saved")
    assert "of 2 files none could be decoded" in fault(tmp_path / "saved")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow", "a.parquet"])
@pytest.mark.parametrize("keep", [0, 20, -1])
def test_damaged_files_are_named(rows: Dataset, tmp_path: Path, name: str, keep: int) -> None:
    rows.save_to_disk(tmp_path / "set")
    if name == "a.parquet":
        rows.to_parquet(tmp_path / "set/a.parquet")
    damaged = tmp_path / "set" / name
    damaged.write_bytes(damaged.read_bytes()[:keep])
    path = damaged if name == "a.parquet" else tmp_path / "set"
    with pytest.raises(DataError, match=rf"^{damaged} is damaged \(.*\): (copy it|write it) again"):
        write_shards(source_at(path), tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(rows: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet is missing: copy it again"):
        write_shards(source_at(tmp_path / "a.parquet"), tmp_path / "out", SETTINGS)
    rows.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved/data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow is missing: copy it again" in fault(tmp_path / "saved")


@pytest.mark.parametrize("name", ["set/data-00000-of-00001.arrow", "a.parquet"])
def test_flipped_bits_end_in_an_error_or_in_other_rows(rows: Dataset, tmp_path: Path, name: str) -> None:
    """Never in a crash: pyarrow checks neither all offsets nor all lengths by itself."""
    few = rows.select(range(3))
    few.save_to_disk(tmp_path / "set")
    few.to_parquet(tmp_path / "a.parquet")
    file, source = tmp_path / name, tmp_path / name.split("/")[0]
    whole, refusals = file.read_bytes(), 0
    for step in range(300):
        place = step * 13 % 1500 if step % 2 else len(whole) - 1 - step * 13 % 3000
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << step % 8]) + whole[place + 1 :])
        try:
            table = source_at(source)
            list(table.examine(list(table.entries()), 10**6))
        except DataError:
            refusals += 1
    assert refusals > 20


def test_the_extra_is_named_where_pyarrow_is_missing(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_images: Path, tiny_shards: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow, .* pip install 'moce-ds\[hf\]'"):
        write_shards(source_at(table), tmp_path / "set", SETTINGS)
    assert not (tmp_path / "set").exists()
    with opened_images(tiny_images) as images:  # which does not need it
        assert images.fingerprint == ShardSet.open(tiny_shards).fingerprint


def test_what_a_path_names(table: Path, tmp_path: Path) -> None:
    assert source_at(table) == TableSource(table)
    (tmp_path / "x.arrow").touch()
    with pytest.raises(DataError, match=r"x\.arrow is a file: expected a folder, a \.tar or \.parquet file, or a list"):
        source_at(tmp_path / "x.arrow")


def test_the_verbs_read_tables(table: Path, written: Path, tmp_path: Path, tiny_moce_run: object) -> None:
    said = run_here("shards", table, tmp_path / "set", "images_per_shard=5", "workers=1")
    assert said.status == 0 and "20 images of 3 classes in 5 shards" in said.out, said
    assert contents(tmp_path / "set") == contents(written)
    write_parquet(tmp_path / "text.parquet", {"text": ["a"]})
    run = tiny_moce_run()  # type: ignore[operator]
    for verb in (("select", run, "--data"), ("export", run, tmp_path / "out", "--data")):
        assert "has no column of images; its columns: text" in refused(*verb, tmp_path / "text.parquet")
