"""Runs programs on a fake GPU, in a fake group of 64 processes, and prints as JSON what was seen of them.

    python -m tests.device.scenario LIBRARY FOLDER '{"NAME": ["KEY=VALUE", ...], ...}'

LIBRARY is `cuda_guard.cpp`, compiled. Each NAME is a training run with these settings, in its own folder in FOLDER.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

WORLD_SIZE, RANK = 64, 1  # rank 0 would also write the files of a run


def main(library: str, folder: str, runs: str) -> None:
    """Run the small programs of `examples.py`, then each of `runs`."""
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # before torch is imported
    from tests.device import fake_cuda
    from tests.device.watch import FakeDevice

    device = FakeDevice()
    fake_cuda.install(device)  # before DeepSpeed is imported, which asks torch.cuda
    fake_cuda.join(WORLD_SIZE, RANK)
    from tests.device.examples import run_all
    from tests.device.fake_training import train

    found: dict[str, dict[str, Any]] = {}
    with device:
        examples = run_all(device)
        for name, words in json.loads(runs).items():
            found[name] = train(device, words, Path(folder) / name, RANK, WORLD_SIZE)
    print(json.dumps({"examples": examples, "runs": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
