"""Lines of a file by number, for files of all lengths around the steps of the index and of the chunks."""

from pathlib import Path

import pytest

from moce_ds.common.storage import text_lines
from moce_ds.common.storage.text_lines import TextLines


@pytest.mark.parametrize("chunk", [1, 700, 2**22])
@pytest.mark.parametrize(("count", "ended"), [(0, True), (1, False), (1024, True), (1025, False), (2048, False)])
def test_every_line_is_found(
    count: int, ended: bool, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_lines, "_CHUNK_BYTES", chunk)
    expected = [f"{number}".ljust(number % 7) for number in range(count)]
    (tmp_path / "x").write_text("\n".join(expected) + "\n" * (ended and count > 0))
    lines = TextLines(tmp_path / "x")
    assert len(lines) == count
    places = [0, 1, 1022, 1023, 1024, 1025, count - 1]
    assert all(lines[place] == expected[place] for place in places if 0 <= place < count)
    assert list(lines.between(1020, 1030)) == expected[1020:1030] and list(lines.between(0, 3)) == expected[:3]
    for outside in (-1, count):
        with pytest.raises(IndexError, match="is not in 0 to"):
            lines[outside]
