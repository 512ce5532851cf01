"""Lines of a large text file by their number, without the file in memory."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

_EVERY = 1024
"""Lines per entry of the index: 100 million lines have an index of 0.8 MB."""

_CHUNK_BYTES = 2**22


class TextLines:
    """The lines of a file; the file is read once, in chunks, to find where every 1024th line begins."""

    def __init__(self, path: Path) -> None:
        """Read the file once. Raises OSError."""
        self._path, self._count = path, 0
        self._starts = [0]
        offset, last = 0, b"\n"
        with open(path, "rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
                first = -(self._count + 1) % _EVERY  # of these line ends, the first that an entry follows
                self._starts += (offset + ends[first::_EVERY] + 1).tolist()
                self._count += len(ends)
                offset, last = offset + len(chunk), chunk[-1:]
        self._count += last != b"\n"  # a line without an end

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> str:
        """A line without its end. Raises IndexError, OSError, and ValueError for text that is not ASCII."""
        if not 0 <= number < self._count:
            raise IndexError(f"line {number} is not in 0 to {self._count - 1}")
        return next(self.between(number, number + 1))

    def between(self, first: int, last: int) -> Iterator[str]:
        """The lines from `first` to `last` (exclusive) that exist, without their ends. Raises as an index."""
        if first >= min(last, self._count):
            return
        with open(self._path, "rb") as opened:
            opened.seek(self._starts[first // _EVERY])
            skipped = first % _EVERY
            for line in islice(opened, skipped, skipped + last - first):
                yield line.rstrip(b"\n").decode("ascii")
