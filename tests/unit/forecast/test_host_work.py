"""The host in a plan: each term grows as its formula says, is hidden by what docs/planning.md names, or is added.

Axes: L expert layers, M clusters, E experts, W ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moce_ds.data.shards import ShardSet
from moce_ds.forecast.devices import Device, Host, assuming, find_device
from moce_ds.forecast.host_work import HostTimes, HostWork, block_operators, host_warnings, rounds
from moce_ds.forecast.prediction import advice, predict
from moce_ds.forecast.step_cost import Machines, Work, block_flops
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.training.settings import PretrainSettings
from tests.examples.host_work import Operators

EXPERTS = ("model.arch=moce", "experts.clusters=none", "experts.num=4", "experts.layers=[1,2]")
SPREAD = (*EXPERTS, "experts.ep_size=2", "optim.batch_size=64")

Make = Callable[..., PretrainSettings]

NOTHING = dict.fromkeys(
    ("launch", "table_iteration", "table_entry", "plan_layer", "plan_image", "plan_lookup", "mask", "hop", "deal_image",
     "deal_cluster", "file", "latency"), 0.0,
)  # fmt: skip


def host_work_of(config: PretrainSettings) -> HostWork:
    return HostWork.of(Work.of(config), config.data, config.experts)


def host_of(**seconds: float) -> Host:
    """A host that takes time only for what is named."""
    return Host(**{**NOTHING, "storage": 1e30, "decode": 1e30, **seconds})  # type: ignore[arg-type]


def times(host_work: HostWork, device: Device, busy: float = 1.0, world_size: int = 4) -> HostTimes:
    return host_work.times(Machines(1, world_size), device, busy)


def device_of(host: Host, **changes: Any) -> Device:
    return replace(find_device("h100"), host=host, **changes)


def test_the_route_table_grows_with_layers_clusters_and_experts(tiny_config: Make) -> None:
    def seconds(host: Host, clusters: int, *words: str) -> float:
        return replace(host_work_of(tiny_config(*EXPERTS, *words)), clusters=clusters).table(host)

    entries, iterations = host_of(table_entry=1e-9), host_of(table_iteration=1e-6)
    assert seconds(entries, 100) == pytest.approx(2 * 200 * 100 * 4 * 1e-9)
    assert seconds(entries, 200, "experts.num=8") == pytest.approx(4 * seconds(entries, 100))
    assert seconds(entries, 100, "experts.layers=[1]") == pytest.approx(seconds(entries, 100) / 2)
    assert seconds(iterations, 100) == seconds(iterations, 999) == pytest.approx(2 * 200 * 1e-6)
    assert seconds(entries, 100, "experts.balance=loss") == 0
    sdr = ("model.arch=sdr", "experts.clusters=none", "experts.num=4", "sdr.stages=1", "run.init_from=dense")
    paths = host_work_of(tiny_config(*sdr))
    assert paths.table(entries) == host_work_of(tiny_config()).table(entries) == 0


def test_plans_grow_with_layers_the_group_and_all_ranks(tiny_config: Make) -> None:
    spread, alone = (host_work_of(tiny_config(*EXPERTS, f"experts.ep_size={n}", "experts.k=2")) for n in (2, 1))
    assert spread.plan(host_of(plan_layer=1e-6), 8, 16) == pytest.approx(2e-6)
    assert spread.plan(host_of(plan_image=1e-9), 8, 16) == pytest.approx(2 * 2 * 16 * 2 * 1e-9)
    assert alone.plan(host_of(plan_image=1e-9), 8, 16) == pytest.approx(2 * 1 * 16 * 2 * 1e-9)
    assert spread.plan(host_of(plan_lookup=1e-9), 8, 16) == pytest.approx(8 * 16 * 1e-9)
    assert host_work_of(tiny_config()).plan(Host(), 8, 16) == 0


def test_dealing_grows_with_the_batch_and_the_clusters(tiny_config: Make) -> None:
    host_work = replace(host_work_of(tiny_config(*SPREAD)), clusters=10)
    assert host_work.dealing(host_of(deal_image=1e-9)) == pytest.approx(64e-9)
    assert host_work.dealing(host_of(deal_cluster=1e-9)) == pytest.approx(10 * 2 * 1e-9)
    twice = host_work_of(tiny_config(*SPREAD, "optim.accumulation=2"))
    assert replace(twice, clusters=10).dealing(host_of(deal_cluster=1e-9)) == pytest.approx(2 * 10 * 2 * 1e-9)
    for words in ((*SPREAD, "experts.loader_locality=false"), (*EXPERTS, "experts.ep_size=1"), ()):
        assert host_work_of(tiny_config(*words)).dealing(Host()) == 0


def test_rounds_of_the_agreement() -> None:
    """As `test_host_reduce.py` counts messages: a rank above the largest power of two sends first and receives last."""
    assert [rounds(W) for W in (1, 2, 3, 4, 6, 8, 512)] == [0, 1, 3, 2, 4, 3, 9]


def test_reading_is_as_slow_as_its_slowest_stage(tiny_config: Make, tiny_shards: Path) -> None:
    host_work = host_work_of(tiny_config())
    size = float(ShardSet.open(tiny_shards).samples["size"].mean())
    assert host_work.image_bytes == size
    host = host_of(file=1e-3, latency=0.032, storage=size / 3e-3, decode=250)
    found = times(host_work, device_of(host)).reading
    assert host_work.reading(host, 3) == {
        "files": pytest.approx(3e-3),
        "latency of the storage": pytest.approx(3 * 2e-3),
        "bandwidth of the storage": pytest.approx(3 * 3e-3),
        "decoding": pytest.approx(3 * 4e-3),
    }
    assert found.seconds == pytest.approx(3 * 4e-3), "12 images of 4 processes"
    assert replace(host_work, image_bytes=None).reading(host_of(image_bytes=7.0, storage=1.0), 1)[
        "bandwidth of the storage"
    ] == pytest.approx(7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_a_block_launches_the_operators_that_are_counted(tiny_config: Make, precision: str, recompute: str) -> None:
    counted, predicted = [], []
    for depth in (2, 4):
        words = (f"model.depth={depth}", f"engine.precision={precision}", f"engine.checkpoint_activations={recompute}")
        config = tiny_config(*words)
        spec = config.model_spec
        model = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
        model.checkpoint_activations = recompute == "true"
        images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, spec.shape.num_patches)
        with Operators() as operators:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = model(images, noise).loss
            loss.backward()
        counted.append(operators.names.total())
        predicted.append(host_work_of(config).launches)
    of_deepspeed = 12 + 36  # a hook on each parameter of a block, and the update
    assert predicted[1] - predicted[0] == counted[1] - counted[0] + 2 * of_deepspeed
    if recompute == "false":
        assert counted[1] - counted[0] == 2 * block_operators(precision)


def test_launches_grow_with_parts_and_experts(tiny_config: Make) -> None:
    once, twice = (host_work_of(tiny_config(f"optim.accumulation={n}")).launches for n in (1, 2))
    assert once < twice < 2 * once, "the update is launched once"
    four, eight = (host_work_of(tiny_config(*EXPERTS, f"experts.num={n}")).launches for n in (4, 8))
    spread = host_work_of(tiny_config(*EXPERTS, "experts.num=8", "experts.ep_size=2")).launches
    assert once < four == spread < eight


def test_the_blocks_below_hide_the_table_and_the_agreement(tiny_config: Make) -> None:
    """Seconds that the device computes below the first expert layer are subtracted, the rest is added."""
    host_work = host_work_of(tiny_config(*EXPERTS, "optim.batch_size=64"))
    shape = host_work.work.spec.shape
    below = host_work.flops_below
    assert below == host_work.work.image_flops.patches + block_flops(host_work.work.visible_tokens, 16, 4.0)
    assert shape.depth == 3, "one block below, two with experts"
    device = device_of(host_of(hop=1e-3))
    hidden = 16 * below / device.flops("fp32")
    found = times(host_work, device)
    assert found.agreement.seconds == 2e-3
    assert found.agreement.exposed == pytest.approx(2e-3 - hidden)
    slow = replace(device, fp32=device.fp32 * hidden / 2.5e-3)
    assert times(host_work, slow).agreement.exposed == 0
    with_table = replace(slow, host=host_of(hop=1e-3, plan_layer=1e-3))
    found = times(host_work, with_table)
    assert (found.work.exposed, found.agreement.exposed) == (0, pytest.approx(1.5e-3)), "the plan comes first"
    dense = host_work_of(tiny_config())
    flops = dense.work.image_flops
    assert dense.flops_below == flops.patches + flops.encoder + flops.decoder


def test_the_whole_step_hides_launches(tiny_config: Make) -> None:
    host_work = host_work_of(tiny_config())
    device = device_of(host_of(launch=1e-5))
    launching = host_work.launches * 1e-5
    assert times(host_work, device, busy=launching).work.exposed == 0
    found = times(host_work, device, busy=launching / 4)
    assert found.work.exposed == pytest.approx(launching * 3 / 4) and found.agreement.exposed == 0


def test_the_whole_step_hides_dealing_and_reading(tiny_config: Make) -> None:
    host_work = host_work_of(tiny_config(*SPREAD))
    device = device_of(host_of(deal_image=1 / 64, decode=16 / 3))  # one second, and three
    assert times(host_work, device, busy=3.5).exposed == 0
    found = times(host_work, device, busy=2)
    assert (found.dealing.exposed, found.reading.exposed) == (0, pytest.approx(1))
    found = times(host_work, device, busy=0.5)
    assert (found.dealing.exposed, found.reading.exposed) == (pytest.approx(0.5), pytest.approx(2))


def test_a_cpu_hides_nothing(tiny_config: Make) -> None:
    host_work = host_work_of(tiny_config(*SPREAD))
    found = times(host_work, device_of(Host(), asynchronous=False), busy=1e6)
    terms = (found.work, found.agreement, found.dealing, found.reading)
    assert all(term.exposed == term.seconds > 0 for term in terms)
    assert found.exposed == pytest.approx(sum(term.seconds for term in terms))


def test_the_step_is_longer_by_what_is_exposed_and_the_plan_says_why(tiny_config: Make) -> None:
    host_work = host_work_of(tiny_config(*SPREAD))

    def warnings(**seconds: float) -> list[str]:
        device = device_of(host_of(**seconds))
        prediction = predict(host_work, Machines(1, 4), device, steps=100)
        assert prediction.step == pytest.approx(prediction.busy + prediction.host.exposed)
        assert prediction.trained == prediction.busy + prediction.host.work.exposed
        assert prediction.images_per_second == pytest.approx(64 / prediction.step)
        lines = advice(host_work.work, device, [prediction])
        assert all(len(line) <= 100 for text in lines for line in text.splitlines())
        told = [" ".join(text.split()) for text in lines]
        assert told == [f"WARNING: --nodes 1: {text}." for text in host_warnings(prediction.host, prediction.step)]
        return told

    assert warnings() == []
    for seconds, told in (
        ({"launch": 1e-2}, "for the host (launches"),
        ({"table_entry": 1e-3}, "for the host (route table"),
        ({"hop": 1.0}, "2,000.0 ms for the agreement of all ranks: put experts into later blocks"),
        ({"deal_image": 1.0}, "experts.loader_locality=false"),
        ({"latency": 16.0}, "for images: latency of the storage takes 16,000.0 ms"),
        ({"decode": 1.0}, "images: decoding takes 16,000.0 ms"),
    ):
        (line,) = warnings(**seconds)
        assert told in line


def test_assumptions_about_the_host_can_be_replaced(tmp_path: Path) -> None:
    device = assuming(find_device("h100"), ["host.hop=1e-4", "host.clusters=9"])
    assert device == replace(find_device("h100"), host=Host(hop=1e-4, clusters=9))
    own = tmp_path / "lab.yaml"
    own.write_text(
        "bf16: 1.0e+14\nfp32: 1.0e+13\nmemory: 4.0e+10\nbandwidth: 1.0e+12\ninside: 3.0e+10\nacross: 1.0e+10\n"
        "host:\n  storage: 5.0e+8\n"
    )
    assert find_device(str(own), ["host.latency=0"]).host == Host(storage=5e8, latency=0)
