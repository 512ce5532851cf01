"""Settings of pre-training: impossible combinations, sizes, batch arithmetic, and what a resumed run may change."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from moce_ds.checkpoint.format import step_folder, write_checkpoint
from moce_ds.common.config.settings import differences, keys, load, to_tree, to_yaml
from moce_ds.common.errors import ConfigError
from moce_ds.models.moce import ExpertShape
from moce_ds.models.vit import ViTShape
from moce_ds.training.run_checks import RequestedRun
from moce_ds.training.schedule import batch_arithmetic
from moce_ds.training.settings import PretrainSettings, forbidden_changes, settings_of_run

Make = Callable[..., PretrainSettings]
MOCE = ("model.arch=moce", "experts.clusters=clusters")
TOKEN = ("model.arch=token_moe",)
PATHS = ["model.arch=sdr", "experts.clusters=none", "experts.num=4", "sdr.stages=1",
         "run.init_from=dense"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.mask_ratio=1.5"], "model.mask_ratio: got 1.5; expected a number less than 1"),
        (["model.mask_ratio=0"], "model.mask_ratio: got 0; expected a number greater than 0"),
        (["model.mask_ratio=0.99"], "model.mask_ratio: 0.99 leaves 0 of 16 patches visible; expected at least one"),
        (["model.width=18"], "model.width: 18 is not a multiple of 4, which sine-cosine positions need"),
        (["model.heads=3"], "model.width: 16 is not a multiple of model.heads 3"),
        (["model.decoder_heads=5"], "model.decoder_width: 16 is not a multiple of model.decoder_heads 5"),
        (["model.decoder_width=14"], "model.decoder_width: 14 is not a multiple of 4"),
        (["data.image_size=18"], "data.image_size: 18 is not a multiple of model.patch_size 4"),
        (["data.crop_scale=[0.9, 0.2]"], "data.crop_scale: [0.9, 0.2]; expected [low, high]"),
        (["data.crop_scale=[0, 1]"], "data.crop_scale.0: got 0; expected a number greater than 0"),
        (["data.std=[0, 1, 1]"], "data.std.0: got 0; expected a number greater than 0"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas.1: got 1.0; expected a number less than 1"),
        (["optim.epochs=.inf"], "optim.epochs: got '.inf'; expected a number, such as"),
        (["optim.batch_size=0"], "optim.batch_size: got 0; expected a number greater than 0"),
        (["run.seed=-1"], "run.seed: got -1; expected a number greater than or equal to 0"),
        (["engine.zero_stage=3"], "engine.zero_stage: got 3; expected 1 or 2"),
        (["model.arch=vae"], "model.arch: got 'vae'; expected 'mae', 'moce', 'token_moe' or 'sdr'"),
        (["model.arch=moce"], "experts.clusters: required for model.arch=moce; write the clusters with `moce cluster`"),
        ([*MOCE, "experts.num=6", "experts.ep_size=4"], "experts.num: 6 is not a multiple of experts.ep_size 4"),
        ([*MOCE, "experts.layers=[1, 3]"], "experts.layers: block 3 is beyond the encoder's 3 blocks (0-2)"),
        ([*MOCE, "experts.layers=[-1]"], "experts.layers.0: got -1; expected a number greater than or equal to 0"),
        ([*MOCE, "experts.layers=[2, 1]"], "experts.layers: [2, 1]; expected different blocks in rising order"),
        ([*MOCE, "experts.layers=[1, 1]"], "experts.layers: [1, 1]; expected different blocks in rising order"),
        ([*MOCE, "experts.layers=[]"], "experts.layers: []; expected different blocks"),
        ([*MOCE, "experts.num=1", "experts.k=2"], "experts.k=2 exceeds experts.num=1"),
        ([*MOCE, "experts.shared_expert=true"], "experts.shared_expert: needs experts.combine=prob and a gate"),
        ([*TOKEN, "experts.shared_expert=true", "experts.combine=prob"], "experts.shared_expert: needs"),
        ([*MOCE, "experts.k=3"], "experts.k: got 3; expected 1 or 2"),
        ([*MOCE, "experts.gate=expert"], "experts.gate: got 'expert'; expected 'cluster' or 'random'"),
        ([*PATHS, "experts.layers=[0]"], "model.arch=sdr: leave out experts.layers, experts.k"),
        ([*PATHS, "experts.k=2"], "model.arch=sdr: leave out experts.layers, experts.k"),
        ([*PATHS, "sdr.stages=4"], "sdr.stages: 4 parts of an encoder of 3 blocks"),
        ([*PATHS, "experts.num=5"], "sdr.common: 0.5 of 64 hidden units leaves 32, which do not make"),
        ([*PATHS, "run.init_from=null"], "run.init_from: required for model.arch=sdr: SDR's first phase is a dense"),
        (["sdr.stages=2"], "sdr.stages: only model.arch=sdr uses it, and model.arch is mae: leave it out, or set"),
        ([*MOCE, "sdr.common=0.25"], "sdr.common: only model.arch=sdr uses it, and model.arch is moce"),
        ([*PATHS, "token_moe.balance_weight=1"], "token_moe.balance_weight: only model.arch=token_moe uses it"),
        ([*TOKEN, "experts.gate=random"], "experts.gate: only model.arch=moce uses it, and model.arch is token_moe"),
        ([*PATHS, "experts.gate=random"], "experts.gate: only model.arch=moce uses it, and model.arch is sdr"),
        (["optim.epoch=3"], "optim.epoch: no such setting. Did you mean optim.epochs?"),
        (["mask_ratio=0.5"], "mask_ratio: no such setting. Did you mean model.mask_ratio?"),
        (["model.vit=vit_gigantic"], "model.vit: got 'vit_gigantic'; expected the name of a ViT in timm."),
        (["model.vit=resnet18"], "model.vit: resnet18 is not a plain ViT with one cls token"),
        (["model.vit=vit_small_patch14_reg4_dinov2"], "is not a plain ViT with one cls token"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_the_key_and_what_is_allowed(
    tiny_config: Make, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(*words)
    assert message in str(caught.value)


def test_settings_of_experts_do_not_trouble_a_dense_run(tiny_config: Make) -> None:
    assert tiny_config("experts.num=6", "experts.ep_size=4", "experts.layers=[9]").model_spec.experts is None


def test_a_gate_that_reads_tokens_needs_no_clusters(tiny_config: Make) -> None:
    experts = tiny_config(*TOKEN).model_spec.experts
    assert experts is not None and experts.gate == "token"


def test_the_gate_s_settings_reach_the_model(tiny_config: Make) -> None:
    words = ["gate=random", "k=2", "gate_sharing=tied", "embeddings=learnable", "combine=prob", "shared_expert=true"]
    words += ["gate_temperature=0.1", "gate_init=0.5", "num=4"]
    experts = tiny_config(*MOCE, *(f"experts.{word}" for word in words), "run.seed=7").model_spec.experts
    assert experts == ExpertShape(4, (0, 2), "random", 2, 0.1, True, True, 0.5, "prob", True, 7)


def test_required_settings_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load(PretrainSettings)
    assert str(caught.value).splitlines()[1:] == [
        "  data.shards: required, and not given.",
        "  run.out: required, and not given.",
    ]


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        ([], 5, "optim.batch_size: 12 is not divisible by 5 processes x optim.accumulation 1 = 5."),
        (["optim.accumulation=4"], 6, "optim.batch_size: 12 is not divisible by 6 processes x optim.accumulation 4"),
        ([*MOCE, "experts.ep_size=2"], 3, "experts.ep_size: got 2; it must divide the number of processes, 3."),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_shared_out(tiny_config: Make, words: list[str], world_size: int, message: str) -> None:
    config = tiny_config(*words)
    with pytest.raises(ConfigError) as caught:
        batch_arithmetic(config.optim, world_size, config.ep_size)
    assert message in str(caught.value)


def test_batch_arithmetic(tiny_config: Make) -> None:
    batches = batch_arithmetic(tiny_config("optim.accumulation=3").optim, 2)
    assert (batches.global_batch, batches.micro_global, batches.micro) == (12, 4, 2)


def test_sizes_come_from_the_name_and_are_replaced_one_by_one(tiny_config: Make) -> None:
    words = ["data.shards=s", "run.out=o"]
    named = load(PretrainSettings, None, words)
    assert named.vit_shape == ViTShape(224, 16, 768, 12, 12, 4.0)
    wider = load(
        PretrainSettings, None, [*words, "model.vit=vit_small_patch32_224", "model.width=192", "model.mlp_ratio=2"]
    )
    assert wider.vit_shape == ViTShape(224, 32, 192, 12, 6, 2.0)
    assert tiny_config().vit_shape == ViTShape(16, 4, 16, 3, 2, 4.0)


@pytest.mark.parametrize(("depth", "layers"), [(12, (9, 11)), (6, (3, 5)), (3, (0, 2)), (2, (0, 1)), (1, (0,))])
def test_experts_are_in_the_last_block_and_the_last_but_two(
    tiny_config: Make, depth: int, layers: tuple[int, ...]
) -> None:
    config = tiny_config(*MOCE, f"model.depth={depth}")
    assert config.expert_layers == layers
    assert config.model_spec.experts is not None and config.model_spec.experts.layers == layers


def test_yaml_gives_the_same_settings_back(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(*MOCE, "experts.layers=[1, 2]", "run.init_from=a/b", "optim.base_lr=1.5e-4", "data.flip=false")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(PretrainSettings, tmp_path / "config.yaml") == config
    assert differences(to_tree(config), to_tree(load(PretrainSettings, tmp_path / "config.yaml"))) == {}


def test_what_a_resumed_run_may_change() -> None:
    """All of `run` and `engine` but the seed, and how the work is shared out; nothing that changes the result."""
    every = {key for key, _ in keys(PretrainSettings)}
    allowed = every - forbidden_changes(every, PretrainSettings)
    assert allowed == {
        "experts.ep_size", "experts.loader_locality", "experts.execution", "data.threads", "data.cache",
            "data.cache_gib", "optim.accumulation",
        "engine.precision", "engine.tf32", "engine.zero_stage", "engine.checkpoint_activations", "engine.compile",
        "engine.device", "run.out", "run.init_from", "run.replace_positions",
            "run.checkpoint_every", "run.keep_checkpoints", "run.log_every", "run.picture_every",
            "run.async_checkpoint", "run.keep_every", "run.max_hours", "run.max_skipped", "run.peer_timeout",
        "run.wandb", "run.mlflow",
    }  # fmt: skip


def test_a_run_whose_paths_an_earlier_version_wrote_as_they_are_goes_on(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config("data.shards=a$$b")
    for shards, same in (("a$$b", True), ("a$b", True), ("a$c", False)):
        tree = to_tree(config)
        tree["data"]["shards"] = shards
        shutil.rmtree(config.run.out, ignore_errors=True)
        write_checkpoint(step_folder(config.run.out, 1), {}, {}, {
            "step": 1, "config": tree, "model": config.model_spec.to_tree(), "routing": None, "clusters_hash": None,
            "shards_fingerprint": "", "placement": None, "skipped": 0, "images_read": 12, "dealt_by": [],
        })  # fmt: skip
        with nullcontext() if same else pytest.raises(ConfigError, match=r"data.shards: a\$c -> a\$\$b"):
            RequestedRun(config).check_newest_checkpoint()


def test_the_settings_of_an_older_run_are_read(tiny_config: Make, tmp_path: Path) -> None:
    """It had no `flip`, which was always on, and settings of `engine` and `run` that are gone by now."""
    config = tiny_config("optim.epochs=3")
    tree = to_tree(config)
    del tree["data"]["flip"], tree["run"]["max_hours"]
    tree["engine"]["apex"], tree["run"]["visdom"] = "O1", {"port": 8097}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert settings_of_run(tmp_path / "config.yaml", PretrainSettings) == config


def test_what_an_older_run_was_and_this_version_cannot_be_is_listed(tiny_config: Make, tmp_path: Path) -> None:
    tree = to_tree(tiny_config())
    tree["optim"]["lars"] = True
    tree["data"]["fip"] = tree["data"].pop("flip")
    tree["model"]["arch"] = "vae"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        settings_of_run(tmp_path / "config.yaml", PretrainSettings)
    said = str(caught.value)
    for told in ("optim.lars: no such", "data.fip: no such setting. Did you mean data.flip?", "model.arch: got 'vae'"):
        assert told in said
    assert f"({tmp_path / 'config.yaml'})" in said and "begun by another version of moce" in said
    assert f"start another run from its weights: run.init_from={tmp_path}." in said


def test_a_setting_that_this_version_does_not_know_may_not_change() -> None:
    named = {"optim.invented_later", "run.seed"}
    assert forbidden_changes(named, PretrainSettings) == named
