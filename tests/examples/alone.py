"""The place of a process without peers, for tests that call stages in their own process."""

import torch

from moce_ds.distributed.runtime import Runtime

ALONE = Runtime.alone(torch.device("cpu"))
