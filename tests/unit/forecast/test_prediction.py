"""Plans: FLOPs against PyTorch's counter, bytes against the routing plan, memory against what autograd keeps.

Axes: W ranks, B images a rank, M clusters, L expert layers, E experts, K experts an image.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moce_ds.common.config.model_kinds import SDR
from moce_ds.common.config.settings import to_yaml
from moce_ds.common.errors import ConfigError
from moce_ds.forecast.devices import DEVICES, Host, assuming, find_device
from moce_ds.forecast.host_work import HostWork
from moce_ds.forecast.prediction import Prediction, advice, predict
from moce_ds.forecast.step_cost import Machines, Traffic, Work
from moce_ds.models.mae import MaskedAutoencoder
from moce_ds.models.moce import Moce, Routing
from moce_ds.models.sdr import Sdr, Teacher
from moce_ds.models.vit import Encoder, timm_vit
from moce_ds.moe.placement import default_placement
from moce_ds.moe.reference import ReferenceMoE
from moce_ds.moe.routing_plan import make_plan
from moce_ds.training.settings import PretrainSettings
from tests.examples.moce_command import refused, run_alone, run_here

CONFIGS = Path(__file__).parents[3] / "configs"
EXPERTS = ("model.arch=moce", "experts.clusters=none", "experts.num=4", "experts.layers=[0,2]")
PATHS = ("model.arch=sdr", "experts.clusters=none", "experts.num=4", "sdr.stages=1",
         "run.init_from=dense")  # fmt: skip
M, IMAGES = 8, 3

Make = Callable[..., PretrainSettings]


def step_of(config: PretrainSettings) -> Callable[[], None]:
    """Forward and backward of `IMAGES` random images through the model of a config, experts all in one process."""
    torch.manual_seed(0)
    spec = config.model_spec
    images = torch.randn(IMAGES, 3, spec.shape.image_size, spec.shape.image_size)
    noise = torch.rand(IMAGES, spec.shape.num_patches)
    if spec.experts is None:
        dense = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
        dense.checkpoint_activations = config.engine.checkpoint_activations
        return lambda: dense(images, noise).loss.backward()
    layers = len(spec.experts.layers)
    clusters = torch.randn(M, 4), torch.full((M,), 1 / M)
    kind = Sdr if spec.model_kind is SDR else Moce
    model = kind(spec.shape, spec.decoder, spec.mask_ratio, spec.experts, *clusters, ReferenceMoE)
    model.checkpoint_activations = config.engine.checkpoint_activations
    clusters_WB = np.arange(IMAGES)[None]
    expert_MLK = np.random.default_rng(0).permuted(np.tile(np.arange(4), (M, layers, 1)), axis=2)[
        :, :, : spec.experts.k
    ]
    routing = Routing(
        torch.arange(IMAGES), make_plan(clusters_WB, expert_MLK, default_placement(layers, 4), 0, 1), None
    )
    inputs = [images, noise, routing]
    if config.wants_teacher:
        inputs.append(Teacher(Encoder(timm_vit(spec.shape), spec.shape, spec.input, {})))
    return lambda: model(*inputs).reconstruction.loss.backward()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("engine.checkpoint_activations=true",),
        ("model.mask_ratio=0.5", "model.mlp_ratio=3", "model.decoder_depth=2", "data.image_size=32"),
        EXPERTS,
        (*EXPERTS, "experts.k=2"),
        (*EXPERTS, "experts.combine=prob", "experts.shared_expert=true"),
        (*EXPERTS, "engine.checkpoint_activations=true"),
        PATHS,
        (*PATHS, "sdr.distillation_weight=0"),
    ],
)
def test_flops_are_those_that_pytorch_counts(tiny_config: Make, words: tuple[str, ...]) -> None:
    config = tiny_config(*words, "model.width=64", "model.heads=4", "model.decoder_width=32")
    step = step_of(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        step()
    counted = IMAGES * Work.of(config).image_flops.step
    # An expert layer's weighted sum and its gate are products too, and left out.
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.01 if config.model_kind.has_experts else 0)


def test_parameters_of_paths_are_those_of_the_model(tiny_config: Make) -> None:
    config = tiny_config(*PATHS)
    spec, count = config.model_spec, Work.of(config).parameters
    assert spec.experts is not None
    model = Sdr(spec.shape, spec.decoder, 0.75, spec.experts, torch.randn(M, 4), torch.ones(M), ReferenceMoE)
    groups = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert (count.total, count.experts) == (sum(p.numel() for p in model.parameters()), groups)
    assert count.active == count.total - groups * 3 // 4
    assert count.encoder == sum(p.numel() for p in timm_vit(spec.dense.shape).parameters()) - spec.shape.width * 17
    without = Work.of(tiny_config(*PATHS, "sdr.distillation_weight=0")).memory(1)
    teacher = Work.of(tiny_config()).parameters.encoder
    assert Work.of(config).memory(1).state - without.state == 4 * teacher


@pytest.mark.parametrize("words", [(), ("engine.checkpoint_activations=true",), EXPERTS, (*EXPERTS, "experts.k=2")])
def test_activations_are_about_what_autograd_keeps(tiny_config: Make, words: tuple[str, ...]) -> None:
    config = tiny_config(*words, "model.width=64", "model.heads=4", f"optim.batch_size={IMAGES}")
    step = step_of(config)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        origin = tensor if tensor._base is None else tensor._base  # weights are kept transposed
        if not isinstance(origin, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    estimate = Work.of(config).memory(1).activations
    assert sum(kept.values()) < estimate < 2.5 * sum(kept.values())


def plan_of(config: PretrainSettings, nodes: int, gpus: int = 2, **assumed: float) -> Prediction:
    device = assuming(DEVICES["h100"], [f"{key}={value}" for key, value in assumed.items()])
    return predict(HostWork.of(Work.of(config), config.data, config.experts), Machines(nodes, gpus), device, steps=100)


def test_twice_the_nodes_compute_half_as_long(tiny_config: Make) -> None:
    config = tiny_config("optim.batch_size=64")
    one, two, four = (plan_of(config, nodes) for nodes in (1, 2, 4))
    assert [one.compute, 2 * two.compute] == pytest.approx([4 * four.compute] * 2)
    assert one.efficiency > two.efficiency > four.efficiency
    assert one.days == pytest.approx(one.step * 100 / 86_400)
    assert four.gpu_hours == pytest.approx(four.days * 24 * 8)
    faster = plan_of(config, 1, compute_share=0.6)
    assert faster.compute == pytest.approx(one.compute / 2) and faster.optimizer == one.optimizer


def test_what_is_hidden_is_hidden_behind_the_backward_pass_only(tiny_config: Make) -> None:
    config = tiny_config("optim.batch_size=64")
    none, half, slow = (plan_of(config, 2, overlap=o, across=a) for o, a in ((0, 5e10), (0.5, 5e10), (1, 1e3)))
    assert half.reduction < none.reduction
    assert slow.reduction > plan_of(config, 2, across=1e3).reduction - slow.compute


def test_bytes_of_the_exchange_are_those_of_the_plan(tiny_config: Make) -> None:
    """Counted from what each rank sends to each other one, with groups that cross nodes."""
    W, gpus, ep_size = 8, 2, 4
    config = tiny_config(*EXPERTS, "experts.ep_size=4", "optim.batch_size=8000")
    random = np.random.default_rng(0)
    clusters_WB = random.integers(M, size=(W, 1000))
    expert_MLK = np.stack([random.permutation(np.arange(M) % 4) for _ in range(2)], axis=1)[:, :, None]
    plans = [make_plan(clusters_WB, expert_MLK, default_placement(2, 4), rank, ep_size) for rank in range(W)]
    image = Work.of(config).visible_tokens * 16 * 4  # fp32
    inside = across = 0
    for rank, plan in enumerate(plans):
        for layer in plan.layers:
            for place, rows in enumerate(layer.send_R):
                peer = rank - rank % ep_size + place
                inside += 4 * image * rows * (peer != rank and peer // gpus == rank // gpus)
                across += 4 * image * rows * (peer // gpus != rank // gpus)
    moved = np.mean([layer.moved for plan in plans for layer in plan.layers]) / 1000
    sent = Work.of(config).exchange(Machines(4, 2), moved)
    assert W * (sent.inside + sent.across) == pytest.approx(inside + across)
    assert (sent.inside, sent.across) == pytest.approx((inside / W, across / W), rel=0.05)
    assert Work.of(config).exchange(Machines(4, 2), None).across == pytest.approx(across / W, rel=0.05)


def test_experts_inside_a_node_send_nothing_across(tiny_config: Make) -> None:
    config = tiny_config(*EXPERTS, "experts.ep_size=2", "optim.batch_size=64")
    sent = Work.of(config).exchange(Machines(4, 2), None)
    assert sent.inside > 0 and sent.across == 0 == plan_of(config, 4).exchange_across
    recomputed = tiny_config(*EXPERTS, "experts.ep_size=2", "optim.batch_size=64", "engine.checkpoint_activations=true")
    assert Work.of(recomputed).exchange(Machines(4, 2), None).inside == 1.5 * sent.inside
    halved = tiny_config(*EXPERTS, "experts.ep_size=2", "optim.batch_size=64", "optim.accumulation=2")
    split = Work.of(halved).exchange(Machines(4, 2), None)
    assert (split.inside, split.collectives) == (sent.inside, 2 * sent.collectives)
    for words in ((*EXPERTS, "experts.ep_size=1"), ()):
        assert Work.of(tiny_config(*words)).exchange(Machines(4, 2), None) == Traffic(0, 0, 0)


def test_bytes_of_the_reduction(tiny_config: Make) -> None:
    """One GPU a node: a flat all-reduce; experts without copies are not reduced at all."""
    dense = tiny_config()
    size = 4 * Work.of(dense).parameters.total
    gradients, weights = Work.of(dense).reduction(Machines(4, 1))
    assert (gradients.inside, gradients.across) == (0, pytest.approx(2 * 3 / 4 * size))
    assert (weights.inside, weights.across) == (0, pytest.approx(3 / 4 * size))
    gradients, _ = Work.of(dense).reduction(Machines(4, 8))
    assert gradients.across == pytest.approx(2 * 3 / 4 * size / 8) and gradients.inside == pytest.approx(
        2 * 7 / 8 * size
    )
    spread = tiny_config(*EXPERTS, "experts.ep_size=4")
    shared = 4 * Work.of(spread).parameters.shared
    assert Work.of(spread).reduction(Machines(1, 4))[0].inside == pytest.approx(2 * 3 / 4 * shared)
    held = 4 * Work.of(spread).parameters.experts
    assert Work.of(spread).reduction(Machines(2, 4))[0].across == pytest.approx(shared / 4 + held)
    half = Work.of(replace(dense, engine=replace(dense.engine, precision="bf16"))).reduction(Machines(4, 1))
    assert half[0].across == pytest.approx(3 / 4 * size) and half[1].across == weights.across
    assert Work.of(dense).reduction(Machines(1, 1)) == (Traffic(0, 0, 0), Traffic(0, 0, 0))


@pytest.mark.parametrize(
    ("less", "than"),
    [
        (("optim.accumulation=2",), ()),
        (("optim.batch_size=32",), ()),
        (("engine.zero_stage=2",), ()),
        (("engine.checkpoint_activations=true",), ()),
        ((), ("model.width=32",)),
        ((*EXPERTS, "experts.ep_size=4"), (*EXPERTS, "experts.ep_size=2")),
        (EXPERTS, (*EXPERTS, "experts.k=2")),
        ((), EXPERTS),
    ],
)
def test_memory_goes_where_it_should(tiny_config: Make, less: tuple[str, ...], than: tuple[str, ...]) -> None:
    small, large = (Work.of(tiny_config("optim.batch_size=64", *words)).memory(4) for words in (less, than))
    assert small.total < large.total
    assert (
        Work.of(tiny_config("optim.batch_size=64")).memory(8).state
        < Work.of(tiny_config("optim.batch_size=64")).memory(4).state
    )


def test_advice_names_what_would_fit(tiny_config: Make) -> None:
    config = tiny_config("optim.batch_size=512")
    prediction = plan_of(config, 1)
    device = assuming(DEVICES["h100"], [f"memory={0.999 * prediction.memory.total}"])
    (line,) = (text for text in advice(Work.of(config), device, [prediction]) if "do not fit" in text)
    assert "do not fit" in line and "optim.accumulation=2: " in line and "engine.checkpoint_activations=true: " in line
    assert "optim.accumulation=4" not in line  # twice suffices
    assert not any("do not fit" in text for text in advice(Work.of(config), DEVICES["h100"], [prediction]))


def test_a_device_can_be_described(tmp_path: Path) -> None:
    own = tmp_path / "lab.yaml"
    own.write_text(
        "bf16: 1.0e+14\nfp32: 1.0e+13\nmemory: 4.0e+10\nbandwidth: 1.0e+12\ninside: 3.0e+10\nacross: 1.0e+10\n"
    )
    device = find_device(str(own), ["compute_share=0.5"])
    assert device.flops("fp32") == 5e12 and device.across == 1e10 and device.overlap == 0
    assert find_device("h200") == replace(find_device("h100"), memory=141e9, bandwidth=4.8e12)
    with pytest.raises(ConfigError, match=r"compute_share: got 2; .*less than or equal to 1"):
        find_device("h100", ["compute_share=2"])
    with pytest.raises(ConfigError, match="--device: got 'h1000'; expected h100, h200, a100, this, or a YAML file"):
        find_device("h1000")


BASE = CONFIGS / "vit_base_moce.yaml"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--device v100 --images 9", "--device: got 'v100'; expected h100"),
        ("--nodes 3 --images 9", "optim.batch_size: 4096 is not divisible by 24 processes"),
        ("--gpus 4 --images 9", "experts.ep_size: got 8; it must divide the number of processes, 4"),
        ("", "data.shards: data/imagenet does not exist yet, .* --images 1281167"),
        ("--images 9 --assume speed=1", "speed: no such setting"),
        ("--images 9 --assume host.speed=1", "host.speed: no such setting"),
        ("--images 9 --assume host.decode=0", "host.decode: got 0; .*greater than 0"),
        ("--images 9 model.arch=token_moe", "model.arch: .*it cannot be planned"),
        ("--images 9 --measure", "--measure: only this machine can be measured; got --device h100"),
        ("--images 9 --device this --nodes 1,2", "--nodes: got 1,2; --device this is one machine"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: str, told: str) -> None:
    assert re.search(told, refused("plan", BASE, *words.split()))


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted({*CONFIGS.rglob("*.yaml"), *CONFIGS.glob("demo/*.yaml")})
        if "run" in yaml.safe_load(path.read_text())
    ],
    ids=lambda path: path.stem,
)
def test_shipped_configs_can_be_planned(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    said = run_here("plan", path, "--nodes", "1,2,4", "--images", 1281167, "--device", "h200", "--json", file)
    assert said.status == 0, said.err
    assert all(len(line) <= 100 for line in said.out.splitlines())
    for row in (
        "compute",
        "exchange inside nodes",
        "exchange across nodes",
        "reduction",
        "optimizer",
        "host, not hidden",
        "agreement, not hidden",
        "dealing, not hidden",
        "reading, not hidden",
        "step",
        "on the host: work",
        "on the host: agreement",
        "on the host: dealing",
        "on the host: reading",
        "fits in",
    ):
        assert re.search(rf"│ {row}.*│.*│.*│.*│", said.out), row
    record = json.loads(file.read_text())
    assert [row["machines"]["nodes"] for row in record["predictions"]] == [1, 2, 4]
    assert record["device"]["memory"] == 141e9 and record["measured_step"] is None
    for row in record["predictions"]:
        parts = ("compute", "exchange_inside", "exchange_across", "reduction", "optimizer")
        waits = sum(row["host"][term]["exposed"] for term in ("work", "agreement", "dealing", "reading"))
        assert row["step"] == pytest.approx(sum(row[part] for part in parts) + waits)
    assert run_here("plan", path, "--images", 1000, "--json", file).status == 0
    file.write_text('{"mine": 1}')
    assert f"{file} exists and is not a plan of this program" in refused("plan", path, "--images", 1000, "--json", file)


def test_this_machine_is_planned_and_measured(tiny_config: Make, tmp_path: Path) -> None:
    """Two processes, experts of both; on a busy machine the prediction is worse than docs/planning.md says."""
    config = tiny_config(
        *EXPERTS, "experts.ep_size=2", "model.width=192", "model.heads=3", "data.image_size=64", "optim.batch_size=128"
    )
    settings, file = tmp_path / "config.yaml", tmp_path / "plan.json"
    settings.write_text(to_yaml(config))
    ratios: list[float] = []
    while not (ratios and 1 / 3 < ratios[-1] < 3):
        assert len(ratios) < 3, f"predicted over measured step: {ratios}"  # a load that comes or goes spoils one try
        said = run_alone("plan", settings, "--gpus", 2, "--device", "this", "--measure", "--json", file)
        assert said.status == 0, said.err
        assert re.search(r"step predicted .* step measured .* error", said.out) and re.search(r"[+-][\d.]+%", said.out)
        record = json.loads(file.read_text())
        (prediction,) = record["predictions"]
        assert prediction["exchange_inside"] > 0 and prediction["reduction"] > 0
        host, times = record["device"]["host"], prediction["host"]
        assert host["launch"] == 0 and not record["device"]["asynchronous"], "the CPU does what it launches"
        assert all(host[name] != asdict(Host())[name] for name in ("table_entry", "plan_layer", "deal_image", "decode"))
        assert min(times[term]["exposed"] for term in ("work", "agreement", "dealing", "reading")) > 0
        ratios.append(prediction["trained"] / record["measured_step"])
