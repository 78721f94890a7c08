"""Whether what a GGUF file says of itself fits into the file.

The `gguf` package believes the counts, lengths and offsets of a header: a kilobyte
that announces 2**40 values keeps it busy until memory ends. So every number is held
against the bytes that are there before the package sees the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes by type of value; 8 is a text, 9 an array."""

_LONGEST_ARRAY = 1 << 22
"""Values of an array at most, many times the largest vocabulary: the package makes an
object of each."""

_MOST_AXES = 4  # GGML_MAX_DIMS


def check_header(path: Path) -> None:
    """Walks the header of a GGUF file; allocates nothing.

    Raises:
      ValueError: it is none, or a count, a length or an offset leaves the file.
    """
    with open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()


class _Header:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def check(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._skip(4)
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"version {version} is not supported, only 2 and 3 are")
        tensors, values = self._number("Q"), self._number("Q")
        alignment = 32
        for _ in range(values):
            key, kind = self._text(), self._number("I")
            if key == b"general.alignment" and kind == 4:
                alignment = self._number("I")
                if alignment < 1 or alignment & (alignment - 1):
                    raise ValueError(f"alignment {alignment} is no power of two")
            else:
                self._value(kind)
        ends = [self._tensor() for _ in range(tensors)]
        start = -(-self._at // alignment) * alignment
        for name, end in ends:
            if start + end > len(self._data):
                raise ValueError(
                    f"tensor {name} ends at byte {start + end} of {len(self._data)}"
                )

    def _value(self, kind: int) -> None:
        if kind == 8:
            self._text()
        elif kind == 9:
            item, count = self._number("I"), self._number("Q")
            if count > _LONGEST_ARRAY:
                raise ValueError(f"an array of {count} values is too long")
            if item == 8:
                for _ in range(count):
                    self._text()
            else:
                self._skip(count * self._size(item))
        else:
            self._skip(self._size(kind))

    def _tensor(self) -> tuple[str, int]:
        """Name of a tensor and, from where data begin, its last byte."""
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(k): size for k, size in GGML_QUANT_SIZES.items()}
        name = self._text().decode(errors="replace")
        if not 1 <= (axes := self._number("I")) <= _MOST_AXES:
            raise ValueError(f"tensor {name} has {axes} axes, not 1 to {_MOST_AXES}")
        shape = [self._number("Q") for _ in range(axes)]
        if 0 in shape:
            raise ValueError(f"tensor {name} is empty")
        kind, offset = self._number("I"), self._number("Q")
        if kind not in sizes:
            raise ValueError(f"tensor {name} has the unknown type {kind}")
        block, size = sizes[kind]
        return name, offset + math.prod(shape) * size // block

    def _size(self, kind: int) -> int:
        if kind not in _SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        return _SCALARS[kind]

    def _text(self) -> bytes:
        length = self._number("Q")
        begin = self._at
        self._skip(length)
        return self._data[begin : self._at]

    def _number(self, code: str) -> int:
        begin = self._at
        self._skip(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self._data, begin)[0]

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise ValueError(
                f"it ends at byte {len(self._data)}, {count} more were announced at "
                f"byte {self._at}"
            )
        self._at += count
