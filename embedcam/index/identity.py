"""Identity of the network that an index was built with, checked whenever the two meet.

The digest says whether the parameters are the same bytes; the *probe*, what the network makes of
one synthetic picture, whether they do the same, as in a compiled, exported or half-precision form.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ..errors import EmbedcamWarning, IndexFormatError, NetworkMismatch

SAME = 1e-3
"""Largest relative difference of the probe for the same parameters in the same precision."""
ALIKE = 2e-2
"""Largest relative difference of the probe for other parameters or another precision."""

_MAX_WIDTH = 1 << 20


_KINDS: dict[str, tuple[type, ...]] = {
    "parameters_sha256": (str,),
    "layer": (str,),
    "preprocess": (dict, type(None)),
    "normalize": (bool,),
    "output": (str, int, type(None)),
    "layout": (str,),
    "precision": (str,),
    "name": (str, type(None)),
}


class NetworkWarning(EmbedcamWarning):
    """A network was admitted that is not, byte for byte, the one of the index."""


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
    preprocess: dict[str, Any] | None
    normalize: bool
    output: str | int | None
    layout: str
    precision: str
    name: str | None
    probe_embedding: np.ndarray
    probe_pooled: np.ndarray
    structure_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the probe's arrays, ready for JSON."""
        return {key: getattr(self, key) for key in (*_KINDS, "structure_sha256")}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return `probe_embedding` float32 `[D]` and `probe_pooled` float32 `[K]`."""
        return {"probe_embedding": self.probe_embedding, "probe_pooled": self.probe_pooled}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Self:
        """Return the identity that `to_dict` and `arrays` described, refused where it lacks one."""
        for key, kinds in _KINDS.items():
            if key not in values:
                raise IndexFormatError(f"the network's identity has no {key!r}; verify the index")
            if not isinstance(values[key], kinds):
                raise IndexFormatError(
                    f"the network's identity has {key} = {values[key]!r}, which is not of the "
                    "expected kind; verify the index"
                )
        return cls(
            **{key: values[key] for key in _KINDS},
            structure_sha256=values.get("structure_sha256"),
            probe_embedding=_probe_array(arrays, "probe_embedding"),
            probe_pooled=_probe_array(arrays, "probe_pooled"),
        )


def _probe_array(arrays: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    array = arrays.get(key, np.empty(0))
    if array.ndim != 1 or array.dtype.kind != "f" or not 0 < array.size <= _MAX_WIDTH:
        raise IndexFormatError(
            f"the network's identity has no usable {key}: expected a row of floats; verify the "
            "index"
        )
    if not np.isfinite(array).all():
        raise IndexFormatError(f"the network's {key} holds NaN or infinity; verify the index")
    return np.asarray(array, dtype=np.float32)


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
    difference, what = max(
        (_difference(a, b), key)
        for key, a, b in (
            ("embedding", stored.probe_embedding, given.probe_embedding),
            ("pooled activations", stored.probe_pooled, given.probe_pooled),
        )
    )
    about = (
        f"parameters {stored.parameters_sha256[:12]} ({stored.precision}) in the index, "
        f"{given.parameters_sha256[:12]} ({given.precision}) given"
    )
    if not difference <= allowed:
        _refuse_another(stored, given)
        raise NetworkMismatch(
            f"this is not the network of the index: {about}; on the probe picture they differ "
            f"by {difference:.2g} in the {what}, where {allowed:g} is allowed "
            f"({_values(stored, what)} in the index, {_values(given, what)} given); give the "
            "network and weights that the index was built with, or build the index again"
        )
    if not precise:
        warnings.warn(
            f"{about}: not the same computation, admitted because on the probe picture they differ "
            f"by only {difference:.2g} in the {what}",
            NetworkWarning,
            stacklevel=3,
        )


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
    advice = {
        "layer": "choose that layer (--layer, or layer= of EmbeddingNetwork and from_parts)",
        "preprocess": "give the network that preprocess",
        "normalize": "give the network that normalize",
    }
    for key, step in advice.items():
        old, new = getattr(stored, key), getattr(given, key)
        if old == new:
            continue
        _refuse_another(stored, given)
        changed: list[str] = []
        if isinstance(old, dict) and isinstance(new, dict):
            # Only the entries that differ, so that a message shows what matters.
            differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            if set(differ) <= {"size", "resize", "resize_to"}:
                changed = [name for name in ("size", "resize") if name in differ]
            old, new = ({name: of.get(name) for name in changed or differ} for of in (old, new))
        before, now = (
            json.dumps(one) if isinstance(one, dict) else repr(one) for one in (old, new)
        )
        if changed:
            options = " and ".join(f"--{name}" for name in changed)
            names = ", ".join(f"{name}=" for name in changed)
            raise NetworkMismatch(
                f"this is not the input of the index, which was built with {before}, and given is "
                f"{now}; leave out {options} ({names}), give the network that preprocess, or build "
                "the index again with this one"
            )
        raise NetworkMismatch(
            f"this is not the network of the index: its {key} is {before}, given is one with "
            f"{now}; {step}, or build the index again"
        )


def _values(identity: Identity, what: str) -> str:
    # The first numbers of a probe array, to be compared by eye.
    array = identity.probe_embedding if what == "embedding" else identity.probe_pooled
    first = ", ".join(f"{value:.4g}" for value in array[:3])
    return f"{array.size} numbers: {first}, ..."


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    # |a - b| / |a|, infinite for arrays of different sizes.
    if a.shape != b.shape:
        return float("inf")
    size = float(np.linalg.norm(a.astype(np.float64)))
    distance = float(np.linalg.norm(a.astype(np.float64) - b))
    return distance / size if size > 0 else (0.0 if distance == 0 else float("inf"))
