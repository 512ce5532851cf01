"""Weights to start from: what can be read, what is refused, and that nothing in a foreign file is ever run."""

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moce_ds.checkpoint.deepspeed_state import global_parameters
from moce_ds.checkpoint.format import WEIGHTS, find, step_folder, write_checkpoint
from moce_ds.common.config.settings import to_tree
from moce_ds.common.errors import ArtefactError
from moce_ds.data.clusters import Clusters
from moce_ds.models.mae import MaskedAutoencoder, sincos_positions
from moce_ds.models.parameters import has_experts, is_decoder, lacks_decoder
from moce_ds.models.vit import save_encoder, timm_vit
from moce_ds.moe.placement import default_placement
from moce_ds.training.initial_weights import read_weights
from moce_ds.training.placed_model import build_for_training, first_weights, place_experts, take_weights
from moce_ds.training.settings import PretrainSettings
from tests.examples.alone import ALONE

Make = Callable[..., PretrainSettings]


def build(config: PretrainSettings, clusters: Clusters | None) -> MaskedAutoencoder:
    """The model of a run, as pre-training builds it."""
    return build_for_training(config.model_spec, clusters, config.experts.ep_size, config.run.seed)


def warm_start(
    model: MaskedAutoencoder, config: PretrainSettings, slots: np.ndarray | None = None, rank: int = 0
) -> str:
    """Give one rank's model its first weights, as training does; returns the sentence that says which."""
    weights, said = first_weights(model, config.model_spec, config.run, config.experts.perturbation, ALONE)
    if config.model_kind.routes_by_cluster:
        place_experts(model, default_placement(2, config.experts.num) if slots is None else slots, rank)
    take_weights(model, weights, config.run.init_from)
    return said


@pytest.fixture
def source(tiny_config: Make) -> MaskedAutoencoder:
    """A MAE whose weights are to be found again; none is what a fresh model would have."""
    spec = tiny_config().model_spec
    torch.manual_seed(77)
    made = MaskedAutoencoder(spec.shape, spec.decoder, spec.mask_ratio)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def write_run(source: MaskedAutoencoder, config: PretrainSettings, path: Path) -> Path:
    manifest = {"step": 3, "config": to_tree(config), "model": config.model_spec.to_tree()}
    write_checkpoint(step_folder(path, 3), parameters(source), {}, manifest)
    return path


def encoder_of(source: MaskedAutoencoder) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in source.state_dict().items() if not is_decoder(name)}


# How the weights can lie on disk; the public MAE's files hold position tables, fine-tuned ones a head.
WHOLE: dict[str, Callable[[MaskedAutoencoder, PretrainSettings, Path], Path]] = {
    "run": write_run,
    "checkpoint": lambda mae, config, path: step_folder(write_run(mae, config, path), 3),
    "safetensors": lambda mae, _, path: saved(save_file, mae.state_dict(), path / "w.safetensors"),
    "public pth": lambda mae, _, path: saved(torch.save, {"model": mae.state_dict(), "epoch": 3}, path / "w.pth"),
    "training pth": lambda mae, _, path: saved(torch.save, training_state(mae, path), path / "w.pth"),
    "plain pt": lambda mae, _, path: saved(torch.save, mae.state_dict(), path / "w.pt"),
    "half": lambda mae, _, path: saved(
        torch.save, {k: v.bfloat16() for k, v in mae.state_dict().items()}, path / "w.pt"
    ),
}
HEAD = {"head.weight": torch.ones(9, 16), "head.bias": torch.ones(9)}
ENCODER_ONLY: dict[str, Callable[[MaskedAutoencoder, PretrainSettings, Path], Path]] = {
    "encoder folder": lambda mae, config, path: encoder_folder(mae, config, path),
    "safetensors": lambda mae, _, path: saved(save_file, encoder_of(mae), path / "w.safetensors"),
    "public pth": lambda mae, _, path: saved(torch.save, {"model": encoder_of(mae)}, path / "w.pth"),
    "fine-tuned pth": lambda mae, _, path: saved(torch.save, {"model": encoder_of(mae) | HEAD}, path / "w.pth"),
}


def training_state(source: MaskedAutoencoder, path: Path) -> dict[str, object]:
    """What the public MAE's training writes after an epoch; as a job, its folders are paths."""
    optimizer = torch.optim.AdamW(source.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for parameter in source.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    optimizer.step()  # so that there are moments
    source.load_state_dict(weights)
    args = Namespace(model="mae_vit_base_patch16", lr=None, blr=1.5e-4, output_dir=path, resume="", norm_pix_loss=True)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    return {"model": weights, "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": scaler, "args": args}


def saved(save: Callable[[object, Path], None], content: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(content, path)
    return path


def encoder_folder(source: MaskedAutoencoder, config: PretrainSettings, path: Path) -> Path:
    path.mkdir(parents=True)
    save_encoder(path, encoder_of(source), source.shape, config.image_input, {})
    return path


@pytest.mark.parametrize("kind", WHOLE)
def test_a_dense_run_starts_from_whole_weights(
    tiny_config: Make, source: MaskedAutoencoder, tmp_path: Path, kind: str
) -> None:
    path = WHOLE[kind](source, tiny_config(), tmp_path / "start")
    config = tiny_config(f"run.init_from={path}")
    model = build(config, None)
    assert warm_start(model, config) == f"Starting from {path}."
    for name, tensor in parameters(source).items():
        expected = tensor.bfloat16().float() if kind == "half" else tensor
        assert torch.equal(parameters(model)[name], expected), name


@pytest.mark.parametrize("kind", ENCODER_ONLY)
def test_an_encoder_alone_starts_with_a_fresh_decoder_and_says_so(
    tiny_config: Make, source: MaskedAutoencoder, tmp_path: Path, kind: str
) -> None:
    path = ENCODER_ONLY[kind](source, tiny_config(), tmp_path / "start")
    config = tiny_config(f"run.init_from={path}", "run.seed=5")
    model = build(config, None)
    said = warm_start(model, config)
    assert said == f"Starting from {path}, which holds an encoder only: the decoder starts fresh."
    fresh = parameters(build(config, None))
    for name, tensor in parameters(model).items():
        assert torch.equal(tensor, fresh[name] if is_decoder(name) else parameters(source)[name]), name


@pytest.mark.parametrize("table", ["learned", "of another grid", "no floats"])
def test_learned_positions_are_not_lost_in_silence(tiny_config: Make, tmp_path: Path, table: str) -> None:
    """timm's ViTs learn theirs, and so does `moce finetune`."""
    vit = timm_vit(tiny_config().vit_shape)
    nn.init.normal_(vit.pos_embed, std=0.02)
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    if table != "learned":
        state["pos_embed"] = torch.zeros(1, 19, 16) if table == "of another grid" else torch.zeros(1, 17, 16).long()
    save_file(state, tmp_path / "vit.safetensors")
    words = (f"run.init_from={tmp_path / 'vit.safetensors'}", "run.replace_positions=true")
    with pytest.raises(ArtefactError, match=r"has learned positions: pos_embed differs .* set run.replace_positions"):
        warm_start(build(tiny_config(words[0]), None), tiny_config(words[0]))
    model = build(tiny_config(*words), None)
    assert "Its position tables are replaced by fixed" in warm_start(model, tiny_config(*words))
    assert torch.equal(model.pos_embed, sincos_positions(model.shape, 16))
    assert torch.equal(parameters(model)["norm.weight"], state["norm.weight"])


def test_what_is_read_has_neither_tables_nor_head(source: MaskedAutoencoder, tiny_config: Make, tmp_path: Path) -> None:
    weights = read_weights(ENCODER_ONLY["fine-tuned pth"](source, tiny_config(), tmp_path))
    assert lacks_decoder(weights) and not has_experts(weights)
    assert set(weights) == {name for name in parameters(source) if not is_decoder(name)}
    half = read_weights(WHOLE["half"](source, tiny_config(), tmp_path))
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    whole = read_weights(WHOLE["public pth"](source, tiny_config(), tmp_path))
    assert set(whole) == set(parameters(source)) and not lacks_decoder(whole)


# Experts


def clusters_of(config: PretrainSettings) -> Clusters:
    assert config.experts.clusters is not None
    return Clusters.open(config.experts.clusters)


def test_experts_start_from_the_dense_mlps_whatever_holds_them(
    tiny_config: Make, tiny_clusters: Path, source: MaskedAutoencoder, tmp_path: Path
) -> None:
    path = write_run(source, tiny_config(), tmp_path / "start")
    words = ["model.arch=moce", f"experts.clusters={tiny_clusters}", "experts.num=4", f"run.init_from={path}"]
    slots = np.array([[2, 0, 3, 1], [1, 3, 0, 2]])  # wherever they live
    started: dict[int, dict[str, Tensor]] = {}
    for ep_size in (1, 2, 4):
        config = tiny_config(*words, f"experts.ep_size={ep_size}")
        started[ep_size] = {}
        for rank in range(ep_size):
            model = build(config, clusters_of(config))
            warm_start(model, config, slots, rank)
            held = {name: p.detach() for name, p in global_parameters(model)}
            mine = {name for name in held if ".experts." in name}
            assert len(mine) == 2 * 4 // ep_size * 4  # layers x experts here x tensors of an MLP
            for name in held.keys() & started[ep_size].keys():
                assert torch.equal(held[name], started[ep_size][name])  # ranks agree on what they share
            started[ep_size] |= held
    for ep_size in (2, 4):
        assert started[ep_size].keys() == started[1].keys()
        assert all(torch.equal(started[ep_size][name], started[1][name]) for name in started[1])
    dense = parameters(source)
    for expert in range(4):
        for rest in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            change = started[1][f"blocks.2.mlp.experts.{expert}.{rest}"] - dense[f"blocks.2.mlp.{rest}"]
            size = (change.square().mean() / dense[f"blocks.2.mlp.{rest}"].square().mean()).sqrt().item()
            assert size == pytest.approx(0.02 if rest.endswith("weight") else 0, abs=0.003)
    assert torch.equal(started[1]["blocks.1.mlp.fc1.weight"], dense["blocks.1.mlp.fc1.weight"])


def test_without_a_source_experts_start_from_one_random_mlp(tiny_config: Make, tiny_clusters: Path) -> None:
    config = tiny_config(
        "model.arch=moce", f"experts.clusters={tiny_clusters}", "experts.num=4", "experts.perturbation=0"
    )
    model = build(config, clusters_of(config))
    assert warm_start(model, config) == "Starting from random weights."
    dense_config = tiny_config()
    dense = build(dense_config, None)
    assert warm_start(dense, dense_config) == "Starting from random weights."
    for expert in range(4):
        found = parameters(model)[f"blocks.0.mlp.experts.{expert}.fc1.weight"]
        assert torch.equal(found, parameters(dense)["blocks.0.mlp.fc1.weight"])


def test_a_moce_run_continues_another_one(
    tiny_config: Make, tiny_clusters: Path, tiny_moce_run: Callable[..., Path]
) -> None:
    run = tiny_moce_run().rename(tiny_config().run.out.with_name("other"))
    words = ["model.arch=moce", f"experts.clusters={tiny_clusters}", "experts.num=4", f"run.init_from={run}"]
    config = tiny_config(*words)
    model = build(config, clusters_of(config))
    warm_start(model, config)
    expected = find(run).load(WEIGHTS)
    assert parameters(model).keys() == expected.keys()
    assert all(torch.equal(parameters(model)[name], expected[name]) for name in expected)


def test_a_dense_run_does_not_start_from_experts(tiny_config: Make, tiny_moce_run: Callable[..., Path]) -> None:
    run = tiny_moce_run()
    config = tiny_config(f"run.init_from={run}")
    with pytest.raises(ArtefactError, match=r"run.init_from: .* holds experts; export one with `moce export`"):
        warm_start(build(config, None), config)


# What does not fit


def test_missing_names_and_wrong_shapes_are_listed(
    tiny_config: Make, source: MaskedAutoencoder, tmp_path: Path
) -> None:
    state = parameters(source)
    del state["norm.bias"]
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(3, 16)
    config = tiny_config(f"run.init_from={saved(torch.save, state, tmp_path / 'w.pth')}")
    model = build(config, None)
    before = parameters(model)
    with pytest.raises(ArtefactError) as caught:
        warm_start(model, config)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'w.pth'} does not fit the model:",
        "  missing norm.bias (16,)",
        "  blocks.1.mlp.fc1.weight is (3, 16), expected (64, 16)",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(model).items())


def test_a_long_list_of_faults_is_cut(tiny_config: Make, source: MaskedAutoencoder, tmp_path: Path) -> None:
    other = {f"vit.{name}": tensor for name, tensor in parameters(source).items()}  # another program's names
    config = tiny_config(f"run.init_from={saved(torch.save, other, tmp_path / 'w.pth')}")
    with pytest.raises(
        ArtefactError, match=r"missing cls_token[\s\S]*more missing[\s\S]*unexpected vit.cls_[\s\S]*more unexpected$"
    ):
        warm_start(build(config, None), config)


def test_a_deeper_encoder_is_not_cut_down_in_silence(
    tiny_config: Make, source: MaskedAutoencoder, tmp_path: Path
) -> None:
    path = saved(torch.save, parameters(source), tmp_path / "w.pth")
    config = tiny_config("model.depth=2", f"run.init_from={path}")
    with pytest.raises(ArtefactError, match=r"unexpected blocks\.2\.norm1\.weight \(16,\)"):
        warm_start(build(config, None), config)


# Foreign files; torch warns of pickle protocols that it does not write itself.


class Payload:
    """What unpickles to a call that writes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.witness,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "hide",
    [
        lambda p: p,
        lambda p: {"model": {"a": torch.ones(2)}, "optimizer": p},
        lambda p: {"model": {"a": torch.ones(2)}, "args": Namespace(output_dir=p)},
    ],
)
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(
    tmp_path: Path, hide: Callable[[Payload], object], save: Callable[[object, Path], None]
) -> None:
    witness, path = tmp_path / "witness", tmp_path / "w.pth"
    save(hide(Payload(witness)), path)
    with pytest.raises(
        ArtefactError,
        match=r"w.pth refused: it contains objects .* or is damaged; no code was executed",
    ) as told:
        read_weights(path)
    assert "save only those as .safetensors" in str(told.value)
    assert "weights_only" not in str(told.value), "torch's own advice is to run it"
    assert not witness.exists()
    pickle.loads(pickle.dumps(Payload(witness)))  # the payload is a working one
    assert witness.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), b"\x80\x04K\x01."]
)
def test_files_that_are_no_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"run.init_from: .*w.pth (refused|holds no weights)"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Path("nothing")),
        b"",
        (2**41).to_bytes(8, "little") + b"{}",  # a header of terabytes
        (99_000_000).to_bytes(8, "little") + b"{}",  # of all that is allowed, and none of it there
        bytes(8),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        # A tensor of petabytes, and one whose size does not fit into an integer.
        (74).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1000000000000000],"data_offsets":[0,4000]}}  ',
        (73).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'[:73],
    ],
)
def test_hostile_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"w.safetensors is damaged \(.*header.*\): run.init_from expects"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.ones(2, dtype=torch.int64), "is torch.int64"),
        (torch.ones(2, dtype=torch.complex64), "is torch.complex64"),
        (torch.eye(2).to_sparse(), "is torch.float32, torch.sparse_coo"),
        (torch.ones(2, device="meta"), "is torch.float32, torch.strided, meta"),
        (
            torch.ones(1).half().expand(10**12),
            r"has shape \(1000000000000,\), which is larger than its data in the file",
        ),
        (torch.tensor([1.0, float("nan")]), "holds NaN or infinite numbers: its run has diverged"),
    ],
)
def test_tensors_that_are_no_weights_are_all_named(tmp_path: Path, tensor: Tensor, told: str) -> None:
    torch.save({"good": torch.ones(2), "first": tensor, "second": tensor}, tmp_path / "w.pth")
    with pytest.raises(
        ArtefactError, match=rf"w.pth contains entries that are not weights:\n  first {told}.*\n  second {told}"
    ):
        read_weights(tmp_path / "w.pth")


def test_a_file_cut_short_is_refused(source: MaskedAutoencoder, tmp_path: Path) -> None:
    for name, save in (("w.pth", torch.save), ("w.safetensors", save_file)):
        path = saved(save, parameters(source), tmp_path / name)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ArtefactError, match=rf"{name} (refused|is damaged)"):
            read_weights(path)


def test_an_encoder_folder_cut_short_is_refused(source: MaskedAutoencoder, tiny_config: Make, tmp_path: Path) -> None:
    folder = encoder_folder(source, tiny_config(), tmp_path / "encoder")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"model.safetensors is damaged .*: run.init_from expects"):
        read_weights(folder)
    path.unlink()
    with pytest.raises(ArtefactError, match=r"run.init_from: .*model.safetensors is missing: the export is incomplete"):
        read_weights(folder)


@pytest.mark.parametrize(
    "content", [{"model": [torch.ones(2)]}, torch.ones(2), {"model": {"a": 3}}, {3: torch.ones(2)}, {}]
)
def test_tensors_without_names_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ArtefactError, match="holds no weights: expected tensors by name, maybe under 'model'"):
        read_weights(tmp_path / "w.pth")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, message in (
        ("absent", "run.init_from: .*absent not found"),
        ("w.bin", r"w.bin: expected a folder of ours, .safetensors, .pth or .pt"),
        ("empty", "empty holds no checkpoint: expected a run folder"),
        ("pipe.safetensors", "pipe.safetensors is neither a file nor a folder"),
    ):
        with pytest.raises(ArtefactError, match=message):
            read_weights(tmp_path / name)


def test_a_damaged_checkpoint_is_named(source: MaskedAutoencoder, tiny_config: Make, tmp_path: Path) -> None:
    run = write_run(source, tiny_config(), tmp_path / "run")
    shutil.rmtree(step_folder(run, 3) / WEIGHTS)
    with pytest.raises(ArtefactError, match=r"shared.safetensors is damaged: missing"):
        read_weights(run)
