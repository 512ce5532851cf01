"""What pydantic expected, in the words of this package's messages: of settings, of records, and of COCO's files."""

from collections.abc import Mapping
from typing import Any

_EXPECTED = {
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number greater than or equal to {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number less than or equal to {le}",
    "literal_error": "{expected}",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "string_type": "text",
    "path_type": "a path",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "too_short": "at least {min_length} of them, not {actual_length}",
    "too_long": "at most {max_length} of them, not {actual_length}",
    "string_too_short": "text of {min_length} characters or more",
    "string_pattern_mismatch": "text that matches {pattern}",
}
"""By the type of a fault, with the names of its context."""


def expectation(fault: Mapping[str, Any]) -> str:
    """What was expected instead of the value of a fault, one of `ValidationError.errors()`; without a full stop.

    A check of ours has its own message, and a fault of a type that has no text here that of pydantic.
    """
    if fault["type"] == "missing":
        return "is missing"
    if expected := _EXPECTED.get(fault["type"]):
        return f"expected {expected.format(**fault.get('ctx', {}))}"
    return str(fault["msg"]).removeprefix("Value error, ").removesuffix(".")
