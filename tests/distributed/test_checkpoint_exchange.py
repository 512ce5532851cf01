"""What processes send one another for a checkpoint: moments in buckets to those that write them, and each file once
from the process that reads it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from harness import run_distributed
from numpy.typing import NDArray
from test_waitless import Case, small_model, take_step
from torch import Tensor

from moce_ds.checkpoint import deepspeed_state, format
from moce_ds.checkpoint.deepspeed_state import MOMENTS, Files, global_parameters, load_checkpoint, snapshot
from moce_ds.checkpoint.format import publish, step_folder, write_files
from moce_ds.checkpoint.shared_read import SharedReader
from moce_ds.common.errors import DamagedError
from moce_ds.distributed.runtime import Runtime, started
from moce_ds.training.engine import Engine, parameter_groups, start_engine
from moce_ds.training.schedule import BatchArithmetic
from moce_ds.training.settings import EngineSettings, PretrainOptimSettings

EP_SIZES = (1, 2)
"""Every process holds all experts, which both replicate; or each holds half of them."""


@dataclass
class Told:
    """What a process saw.

    Attributes:
        wrong: moments that differ from DeepSpeed's own collection, or after loading from those that were saved.
        reduced: collectives of a save, with buckets for a few tensors and with those of the program.
        tensors: moments that processes share.
        files: of the checkpoint, and their bytes; read: by this process when it loads them.
        error: of a load with a damaged file.
    """

    wrong: list[str]
    reduced: list[int]
    tensors: int
    files: dict[str, int]
    read: list[str]
    error: str


def exchange(folder: Path) -> dict[int, Told]:
    """Save and load the state of a small model, and load it again with a damaged file."""
    with started() as runtime:
        return {ep_size: _exchange(folder / str(ep_size), ep_size, runtime) for ep_size in EP_SIZES}


def _exchange(run: Path, ep_size: int, runtime: Runtime) -> Told:
    engine = _trained(ep_size, runtime)
    told = Told([], [], 0, {}, [], "")
    with patch.object(deepspeed_state, "BUCKET", 2**13):
        in_small_buckets = _saved(engine, runtime, told)
    whole = {
        f"{name}.{kind}": safe_get_full_optimizer_state(parameter, kind)
        for name, parameter in global_parameters(engine.module)
        for kind in MOMENTS
    }
    shared = [p for _, p in global_parameters(engine.module) if dist.get_world_size(p._dp_group) > 1]
    told.tensors = len(MOMENTS) * len(shared)
    _compare(told, whole, in_small_buckets)
    files = _saved(engine, runtime, told)
    _compare(told, whole, files)
    files = {file: {name: t.detach().clone() for name, t in tensors.items()} for file, tensors in files.items()}
    reader = _published(run, files, runtime)
    told.files = {name: record["bytes"] for name, record in reader.checkpoint.manifest["files"].items()}
    with torch.no_grad():
        for _, parameter in global_parameters(engine.module):
            parameter.zero_()
    with _counted_reads(told.read):
        load_checkpoint(engine, reader)
    assert sorted(reader.files_read) == sorted(told.read)
    for file, tensors in _saved(engine, runtime, told).items():
        _compare(told, tensors, {file: files[file]})
    if runtime.is_main:
        _flip_last_byte(reader.checkpoint.folder / "optimizer/block-01-expert-003.safetensors")
    runtime.barrier()
    try:
        load_checkpoint(engine, SharedReader.open(reader.checkpoint.folder, runtime))
    except DamagedError as error:
        told.error = str(error)
    return told


def _trained(ep_size: int, runtime: Runtime) -> Engine:
    torch.manual_seed(0)
    model, optim, case = small_model(ep_size, runtime.rank), PretrainOptimSettings(), Case(ep_size, 1)
    batches = BatchArithmetic(8, runtime.world_size, 1)
    groups = parameter_groups(model, optim, 1.0)
    engine = start_engine(model, groups, optim, EngineSettings(precision="fp32", zero_stage=1), batches)
    take_step(engine, case, 0, None, runtime, batches)
    return engine


def _saved(engine: Engine, runtime: Runtime, told: Told) -> Files:
    with patch.object(dist, "reduce", wraps=dist.reduce) as reduced:
        files = snapshot(engine, runtime, {})
    told.reduced.append(reduced.call_count)
    return files


def _compare(told: Told, expected: dict[str, Tensor], files: Files) -> None:
    found = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    told.wrong += [name for name in found.keys() & expected.keys() if not torch.equal(found[name], expected[name])]


def _published(run: Path, files: Files, runtime: Runtime) -> SharedReader:
    if runtime.is_main:
        (run / "draft").mkdir(parents=True)
    runtime.barrier()
    parts = runtime.texts(json.dumps(write_files(run / "draft", files.items())))
    if runtime.is_main:
        records = {name: record for part in parts for name, record in json.loads(part).items()}
        publish(run / "draft", step_folder(run, 1), {"step": 1, "skipped": 0, "files": records})
    runtime.barrier()
    return SharedReader.open(step_folder(run, 1), runtime)


@contextmanager
def _counted_reads(read: list[str]) -> Iterator[None]:
    def noted(path: Path, record: Any) -> NDArray[Any]:
        read.append(f"{path.parent.name}/{path.name}")
        return plain(path, record)

    plain = format.read_checked
    with patch.object(format, "read_checked", noted):
        yield


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Told]]:
    return run_distributed(exchange, 2, tmp_path_factory.mktemp("exchange"))


@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_moments_are_those_of_deepspeed_in_few_collectives(told: list[dict[int, Told]], ep_size: int) -> None:
    for rank in told:
        small, usual, _ = rank[ep_size].reduced
        assert rank[ep_size].wrong == []
        assert usual <= 4 < small < rank[ep_size].tensors, "a bucket for each writer of each group"


@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_each_file_is_read_once(told: list[dict[int, Told]], ep_size: int) -> None:
    parts, sizes = [rank[ep_size].read for rank in told], told[0][ep_size].files
    assert sorted(parts[0] + parts[1]) == sorted(sizes)
    shares = [sum(sizes[name] for name in part) for part in parts]
    assert abs(shares[0] - shares[1]) <= 2 * max(sizes.values()), "they share the reading: at most a file of each group"


@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_a_file_that_one_process_finds_damaged_ends_all(told: list[dict[int, Told]], ep_size: int) -> None:
    errors = {rank[ep_size].error for rank in told}
    assert len(errors) == 1 and "block-01-expert-003.safetensors is damaged: its checksum" in errors.pop()
