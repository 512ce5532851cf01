"""What plans assume of a device and of the links between devices.

Peaks are of data sheets. The shares of them that are achieved, the latencies and the overlap are assumptions, which
`moce plan --assume KEY=VALUE` replaces; a device that is not in the table can be described by a YAML file of the same
keys. All rates are a GPU's own, in one direction, and in powers of ten.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from moce_ds.config import settings as configuration
from moce_ds.config.composition import Layer
from moce_ds.config.settings import option, settings
from moce_ds.config.values import expanded
from moce_ds.errors import ConfigError

Rate = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Achieved = Annotated[float, Field(gt=0, le=1)]
Hidden = Annotated[float, Field(ge=0, le=1)]


@settings
class Device:
    """One GPU (or process) of a cluster, and its links."""

    bf16: Rate = option(help="dense bf16 products, FLOP/s")
    fp32: Rate = option(help="fp32 products, FLOP/s")
    compute_share: Achieved = option(0.3, "share of that peak that whole transformer blocks achieve")
    memory: Rate = option(help="bytes of memory")
    bandwidth: Rate = option(help="bytes/s read and written of that memory")
    bandwidth_share: Achieved = option(0.8, "share of that bandwidth that element-wise work achieves")
    inside: Rate = option(help="bytes/s to the other GPUs of its node")
    across: Rate = option(help="bytes/s to other nodes")
    exchange_share: Achieved = option(0.6, "share of the links' rate that the exchange of images achieves")
    reduce_share: Achieved = option(0.8, "share of the links' rate that reductions achieve")
    inside_latency: Seconds = option(20e-6, "seconds to start a collective inside a node")
    across_latency: Seconds = option(40e-6, "seconds to start one that crosses nodes")
    # DeepSpeed reduces the gradients of ZeRO 1 and 2 after or in line with the backward pass unless its overlap_comm
    # is set (seen in 0.19.8), which training/engine.py does not do.
    overlap: Hidden = option(0.0, "share of the gradients' reduction that hides behind the backward pass")

    def flops(self, precision: str) -> float:
        """FLOP/s that blocks achieve with `engine.precision`."""
        return self.compute_share * (self.bf16 if precision == "bf16" else self.fp32)


# PyTorch computes fp32 products in full fp32 unless told otherwise, so TF32 counts nowhere.
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
"""The name of the machine at hand, which is measured rather than looked up."""


def find_device(name: str, assumed: Sequence[str] = ()) -> Device:
    """A device by its name in `DEVICES`, or of a YAML file, with `key=value` words replacing parts of it.

    Raises:
        ConfigError: there is no such device or file, or a key or value is not allowed.
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
    """`device` with parts of it replaced by `key=value` words. Raises ConfigError."""
    layers = [Layer("the device", configuration.to_tree(device)), configuration.words_layer(assumed, ASSUMED)]
    return configuration.from_layers(Device, layers)
