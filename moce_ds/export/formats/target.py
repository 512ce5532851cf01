"""What a format is: how the dense model is written for one library, and how it is loaded back and run there."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from moce_ds.export.reference_model import Output, Trial
from moce_ds.models.build import ModelSpec
from moce_ds.storage import export_folder

EXTRA = "moce-ds[formats]"
"""Installs what other formats than timm's are written and loaded back with."""


@dataclass(frozen=True)
class DenseModel:
    """What is exported: weights by the names of timm and the public MAE (with a decoder where the part is `full`)."""

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
        library: the package that loads them back; None where there is no package of it.
        run: what `library` computes from the folder, given a trial: compared with the trained model's `output`.
        needs: packages without which nothing can be written.
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
        """Whether other verbs read it, too."""
        return (self.name, self.part) == ("timm", "encoder")


def installed(library: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(library) is not None


def library_version(library: str) -> str:
    """Such as "transformers 5.24.0"."""
    return f"{library} {version(library)}"


def write_record(folder: Path, format: Format, spec: ModelSpec) -> None:
    """Write `export.json`, by which `moce inspect` knows the folder and its files."""
    shape, input = asdict(spec.shape), spec.input.to_tree()
    export_folder.write_record(folder, {"target": format.name, "part": format.part, "shape": shape, "input": input})


def renamed(state: Mapping[str, Tensor], names: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors under other names: every pair (old, new) is replaced in turn."""
    result = {}
    for name, tensor in state.items():
        for old, new in names:
            name = name.replace(old, new)
        result[name] = tensor
    return result
