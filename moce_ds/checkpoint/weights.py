"""Giving a model the weights of a file: all of them, or an error that lists what does not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moce_ds.errors import ArtefactError

_LISTED = 20  # weights of each kind of misfit that are named


def load_weights_strict(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into parameters of the same names, refusing what is missing, left over or of another shape.

    Raises:
        ArtefactError: lists what does not fit; `source` is named.
    """
    check_fit(parameters, weights, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that are missing, left over or of another shape, listing them all. Raises ArtefactError."""
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in given.items()}
    missing = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in found]
    unexpected = [f"unexpected {name} {shape}" for name, shape in found.items() if name not in shapes]
    other = [f"{n} is {found[n]}, expected {shape}" for n, shape in shapes.items() if found.get(n, shape) != shape]
    if lines := [*cut(missing, "missing"), *cut(unexpected, "unexpected"), *cut(other, "of another shape")]:
        raise ArtefactError("\n  ".join([f"{source} does not fit the model:", *lines]))


def cut(lines: list[str], kind: str = "") -> list[str]:
    """The first lines of a list of faults, and how many `kind` are left out."""
    return [*lines[:_LISTED], f"and {len(lines) - _LISTED} more {kind}".rstrip()] if len(lines) > _LISTED else lines
