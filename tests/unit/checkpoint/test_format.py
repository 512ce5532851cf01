"""The checkpoint format: one file an expert, nothing visible before it is whole, damage named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moce_ds.checkpoint.format import (
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    file_of,
    find,
    grouped,
    prune,
    publish,
    set_aside,
    step_folder,
    steps_of,
    write_checkpoint,
    write_files,
)
from moce_ds.common.errors import ArtefactError


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    experts = {
        f"blocks.3.mlp.experts.{e}.fc1.{kind}": torch.randn(4, 3) for e in range(2) for kind in ("weight", "bias")
    }
    return {"cls_token": torch.randn(1, 1, 4), "blocks.0.mlp.fc1.weight": torch.randn(4, 4), **experts}


def moments(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"{name}.{m}": tensor + k for name, tensor in of.items() for k, m in enumerate(("exp_avg", "exp_avg_sq"), 1)
    }


def write(run: Path, step: int) -> Path:
    return write_checkpoint(step_folder(run, step), weights(step), moments(weights(step)), {"step": step}).folder


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.step == 7 and checkpoint.faults() == []
    assert same(checkpoint.load(WEIGHTS), weights(7)) and same(checkpoint.load(OPTIMIZER), moments(weights(7)))
    assert checkpoint.shapes() == {name: tuple(tensor.shape) for name, tensor in weights().items()}


def test_each_global_expert_has_files_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    files = ("block-00", "block-03-expert-000", "block-03-expert-001", "shared")
    names = [f"{name}.safetensors" for name in files]
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["manifest.json", *(f"{part}/{n}" for part in (OPTIMIZER, WEIGHTS) for n in names)]
    assert Checkpoint.open(folder).names() == [f"weights/{name}" for name in names]
    assert file_of("blocks.11.mlp.experts.123.fc2.bias.exp_avg") == "block-11-expert-123.safetensors"
    assert file_of("decoder_blocks.3.mlp.fc1.weight") == "decoder-block-03.safetensors"
    assert file_of("blocks.3.mlp.shared.fc1.weight") == "block-03.safetensors"
    assert file_of("gate.weights.0") == file_of("cls_token") == "shared.safetensors"


def test_only_the_files_of_the_wanted_parameters_are_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, 1))
    wanted = ["blocks.3.mlp.experts.1.fc1.weight"]
    for name in ("shared", "block-03-expert-000"):
        (checkpoint.folder / WEIGHTS / f"{name}.safetensors").unlink()
    assert set(checkpoint.load(WEIGHTS, wanted)) == {
        f"blocks.3.mlp.experts.1.fc1.{kind}" for kind in ("weight", "bias")
    }
    with pytest.raises(ArtefactError, match=r"block-03-expert-000.safetensors is missing"):
        checkpoint.load(WEIGHTS)


def test_a_draft_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    final, draft = step_folder(tmp_path, 5), tmp_path / "draft"
    draft.mkdir()
    files = write_files(draft, grouped(WEIGHTS, weights()).items())
    with pytest.raises(ArtefactError, match=f"{tmp_path} holds no checkpoint: expected a run folder"):
        find(tmp_path)
    publish(draft, final, {"step": 5, "files": files})
    assert steps_of(tmp_path) == [5] and not draft.exists() and find(tmp_path).faults() == []


def test_what_a_kill_leaves_is_cleared_away(tmp_path: Path) -> None:
    write(tmp_path, 5)
    for left in (".step-00000006.draft", ".step-00000004.removed", ".step-00000005.replaced"):
        (tmp_path / "checkpoints" / left / "weights").mkdir(parents=True)
    assert find(tmp_path).step == 5
    prune(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_draft_that_has_gone_is_an_error_that_leaves_the_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    with pytest.raises(ArtefactError, match="cannot be written"):
        publish(tmp_path / "gone", folder, {"step": 5, "files": {}})
    assert find(tmp_path).faults() == [] and same(find(tmp_path).load(WEIGHTS), weights(5))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file where a folder must be")
    with pytest.raises(ArtefactError, match=rf"{tmp_path}/weights/[a-z0-9-]+.safetensors cannot be written"):
        write_files(tmp_path, grouped(WEIGHTS, weights()).items())


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write_checkpoint(step_folder(tmp_path, 5), weights(99), {}, {"step": 5})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert same(Checkpoint.open(step_folder(tmp_path, 5)).load(WEIGHTS), weights(99))


def test_the_newest_by_number_and_others_are_found(tmp_path: Path) -> None:
    for step in (900, 1000, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step-9").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert steps_of(tmp_path) == [20, 900, 1000]
    assert find(tmp_path).step == 1000 and find(step_folder(tmp_path, 900)).step == 900


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (2, 1, 4, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    prune(tmp_path, keep)
    assert steps_of(tmp_path) == left and (tmp_path / "checkpoints" / "notes.txt").exists()


def test_prune_keeps_milestones_too(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        write(tmp_path, step)
    prune(tmp_path, 2, every=30)
    assert steps_of(tmp_path) == [30, 60, 70]
    prune(tmp_path, 1, every=None)
    assert steps_of(tmp_path) == [70]


def test_a_damaged_checkpoint_set_aside_no_longer_counts(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 6)
    aside = set_aside(tmp_path, 6)
    assert steps_of(tmp_path) == [5] and Checkpoint.open(aside).faults() == []
    write(tmp_path, 6)
    assert set_aside(tmp_path, 6) == aside and steps_of(tmp_path) == [5]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(("harm", "found"), [(cut, r"\d+ bytes"), (Path.unlink, "missing")])
@pytest.mark.parametrize("name", ["weights/block-03-expert-001.safetensors", "optimizer/shared.safetensors"])
def test_a_file_cut_short_or_missing_is_named(
    tmp_path: Path, harm: Callable[[Path], None], found: str, name: str
) -> None:
    write(tmp_path, 4)
    folder = write(tmp_path, 5)
    size = (folder / name).stat().st_size
    harm(folder / name)
    message = f"{folder / name} is damaged: {found}, expected {size} bytes."
    with pytest.raises(ArtefactError, match=message + "$"):
        Checkpoint.open(folder)
    with pytest.raises(ArtefactError, match=f"{message} {step_folder(tmp_path, 4)} is the one before it"):
        find(tmp_path)


def test_weights_can_be_read_without_the_optimizer(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    shutil.rmtree(folder / OPTIMIZER)
    for path in (tmp_path, folder):
        assert same(find(path).load(WEIGHTS), weights(5))
    with pytest.raises(ArtefactError, match=r"optimizer/.* is damaged: missing"):
        Checkpoint.open(folder, resumable=True)  # as a run does that resumes
    (folder / "weights/shared.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"weights/shared.safetensors is damaged: missing"):
        find(tmp_path)


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    path = folder / "weights/shared.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    (fault,) = Checkpoint.open(folder).faults()
    assert fault == f"{path} is damaged: its checksum is not the one it was written with."
    with pytest.raises(ArtefactError, match=fault):
        Checkpoint.open(folder).load(WEIGHTS)
    assert same(Checkpoint.open(folder).load(OPTIMIZER), moments(weights(5)))


def test_headers_that_are_none_are_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, 5))
    path = checkpoint.folder / "weights/shared.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ArtefactError, match=f"{path} is damaged"):
        checkpoint.shapes()


def test_a_manifest_cannot_lead_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    elsewhere = {"weights/../../../secret.safetensors": {"bytes": 1, "xxh3": "0"}}
    publish(tmp_path / "draft", step_folder(tmp_path, 5), {"step": 5, "files": elsewhere})
    with pytest.raises(ArtefactError, match="which is not a file of a checkpoint"):
        find(tmp_path)


def test_no_byte_of_a_manifest_can_change_unnoticed(tmp_path: Path) -> None:
    path = write(tmp_path, 5) / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content) - 1):  # but for the line feed at its end
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ArtefactError, match=r"step-00000005/manifest.json(: format| is damaged)"):
            find(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [("[1, 2]", "format None; this version reads"),
     (None, "manifest.json not found: expected a checkpoint, which `moce pretrain` writes"), ("{", "is damaged"),
     (json.dumps({"format": "moce_ds checkpoint 9"}), "format 'moce_ds checkpoint 9'; this version reads 'moce_ds ch")],
)  # fmt: skip
def test_manifests_that_cannot_be_read(tmp_path: Path, manifest: str | None, message: str) -> None:
    folder = write(tmp_path, 5)
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ArtefactError) as caught:
        Checkpoint.open(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)
