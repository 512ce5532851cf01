"""Assumptions of plans about a device and the links between devices.

Peak rates come from data sheets. The achieved shares of them, the latencies and the overlap are assumptions that `moce
plan --assume KEY=VALUE` replaces. A YAML file with the same keys describes a device that is not in the table. All rates
are per GPU, in one direction, and in powers of ten.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from moce_ds.common.config import settings as configuration
from moce_ds.common.config.composition import Layer
from moce_ds.common.config.settings import option, settings
from moce_ds.common.config.values import expanded
from moce_ds.common.errors import ConfigError

Rate = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Achieved = Annotated[float, Field(gt=0, le=1)]
Hidden = Annotated[float, Field(ge=0, le=1)]


@settings
class Device:
    """One GPU (or process) of a cluster, and its links."""

    bf16: Rate = option(help="dense bf16 matrix products, FLOP/s")
    fp32: Rate = option(help="fp32 matrix products, FLOP/s")
    compute_share: Achieved = option(0.3, "achieved share of that peak in transformer blocks")
    memory: Rate = option(help="memory capacity, bytes")
    bandwidth: Rate = option(help="memory bandwidth, bytes/s")
    bandwidth_share: Achieved = option(0.8, "achieved share of that bandwidth in element-wise operations")
    inside: Rate = option(help="bandwidth to the other GPUs of the node, bytes/s")
    across: Rate = option(help="bandwidth to other nodes, bytes/s")
    exchange_share: Achieved = option(0.6, "achieved share of the link bandwidth in all-to-all exchanges")
    reduce_share: Achieved = option(0.8, "achieved share of the link bandwidth in reductions")
    inside_latency: Seconds = option(20e-6, "seconds to start a collective within a node")
    across_latency: Seconds = option(40e-6, "seconds to start a collective across nodes")
    # With ZeRO 1 and 2, DeepSpeed reduces the gradients after or in line with the backward pass unless overlap_comm is
    # set (seen in 0.19.8). training/engine.py does not set it.
    overlap: Hidden = option(0.0, "share of the gradient reduction that overlaps the backward pass")

    def flops(self, precision: str) -> float:
        """FLOP/s that blocks achieve with `engine.precision`."""
        return self.compute_share * (self.bf16 if precision == "bf16" else self.fp32)


# PyTorch uses full fp32 for fp32 products by default, so TF32 does not count.
_H100 = Device(
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS bf16 with sparsity, half of it dense; 67 fp32; 80 GB at 3.35 TB/s;
    # NVLink 900 GB/s in both directions together.
    bf16=989e12,
    fp32=67e12,
    memory=80e9,
    bandwidth=3.35e12,
    inside=450e9,
    # NVIDIA DGX H100 data sheet: one port of 400 Gb/s a GPU.
    across=50e9,
)

DEVICES: dict[str, Device] = {
    "h100": _H100,
    # NVIDIA H200 data sheet, SXM: an H100 with 141 GB at 4.8 TB/s.
    "h200": dataclasses.replace(_H100, memory=141e9, bandwidth=4.8e12),
    # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOPS bf16 dense, 19.5 fp32, 2,039 GB/s, NVLink 600 GB/s in both
    # directions together; DGX A100 data sheet: one port of 200 Gb/s a GPU.
    "a100": Device(bf16=312e12, fp32=19.5e12, memory=80e9, bandwidth=2.039e12, inside=300e9, across=25e9),
}

ASSUMED = "--assume"
THIS = "this"
"""The name of this machine, which is measured instead of looked up."""


def find_device(name: str, assumed: Sequence[str] = ()) -> Device:
    """A device by its name in `DEVICES` or from a YAML file; `key=value` words replace parts of it.

    Raises:
        ConfigError: there is no such device or file, or a key or value is invalid.
    """
    if name in DEVICES:
        return assuming(DEVICES[name], assumed)
    try:
        path = expanded(name)
    except ValueError as error:
        raise ConfigError(f"--device: got {name!r}; {error}.") from None
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise ConfigError(
            f"--device: got {name!r}; expected {', '.join(DEVICES)}, {THIS}, or a YAML file with "
            f"{', '.join(field.name for field in dataclasses.fields(Device))}."
        )
    return configuration.load(Device, path, assumed, origin=ASSUMED)


def assuming(device: Device, assumed: Sequence[str]) -> Device:
    """`device` with parts replaced by `key=value` words. Raises ConfigError."""
    layers = [Layer("the device", configuration.to_tree(device)), configuration.words_layer(assumed, ASSUMED)]
    return configuration.from_layers(Device, layers)
