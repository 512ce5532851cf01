"""What all ranks must agree on before a forward pass begins."""

from collections.abc import Iterator
from typing import TypeVar

from moce_ds.distributed.runtime import Runtime
from moce_ds.errors import MoceError

Batch = TypeVar("Batch")


def next_batch_checked(runtime: Runtime, stream: Iterator[Batch], digest: int, step: int) -> Batch:
    """The next batch, once all ranks have the same plan. If any rank fails, every rank raises.

    Raises:
        DataError: a rank cannot read its batch.
        MoceError: the ranks have different plans; names the step and the ranks.
    """
    with runtime.raise_on_all_ranks():
        batch = next(stream)
    largest, negative_smallest = runtime.max([float(digest), float(-digest)])
    if largest != -negative_smallest:
        digests = runtime.texts(f"{digest:012x}")
        usual = max(digests, key=digests.count)  # rank 0's if there is no majority; the same on all ranks
        others = [rank for rank, text in enumerate(digests) if text != usual]
        raise MoceError(
            f"Step {step}: the ranks disagree on where images go. Rank(s) {', '.join(map(str, others))} differ "
            f"from the rest ({', '.join(digests)}): do all processes have the same shards, clusters and code?"
        )
    return batch
