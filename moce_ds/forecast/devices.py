"""Assumptions of plans about a device, the links between devices, and the host that feeds a device.

Peak rates come from data sheets. The achieved shares of them, the latencies, the overlap and all times of the host are
assumptions that `moce plan --assume KEY=VALUE` replaces. A YAML file with the same keys describes a device that is not
in the table. All rates are per GPU, in one direction, and in powers of ten.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from moce_ds.common.config import settings as configuration
from moce_ds.common.config.composition import Layer
from moce_ds.common.config.settings import Positive, option, settings
from moce_ds.common.config.values import expanded
from moce_ds.common.errors import ConfigError

Rate = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Achieved = Annotated[float, Field(gt=0, le=1)]
Hidden = Annotated[float, Field(ge=0, le=1)]


@settings
class Host:
    """What one process does on the host, on one core where nothing else is stated (docs/planning.md, "The host").

    The defaults up to `file` come from CPU times of `tests/examples/host_work.py`, and `hop` from messages over
    loopback. Latency, bandwidth of the storage and decoding are not measured.
    """

    launch: Seconds = option(15e-6, "seconds to launch one operator, Python and DeepSpeed included")
    table_iteration: Seconds = option(8e-6, "seconds of an iteration that balances the route table of one layer")
    table_entry: Seconds = option(0.3e-9, "the same, for each cluster and expert")
    plan_layer: Seconds = option(40e-6, "seconds to plan one expert layer")
    plan_image: Seconds = option(6e-9, "the same, for each image of the expert-parallel group")
    plan_lookup: Seconds = option(6e-9, "seconds to look up the cluster of an image; each process does so for all")
    mask: Seconds = option(7e-9, "seconds to draw the noise of one patch")
    hop: Seconds = option(47e-6, "seconds for a small message between two hosts")
    deal_image: Seconds = option(65e-9, "seconds to assign an image to a rank; each process does so for all")
    deal_cluster: Seconds = option(0.3e-6, "the same, for each cluster and expert layer")
    file: Seconds = option(48e-6, "seconds of Python to read a file and to draw its window")
    latency: Seconds = option(1e-3, "seconds until the storage answers a read")
    storage: Rate = option(1e9, "bandwidth of the storage for each GPU, bytes/s")
    decode: Rate = option(5000.0, "images that a GPU decodes per second")
    image_bytes: Rate = option(110e3, "bytes of an image, if data.shards does not exist")
    clusters: Positive = option(256, "clusters, if experts.clusters does not exist")


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
    asynchronous: bool = option(True, "whether it computes while the host works; false: a CPU, which does both")
    host: Host = dataclasses.field(default_factory=Host)

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

_USUAL = "h100"  # in place of a GPU that is not in the table

ASSUMED = "--assume"
THIS = "this"
"""The name of this machine, which is measured instead of looked up."""


def find_device(name: str, assumed: Sequence[str] = (), flag: str = "--device") -> Device:
    """A device by its name in `DEVICES` or from a YAML file; `key=value` words replace parts of it.

    Args:
        flag: the option that gave the name, for messages.

    Raises:
        ConfigError: there is no such device or file, or a key or value is invalid.
    """
    if name in DEVICES:
        return assuming(DEVICES[name], assumed)
    try:
        path = expanded(name)
    except ValueError as error:
        raise ConfigError(f"{flag}: got {name!r}; {error}.") from None
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise ConfigError(
            f"{flag}: got {name!r}; expected {', '.join(DEVICES)}, {THIS}, or a YAML file with "
            f"{', '.join(key for key, _ in configuration.keys(Device))}."
        )
    return configuration.load(Device, path, assumed, origin=ASSUMED)


def device_of_gpu(gpu: str, memory: float | None) -> tuple[str, Device]:
    """The name and the description of a GPU: the device in the table whose name is a word of the GPU's, else an H100.

    Args:
        gpu: as the driver calls it, such as "NVIDIA A100-SXM4-40GB"; "" if unknown.
        memory: bytes, which may differ from those in the table; None if unknown.
    """
    known = next((name for name in re.findall("[a-z0-9]+", gpu.lower()) if name in DEVICES), None)
    device = DEVICES[known or _USUAL]
    own = device if memory is None else dataclasses.replace(device, memory=memory)
    return known or f"{_USUAL} assumed", own


def assuming(device: Device, assumed: Sequence[str]) -> Device:
    """`device` with parts replaced by `key=value` words. Raises ConfigError."""
    layers = [Layer("the device", configuration.to_tree(device)), configuration.words_layer(assumed, ASSUMED)]
    return configuration.from_layers(Device, layers)
