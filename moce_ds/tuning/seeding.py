"""The global random generators, seeded for one item: other people's augmentations draw from them."""

import random

import numpy as np
import torch

from moce_ds.distributed.randomness import AUGMENT, hashed


def seed_item(seed: int, epoch: int, item: int, use: int = 0) -> None:
    """Seed Python's, NumPy's and torch's global generators for one item in one epoch; `use` tells draws apart.

    What is drawn then does not depend on processes, workers, or where a run was resumed.
    """
    bits = int(hashed(AUGMENT, seed, epoch, item, use)[()])
    random.seed(bits)
    np.random.seed(bits % 2**32)  # the generator that timm's mixup draws from
    torch.manual_seed(bits >> 1)
