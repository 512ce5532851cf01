"""The routes of a step: its route table, the plan of each micro-batch, and their statistics for the log.

Axes: L expert layers, M clusters, E experts, K experts an image is sent to, W ranks, B images of a rank, G = W B,
N images of the shard set or patches of an image.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moce_ds.checkpoint.records import RoutingTable
from moce_ds.distributed.device_copy import HostCopy, on_device, together_on_device
from moce_ds.distributed.runtime import Runtime
from moce_ds.models.moce import Moce, Routing
from moce_ds.models.settings import ExpertSettings
from moce_ds.moe.gate import FixedGate, gate_noise, live_experts, route_table
from moce_ds.moe.routing_plan import LayerPlan, Plan, make_plan
from moce_ds.training.step_agreement import Agree, without_agreement


class StepTable:
    """The route table of one step. Its probabilities are on their way to the host, which chooses the experts.

    Args:
        noise_LME: the noise of the gate that it contains, on the device; None: without noise.
        probs_LME: the probabilities, on the device.
        choose: the experts of every cluster, [M, L, K] int64, from probabilities on the host.
    """

    def __init__(self, noise_LME: Tensor | None, probs_LME: Tensor, choose: Callable[[Tensor], Tensor]) -> None:
        self.noise_LME, self.probs_LME = noise_LME, probs_LME
        self._arriving_LME, self._choose = HostCopy(probs_LME), choose

    @cached_property
    def host_probs_LME(self) -> Tensor:
        """The probabilities on the host, once they have arrived."""
        return self._arriving_LME.wait()

    @cached_property
    def expert_MLK(self) -> NDArray[np.int64]:
        """The experts of every cluster in every layer, on the host."""
        return self._choose(self.host_probs_LME).contiguous().numpy()


class PendingPlan:
    """The plan of a micro-batch, made when an expert layer first asks for it.

    Until then the host gives the device the blocks below that layer, and the route table arrives.

    Args:
        make: makes the plan on the host.
        agree: called with the digest of the plan before it is used.
    """

    def __init__(self, make: Callable[[], Plan], agree: Agree, device: torch.device) -> None:
        self._make, self._agree, self._device = make, agree, device

    @cached_property
    def _plan(self) -> Plan:
        plan = self._make()
        self._agree(plan.digest)
        return plan.to(self._device)

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The plans of all expert layers."""
        return self._plan.layers


class Router:
    """Looks up the routes of a training run.

    Args:
        model: whose gate decides.
        ids_N: cluster of every image of the shard set.
        slot_LE: where experts live (see `placement`).
        experts: settings; seed: of the gate noise.

    Attributes:
        share_M: the clusters' shares of the data, on the host.
        table: that of the step that was last begun; None before the first.
    """

    def __init__(
        self,
        model: Moce,
        ids_N: NDArray[np.int32],
        slot_LE: NDArray[np.int64],
        experts: ExpertSettings,
        seed: int,
        runtime: Runtime,
    ) -> None:
        self.model, self.ids_N, self.slot_LE, self.runtime = model, ids_N, slot_LE, runtime
        self.experts, self.seed = experts, seed
        self.shape_LME = (len(model.experts.layers), len(model.share_M), model.experts.num_experts)
        self.share_M = model.share_M.cpu()
        self.table: StepTable | None = None
        self._step: int | None = None

    @torch.no_grad()
    def prepare(self, noise_LME: Tensor | None) -> StepTable:
        """Start on a table, with noise on the device or without: on a GPU, neither it nor its copy waits."""
        return StepTable(noise_LME, self.model.gate(noise_LME), self._choose)

    @torch.no_grad()
    def _choose(self, probs_LME: Tensor) -> Tensor:
        return route_table(self.model.gate, probs_LME, self.share_M, self.model.experts.k, self.experts.balance)

    def begin(
        self,
        step: int,
        ids_G: NDArray[np.int64],
        noise_BN: Tensor,
        imbalance_share: float = 1.0,
        agree: Agree = without_agreement,
    ) -> tuple[Tensor, Routing]:
        """The routes of a micro-batch of a step, and the noise of its masks on the device; the same call on every rank.

        All that the host knows as the micro-batch begins goes to the device in one copy: clusters, masks, and in the
        first micro-batch of a step the noise of its gate, from which the device then computes the table.

        Args:
            ids_G: images, rank after rank.
            noise_BN: the noise of this rank's masks, on the host.
            agree: called with the digest of the plan, in the first expert layer.
        """
        clusters_WB = self._clusters(ids_G)
        known = [self._own(clusters_WB), noise_BN]
        begins = step != self._step
        if begins:
            known += self._noise(step)
        clusters_B, noise_BN, *noise = together_on_device(known, self.runtime.device)
        if begins:
            self.table, self._step = self.prepare(noise[0] if noise else None), step
        assert self.table is not None
        pending = self._pending(clusters_WB, self.table, agree)
        return noise_BN, Routing(clusters_B, pending, self.table.noise_LME, imbalance_share)

    def route(self, table: StepTable, ids_G: NDArray[np.int64]) -> Routing:
        """The routes of images outside of training, as of pictures; the same call on every rank."""
        clusters_WB = self._clusters(ids_G)
        clusters_B = on_device(self._own(clusters_WB), self.runtime.device)
        return Routing(clusters_B, self._pending(clusters_WB, table, without_agreement), table.noise_LME)

    def _clusters(self, ids_G: NDArray[np.int64]) -> NDArray[np.int64]:
        """Clusters of images by rank, [W, B]."""
        return self.ids_N[ids_G].astype(np.int64).reshape(self.runtime.world_size, -1)

    def _own(self, clusters_WB: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(clusters_WB[self.runtime.rank].copy())

    def _noise(self, step: int) -> list[Tensor]:
        """The noise of the gate in a step, on the host; empty where the gate has none."""
        scale = self.experts.gate_noise
        if scale == 0 or isinstance(self.model.gate, FixedGate):
            return []
        return [gate_noise(self.seed, step, self.shape_LME, scale)]

    def _pending(self, clusters_WB: NDArray[np.int64], table: StepTable, agree: Agree) -> PendingPlan:
        def plan() -> Plan:
            return make_plan(clusters_WB, table.expert_MLK, self.slot_LE, self.runtime.rank, self.experts.ep_size)

        return PendingPlan(plan, agree, self.runtime.device)

    def record(self, step: int) -> RoutingTable:
        """The noise-free table, for a checkpoint."""
        table = self.prepare(None)
        return RoutingTable(
            step,
            tuple(self.model.experts.layers),
            table.expert_MLK[:, :, 0],
            table.host_probs_LME.double().numpy(),
            self.share_M.double().numpy().round(8),
        )


def _evenness(share_E: NDArray[np.float64]) -> float:
    """Entropy of the shares, divided by that of equal ones: 1 is even, 0 is one expert for all."""
    used = share_E[share_E > 0]
    return float(-(used * np.log(used)).sum() / np.log(len(share_E))) if len(share_E) > 1 else 1.0


class RouteStatistics:
    """Statistics of the routes for the log, and the experts that no cluster chooses."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._last_MLK = router.prepare(None).expert_MLK.copy()
        self._warned: set[tuple[int, int]] = set()

    def of_step(self, ids_G: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
        """Of the last step, per expert layer: `load` (each expert's share of the micro-batch, with the step's noise),
        its least and largest share and its entropy, divided by that of equal shares; and of the table without noise
        `live` experts, mean `confidence`, and `churn`, the share of clusters whose expert changed since last asked."""
        router, E = self.router, self.router.shape_LME[2]
        assert router.table is not None
        plain = router.prepare(None)
        confidence_L = (plain.host_probs_LME.amax(dim=-1) @ router.share_M).tolist()
        live = live_experts(plain.expert_MLK)
        churn_L = (plain.expert_MLK[:, :, 0] != self._last_MLK[:, :, 0]).mean(axis=0)
        self._last_MLK = plain.expert_MLK.copy()
        chosen_GLK = router.table.expert_MLK[router.ids_N[ids_G]]
        found = {}
        for layer, block in enumerate(router.model.experts.layers):
            load_E = np.bincount(chosen_GLK[:, layer].ravel(), minlength=E) / chosen_GLK[:, layer].size
            found[str(block)] = {
                "load": load_E.round(5).tolist(),
                "load_min": round(float(load_E.min()), 5),
                "load_max": round(float(load_E.max()), 5),
                "load_entropy": round(_evenness(load_E), 5),
                "live": len(live[layer]),
                "confidence": round(confidence_L[layer], 5),
                "churn": round(float(churn_L[layer]), 5),
            }
        return found

    def newly_dead(self) -> list[tuple[int, int]]:
        """(block, expert) of experts that no cluster chooses in the last requested table, each reported once."""
        layers, E = self.router.model.experts.layers, self.router.shape_LME[2]
        live = live_experts(self._last_MLK)
        dead = {(layers[layer], e) for layer, chosen in enumerate(live) for e in range(E) if e not in chosen}
        new = dead - self._warned
        self._warned |= new
        return sorted(new)
