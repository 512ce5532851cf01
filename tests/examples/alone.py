"""The place of a process without peers, for tests that call stages in their own process."""

import torch

from moce_ds.distributed.runtime import Runtime

ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
