"""Parameters of a model by name: every rule about their names, and the check that weights from a file fit them.

The names are those of the public MAE, of timm's ViT, and of our layers of experts:

    blocks.9.norm1.weight                      block 9 of the encoder
    blocks.9.mlp.experts.3.fc1.weight          its expert 3; the numbers are global, those of the whole model
    blocks.9.mlp.gate.weight, gate.weights.0   a gate of TokenMoE, and of MoCE, whose gates are outside the blocks
    decoder_blocks.0.norm1.weight, mask_token  the decoder
"""

import re
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from moce_ds.common.errors import ArtefactError

if TYPE_CHECKING:  # verbs without torch read checkpoints with this module
    from torch import Tensor, nn

TOKENS = ("cls_token", "mask_token")
POSITIONS = ("pos_embed", "decoder_pos_embed")
"""Fixed tables of every run, which no checkpoint holds."""

CLASSIFIER = ("head.weight", "head.bias")
"""The classifier of a fine-tuned model."""

_DECODER = ("decoder_", "mask_token")
_EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed.")
_LISTED = 20  # listed weights per kind of mismatch
_PLACE = re.compile(r"^(decoder_)?blocks\.(\d+)\.(?:mlp\.experts\.(\d+)\.)?")

# DeepSpeed's stock layer puts more words into the names, and `ClusterMoE` does so in DeepSpeed's own checkpoints.
_NATIVE = r"deepspeed_moe\.experts\.deepspeed_experts"
_NATIVE_GATE = ".deepspeed_moe.gate.wg."
_NATIVE_EXPERT = re.compile(rf"^blocks\.(\d+)\.mlp\.{_NATIVE}\.(\d+)\.(.+)$")
_LOCAL_EXPERT = re.compile(rf"^blocks\.(\d+)\.mlp\.(?:{_NATIVE}|experts)\.(\d+)\.(.+)$")


class Place(NamedTuple):
    """A block of the encoder or decoder, and the number of an expert in it (None: no expert)."""

    in_decoder: bool
    block: int
    expert: int | None


def place_of(name: str) -> Place | None:
    """The place of a parameter; None if it is outside all blocks."""
    match = _PLACE.match(name)
    return Place(bool(match[1]), int(match[2]), int(match[3]) if match[3] else None) if match else None


def encoder_block(name: str) -> int | None:
    """The block of the encoder that a parameter belongs to, or None."""
    place = place_of(name)
    return None if place is None or place.in_decoder else place.block


def is_embedding(name: str) -> bool:
    """Whether a parameter of the encoder comes before its blocks."""
    return name.startswith(_EMBEDDINGS)


def is_decoder(name: str) -> bool:
    """Whether a parameter belongs to the decoder, which an encoder-only file does not have."""
    return name.startswith(_DECODER)


def lacks_decoder(names: Iterable[str]) -> bool:
    """Whether the names are those of an encoder alone, as in the public MAE's files named "pretrain"."""
    return not any(map(is_decoder, names))


def is_gate(name: str) -> bool:
    """Whether a parameter belongs to a gate of any kind."""
    return "gate." in name


def is_cluster_gate(name: str) -> bool:
    """Whether a parameter belongs to the gate of MoCE, which reads clusters."""
    return name.startswith("gate.")


def expert_key(block: int, expert: int, rest: str) -> str:
    """The name of one expert's parameter, by *global* expert: `blocks.9.mlp.experts.3.fc1.weight`."""
    return f"blocks.{block}.mlp.experts.{expert}.{rest}"


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one of a layer's experts."""
    return ".mlp.experts." in name


def has_experts(names: Iterable[str]) -> bool:
    """Whether the names are those of a model with experts."""
    return any(map(is_expert, names))


def is_replaced(name: str, layers: Container[int]) -> bool:
    """Whether a parameter of a dense MAE belongs to an MLP that experts replace: those of the blocks `layers`."""
    parts = name.split(".")
    return parts[0] == "blocks" and int(parts[1]) in layers and parts[2] == "mlp"


class LocalExpert(NamedTuple):
    """The block of an expert, its number within a process, and the rest of a parameter's name."""

    block: int
    number: int
    rest: str


def local_expert(name: str) -> LocalExpert | None:
    """The expert that a parameter of a model in training belongs to, or None."""
    return _expert(_LOCAL_EXPERT.match(name))


def native_expert(name: str) -> LocalExpert | None:
    """The expert that a parameter in DeepSpeed's own checkpoint belongs to, or None."""
    return _expert(_NATIVE_EXPERT.match(name))


def _expert(match: re.Match[str] | None) -> LocalExpert | None:
    return LocalExpert(int(match[1]), int(match[2]), match[3]) if match else None


def with_plain_gate(name: str) -> str:
    """The name of a gate's parameter without the words of DeepSpeed's stock layer; other names stay."""
    return name.replace(_NATIVE_GATE, ".gate.")


def load_weights_strict(parameters: "Mapping[str, nn.Parameter]", weights: "Mapping[str, Tensor]", source: str) -> None:
    """Copy weights into the parameters with the same names; refuse missing or unexpected weights and wrong shapes.

    Raises:
        ArtefactError: lists the mismatches; names `source`.
    """
    check_fit(parameters, weights, source)
    for name, parameter in parameters.items():
        parameter.detach().copy_(weights[name])


def check_fit(expected: "Mapping[str, Tensor]", weights: "Mapping[str, Tensor]", source: str) -> None:
    """Raise ArtefactError, listing all of them, if tensors are missing, unexpected or of another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    actual = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    missing = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in actual]
    unexpected = [f"unexpected {name} {shape}" for name, shape in actual.items() if name not in shapes]
    other = [f"{n} is {actual[n]}, expected {shape}" for n, shape in shapes.items() if actual.get(n, shape) != shape]
    if lines := [*cut(missing, "missing"), *cut(unexpected, "unexpected"), *cut(other, "of another shape")]:
        raise ArtefactError("\n  ".join([f"{source} does not fit the model:", *lines]))


def cut(lines: list[str], kind: str = "") -> list[str]:
    """The first lines of a list of faults, and the number of further ones of that `kind`."""
    return [*lines[:_LISTED], f"and {len(lines) - _LISTED} more {kind}".rstrip()] if len(lines) > _LISTED else lines
