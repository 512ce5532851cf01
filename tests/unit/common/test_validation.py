"""Faults that pydantic finds, in our words; what the settings say of them is in `test_settings.py`."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from moce_ds.common.validation import expectation


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (Annotated[float, Field(gt=0)], 0, "expected a number greater than 0.0"),
        (Annotated[int, Field(le=8)], 9, "expected a number less than or equal to 8"),
        (Literal["fine", "coarse"], "medium", "expected 'fine' or 'coarse'"),
        (list[int], 3, "expected a list"),
        (Annotated[list[int], Field(min_length=2)], [1], "expected at least 2 of them, not 1"),
        (dict[str, int], [], "expected a mapping"),
        (int, "many", "expected a whole number"),
        (int, 2.5, "expected a whole number"),
        (str, 3, "expected text"),
    ],
)
def test_a_fault_says_what_was_expected(kind: Any, value: Any, told: str) -> None:
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(kind).validate_python(value)
    assert expectation(raised.value.errors()[0]) == told
