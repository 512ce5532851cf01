"""Turn what DeepSpeed's own `engine.save_checkpoint` wrote into a run folder: `python -m tools.import_deepspeed -h`."""

from collections.abc import Sequence
from pathlib import Path

import click

from moce_ds.checkpoint.format import find
from moce_ds.common.config import settings as configuration
from moce_ds.common.host.program import run_command, say
from moce_ds.training.import_deepspeed_checkpoint import import_native
from moce_ds.training.settings import PretrainSettings

PATH = click.Path(path_type=Path)


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.argument("folder", metavar="DIR", type=PATH)
@click.argument("out", type=PATH)
@click.argument("words", nargs=-1, metavar="[key=value ...]")
@click.option("--config", "settings", type=PATH, required=True, help="config.yaml of the run that made the model.")
@click.option("--tag", default=None, help="Name of the checkpoint in DIR (default: the one that DIR/latest names).")
def main(folder: Path, out: Path, words: Sequence[str], settings: Path, tag: str | None) -> None:
    """Turn DIR, written by DeepSpeed's engine.save_checkpoint, into the run folder OUT.

    Only weights are taken. Nothing in the files of DIR is executed: a file with anything but tensors and plain values
    is refused. Settings that have changed since, such as experts.clusters, are given as key=value.
    """
    native = import_native(folder, out, configuration.load(PretrainSettings, settings, words), tag)
    say(
        f"{find(out).folder}: the weights of step {native.step} ({native.precision}) from {native.folder}. The "
        f"optimizer's state is left behind: start a new run from them with run.init_from={out}"
    )


if __name__ == "__main__":
    run_command(main, "python -m tools.import_deepspeed")
