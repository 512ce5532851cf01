"""Several tensors go to a device by one copy, and arrive as they were."""

import pytest
import torch

from moce_ds.distributed.device_copy import together_on_device

HOST = torch.device("cpu")


def test_tensors_of_different_types_share_one_buffer() -> None:
    sent = [
        torch.arange(6).reshape(3, 2).T,  # not contiguous
        torch.tensor(-7),
        torch.tensor(3).expand(1),  # a stride of 0
        torch.empty(0, 4, dtype=torch.int64),
        torch.linspace(0, 1, 3),
        torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([True, False, True]),
    ]
    arrived = together_on_device(sent, HOST)
    for before, after in zip(sent, arrived, strict=True):
        assert after.dtype == before.dtype and torch.equal(after, before)
    assert len({tensor.untyped_storage().data_ptr() for tensor in arrived}) == 1


def test_tensors_that_would_not_be_aligned_are_refused() -> None:
    with pytest.raises(RuntimeError, match="divisible by 8"):
        together_on_device([torch.zeros(3), torch.zeros(3, dtype=torch.int64)], HOST)
