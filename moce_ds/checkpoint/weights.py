"""Loads all weights of a file into a model, or raises an error that lists the mismatches."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moce_ds.errors import ArtefactError

_LISTED = 20  # listed weights per kind of mismatch


def load_weights_strict(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into the parameters with the same names; refuse missing or unexpected weights and other shapes.

    Raises:
        ArtefactError: lists the mismatches; names `source`.
    """
    check_fit(parameters, weights, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def check_fit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
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
