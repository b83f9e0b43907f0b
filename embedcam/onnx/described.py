"""What an ONNX file says of itself, in its `metadata_props`.

    embedcam.version   of the embedcam that wrote it
    embedcam.network   JSON: the network's identity, as an index's manifest has it
    embedcam.layers    JSON: names of the layers behind `activations`, `activations_1`, ...
    embedcam.head      JSON: {"kind": "identity" | "affine" | "other", "bias": base64 or null}

A head that is pooled and affine is z = W p + b, p the mean of the activations over positions and z
the embedding before any normalisation. W is the identity where the kind says so; else the basis
of an index whose encoding has the origin "head", times the number of positions of its `grid` (the
basis is dz/dA). b is float32, little-endian, base64.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ..errors import IndexFormatError, NetworkError
from ..index.identity import Identity

HEAD_KINDS = ("identity", "affine", "other")
PREFIX = "embedcam."
_KEYS = ("version", "network", "layers", "head")
_MAX_CHARACTERS = 16 << 20
_MAX_WIDTH = 1 << 20


@dataclass(frozen=True, eq=False)
class Head:
    """What follows the layer: see the module's docstring.

    kind: one of `HEAD_KINDS`; bias: float32 `[D]`, None for "other".
    """

    kind: str
    bias: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        bias = None
        if self.bias is not None:
            raw = np.ascontiguousarray(self.bias, "<f4").tobytes()
            bias = base64.b64encode(raw).decode("ascii")
        return {"kind": self.kind, "bias": bias}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return what `to_dict` described; a ValueError for anything else."""
        if not isinstance(values, dict) or values.get("kind") not in HEAD_KINDS:
            raise ValueError(f"the head is none of {', '.join(HEAD_KINDS)}")
        kind, text = values["kind"], values.get("bias")
        if (kind == "other") != (text is None):
            raise ValueError(f"a head of kind {kind!r} {'has no' if text else 'needs a'} bias")
        if text is None:
            return cls(kind)
        if not isinstance(text, str):
            raise ValueError("the head's bias is no text")
        raw = base64.b64decode(text, validate=True)
        if not 0 < len(raw) <= 4 * _MAX_WIDTH or len(raw) % 4:
            raise ValueError(f"the head's bias has {len(raw)} bytes")
        bias = np.frombuffer(raw, "<f4").astype(np.float32)
        if not np.isfinite(bias).all():
            raise ValueError("the head's bias holds NaN or infinity")
        return cls(kind, bias)


@dataclass(frozen=True, eq=False)
class Described:
    """An ONNX file's own description.

    version: of embedcam; network: the identity's settings, its probe aside; layers: their names,
    the network's own first; head: of that one.
    """

    version: str
    network: dict[str, Any]
    layers: tuple[str, ...]
    head: Head

    def to_props(self) -> dict[str, str]:
        """Return texts for `metadata_props`."""
        values = {
            "network": json.dumps(self.network, sort_keys=True, allow_nan=False),
            "layers": json.dumps(list(self.layers)),
            "head": json.dumps(self.head.to_dict()),
        }
        return {PREFIX + key: text for key, text in {"version": self.version, **values}.items()}

    @classmethod
    def from_props(cls, props: Mapping[str, str], path: object) -> Self | None:
        """Return what `to_props` wrote; None where none of it is there: another program's file.

        Raises `NetworkError` where some of it is there and cannot be believed.
        """
        texts = {key: props[PREFIX + key] for key in _KEYS if PREFIX + key in props}
        if not texts:
            return None
        try:
            missing = [key for key in _KEYS if key not in texts]
            if missing:
                raise ValueError(f"{PREFIX}{missing[0]} is missing")
            if sum(map(len, texts.values())) > _MAX_CHARACTERS:
                raise ValueError(f"it has more than {_MAX_CHARACTERS:,} characters")
            network, layers = json.loads(texts["network"]), json.loads(texts["layers"])
            if not isinstance(network, dict):
                raise ValueError("the network is no object")
            # One number stands for the probe, which is the file's to compute.
            probe = np.zeros(1, np.float32)
            Identity.from_dict(network, {"probe_embedding": probe, "probe_pooled": probe})
            if not isinstance(layers, list) or not 0 < len(layers) == len(set(map(str, layers))):
                raise ValueError("the layers are no list of names")
            if layers[0] != network["layer"] or not all(isinstance(name, str) for name in layers):
                raise ValueError(f"the layers {layers} do not begin with {network['layer']!r}")
            head = Head.from_dict(json.loads(texts["head"]))
        except (ValueError, RecursionError, IndexFormatError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise NetworkError(
                f"{path}: what it says of its network cannot be believed ({said}); write it again "
                "with `embedcam export`"
            ) from error
        return cls(texts["version"], network, tuple(layers), head)
