"""All formats, by the names of `--format` and `--part`."""

from moce_ds.errors import ConfigError
from moce_ds.export.formats import huggingface, onnx_file, pth, timm_folder
from moce_ds.export.formats.target import EXTRA, Format, installed

TIMM = Format("timm", "encoder", timm_folder.write, "timm", timm_folder.run)

FORMATS = (
    TIMM,
    Format("timm", "full", pth.writer(pth.public_mae, "model"), "moce_ds", pth.run_public_mae, output="patches"),
    Format("hf-vit", "encoder", huggingface.write_vit, "transformers", huggingface.run_vit),
    Format(
        "hf-vitmae",
        "encoder",
        huggingface.write_vitmae_encoder,
        "transformers",
        huggingface.run_vitmae_encoder,
        output="visible",
    ),
    Format("hf-vitmae", "full", huggingface.write_vitmae, "transformers", huggingface.run_vitmae, output="patches"),
    Format("detectron2", "encoder", pth.writer(pth.vitdet, "model")),
    Format("mmdet", "encoder", pth.writer(pth.vitdet, "model")),
    Format("mmseg", "encoder", pth.writer(pth.mmseg, "state_dict")),
    Format("mmpretrain", "encoder", pth.writer(pth.mmpretrain, "state_dict")),
    Format("onnx", "encoder", onnx_file.write, "onnxruntime", onnx_file.run, needs=("onnx",)),
)

NAMES = tuple(dict.fromkeys(format.name for format in FORMATS))


def find_format(name: str, part: str = "encoder") -> Format:
    """The format of a part of the model.

    Raises:
        ConfigError: there is none, or a package required for writing it is missing.
    """
    parts = {format.part: format for format in FORMATS if format.name == name}
    if not parts:
        raise ConfigError(f"--format: got {name!r}; expected one of {', '.join(NAMES)}.")
    if part not in parts:
        full = ", ".join(format.name for format in FORMATS if format.part == "full")
        raise ConfigError(
            f"--part: got {part!r}; --format {name} takes {' or '.join(parts)}; full, with the decoder, is "
            f"available for {full}."
        )
    missing = [package for package in parts[part].needs if not installed(package)]
    if missing:
        raise ConfigError(f"--format {name} needs {', '.join(missing)}: pip install '{EXTRA}'.")
    return parts[part]
