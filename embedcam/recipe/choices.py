"""The declaration of a recipe's choices, which the command line and TOML follow."""

import math
from collections.abc import Mapping
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING

from .._checks import one_of
from .._options import setting
from ..errors import InputError, short
from .registry import FILLS, METHODS, bare_name, storable_methods

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(**_):
        """Leave a class as it is: only `Recipe`, below it, is made one."""
        return lambda declaration: declaration


Value = bool | int | float | str | None
"""Of a method's own option."""
TARGETS = ("margin", "centred", "discriminant", "distinctive")
WHITENED = ("discriminant", "distinctive")
"""Targets that measure the margin in whitened embeddings, over every triplet."""
NORMS = ("through", "around")
N_TRIPLETS, MOST_TRIPLETS = 50, 1_000_000
"""S where none is asked for (Chen et al., WACV 2020)."""


def _method(name: str, value: object) -> str:
    bare = bare_name(value) if isinstance(value, str) else ""
    method = METHODS.get(bare)
    if method is None or method.storable:
        return one_of(name, bare or value, storable_methods())
    raise InputError(
        f"{name} = {bare!r}: {method.title} cannot be put in an index: {method.why}; the nearest "
        f"method that can is {method.nearest!r}"
    )


def _pairs(name: str, options: Mapping[str, Value]) -> tuple[tuple[str, Value], ...]:
    """Return options as pairs in the order of their names: one set of choices is one recipe."""
    try:
        pairs = dict(options)
    except (TypeError, ValueError):
        pairs = {"": None}
    for key, value in pairs.items():
        plain = type(value) in (bool, int, str, NoneType)
        plain |= type(value) is float and math.isfinite(value)
        if not isinstance(key, str) or not key or not plain:
            raise InputError(
                f"{name} = {short(options)}; give a table of the method's options, each a number, "
                "a text or a truth value, such as { samples = 50 }"
            )
    return tuple(sorted(pairs.items()))


def _pair(text: str) -> tuple[str, Value]:
    """Return NAME=VALUE, the value a number, true, false, none or words."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InputError(f"{text!r} is not NAME=VALUE, such as samples=50")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    words: dict[str, Value] = {"true": True, "false": False, "none": None}
    return name, words.get(value.lower(), value)


def _count_or_file(text: str) -> int | str:
    try:
        return text if text.endswith(".npy") else int(text)
    except ValueError:
        raise InputError(
            f"{short(text)} is no number and no .npy file of shape [N S 2]; for all there are, use "
            "--sampling all"
        ) from None


_weights, _stored = partial(setting, table="weights"), partial(setting, table="encoding")


@dataclass(frozen=True)
class Choices:
    """A recipe's choices, one setting each; `Recipe` says what they mean."""

    method: str = _weights(
        "gradcam",
        "NAME",
        "gradcam (default), gradcam++, scorecam, ...: any that yields channel weights",
        check=_method,
    )
    target: str = _weights(
        "auto",
        "NAME",
        "auto (default: distinctive where it has a closed form, else margin), "
        "margin, distinctive, discriminant or centred",
        choices=("auto", *TARGETS),
    )
    norm: str = _weights("through", "WAY", "through (default) or around the L2 norm", choices=NORMS)
    sampling: str = _weights(
        "auto",
        "NAME",
        "auto (default), all, random, semihard or hard",
        choices=("auto", "random", "semihard", "hard", "all", "given"),
    )
    triplets: int | None = _weights(
        None,
        "S|FILE",
        "S for each image (default 50), or a .npy file [N S 2]",
        kind=int,
        least=1,
        most=MOST_TRIPLETS,
        read=_count_or_file,
    )
    hinge: bool = _weights(False, help="leave out triplets that the margin satisfies")
    margin: float = _weights(0.2, "X", "of hinge and semihard (default 0.2)", above=0)
    seed: int = _weights(0, "N", "of all sampling (default 0)", least=0, most=(1 << 64) - 1)
    layers: tuple[str, ...] = _weights(
        (),
        "NAMES",
        "of a method of several layers, such as layer2,layer3,layer4; the last is the "
        "one the network explains, named as a build prints it",
    )
    fill: str = _weights(
        "mean",
        "WHAT",
        "what a masking method puts in place of masked pixels: mean (default), black or blur",
        choices=FILLS,
    )
    options: Mapping[str, Value] | tuple[tuple[str, Value], ...] = _weights(
        (),
        "NAME=VALUE",
        "an option of the method, such as samples=50; may be repeated",
        flag="option",
        read=_pair,
        repeated=True,
        check=_pairs,
    )
    encoding: str = _stored(
        "low-rank",
        "NAME",
        "low-rank (default), top-m or dense",
        choices=("low-rank", "top-m", "dense"),
        entry="name",
    )
    rank: int = _stored(128, "R", "R of low-rank (default 128)", least=1)
    m: int = _stored(50, "M", "M of top-m (default 50)", least=1, flag="top_m")
    by: str = _stored(
        "signed", "WHAT", "top-m by signed (default) or magnitude", choices=("signed", "magnitude")
    )
    dtype: str = _stored(
        "float16", "NAME", "float16 (default) or float32", choices=("float16", "float32")
    )
    concepts: int = _stored(
        64,
        "N",
        "parts that activations are divided into, so that receipts can name them (default 64; 0 "
        "for none)",
        least=0,
        most=64,
    )
    faiss: str = setting(
        "Flat", "FACTORY", "FAISS factory string (default Flat), auto, or none", table="search"
    )
    metric: str = setting("l2", "NAME", "l2 (default) or ip", choices=("l2", "ip"), table="search")
    labels: str = _weights("classes", choices=("classes", "numbers"))
    positives: float = _weights(0.1, above=0, most=1)
    negatives: float = _weights(0.5, above=0, most=1)
