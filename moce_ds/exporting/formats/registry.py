"""The export formats, by the names of `--format` and `--part`.

A format defines how the dense model is written for one library, and how that library loads and runs it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from moce_ds.common.errors import ConfigError
from moce_ds.common.storage.encoder_folder import write_export_record
from moce_ds.exporting.formats import huggingface, weights
from moce_ds.exporting.formats.weights import DenseModel
from moce_ds.exporting.reference_model import Output, Trial
from moce_ds.models.build import ModelSpec

EXTRA = "moce-ds[formats]"
"""The extra with the packages for all formats except timm's."""


@dataclass(frozen=True)
class Format:
    """One format of one part.

    Attributes:
        name: as in `--format`.
        part: "encoder", or "full": the decoder too.
        write: writes the model's files into a folder.
        library: the package that loads them again; None if it is not available as a package.
        run: returns the output of `library` for a trial, from the folder; it is compared with `output` of the model.
        needs: packages required for writing.
    """

    name: str
    part: str
    write: Callable[[Path, DenseModel], None]
    library: str | None = None
    run: Callable[[Path, ModelSpec, Trial], Tensor] | None = None
    output: Output = "tokens"
    needs: tuple[str, ...] = ()

    @property
    def is_encoder_folder(self) -> bool:
        """Whether other verbs read it too."""
        return (self.name, self.part) == ("timm", "encoder")


def _write_onnx(folder: Path, model: DenseModel) -> None:
    from moce_ds.exporting.formats import onnx_file  # onnx need not be installed

    onnx_file.write(folder, model)


def _run_onnx(folder: Path, spec: ModelSpec, trial: Trial) -> Tensor:
    from moce_ds.exporting.formats import onnx_file

    return onnx_file.run(folder, spec, trial)


TIMM = Format("timm", "encoder", weights.write_timm, "timm", weights.run_timm)

FORMATS = (
    TIMM,
    Format(
        "timm", "full", weights.writer(weights.public_mae, "model"), "moce_ds", weights.run_public_mae, output="patches"
    ),
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
    Format("detectron2", "encoder", weights.writer(weights.vitdet, "model")),
    Format("mmdet", "encoder", weights.writer(weights.vitdet, "model")),
    Format("mmseg", "encoder", weights.writer(weights.mmseg, "state_dict")),
    Format("mmpretrain", "encoder", weights.writer(weights.mmpretrain, "state_dict")),
    Format("onnx", "encoder", _write_onnx, "onnxruntime", _run_onnx, needs=("onnx",)),
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


def installed(library: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(library) is not None


def library_version(library: str) -> str:
    """A text such as "transformers 5.24.0"."""
    return f"{library} {version(library)}"


def write_record(folder: Path, format: Format, spec: ModelSpec) -> None:
    """Write `export.json`, by which `moce inspect` recognises the folder and its files."""
    shape, input = asdict(spec.shape), spec.input.to_tree()
    write_export_record(folder, {"target": format.name, "part": format.part, "shape": shape, "input": input})
