"""Routes for measurements: images spread evenly over experts, or as unevenly as by the gate of the demo."""

import numpy as np
from numpy.typing import NDArray

# Lorenz curve of a real run: share of the images in the least used quarter, half, ... of the experts (block 5 of the
# demo after 356 steps: loads 0, 0.19, 0.29, 0.53).
_SHARE_OF_EXPERTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SHARE_OF_IMAGES = (0.0, 0.0, 0.189, 0.475, 1.0)


def expert_loads(routing: str, num_experts: int) -> NDArray[np.float64]:
    """Share of the images of each expert, [E], for `uniform` or `skewed` routing."""
    if routing == "uniform":
        return np.full(num_experts, 1 / num_experts)
    edges = np.interp(np.linspace(0, 1, num_experts + 1), _SHARE_OF_EXPERTS, _SHARE_OF_IMAGES)
    loads = np.diff(edges)
    # The load of an expert does not depend on its rank.
    return loads[np.random.default_rng(0).permutation(num_experts)]


def draw_experts(routing: str, num_experts: int, images: int, seed: int) -> NDArray[np.int64]:
    """The expert of each image, [images]; with one cluster per expert, this is also its cluster."""
    return np.random.default_rng(seed).choice(num_experts, size=images, p=expert_loads(routing, num_experts))
