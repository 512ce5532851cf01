"""Work-arounds for other people's packages: each with the reason, and when it can go."""

import importlib
import logging
import os
import sys
import warnings

import torch

if not torch.cuda.is_available():
    # DeepSpeed warns at import when it has to find out by itself that there is only a CPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The library object must stay alive as long as the operators that it defines.
_torchvision_operators: list[torch.library.Library] = []


def repair_torchvision() -> None:
    """Make `import torchvision` (which timm does) work beside a CPU build of torch.

    The torchvision wheel on the package index is built for CUDA; beside a CPU torch its compiled operators do not
    load and the import fails at the first one it looks up ("operator torchvision::nms does not exist"). Models and
    transforms do not need them, so the missing names are declared. Can go when a CPU wheel is on the index.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_operators.append(library)
        importlib.import_module("torchvision")


def quiet_deepspeed() -> None:
    """Keep DeepSpeed from compiling what training does not use, and from its chatter.

    `init_distributed` compiles a shared-memory operator (31 s, needs g++) that only inference uses. Seen in 0.19.8;
    can go when DeepSpeed builds it on first use.
    """
    import deepspeed
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    # Inside DeepSpeed, on every process, about a name that torch 2.13 renamed.
    warnings.filterwarnings("ignore", message=".*_tensor` is deprecated", category=FutureWarning)
