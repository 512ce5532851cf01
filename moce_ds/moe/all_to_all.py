"""All-to-all of whole images between the ranks of an expert-parallel group, forward and backward.

Axes: N rows to send, S rows received, ... the axes of one image (tokens and width).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _UnevenAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(result, rows.contiguous(), receive, send, group=group)
    return result


def all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Send `send[r]` consecutive rows to each rank r of the group: [N, ...] -> [S, ...].

    The gradient takes the reverse way. Without a group (all experts are local) the rows are returned unchanged.
    Collective: every rank of the group must call it, with matching counts, even without rows.
    """
    if group is None:
        return rows
    result: Tensor = _UnevenAllToAll.apply(rows, send, receive, group)
    return result
