"""Which network an index was built with: recorded once, checked whenever the two meet.

An `Identity` is a SHA-256 of the parameters, the settings that change what they compute, and a
*probe*: what the network makes of one fixed synthetic picture. The digest says whether the
parameters are the same bytes; the probe says whether they do the same, and so admits compiled,
exported and half-precision networks, whose parameters have other names or bytes.

Arrays only, so that a service without torch can ask.
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


class NetworkWarning(EmbedcamWarning):
    """A network was admitted that is not, byte for byte, the one of the index."""


@dataclass(frozen=True, eq=False)
class Identity:
    """What tells one network from another.

    parameters_sha256: of the sorted state dict: names without wrappers' prefixes, dtypes, shapes,
        bytes; counters of batch norms left out.
    layer, preprocess, normalize: must be equal.
    structure_sha256: of names, dtypes and shapes alone; the same structure with other bytes is
        another training, not another form of the same network.
    output, layout, precision, name: recorded for people; the probe decides.
    probe_embedding: float32 `[D]`, the embedding of the synthetic picture.
    probe_pooled: float32 `[K]`, the mean over positions of its activations.
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
    """Refuse a network that is not the one an index was built with.

    The same parameters in the same precision may differ in the probe by 1e-3, relative, and so may
    other parameters of the same structure; other forms of the network (compiled, exported, half
    precision, autocast) by 2e-2, both with a `NetworkWarning`. Anything else is a
    `NetworkMismatch` that names the index's value and the network's.
    """
    _refuse_settings(stored, given)
    same = stored.parameters_sha256 == given.parameters_sha256
    precise = same and stored.precision == given.precision
    # Of the same structure and precision, and yet other bytes: trained differently.
    retrained = (
        not same
        and stored.precision == given.precision
        and stored.structure_sha256 == given.structure_sha256
    )
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
        if old != new:
            _refuse_another(stored, given)
            old, new = _differing(old, new)
            changed = [name for name in ("size", "resize") if isinstance(old, dict) and name in old]
            if changed and set(old) <= {"size", "resize", "resize_to"}:
                old, new = ({name: of[name] for name in changed} for of in (old, new))
                options = " and ".join(f"--{name}" for name in changed)
                names = ", ".join(f"{name}=" for name in changed)
                raise NetworkMismatch(
                    f"this is not the input of the index, which was built with {_shown(old)}, and "
                    f"given is {_shown(new)}; leave out {options} ({names}), give the network that "
                    "preprocess, or build the index again with this one"
                )
            raise NetworkMismatch(
                f"this is not the network of the index: its {key} is {_shown(old)}, given is one "
                f"with {_shown(new)}; {step}, or build the index again"
            )


def _differing(old: Any, new: Any) -> tuple[Any, Any]:
    # Of two dicts only the entries that differ, so that a message shows what matters.
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: old.get(key) for key in keys}, {key: new.get(key) for key in keys}


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else repr(value)


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
