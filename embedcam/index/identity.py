"""Identity of the network that an index was built with, checked whenever the two meet.

The digest says whether the parameters are the same bytes; the *probe*, what the network makes of
one synthetic picture, whether they do the same, as in a compiled, exported or half-precision form.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Self

import numpy as np

from ..errors import EmbedcamWarning, IndexFormatError, NetworkMismatch
from .records import Json, Wrong, of_type, read_as

SAME = 1e-3
"""Largest relative difference of the probe for the same parameters in the same precision."""
ALIKE = 2e-2
"""Largest relative difference of the probe for other parameters or another precision."""
_PROBE = ("probe_embedding", "probe_pooled")
_MAX_WIDTH = 1 << 20


class NetworkWarning(EmbedcamWarning):
    """A network was admitted that is not, byte for byte, the one of the index."""


def _floats(value: object) -> np.ndarray:
    array = of_type(np.ndarray, value)
    if array.ndim != 1 or array.dtype.kind != "f" or not 0 < array.size <= _MAX_WIDTH:
        raise Wrong(" is no row of floats")
    if not np.isfinite(array).all():
        raise Wrong(" holds NaN or infinity")
    return np.asarray(array, dtype=np.float32)


Row = Annotated[np.ndarray, _floats]


@dataclass(frozen=True, eq=False)
class Identity:
    """What tells one network from another.

    Layer, preprocess and normalize must be equal; the parameters' digest is of the sorted state
    dict (names without wrappers' prefixes, dtypes, shapes, bytes; no counters of batch norms), the
    structure's of the same without the bytes: with other bytes it is another training. The probe
    is the synthetic picture's embedding `[D]` and the mean of its activations `[K]`, float32; it
    decides about the rest, which is recorded for people.
    """

    parameters_sha256: str
    layer: str
    preprocess: Annotated[Json, lambda value: of_type(dict, value)] | None
    normalize: bool
    output: str | int | None
    layout: str
    precision: str
    name: str | None
    probe_embedding: Row
    probe_pooled: Row
    structure_sha256: str | None = None

    def to_dict(self) -> Json:
        """Return everything but the probe's arrays, ready for JSON."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _PROBE}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return `probe_embedding` float32 `[D]` and `probe_pooled` float32 `[K]`."""
        return {name: getattr(self, name) for name in _PROBE}

    @classmethod
    def from_dict(cls, values: Json, arrays: Mapping[str, np.ndarray]) -> Self:
        """Return the identity that `to_dict` and `arrays` described, refused where it lacks one."""
        try:
            return read_as(cls, {**values, **{n: arrays[n] for n in _PROBE if n in arrays}})
        except Wrong as wrong:
            raise IndexFormatError(f"the network's identity: {wrong}; verify the index") from wrong


def compare(stored: Identity, given: Identity) -> None:
    """Refuse a network that is not the one an index was built with, by a `NetworkMismatch`.

    The same parameters in the same precision may differ in the probe by `SAME`, and so may other
    parameters of the same structure; other forms of the network (compiled, exported, half
    precision, autocast) by `ALIKE`, both with a `NetworkWarning`.
    """
    _refuse_settings(stored, given)
    same = stored.parameters_sha256 == given.parameters_sha256
    precise = same and stored.precision == given.precision
    # Of the same structure and precision, and yet other bytes: trained differently.
    alike = stored.structure_sha256 == given.structure_sha256
    retrained = not same and stored.precision == given.precision and alike
    allowed = SAME if precise or retrained else ALIKE
    difference, what, pair = _furthest(stored, given)
    numbers = "{} in the index, {} given".format(*map(_first, pair))
    about = (
        f"parameters {stored.parameters_sha256[:12]} ({stored.precision}) in the index, "
        f"{given.parameters_sha256[:12]} ({given.precision}) given"
    )
    if not difference <= allowed:
        _refuse_another(stored, given)
        raise NetworkMismatch(
            f"this is not the network of the index: {about}; on the probe picture they differ "
            f"by {difference:.2g} in the {what}, where {allowed:g} is allowed ({numbers}); give "
            "the network and weights that the index was built with, or build the index again"
        )
    if not precise:
        warnings.warn(
            f"{about}: not the same computation, admitted because on the probe picture they differ "
            f"by only {difference:.2g} in the {what}",
            NetworkWarning,
            stacklevel=3,
        )


def difference_of(one: Identity, other: Identity) -> str | None:
    """Return in what two forms of a network differ, in words; None where they compute the same."""
    for key in ("layer", "preprocess", "normalize"):
        mine, theirs = getattr(one, key), getattr(other, key)
        if mine != theirs:
            of = "" if isinstance(mine, dict) else f", {mine!r} and {theirs!r}"
            return f"their {key} differs{of}"
    difference, what, _ = _furthest(one, other)
    if difference <= SAME:
        return None
    return f"on the probe picture they differ by {difference:.2g} in the {what} ({SAME:g} allowed)"


def _furthest(one: Identity, other: Identity) -> tuple[float, str, tuple[np.ndarray, np.ndarray]]:
    """Return the largest relative difference of the probe, of what, and its two arrays."""
    probes = {
        "embedding": (one.probe_embedding, other.probe_embedding),
        "pooled activations": (one.probe_pooled, other.probe_pooled),
    }
    difference, what = max((_difference(*pair), key) for key, pair in probes.items())
    return difference, what, probes[what]


def _refuse_another(stored: Identity, given: Identity) -> None:
    # Both are named where they are others by name and by structure.
    known = stored.name and given.name and stored.structure_sha256 and given.structure_sha256
    if known and stored.name != given.name and stored.structure_sha256 != given.structure_sha256:
        raise NetworkMismatch(
            f"this is not the network of the index: that is {stored.name} with layer "
            f"{stored.layer}, given is {given.name} with layer {given.layer}; leave out --network, "
            "--weights and --layer (or load the index's), or build the index again"
        )


def _refuse_settings(stored: Identity, given: Identity) -> None:
    steps = {
        "layer": "choose that layer (--layer, or layer= of EmbeddingNetwork and from_parts)",
        "preprocess": "give the network that preprocess",
        "normalize": "give the network that normalize",
    }
    for key, step in steps.items():
        old, new = getattr(stored, key), getattr(given, key)
        if old == new:
            continue
        _refuse_another(stored, given)
        before, now = f"network of the index: its {key} is", "given is one with"
        if isinstance(old, dict) and isinstance(new, dict):
            # Only the entries that differ, so that a message shows what matters.
            differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            options = [name for name in ("size", "resize") if name in differ]
            if options and set(differ) <= {"size", "resize", "resize_to"}:
                before, now, differ = "input of the index: built with", "and given is", options
                keys = ", ".join(f"{name}=" for name in options)
                step = f"leave out {' and '.join(f'--{name}' for name in options)} ({keys}), {step}"
            old, new = ({name: of.get(name) for name in differ} for of in (old, new))
        old, new = (json.dumps(one) if isinstance(one, dict) else repr(one) for one in (old, new))
        raise NetworkMismatch(
            f"this is not the {before} {old}, {now} {new}; {step}, or build the index again"
        )


def _first(array: np.ndarray) -> str:
    # Numbers of a probe array, to be compared by eye.
    return f"{array.size} numbers: {', '.join(f'{value:.4g}' for value in array[:3])}, ..."


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    # |a - b| / |a|, infinite for arrays of different sizes.
    if a.shape != b.shape:
        return math.inf
    size = float(np.linalg.norm(a.astype(np.float64)))
    distance = float(np.linalg.norm(a.astype(np.float64) - b))
    return distance / size if size > 0 else (0.0 if distance == 0 else math.inf)
