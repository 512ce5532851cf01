"""Write a miniature set in COCO's and ADE20K's format: `python -m tools.miniature_coco -h`."""

from pathlib import Path

import click

from moce_ds.cli.options import PATH
from moce_ds.common.host.program import run_command, say
from moce_ds.data.sources.miniature import Material, write_miniature


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.argument("out", type=PATH)
@click.option("--photographs", type=PATH, help="Folder where the two Debian packages are unpacked.")
@click.option("--side", default=128, show_default=True, type=click.IntRange(16), help="Side of a picture, pixels.")
@click.option("--train", default=1000, show_default=True, type=click.IntRange(1), help="Pictures to train on.")
@click.option("--val", default=200, show_default=True, type=click.IntRange(1), help="Pictures to validate on.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Random seed.")
def main(out: Path, photographs: Path | None, side: int, train: int, val: int, seed: int) -> None:
    """Write OUT/train and OUT/val, each with images/, instances.json (COCO) and annotations/ (ADE20K)."""
    material = Material.from_debian(photographs) if photographs else Material.from_packages()
    write_miniature(out, material, side, train, val, seed)
    say(f"{out}: {train} + {val} pictures of {len(material.cuts)} classes")


if __name__ == "__main__":
    run_command(main, "python -m tools.miniature_coco")
