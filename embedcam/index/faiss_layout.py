"""How FAISS lays out inverted lists in a file, so that its sizes are checked before FAISS is.

FAISS believes the sizes that it reads, and a mapped file is used where it lies. A file whose sizes
are those of its bytes, its vectors, codes and lists included, leads nowhere outside them.
"""

import os
import struct

import numpy as np

HEADER = struct.Struct("<4siqqqBi")
"""Type, D, N, two unused numbers, whether trained, metric."""
FLAT = {b"IxF2": 1, b"IxFI": 0}
"""Types that are nothing but the vectors, and their metric."""
MAPPED = {*FLAT, b"IwFl", b"IwSq", b"IwPQ"}
_MOST_BITS = 16
_SQ_BITS = {0: 8, 1: 4, 2: 8, 3: 4, 4: 16, 6: 6}
"""Bits a dimension of the scalar quantizers: 8, 4, both uniform, half precision, 6."""
_UNIFORM = (2, 3)


class _Unlike(Exception):  # noqa: N818 - reads as the fact it states
    """The file is not laid out as it should be."""


class _Cursor:
    """Reads one number after the other, within a file of `size` bytes."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self.size, self.at = descriptor, size, 0

    def take(self, form: str) -> tuple[int, ...]:
        """Return the numbers of a `struct` format."""
        one = struct.Struct("<" + form)
        data = os.pread(self._descriptor, one.size, self.at)
        self.skip(one.size)
        if len(data) != one.size:
            raise _Unlike
        return one.unpack(data)

    def word(self) -> bytes:
        """Return the next four bytes, which FAISS names types by."""
        self.skip(4)
        return os.pread(self._descriptor, 4, self.at - 4)

    def skip(self, count: int) -> None:
        """Pass over bytes, which must be there."""
        self.at += count
        if self.at > self.size:
            raise _Unlike

    def numbers(self, count: int, *, least: int, most: int) -> np.ndarray:
        """Return `count` whole numbers `[count]`, all in range."""
        begin = self.at
        self.skip(8 * count)
        values = np.frombuffer(os.pread(self._descriptor, 8 * count, begin), "<u8")
        if len(values) != count or (count and not least <= values.min() <= values.max() <= most):
            raise _Unlike
        return values


def is_bounded(descriptor: int, size: int, width: int, rows: int, metric: int) -> bool:
    """Return whether a file of inverted lists has the sizes inside that its `size` bytes have.

    Known are IVF,Flat, IVF,SQ and IVF,PQ with lists around plain centroids; False of all others.
    """
    try:
        _walk(_Cursor(descriptor, size), width, rows, metric)
    except _Unlike:
        return False
    return True


def _walk(file: _Cursor, width: int, rows: int, metric: int) -> None:
    kind = _header(file, width, rows, metric)
    n_lists, _ = file.take("QQ")
    if _header(file, width, n_lists, metric) not in FLAT:
        raise _Unlike
    _floats(file, n_lists * width)
    _expect(file.take("BQ") == (0, 0))  # no map of the rows' places
    code = _code_of(file, kind, width)
    _expect(file.word() == b"ilar" and file.take("QQ") == (n_lists, code))
    how = file.word()
    (count,) = file.take("Q")
    if how == b"full":
        _expect(count == n_lists)
        sizes = file.numbers(count, least=0, most=rows)
    elif how == b"sprs":  # pairs of a list and its size
        _expect(count % 2 == 0 and count <= 2 * n_lists)
        pairs = file.numbers(count, least=0, most=max(rows, n_lists))
        pairs = pairs.reshape(-1, 2)
        _expect(pairs[:, 0].max(initial=0) < n_lists)
        _expect(len(set(pairs[:, 0].tolist())) == len(pairs))
        sizes = pairs[:, 1]
    else:
        raise _Unlike
    _expect(sum(sizes.tolist()) == rows)
    file.skip(rows * (code + 8))
    _expect(file.at == file.size)


def _header(file: _Cursor, width: int, rows: int, metric: int) -> bytes:
    kind, numbers = file.word(), file.take(HEADER.format.removeprefix("<4s"))
    _expect((*numbers[:2], *numbers[4:]) == (width, rows, 1, metric))
    return kind


def _floats(file: _Cursor, expected: int) -> None:
    _expect(file.take("Q") == (expected,))
    file.skip(4 * expected)


def _code_of(file: _Cursor, kind: bytes, width: int) -> int:
    """Read what comes before the lists and return how many bytes a row takes in them."""
    if kind == b"IwFl":
        return 4 * width
    if kind == b"IwSq":
        how, _, _, d, size = file.take("iifQQ")
        _expect(how in _SQ_BITS and d == width)
        trained = 0 if how == 4 else 2 if how in _UNIFORM else 2 * width
        _floats(file, trained)
        code = (_SQ_BITS[how] * width + 7) // 8
        _expect((size, *file.take("QB")) in ((code, code, 0), (code, code, 1)))
        return code
    _expect(kind == b"IwPQ")
    residual, code, d, m, bits = file.take("BQQQQ")
    _expect(residual < 2 and d == width and 1 <= m <= width and width % m == 0)
    _expect(1 <= bits <= _MOST_BITS and code == (m * bits + 7) // 8)
    _floats(file, width << bits)
    return code


def _expect(holds: bool) -> None:
    if not holds:
        raise _Unlike
