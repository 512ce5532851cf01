"""What a program asks of a device: waits of the host, copies, kernels, collectives, and sums by atomics.

`FakeDevice` gives tensors on "cuda" a shape and a type but no data (torch's FakeTensorMode); tensors on the host stay
real. What is copied to the host has made-up values. Operators with tensors of both are refused by torch, as on a GPU.
"""

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import moce_ds

CUDA, HOST = "cuda", "cpu"

_PACKAGE = f"{Path(moce_ds.__file__).parent}/"

_NO_KERNEL = """
    view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias as_strided split
    split_with_sizes unbind lift_fresh _reshape_alias chunk narrow unsafe_split unsafe_chunk empty empty_like
    empty_strided new_empty new_empty_strided diagonal view_as record_stream set_ is_pinned unfold resize_
"""
"""Operators of views, and of memory without values."""

_READ_BY_HOST = "nonzero _unique2 unique_dim unique_consecutive masked_select equal"
"""Operators whose result, or its size, the host reads from the device."""

_ATOMIC_SUMS = "index_add scatter_add scatter_reduce index_reduce index_put _index_put_impl embedding_dense_backward"
"""Operators that sum rows by atomics, in the type of their first tensor."""

_INDEXING = "index index_put _index_put_impl"
"""Operators that take indices on the host, and copy them to the device each time."""


@dataclass(frozen=True)
class Wait:
    """The host waits for the device, which has `ahead` operators to run meanwhile; 0 leaves it idle afterwards."""

    why: str
    where: str
    ahead: int


@dataclass(frozen=True)
class Copy:
    """A copy of `bytes` to "cuda" or to "cpu": whether the host's memory is pinned, and where the program makes it."""

    to: str
    bytes: int
    pinned: bool
    where: str


@dataclass(frozen=True)
class Collective:
    """A collective operation, and what this process contributes to it."""

    name: str
    device: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Seen:
    """What was seen of a piece of a program.

    Attributes:
        kernels: operators on the device by name; each runs one kernel or more.
        low_sums: sums of rows by atomics in bf16 or fp16, which lose small terms.
    """

    waits: list[Wait] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    low_sums: list[str] = field(default_factory=list)


class FakeDevice(TorchDispatchMode):
    """While it is entered, "cuda" can be used.

    Attributes:
        seen: by phase, what happened since `forget`; "" outside of phases.
        beside: what threads have done on streams of their own, all together and never forgotten.
        given: operators and copies that the device has been given so far, except by such threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._phase = ""
        self._sent = torch.zeros(0)
        self.seen: dict[str, Seen] = {}
        self.beside, self._threads = Seen(), set[int]()
        self.given, self._finished = 0, 0

    def use_in_thread(self) -> None:
        """Make "cuda" usable in a thread that works beside the training, for the rest of its life."""
        if threading.current_thread() is not threading.main_thread():
            self._threads.add(threading.get_ident())
            self.__enter__()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in the block, and in no phase inside of it, is noted under this name."""
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    def forget(self) -> dict[str, Seen]:
        """Return what has been seen, and begin again."""
        seen, self.seen = self.seen, {}
        return seen

    def wait(self, why: str, given: int | None = None) -> None:
        """Note that the host waits for the first `given` operators, unless it has done so before; None: for all."""
        if self._is_beside:
            self.beside.waits.append(Wait(why, _where(), 0))
            return
        if given is None:
            given = self.given
        elif given <= self._finished:
            return
        self._finished = given
        self._here.waits.append(Wait(why, _where(), self.given - given))

    @property
    def _is_beside(self) -> bool:
        return threading.get_ident() in self._threads

    @property
    def _here(self) -> Seen:
        return self.beside if self._is_beside else self.seen.setdefault(self._phase, Seen())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator of torch."""
        if func is torch.ops.prim.device.default:  # the most frequent one
            return args[0].fake_device
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if space == "c10d":
            self._note_collective(name, func, args)
        if target != CUDA and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._on_host(name, func, args, kwargs)
        if name == "_local_scalar_dense":
            self.wait("a number is read")
            return self._made_up(args[0]).item()
        if name == "copy_" and args[0].device.type != args[1].device.type:
            return self._copied(args[1], args[0], bool(kwargs.get("non_blocking", len(args) > 2 and args[2])))
        if name == "_to_copy" and target == HOST:
            return self._to_host(args[0], kwargs.get("dtype"), kwargs.get("non_blocking", False))
        if name == "_to_copy" and args[0].device.type == HOST:
            return self._to_device(args[0], kwargs)
        if space == "aten":
            self._note_operator(name, tensors)
        with self._fake:
            result = func(*args, **kwargs)
        return tree_map_only(FakeTensor, lambda made: made if made.is_cuda else self._made_up(made), result)

    def _on_host(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Real values; the other processes send what this one sends."""
        result = func(*args, **kwargs)
        if name == "send":
            self._sent = args[0][0].clone()
        if name == "recv_":
            args[0][0].copy_(self._sent)
        return result

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> Tensor:
        """`target.copy_(source)` from one side to the other."""
        host = source if target.device.type == CUDA else target
        self._note_copy(source, target.device.type, host.is_pinned(), non_blocking)
        return target.copy_(self._made_up(source)) if host is target else target

    def _to_host(self, source: Tensor, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
        """A copy on the host; torch pins it if it does not wait for it."""
        self._note_copy(source, HOST, non_blocking, non_blocking)
        values = self._made_up(source).to(dtype or source.dtype)
        return values.pin_memory() if non_blocking else values

    def _to_device(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A copy on the device."""
        self._note_copy(source, CUDA, source.is_pinned(), kwargs.get("non_blocking", False))
        with self._fake:
            return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=kwargs["device"])

    def _made_up(self, tensor: Tensor) -> Tensor:
        """Values for the host, the same for the same shape: floats in 0.5-1, integers 0 and 1, booleans True."""
        shape, dtype = tensor.shape, tensor.dtype
        if dtype == torch.bool:
            return torch.ones(shape, dtype=dtype)
        generator = torch.Generator().manual_seed(tensor.numel())
        if dtype.is_floating_point:
            return (torch.rand(shape, generator=generator) / 2 + 0.5).to(dtype)
        return torch.randint(2, shape, generator=generator, dtype=dtype)

    def _note_copy(self, source: Tensor, to: str, pinned: bool, non_blocking: bool) -> None:
        if source.numel():
            self.given += not self._is_beside
            self._here.copies.append(Copy(to, source.numel() * source.element_size(), pinned, _where()))
            if not (pinned and non_blocking):
                self.wait(f"a copy to {to}, non_blocking={non_blocking}, pinned={pinned}")

    def _note_operator(self, name: str, tensors: list[Tensor]) -> None:
        plain = name.rstrip("_")
        if name not in _NO_KERNEL.split():
            self.given += 1
            self._here.kernels[name] = self._here.kernels.get(name, 0) + 1
        if name in _READ_BY_HOST.split():
            self.wait(f"the result of {name} is read")
        if plain in _INDEXING.split() and any(tensor.device.type == HOST and tensor.ndim for tensor in tensors):
            self.wait(f"{name} with indices on the host")
        if plain in _ATOMIC_SUMS.split() and tensors[0].dtype in (torch.bfloat16, torch.float16):
            into, added = tensors[0], tensors[-1]
            if added.numel() > into.numel():  # else each may be alone in its sum, as in a permutation
                self._here.low_sums.append(f"{name} of {list(added.shape)} to {list(into.shape)}, {_where()}")

    def _note_collective(self, name: str, func: Any, args: tuple[Any, ...]) -> None:
        """The contribution is the argument that the schema calls an input, or else all tensors."""
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        given = next((named[key] for key in ("input", "input_tensor", "input_tensors") if key in named), args)
        own = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        if own:
            size = sum(tensor.numel() * tensor.element_size() for tensor in own)
            dtype = str(own[0].dtype).removeprefix("torch.")
            self._here.collectives.append(Collective(name, own[0].device.type, dtype, size))


def _where() -> str:
    """The two innermost frames of the package, and that of DeepSpeed below them if there is one."""
    frames = [f"{frame.f_code.co_filename}:{line}" for frame, line in traceback.walk_stack(sys._getframe())][::-1]
    ours = [number for number, frame in enumerate(frames) if frame.startswith(_PACKAGE)][-2:]
    theirs = [frame for frame in frames[ours[-1] + 1 if ours else 0 :] if "/deepspeed/" in frame][-1:]
    inner = [f"deepspeed/{frame.rpartition('/deepspeed/')[2]}" for frame in theirs]
    return " > ".join([frames[number].removeprefix(_PACKAGE) for number in ours] + inner) or "autograd"
