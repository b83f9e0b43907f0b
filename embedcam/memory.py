"""Too little memory: the many ways in which libraries say so, and one sentence for all of them."""

import errno
import mmap
import re
from collections.abc import Mapping
from typing import Any

from .errors import EmbedcamError, text_of

_SAID = re.compile(
    r"out of memory|(?:can(?:'t|not)|unable to|failed to|not) allocate|bad.?alloc"
    r"|insufficient memory|not enough memory|can't start new thread|failed to map segment"
    # oneDNN's words for it; of what it does not support it says "a primitive descriptor".
    r"|could not create a (?:primitive(?! desc)|memory object)"
    # Said by Python where a library's C code met a failing allocation and did not say so.
    r"|error return without exception set|NULL without setting an exception",
    re.IGNORECASE,
)
_SPARE = 64 << 20
_LESS = {"batch_size": "a smaller --batch-size", "workers": "fewer --workers"}


def ran_out(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that there was too little memory.

    Such a failure says nothing about a picture, a network or a file: nothing may be concluded from
    it, and no result of it kept.
    """
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        # Of embedcam's own words some may be a file's name.
        if not isinstance(error, EmbedcamError) and _SAID.search(text_of(error)[:2000]):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_left(n_bytes: int) -> bool:
    """Whether that much memory, and a little to spare, could be had now."""
    try:
        mmap.mmap(-1, n_bytes + _SPARE).close()
    except (OSError, MemoryError, ValueError, OverflowError):
        return False
    return True


def told(error: BaseException, options: Mapping[str, Any]) -> BaseException:
    """The error, or where memory ran out what a command says of that; its options are named."""
    if not ran_out(error):
        return error
    less = " or ".join(text for name, text in _LESS.items() if name in options)
    way = f"take {less}, or allow it more" if less else "allow it more"
    said = EmbedcamError(
        f"there is too little memory ({_reason(error)}); {way}, and run the same command again"
    )
    # As other failures of the machine.
    said.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    return said


def _reason(error: BaseException) -> str:
    """What the library said, on one line, without the place in its source."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    text = re.sub(r"^\[enforce fail at .*?\] \.? ?", "", text).partition(" Exception raised")[0]
    return text[:200] or type(error).__name__
