"""A task's images by the names that the user gave them: what is left out is said, what is wrong is named."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moce_ds.common.errors import DataError
from moce_ds.data.shard_writer import ShardSettings, write_shards
from moce_ds.data.shards import ShardSet
from moce_ds.data.task_images import opened_images
from moce_ds.evaluation import probe
from moce_ds.tuning.classification import make_splits
from tests.examples.moce_command import refused, run_here

FAST = ("threads=1", "batch_size=16")


@pytest.fixture
def task(tiny_images: Path, tmp_path: Path) -> Path:
    """A folder with the splits train and test of two classes, ten images of each."""
    for label in ("digits", "flower"):
        for number, image in enumerate(sorted((tiny_images / label).iterdir())):
            place = tmp_path / "kinds" / ("test" if number % 2 else "train") / label
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, place)
    return tmp_path / "kinds"


def damage(split: Path) -> None:
    for number in range(5):
        (split / "digits" / f"bad-{number}\x1b.png").write_bytes(b"no image")
    (split / "empty.png").touch()


def measured(verb: str, task: Path, encoder: Path) -> list[object]:
    return [verb, encoder, "--train", task / "train", "--test", task / "test", *FAST]


def test_files_that_are_left_out_are_said_and_named(task: Path, tiny_encoder: Path) -> None:
    for split in ("train", "test"):
        damage(task / split)
    for words in (measured("knn", task, tiny_encoder), [*measured("probe", task, tiny_encoder), "method=closed_form"]):
        said = run_here(*words)
        assert said.status == 0, said
        for split in ("train", "test"):
            told = (
                f"WARNING: {task / split}: 6 of 26 files were skipped, since they are not complete images: 1 empty, 5 "
            )
            assert said.err.count(told) == 1 and "skipped" not in said.out
        assert "digits/bad-0\ufffd.png: not an image" in said.err and "and 3 more" in said.err


def test_a_task_that_votes_says_it_too(task: Path, tiny_moce_run: Callable[..., Path], tmp_path: Path) -> None:
    damage(task / "train")
    run = tiny_moce_run()
    for words in (
        ("select", run, "--data", task / "train", "threads=1"),
        ("export", run, tmp_path / "out", "--data", task / "train", "threads=1"),
    ):
        assert run_here(*words).err.count(f"{task / 'train'}: 6 of 26 files were skipped") == 1


def test_a_shard_set_remembers_what_it_left_out(task: Path, tmp_path: Path) -> None:
    damage(task / "train")
    write_shards(task / "train", tmp_path / "set", ShardSettings(workers=1))
    heard: list[str] = []
    with opened_images(tmp_path / "set", heard.append):
        (tmp_path / "set/rejected.jsonl").unlink()
    with opened_images(tmp_path / "set", heard.append):
        pass
    assert [text.count("6 of 26 files were skipped") for text in heard] == [1, 1]
    assert "bad-0" in heard[0] and "bad-0" not in heard[1]


def test_faults_of_labels_name_the_folder_that_was_given(task: Path, tiny_encoder: Path) -> None:
    (task / "test/flower").rename(task / "test/roses")
    message = refused(*measured("knn", task, tiny_encoder))
    assert message.startswith(f"{task / 'test'}: classes ['roses'] are not among the training classes of {task}/train")
    shutil.copy(task / "test/roses/01.jpg", task / "test/0001.jpg")
    assert refused(*measured("knn", task, tiny_encoder)).startswith(f"{task / 'test'}: 0001.jpg has no class")


def test_so_do_those_of_tuning(task: Path) -> None:
    alone, *others = sorted((task / "train/flower").iterdir())
    for image in others:
        image.unlink()
    told = pytest.raises(DataError, match=f"^{task}/train: class flower has a single image")
    with opened_images(task / "train") as train, told:
        make_splits(train, 0.2, train, seed=0)
    alone.unlink()
    with opened_images(task / "train") as train, pytest.raises(DataError, match=rf"^{task}/train: 1 class"):
        make_splits(train, None, train, seed=0)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: (path / "shards.json").unlink(), "is a shard set without its shards.json"),
        (lambda path: ((path / "shards.json").unlink(), (path / ".progress").mkdir()), "is an unfinished shard set"),
        (lambda path: [file.unlink() for file in path.iterdir()], "the folder holds no files"),
        (
            lambda path: (shutil.rmtree(path), path.write_bytes(b"x")),
            "is a file: expected a folder, a .tar or .parquet file",
        ),
        (lambda path: shutil.rmtree(path), "not found: expected a shard set"),
    ],
)
def test_what_is_no_set_of_images(tiny_shards: Path, tmp_path: Path, harm: Callable[[Path], object], told: str) -> None:
    path = shutil.copytree(tiny_shards, tmp_path / "set")
    harm(path)
    with pytest.raises(DataError, match=f"{path}.* {told}"), opened_images(path):
        pass


def test_a_copy_for_another_process_keeps_its_name(tiny_shards: Path) -> None:
    images = ShardSet.open(tiny_shards, named=Path("kinds/train"))
    opened, words = images.__reduce__()
    assert opened(*words).named == Path("kinds/train")


def test_one_line_tells_what_did_not_converge(task: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 3)
    said = run_here(*measured("probe", task, tiny_encoder), "l2=[1.0e-6,1.0e-5,1.0e-4]")
    assert said.status == 0 and "Warning" not in said.err, said
    assert said.err.count("iterations with l2=1e-06, 1e-05, 0.0001; l2=0.0001 was chosen") == 1, said.err


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"verb": "knn"}]', '[{"verb": 1, "task": "a"}]', "null"])
def test_results_of_another_shape_are_refused_first(
    task: Path, tiny_encoder: Path, tiny_moce_run: Callable[..., Path], tmp_path: Path, content: str
) -> None:
    results = tmp_path / "results.json"
    results.write_text(content)
    (task / "test").rename(task / "later")  # would be noticed next
    for words in (measured("knn", task, tiny_encoder), ["select", tiny_moce_run(), "--data", task / "test"]):
        assert re.match(rf"{results}(, record 0,)? is damaged \(", refused(*words, "--results", results))
        told = refused(*words, "--results", results / "sub.json")
        assert told.startswith(f"{results}/sub.json cannot be written: {results} is a file")
    assert results.read_text() == content


@pytest.mark.parametrize(
    ("verb", "word"),
    [
        ("knn", "batch_size=0"),
        ("knn", "threads=-1"),
        ("probe", "batch_size=-4"),
        ("probe", "threads=0"),
        ("probe", "lars.base_lr=[]"),
        ("probe", "seed=-1"),
        ("probe", f"seed={2**63}"),
    ],
)
def test_settings_out_of_bounds(task: Path, tiny_encoder: Path, verb: str, word: str) -> None:
    assert f"  {word.partition('=')[0]}: " in refused(*measured(verb, task, tiny_encoder), word)
