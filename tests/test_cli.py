"""The `moce` command from outside: help, errors, the dry run."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from moce_ds import __version__
from moce_ds.cli.main import moce
from moce_ds.cli.options import Verb
from moce_ds.common.config import settings as configuration
from tests.examples.moce_command import TINY, Said, refused, run_here


def test_the_two_names_of_the_command() -> None:
    script = Path(sys.executable).with_name("moce")
    told = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=300)
    assert told.stdout.startswith(f"moce_ds {__version__}\nPython 3.") and not told.stderr
    module = subprocess.run([sys.executable, "-m", "moce_ds", "--version"], capture_output=True, text=True, timeout=300)
    assert module.stdout == told.stdout


def test_help_names_every_verb() -> None:
    told = run_here("--help")
    assert told.status == 0
    assert all(re.search(rf"^ +{verb} ", told.out, re.MULTILINE) for verb in moce.commands)


@pytest.mark.parametrize("words", [[], ["bench"], ["config"], ["launch"]], ids=" ".join)
def test_no_summary_is_cut(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    told = run_here(*words, "--help")
    summaries = told.out.partition("Commands:\n")[2].splitlines()
    assert summaries and not [line for line in summaries if line.endswith("...")]
    assert not [line for line in summaries if len(line.split()) < 3], "a summary has a second line"


@pytest.mark.parametrize("verb", sorted(moce.commands))
def test_help_lists_every_setting(verb: str) -> None:
    told = run_here(verb, "--help")
    assert told.status == 0 and told.out.startswith(f"Usage: moce {verb}")
    described = moce.commands[verb]
    if isinstance(described, Verb) and described.settings:
        module, name = described.settings.split(":")
        cls = getattr(__import__(module, fromlist=[name]), name)
        assert max(map(len, told.out.splitlines())) <= 100
        unwrapped = re.sub(r"\n {41}", " ", told.out).splitlines()
        for key, field in configuration.keys(cls):
            (line,) = (line for line in unwrapped if line.startswith(f"  {key}="))
            assert line.endswith(field.metadata["help"]) and field.metadata["help"], f"{key} has no help"
        assert "[CONFIG.yaml] [key=value ...]" in " ".join(told.out.split())


def test_help_imports_no_torch() -> None:
    """Help answers at once: of every verb in one process, in which nothing else has imported anything."""
    code = """
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
import click
from moce_ds.cli.main import moce

def ask(command, words):
    for name, inner in getattr(command, "commands", {}).items():
        ask(inner, [*words, name])
    with redirect_stdout(StringIO()), suppress(SystemExit):
        moce([*words, "--help"])
    heavy = {"torch", "timm", "deepspeed", "sklearn", "transformers", "faiss", "nvidia"} & set(sys.modules)
    assert not heavy, (words, heavy)

ask(moce, [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def said_without(packages: Sequence[str], *words: object) -> Said:
    """Run `moce ...` where some packages cannot be imported."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\nfrom moce_ds.cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120)
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("verb", ["detect", "segment"])
def test_help_needs_no_extra(verb: str) -> None:
    told = said_without(["pycocotools", "transformers", "nvidia", "faiss", "datasets"], verb, "--help")
    assert told.status == 0 and "  run.out=(required) " in told.out, told


@pytest.mark.parametrize(
    ("package", "words", "told"),
    [
        ("nvidia", "select run --data images", r"needs NVIDIA DALI, .* 'moce-ds\[cpu\]', 'moce-ds\[cu13\]' or"),
        ("pycocotools", "detect e --train t --images i --val v --out o", r"pip install 'moce-ds\[dense\]'"),
        ("transformers", "segment e --train t --val v --out o", r"pip install 'moce-ds\[dense\]'"),
    ],
)
def test_a_missing_extra_is_named(package: str, words: str, told: str) -> None:
    said = said_without([package], *words.split())
    assert said.status == 1 and said.err.startswith("Error: ") and re.search(told, said.err), said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("optim.epoch=3", r"optim.epoch: no such setting. Did you mean optim.epochs\?"),
        ("optim.epochs=many", "optim.epochs: got 'many'; "),
        ("--processes 4", "--processes: it only plans, with --dry-run"),
        ("optim.epochs=0", "optim.epochs: got 0; .*greater than 0"),
        ("model.mask_ratio=1.5", "model.mask_ratio: got 1.5; .*less than 1"),
        ("model.mask_ratio=0.99", "model.mask_ratio: 0.99 leaves 0 of 16 patches visible"),
        ("data.image_size=18", "data.image_size: 18 is not a multiple of model.patch_size 4"),
        ("model.heads=3", "model.width: 32 is not a multiple of model.heads 3"),
        ("model.arch=moe", "model.arch: got 'moe'; .*'mae', 'moce', 'token_moe' or 'sdr'"),
        ("model.vit=vit_base_patch16_225", "model.vit: got 'vit_base_patch16_225'.*vit_base_patch16_224"),
        ("model.arch=moce", "experts.clusters: required for model.arch=moce"),
        ("model.arch=moce experts.clusters=c experts.num=3 experts.ep_size=2", "experts.num: 3 is not a multiple of"),
        ("model.arch=moce experts.clusters=c experts.layers=[1,4]", "experts.layers: block 4 is beyond"),
        ("model.arch=moce experts.clusters=c experts.ep_size=2", "experts.ep_size: got 2; it must divide .*, 1."),
        ("optim.accumulation=3", "optim.batch_size: 16 is not divisible by 1 processes x optim.accumulation 3"),
        ("model=mae", "model: got 'mae'; it is a group of settings"),
        ("other.yaml", "expected one YAML file at most"),
    ],
)
def test_settings_are_refused_before_anything_starts(tmp_path: Path, words: str, told: str) -> None:
    run = tmp_path / "run"
    message = refused("pretrain", TINY, "data.shards=none", f"run.out={run}", *words.split())
    assert re.search(told, message, re.DOTALL), message
    assert not run.exists()


def test_every_fault_is_listed() -> None:
    message = refused("pretrain", "optim.epoch=3", "engine.precision=fp16")
    for told in ("optim.epoch:", "engine.precision: got 'fp16'", "data.shards: required", "run.out: required"):
        assert told in message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("shards {none} {out}", "{none} is not a folder: expected one with images"),
        ("shards {empty} {out}", "No image to write"),
        ("shards {images} {full}", "{full} is neither empty nor a shard set"),
        ("pretrain {none}.yaml", "{none}.yaml not found: expected a YAML file of settings"),
        ("pretrain {tiny} data.shards={none} run.out={out}", "{none}/shards.json not found: .*`moce shards`"),
        ("pretrain {tiny} data.shards={shards} run.out={full}", "run.out: {full} is not empty and holds no run"),
        (
            "pretrain {tiny} data.shards={shards} run.out={out} model.arch=moce experts.clusters={none}",
            "{none}/clusters.json not found: .*`moce cluster`",
        ),
        ("pretrain {tiny} data.shards={shards} run.out={out} run.init_from={none}", "run.init_from: {none} not found"),
        (
            "features {none} {shards} {out}",
            "{none} not found: expected an encoder folder, the run of a dense MAE, or a .pth file",
        ),
        ("features {encoder} {none} {out}", "{none}/shards.json not found: .*`moce shards`"),
        ("features {full} {shards} {out}", "{full} holds no checkpoint"),
        ("cluster {none} {out}", "{none}/features.json not found: .*`moce features`"),
        ("select {none} --data {shards}", "{none} holds no checkpoint: expected a run folder of `moce pretrain`"),
        ("export {none} {out}", "{none} holds no checkpoint: expected a run folder"),
        ("knn {none} --train {shards} --test {shards}", "{none} not found: expected an encoder folder"),
        ("knn {encoder} --train {none} --test {shards}", "{none} not found: expected a shard set .* or a folder"),
        ("probe {none} --train {shards} --test {shards}", "{none} not found: expected an encoder folder"),
        ("probe {encoder} --train {shards} --test {none}", "{none} not found: expected a shard set"),
        (
            "finetune {none} --train {shards} --test {shards} --out {out}",
            "{none} not found: expected an encoder folder",
        ),
        ("finetune {encoder} --train {empty} --test {shards} --out {out}", "{empty}: No image to write"),
        (
            "finetune {encoder} --train {shards} --test {shards} --out {full}",
            "run.out: {full} is not empty and holds no",
        ),
        ("pretrain {tiny} data.shards={shards} run.out={file}", "run.out: {file} is a file; expected a folder"),
        (
            "finetune {encoder} --train {shards} --test {shards} --out {file}",
            "run.out: {file} is a file; expected a folder",
        ),
        ("pretrain {tiny} data.shards={shards} run.out={file}/run", "{file}/run cannot be written: .*Not a directory"),
        ("shards {images} {file}/set", "{file} is a file; expected a folder for {file}/set"),
        (
            "finetune {encoder} --train {shards} --test {shards} --out {out} optim.batch_size=100000",
            "optim.batch_size: 100000 images in a step exceed the 60 training images: expected 60 at most",
        ),
        ("report {none}", "{none} is not a run folder: expected config.yaml"),
        ("inspect {none}", "{none} not found."),
        (
            "inspect {full}",
            r"{full} was not written by moce. Artefacts contain one of these files: shard set \(shards.json\)",
        ),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, tiny_images: Path, tiny_shards: Path, tiny_encoder: Path, words: str, told: str
) -> None:
    places = {name: tmp_path / name for name in ("none", "out", "empty", "full")}
    places |= {"tiny": TINY, "images": tiny_images, "shards": tiny_shards, "encoder": tiny_encoder}
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear reader,")
    places["file"] = tmp_path / "full" / "letter.txt"
    message = refused(*(word.format(**places) for word in words.split()))
    assert re.search(told.format(**places), message, re.DOTALL), message
    assert not places["out"].exists()


@pytest.mark.parametrize("words", ["shards", "knn encoder --test x", "export run out --cluster one", "no-such-verb"])
def test_wrong_usage_says_how(words: str) -> None:
    said = run_here(*words.split())
    assert said.status == 2 and "Usage: moce" in said.err and "Error: " in said.err


def test_dry_run_prints_the_plan(tiny_shards: Path, tiny_clusters: Path, tmp_path: Path) -> None:
    words = [TINY, f"data.shards={tiny_shards}", f"run.out={tmp_path / 'run'}", "model.arch=moce"]
    words += [f"experts.clusters={tiny_clusters}", "experts.num=4", "experts.layers=[1,3]", "experts.ep_size=2"]
    said = run_here("pretrain", *words, "--dry-run", "--processes", 4)
    assert said.status == 0 and not (tmp_path / "run").exists()
    # One MLP is 2 x 32 x 128 weights and 160 biases; 3 experts more than dense in 2 layers.
    mlp = 2 * 32 * 128 + 128 + 32
    sizes = re.search(r"total ([\d.]+) K, active ([\d.]+) K", said.out)
    assert sizes and float(sizes[1]) - float(sizes[2]) == pytest.approx(6 * mlp / 1e3, abs=0.11)
    for told in (
        "16 = 4 processes x 1 parts x 4 images",
        "8 = 2 epochs of 60 images; 2 of warm-up; peak learning rate 1.25e-04",
        "16 patches, 4 visible + cls",
        "4 in each of blocks 1, 3; rank 0: 0-1, rank 1: 2-3; 2 copies of each",
        "epochs: 2.0",  # the resolved settings
    ):
        assert told in said.out
