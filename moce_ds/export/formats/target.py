"""An export format: how the dense model is written for one library, and how that library loads and runs it again."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from moce_ds.export.reference_model import Output, Trial
from moce_ds.models.build import ModelSpec
from moce_ds.storage.encoder_folder import write_export_record

EXTRA = "moce-ds[formats]"
"""The extra with the packages for all formats except timm's."""


@dataclass(frozen=True)
class DenseModel:
    """The model to export: weights by the names of timm and the public MAE (including the decoder if the part is
    `full`)."""

    state: Mapping[str, Tensor]
    spec: ModelSpec
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One format of one part.

    Attributes:
        name: as in `--format`.
        part: "encoder", or "full": the decoder too.
        write: writes the model's files into a folder.
        library: the package that loads them again; None if it is not available as a package.
        run: the output of `library` for a trial, from the folder; compared with `output` of the trained model.
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


def renamed(state: Mapping[str, Tensor], names: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors under other names: the pairs (old, new) are replaced in order."""
    result = {}
    for name, tensor in state.items():
        for old, new in names:
            name = name.replace(old, new)
        result[name] = tensor
    return result
