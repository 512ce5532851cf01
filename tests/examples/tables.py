"""Tables of images for tests, as `datasets` and pyarrow write them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features
from datasets import Image as ImageFeature

from tests.examples.images import crop


def encoded(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    crop(number).save(file, kind)
    return file.getvalue()


def cell(number: int, kind: str = "PNG") -> dict[str, object]:
    """An image in a column, as `datasets` has it."""
    return {"bytes": encoded(number, kind), "path": None}


def dataset(columns: Mapping[str, Sequence[Any]], **types: object) -> Dataset:
    """A data set of these columns; the columns without a type have type Image."""
    features = Features({name: types.get(name, ImageFeature()) for name in columns})
    return Dataset.from_dict(dict(columns), features=features)


def write_parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> None:
    """A Parquet file without the metadata of `datasets`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path, **options)
