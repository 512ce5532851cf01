"""The columns of images and classes, by what `datasets` recorded about them, or by their types."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Features, List, Value
from datasets import Image as ImageFeature

from moce_ds.common.errors import DataError
from moce_ds.data.sources.table_columns import Columns, choose_columns

FILE = Path("a.parquet")
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
KINDS = ClassLabel(names=["b", "a"])


def chosen(*fields: tuple[str, pa.DataType], **metadata: object) -> Columns:
    recorded = {name: json.dumps(value) for name, value in metadata.items()}
    return choose_columns(FILE, pa.schema(fields, metadata=recorded or None))


def test_what_the_library_recorded_is_taken() -> None:
    features = {"bytes": Value("binary"), "photo": ImageFeature(), "kind": KINDS, "label": Value("int64")}
    more = {"boxes": List(Value("int64")), "nested": {"image": ImageFeature()}}
    columns = choose_columns(FILE, Features(features | more).arrow_schema)
    assert columns == Columns("photo", "kind", "ClassLabel", ("b", "a")) and columns.notices == ()


def test_types_of_a_saved_set_go_before_those_of_its_files() -> None:
    schema = Features({"image": ImageFeature(), "label": Value("int64")}).arrow_schema
    types: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"names": ["x"], "_type": "ClassLabel"}, "lost": {}}
    assert choose_columns(FILE, schema, types).names == ("x",)
    assert choose_columns(FILE, schema).kind == "integers"


@pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary(), pa.binary_view()])
def test_columns_of_bytes_are_images(kind: pa.DataType) -> None:
    columns = chosen(("text", pa.string()), ("jpg", kind), ("labels", pa.dictionary(pa.int8(), pa.string())))
    assert columns == Columns("jpg", "labels", "text")


def test_of_several_a_usual_name_is_preferred() -> None:
    columns = chosen(("depth", pa.binary()), ("img", STRUCT), ("label", pa.int8()))
    assert columns.image == "img" and columns.notices == (
        "a.parquet: columns depth, img all have type bytes; using img.",
    )
    assert chosen(("b", pa.binary()), ("a", pa.binary())).image == "b"


@pytest.mark.parametrize("metadata", [{}, {"huggingface": []}, {"huggingface": {"info": []}}, {"pandas": {}}])
def test_other_metadata_says_nothing(metadata: dict[str, object]) -> None:
    assert chosen(("image", STRUCT), ("label", pa.bool_()), **metadata) == Columns("image", "label", "bool")


def test_recorded_types_that_the_file_does_not_have() -> None:
    """They are ignored, as are those of columns that hold something else."""
    features = {
        "gone": {"_type": "Image"},
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["x"]},
    }
    columns = chosen(
        ("image", pa.list_(pa.int8())), ("raw", pa.binary()), ("label", pa.string()),
        huggingface={"info": {"features": features}},
    )  # fmt: skip
    assert columns == Columns("raw", "label", "text")


def test_no_images() -> None:
    with pytest.raises(DataError, match=r"^a\.parquet has no column of images; its columns: text, n\.$"):
        chosen(("text", pa.string()), ("n", pa.struct({"bytes": pa.string()})))


@pytest.mark.parametrize("kind", [pa.float32(), pa.list_(pa.int64()), pa.null(), pa.timestamp("s")])
def test_a_label_of_another_type_is_no_class(kind: pa.DataType) -> None:
    columns = chosen(("image", STRUCT), ("label", kind))
    assert columns.label is None and f"(label is {kind})" in columns.notices[0]


@pytest.mark.parametrize(
    ("feature", "names"),
    [
        ({"num_classes": 2, "names": None}, ("0", "1")),
        ({"names": ["a", "b"], "num_classes": 9}, ("a", "b")),
        ({"names": ["a", "a"]}, "two of its classes are called a"),
        ({"names": ["a", ""]}, "are not a list of texts"),
        ({"names": {"0": "a"}}, "are not a list of texts"),
        ({}, "are not a list of texts"),
    ],
)
def test_names_of_classes(feature: dict[str, object], names: tuple[str, ...] | str) -> None:
    features = {"label": feature | {"_type": "ClassLabel"}}
    fields = ("image", STRUCT), ("label", pa.int64())
    if isinstance(names, tuple):
        assert chosen(*fields, huggingface={"info": {"features": features}}).names == names
    else:
        with pytest.raises(DataError, match=names):
            chosen(*fields, huggingface={"info": {"features": features}})


def test_values_that_are_no_class() -> None:
    text, numbers, names = (Columns("", "", kind, ("x", "y")) for kind in ("text", "integers", "ClassLabel"))
    assert [text.class_of(value, "row 0") for value in (None, "", " ", "-1")] == ["", "", " ", "-1"]
    assert [numbers.class_of(value, "row 0") for value in (None, -1, 0, 7)] == ["", "", "0", "7"]
    assert [names.class_of(value, "row 0") for value in (None, -1, 0, 1)] == ["", "", "x", "y"]
    with pytest.raises(DataError, match="row 9 has the class 2 of 2"):
        names.class_of(2, "row 9")


def test_order_of_classes() -> None:
    assert Columns("", "", "integers").classes([10, 9, None, -1, 10]) == ["9", "10"]
    assert Columns("", "", "text").classes(["b", "10", "9", "", None]) == ["10", "9", "b"]
    assert Columns("", "", "ClassLabel", ("b", "a")).classes([1]) == ["b", "a"]
