"""Encodings: how weights are kept in an index. Top-m, low-rank, dense, or by position.

Half-precision values lie beside one float32 scale an image (its largest magnitude), so that weights
of 1e-4, the usual size for embeddings, keep their eleven bits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._checks import one_of, whole
from ..errors import IndexFormatError, InputError
from ..ops import product

Rows = Mapping[str, np.ndarray]
_Products = tuple[np.ndarray | None, np.ndarray | None, float]
DTYPES = ("float16", "float32")
_ORTHONORMAL = 3e-7
"""Rows in single precision are orthonormal to about this, and norms no better."""


@dataclass(frozen=True)
class Field:
    """One array kept for each image: its type and its shape without the leading axis."""

    dtype: str
    shape: tuple[int, ...]


class Transferred(NamedTuple):
    """Weights combined from several rows: their norms and shares `[n]`, decoded `each` or None."""

    weights: np.ndarray
    norms: np.ndarray
    shares: np.ndarray
    each: np.ndarray | None


class Encoding:
    """Turns weights `[n K]` into rows of the `fields` kept for each image, and back.

    `fitted` are arrays kept once. Subclasses: `TopM`, `LowRank`, `Dense`.
    """

    name: str
    fitted: dict[str, np.ndarray]
    fields: dict[str, Field]
    grid: tuple[int, int] | None = None
    """(H, W) where weights belong to positions, too: they are then `[n K H W]`."""
    uses_embedding = False
    """True where the code is derived from the stored embedding and nothing is kept beside it."""

    def __init__(self, n_channels: int, field: str, width: int, dtype: str) -> None:
        self.n_channels, self.fitted = whole("n_channels", n_channels, 1), {}
        self.dtype = one_of("dtype", dtype, DTYPES)
        self.field, self.fields = field, {field: Field(dtype, (width,))}
        if dtype == "float16":
            self.fields["scales"] = Field("float32", ())

    def spec(self) -> dict[str, str | int]:
        """Return what `from_spec` needs beside K and the fitted arrays; JSON-able."""
        return {"name": self.name, "dtype": self.dtype}

    def encode(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows of `fields` for weights `[n K]`."""
        return self._pack(_checked(weights, self.n_channels))

    def decode(self, rows: Rows) -> np.ndarray:
        """Return weights `[n K]` float32, missing channels zero."""
        return self._unpack(rows)

    def unpack(self, rows: Rows) -> np.ndarray:
        """Return what `norms` and `combine` take, float32 `[n C]`: weights, or what makes them."""
        return self.decode(rows)

    def norms(self, unpacked: np.ndarray) -> np.ndarray:
        """Return the L2 norm of each weight vector, `[n]` float64, from what `unpack` returned."""
        exact = unpacked.astype(np.float64)
        exact *= exact
        return np.asarray(np.sqrt(exact.sum(axis=1)))

    def combine(self, unpacked: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Return sum_i coefficients_i * weights_i, `[K]`, from what `unpack` returned."""
        return np.asarray(coefficients.astype(np.float32, copy=False) @ unpacked)

    def transfer(
        self, rows: Rows, shares_of: Callable[[np.ndarray], np.ndarray], *, decoded: bool = False
    ) -> Transferred:
        """Return sum_i c_i weights_i, c what `shares_of` makes of the L2 norms `[n]`."""
        unpacked = self.unpack(rows)
        norms = self.norms(unpacked)
        if not np.isfinite(norms).all():
            raise IndexFormatError(
                "stored weights hold a NaN or an infinity; `embedcam verify` says which file is "
                "damaged"
            )
        shares = shares_of(norms)
        if not decoded:
            return Transferred(self.combine(unpacked, shares), norms, shares, None)
        each = self._decoded(unpacked)  # a sum of these reads no basis a second time
        mixed = shares.astype(np.float32, copy=False) @ each.reshape(len(each), -1)
        return Transferred(mixed.reshape(each.shape[1:]), norms, shares, each)

    def _decoded(self, unpacked: np.ndarray) -> np.ndarray:
        return unpacked

    def bytes_per_image(self) -> int:
        """Return the bytes kept for each image."""
        return sum(np.dtype(f.dtype).itemsize * math.prod(f.shape) for f in self.fields.values())

    def _pack(self, values: np.ndarray) -> dict[str, np.ndarray]:
        if self.dtype == "float32":
            return {self.field: np.ascontiguousarray(values, np.float32)}
        scales = np.abs(values).max(axis=1).astype(np.float32)
        safe = np.where(scales > 0, scales, 1)[:, None]
        return {self.field: (values / safe).astype(np.float16), "scales": scales}

    def _unpack(self, rows: Rows) -> np.ndarray:
        values = np.asarray(rows[self.field])
        if values.dtype == np.float32:
            return values
        return np.asarray(values.astype(np.float32) * rows["scales"][:, None])


class Dense(Encoding):
    """All K channels."""

    name = "dense"

    def __init__(self, n_channels: int, dtype: str = "float16") -> None:
        super().__init__(n_channels, "values", n_channels, dtype)


class TopM(Encoding):
    """The paper's encoding: the M largest channels and their values, the others dropped.

    `by` "signed" keeps the largest values (the paper, 50 of them), "magnitude" the largest in size.
    """

    name = "top-m"

    def __init__(
        self, n_channels: int, m: int = 50, by: str = "signed", dtype: str = "float16"
    ) -> None:
        super().__init__(n_channels, "values", m, dtype)
        if not 1 <= m <= n_channels:
            raise InputError(f"m = {m} channels of {n_channels}: m must be 1 to {n_channels}")
        self.m, self.by = int(m), one_of("by", by, ("signed", "magnitude"))
        numbers = "uint16" if n_channels <= 1 << 16 else "uint32"
        self.fields = {"channels": Field(numbers, (m,)), **self.fields}

    def spec(self) -> dict[str, str | int]:
        """Return what `from_spec` needs beside K; JSON-able."""
        return {**super().spec(), "m": self.m, "by": self.by}

    def encode(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows of `fields` for weights `[n K]`."""
        weights = _checked(weights, self.n_channels)
        rank = np.abs(weights) if self.by == "magnitude" else weights
        # A stable sort, so that ties fall to the lower channel on every machine.
        channels = np.argsort(-rank, axis=1, kind="stable")[:, : self.m]
        kept = self._pack(np.take_along_axis(weights, channels, axis=1))
        return {"channels": channels.astype(self.fields["channels"].dtype), **kept}

    def decode(self, rows: Rows) -> np.ndarray:
        """Return weights `[n K]` float32."""
        values = self._unpack(rows)
        weights = np.zeros((len(values), self.n_channels), np.float32)
        np.put_along_axis(weights, rows["channels"].astype(np.int64), values, axis=1)
        return weights


class LowRank(Encoding):
    """weights = codes `[n R]` @ basis `[R K]` + offset `[K]`; basis and offset are kept once.

    With the head's own matrix as the basis (`exact`) the code is dy/dz and nothing is lost. With
    principal components the basis is orthonormal and the code the projection of weights - offset.
    With `codes="embedding"` the code is the image's stored embedding and no field is kept at all.
    With a `grid` of H x W there is a weight for each channel and position, `[n K H W]`, and the
    basis is `[R K*H*W]`.

    Parameters
    ----------
    basis, offset : `[R K]` and `[K]`.
    origin : "head" (codes are given, not projected) or "pca" (orthonormal rows).
    codes : "stored" or "embedding".
    dtype : of stored codes.
    grid : (H, W) of weights by position.
    """

    def __init__(
        self,
        basis: np.ndarray,
        offset: np.ndarray,
        origin: str = "pca",
        codes: str = "stored",
        dtype: str = "float16",
        grid: tuple[int, int] | None = None,
    ) -> None:
        basis, offset = np.asarray(basis, np.float32), np.asarray(offset, np.float32)
        cells = math.prod(grid or ())
        if basis.ndim != 2 or offset.shape != basis.shape[1:] or len(offset) % cells:
            numbers = "K" if grid is None else f"K*{grid[0]}*{grid[1]}"
            raise InputError(
                f"basis {list(basis.shape)} and offset {list(offset.shape)} do not belong "
                f"together; expected [R {numbers}] and [{numbers}]"
            )
        self.rank = basis.shape[0]
        super().__init__(len(offset) // cells, "codes", self.rank, dtype)
        self.origin = one_of("origin", origin, ("head", "pca"))
        self.codes = one_of("codes", codes, ("stored", "embedding"))
        self.fitted = {"basis": basis, "offset": offset}
        self.name, self.grid = "low-rank" if grid is None else "by-position", grid
        self._scale = None if grid else _multiple_of_identity(basis)
        self._products: _Products | None = None
        self.uses_embedding = codes == "embedding"
        if self.uses_embedding:
            self.fields = {}

    def spec(self) -> dict[str, str | int]:
        """Return what `from_spec` needs beside K and the fitted arrays; JSON-able."""
        kept = {} if self.grid else {"origin": self.origin, "codes": self.codes}
        return {**super().spec(), "rank": self.rank, **kept}

    def encode(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return codes of weights by projection; only for an orthonormal (PCA) basis."""
        if self.origin != "pca":
            raise InputError("codes in the head's own basis are dy/dz: give them to encode_codes")
        flat = _checked(np.reshape(weights, (len(weights), -1)), len(self.fitted["offset"]))
        return self.encode_codes((flat - self.fitted["offset"]) @ self.fitted["basis"].T)

    def encode_codes(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows of codes `[n R]`."""
        return {} if self.uses_embedding else self._pack(_checked(codes, self.rank))

    def decode(self, rows: Rows) -> np.ndarray:
        """Return weights `[n K]` or `[n K H W]`, float32."""
        return self._decoded(self.unpack(rows))

    def unpack(self, rows: Rows) -> np.ndarray:
        """Return the codes; with a multiple of the identity as basis the weights themselves."""
        codes = self.stored_codes(rows)
        return codes if self._scale is None else self._spread(codes)

    def _decoded(self, unpacked: np.ndarray) -> np.ndarray:
        return unpacked if self._scale is not None else self._placed(self._spread(unpacked))

    def combine(self, unpacked: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Average the codes and decode once: the same sum, R numbers a neighbor instead of K."""
        mixed = super().combine(unpacked, coefficients)
        if self._scale is not None:
            return mixed
        return self._placed(self._spread(mixed, np.float32(coefficients.sum())))

    def norms(self, unpacked: np.ndarray) -> np.ndarray:
        """Return norms from the codes and products of the basis with itself, without decoding."""
        if self._scale is not None:
            return super().norms(unpacked)
        if self.rank > len(self.fitted["offset"]):
            # Products `[R R]` would take more memory than the basis, and more time than decoding.
            return super().norms(self._spread(unpacked))
        codes = unpacked.astype(np.float64)
        # No cached_property: until Python 3.12 a child forked meanwhile would wait for its lock.
        self._products = self._products or self._multiplied()
        gram, along, squared = self._products
        mixed = codes if gram is None else codes @ gram
        if along is not None:
            mixed = mixed + along
        squares = (mixed * codes).sum(axis=1) + squared
        return np.asarray(np.sqrt(np.maximum(squares, 0)))

    def _multiplied(self) -> _Products:
        """Return what |c B + o|^2 needs: B B^T `[R R]`, 2 B o `[R]` and |o|^2, in float64.

        None stands for a product that changes nothing: of orthonormal rows, of a zero offset.
        """
        basis, offset = (self.fitted[name].astype(np.float64) for name in ("basis", "offset"))
        gram = basis @ basis.T
        orthonormal = np.abs(gram - np.eye(self.rank)).max() < _ORTHONORMAL
        along = 2 * basis @ offset if offset.any() else None
        return None if orthonormal else gram, along, float(offset @ offset)

    def stored_codes(self, rows: Rows) -> np.ndarray:
        """Return the codes `[n R]` that multiply the basis, as float32."""
        return np.asarray(rows["embedding"]) if self.uses_embedding else self._unpack(rows)

    def _spread(self, codes: np.ndarray, share: np.float32 | float = 1.0) -> np.ndarray:
        if self._scale is not None:
            spread = codes * self._scale
        elif codes.ndim == 1:
            spread = codes @ self.fitted["basis"]
        else:
            spread = product(codes, self.fitted["basis"])
        spread += share * self.fitted["offset"]
        return np.asarray(spread)

    def _placed(self, weights: np.ndarray) -> np.ndarray:
        if self.grid is None:
            return weights
        return weights.reshape(*weights.shape[:-1], self.n_channels, *self.grid)


def from_spec(
    spec: Mapping[str, str | int],
    n_channels: int,
    fitted: Rows,
    grid: Sequence[int] | None = None,
) -> Encoding:
    """Return the encoding that `Encoding.spec`, K and the arrays kept once describe.

    By-position needs the layer's grid (H, W). What does not fit the description is an `InputError`.
    """
    kind, dtype = spec.get("name"), str(spec.get("dtype"))
    try:
        if kind == "dense":
            return Dense(n_channels, dtype)
        if kind == "top-m":
            return TopM(n_channels, int(spec["m"]), str(spec["by"]), dtype)
        if kind not in ("low-rank", "by-position"):
            known = "top-m, low-rank, dense, by-position"
            raise InputError(f"encoding {kind!r} is unknown; known: {known}")
        origin, codes, sides = "pca", "stored", None
        if kind == "low-rank":
            origin, codes = str(spec["origin"]), str(spec["codes"])
        elif grid is None:
            raise InputError("weights by position need the layer's grid, and it is null")
        else:
            sides = (grid[0], grid[1])
        basis, shape = fitted["basis"], [int(spec["rank"]), n_channels * math.prod(sides or ())]
        if [*basis.shape] != shape:
            described = f"the description says [{shape[0]} {shape[1]}]"
            raise InputError(f"the basis has shape {list(basis.shape)}; {described}")
        return LowRank(basis, fitted["offset"], origin, codes, dtype, sides)
    except (KeyError, TypeError) as error:
        raise InputError(f"the description of the encoding lacks {error}") from error


def fit_pca(sample: np.ndarray, rank: int, dtype: str = "float16") -> LowRank:
    """Fit a low-rank encoding to the principal components of a sample of weights.

    Of weights `[n K]`, or by position `[n K H W]`. Its rank is smaller where the sample spans fewer
    dimensions, and at least 1.
    """
    if len(sample) == 0:
        raise InputError("a low-rank basis needs at least one weight vector to be fitted on")
    flat = np.reshape(sample, (len(sample), -1))
    flat = _checked(flat, flat.shape[1]).astype(np.float64)
    rank = whole("rank", rank, 1)
    offset = flat.mean(axis=0)
    centered = flat - offset
    n, channels = centered.shape
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    gram = centered @ centered.T if n < channels else centered.T @ centered
    values, vectors = np.linalg.eigh(gram)
    spanned = int((values > values[-1] * max(n, channels) * np.finfo(np.float64).eps).sum())
    kept = max(1, min(rank, spanned))
    basis = vectors[:, ::-1][:, :kept].T
    if n < channels:
        basis = basis @ centered
        lengths = np.linalg.norm(basis, axis=1, keepdims=True)
        basis = np.divide(basis, lengths, out=np.zeros_like(basis), where=lengths > 0)
    # Eigenvectors have no sign of their own: make the largest entry positive.
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    grid = (sample.shape[2], sample.shape[3]) if sample.ndim == 4 else None
    return LowRank(basis * np.where(largest < 0, -1, 1), offset, "pca", "stored", dtype, grid)


def _multiple_of_identity(basis: np.ndarray) -> np.float32 | None:
    # s where the basis is s times the identity matrix.
    if basis.shape[0] != basis.shape[1]:
        return None
    scale: np.float32 = basis[0, 0]
    alike = np.count_nonzero(basis) == len(basis) and bool((basis.diagonal() == scale).all())
    return scale if alike and scale != 0 else None


def _checked(values: np.ndarray, width: int) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] != width:
        raise InputError(f"got an array of shape {list(values.shape)}; expected [n {width}]")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise InputError(f"row {bad} holds a NaN or an infinity; weights must be finite")
    return values
