"""What all ranks agree on in every step: that they can compute it, and the figures of the step before.

Each rank alone knows whether it can read its images, how it routes them, its part of the losses, and whether it is
asked to stop. One small exchange on the host carries all of it:

    step n, ordinary   begin - forward pass on the device - reach: figures of step n - 1 - backward, update - submit
    step n, recorded   the same - reach again, at once: figures of step n - record, validate, save

A model that is routed by cluster reaches the agreement in its first expert layer, a dense one after its forward pass.
By then the device has work, and the figures of the step before have arrived or are next to arrive. TokenMoE reaches it
before its forward pass, whose collectives it does not announce. Where `reach` follows `submit` at once, the host waits
for the device to finish the step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moce_ds.common.errors import MoceError
from moce_ds.distributed.device_copy import HostCopy
from moce_ds.distributed.runtime import Runtime, fault_of

Agree = Callable[[int], None]
"""Agrees with the other ranks that a step is the same on all of them and can be computed; takes a digest (0: nothing is
to be compared). A collective; further calls in the same step do nothing. Raises MoceError on every rank."""


def without_agreement(digest: int) -> None:
    """For what all ranks compute outside of a step, as pictures."""


class StepTotals:
    """This process's part of the figures of one step; the losses are still on their way from the device.

    Args:
        step: counted from 1.
        parts: the named losses of each micro-batch, 0-d on the device; their means over micro-batches and processes are
            the figures of the step.
        shares: micro-batches of all processes.
        further: figures that the host knows already; they are summed.
        applied: whether the step updated the weights, the same on all processes; as a tensor if only the device knows.
        norm: of the step's gradient, likewise.
    """

    def __init__(
        self,
        step: int,
        parts: list[dict[str, Tensor]],
        shares: int,
        further: Mapping[str, float],
        applied: Tensor | bool,
        norm: Tensor | float,
    ) -> None:
        self.step = step
        self.losses = list(parts[0])
        self._shares, self._further = shares, further
        sums = torch.stack([torch.stack(list(losses.values())) for losses in parts]).double().sum(dim=0)
        update = [torch.as_tensor(figure, dtype=sums.dtype, device=sums.device)[None] for figure in (applied, norm)]
        self._arriving = HostCopy(torch.cat([sums, *update]))

    @property
    def applied(self) -> bool:
        """Whether the step updated the weights; known once the figures are read."""
        return self._arriving.wait()[-2].item() != 0

    @property
    def norm(self) -> float:
        """The norm of the gradient before clipping; it arrives with the figures."""
        return self._arriving.wait()[-1].item()

    def read(self) -> dict[str, float]:
        """The figures by name, once the device has computed them."""
        totals = self._arriving.wait()[: len(self.losses)].tolist()
        means = {name: total / self._shares for name, total in zip(self.losses, totals, strict=True)}
        return means | dict(self._further)


@dataclass(frozen=True)
class Agreed:
    """The result of an agreement, the same on all ranks.

    Attributes:
        step: the step, counted from 1, that it took place in.
        totals: of the latest step whose figures were submitted, if no earlier agreement read them.
        sums: its figures by name, summed over processes.
        flags: for each flag the number of processes that have raised it.
    """

    step: int
    totals: StepTotals | None
    sums: dict[str, float]
    flags: dict[str, int]


class StepAgreement:
    """Collects what this rank has to say, and exchanges it once per step.

    Args:
        flags: this process's flags by name, asked at each exchange; the same names on all processes.
    """

    def __init__(self, runtime: Runtime, flags: Callable[[], dict[str, bool]]) -> None:
        self._runtime, self._flags = runtime, flags
        self._step, self._open = 0, False
        self._fault: MoceError | None = None
        self._totals: StepTotals | None = None

    def begin(self, step: int) -> None:
        """Begin a step, counted from 1; the next `reach` belongs to it."""
        self._step, self._open = step, True

    def fail(self, error: MoceError | OSError | MemoryError | RuntimeError) -> None:
        """Note that this rank cannot compute the step, for the next exchange. Raises `error` itself if it is a bug."""
        fault = fault_of(error)
        if fault is None:
            raise error
        self._fault = self._fault or fault

    @property
    def failed(self) -> bool:
        """Whether this rank has noted a fault, which the next exchange raises."""
        return self._fault is not None

    def submit(self, totals: StepTotals) -> None:
        """Add the figures of the step whose work the device has been given.

        They allow another `reach`, which reads them, at once or in the next step."""
        self._totals, self._open = totals, True

    def reach(self, digest: int = 0) -> Agreed | None:
        """Exchange with all ranks; a collective. Does nothing if this step has done so and nothing was submitted since.

        Args:
            digest: of what the ranks must have in common, below 2^53; 0: nothing is to be compared.

        Raises:
            MoceError: on every rank, if one of them failed, or if the digests differ; names the step and the ranks.
        """
        if not self._open:
            return None
        totals, self._totals, self._open = self._totals, None, False
        own = totals.read() if totals else {}
        flags = self._flags()
        summed = [*own.values(), *map(float, flags.values())]
        status = self._fault.status if self._fault else 0
        sums, (worst, largest, negative_smallest) = self._runtime.sum_and_max(summed, [status, digest, -digest])
        if worst:
            self._runtime.raise_fault(self._fault, int(worst))
        if largest != -negative_smallest:
            raise self._disagreement(digest)
        counts = dict(zip(flags, map(round, sums[len(own) :]), strict=True))
        return Agreed(self._step, totals, dict(zip(own, sums, strict=False)), counts)

    def _disagreement(self, digest: int) -> MoceError:
        digests = self._runtime.texts(f"{digest:012x}")
        usual = max(digests, key=digests.count)  # rank 0's if there is no majority; the same on all ranks
        others = [rank for rank, text in enumerate(digests) if text != usual]
        return MoceError(
            f"Step {self._step}: the ranks disagree on where images go. Rank(s) {', '.join(map(str, others))} differ "
            f"from the rest ({', '.join(digests)}): do all processes have the same shards, clusters and code?"
        )
