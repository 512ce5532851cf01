"""Every case of `moce bench scale`, at a small size."""

from pathlib import Path

import pytest

from moce_ds.bench.scale import FITTED, sizes_of
from moce_ds.bench.scale_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs(tmp_path: Path, name: str) -> None:
    case, count = CASES[name], 600
    if case.write is not None:
        case.write(tmp_path, count)
    found = case.ready(tmp_path, count)()
    expected = {"order": 4096, "blocks": 4096, "ids": count, "features": 2}
    if name in expected:
        assert len(getattr(found, "ids", found)) == expected[name]
    if name == "verify":
        assert not found.faults
    assert len(sizes_of(case, 10**6)) >= FITTED
