"""How much the losses of a model count. Settings give these weights, so nothing here needs torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossWeights:
    """Weights of a model's own losses beside that of reconstruction, which counts 1 (docs/method.md, "Losses").

    None: the loss is measured, and nothing learns from it.

    Attributes:
        imbalance, balance: of the gate of MoCE.
        token_balance: of TokenMoE's importance and load losses, both.
        distillation: of SDR's distance from the teacher's tokens.
    """

    imbalance: float | None = None
    balance: float | None = None
    token_balance: float | None = None
    distillation: float | None = None


NO_WEIGHTS = LossWeights()
"""Nothing but reconstruction is learnt from."""
