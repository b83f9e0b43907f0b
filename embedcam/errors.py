"""Everything embedcam raises on purpose, and how texts are made fit to be printed.

A message says what was given, what was expected, and what to do next. It is one line of at most
2,000 printable characters, whatever a file or a caller put into it.
"""

import errno
import mmap
import re
import sys
from collections.abc import Container, Mapping, Sequence
from reprlib import Repr
from typing import TextIO, TypeAlias
from unicodedata import category

Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"
"""What JSON, an entry of TOML, or an option may hold."""
MESSAGE = 2_000
_QUOTED = 60
# Drawn as nothing, though Unicode counts them among letters and marks.
_UNSEEN_LETTERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0]")


def printable(text: str) -> str:
    """Return a text with all that is not seen escaped as Python writes it; blanks stay."""
    if text.isprintable() and not _UNSEEN_LETTERS.search(text):
        return text
    return "".join(
        letter
        if (letter.isprintable() or category(letter) == "Zs") and not _UNSEEN_LETTERS.match(letter)
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def cut(text: str, most: int = MESSAGE) -> str:
    """Return the text, or both its ends around "..." where it is longer than `most`."""
    if len(text) <= most:
        return text
    tail = 2 * (most - 3) // 5
    return f"{text[: most - 3 - tail]}...{text[len(text) - tail :]}"


def sentence(text: str, most: int = MESSAGE) -> str:
    """Return a text as a message: printable, and no longer than `most` characters."""
    return cut(printable(cut(text, most)), most)


def short(value: object, most: int = _QUOTED) -> str:
    """Return a value as messages quote it: as Python writes it, cut in the middle."""
    try:
        return sentence(_BRIEF.repr(value), most)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        return f"<{type(value).__name__}>"


def reason(error: BaseException, most: int = 200) -> str:
    """Return the first line of a foreign exception's message; its kind where it has none."""
    # Of the system's errors without the number and the file's name.
    text = (isinstance(error, OSError) and error.strerror) or str(error)[: 10 * MESSAGE]
    line = next(filter(None, map(str.strip, text.splitlines())), "")
    return sentence(line.rstrip(". ") or type(error).__name__, most)


def show(*lines: str, error: bool = False, flush: bool = False) -> None:
    """Print texts, each as one line, on a stream that may be closed; only this prints."""
    stream: TextIO | None = sys.stderr if error else sys.stdout
    if stream is None:
        return
    text = "".join(f"{printable(line)}\n" for line in lines)
    try:
        stream.write(text)
    except UnicodeEncodeError:  # an encoding without these letters
        known = stream.encoding or "ascii"
        stream.write(text.encode(known, "backslashreplace").decode(known))
    if flush:
        stream.flush()


def say(text: str) -> None:
    """Print a message on the error stream."""
    show(sentence(text), error=True)


def as_json(values: Plain, indent: int | None = None) -> str:
    """Return JSON of ASCII letters that can be seen."""
    import json  # here, since `--help` needs none

    # One control character that JSON lets through: DEL.
    return json.dumps(values, indent=indent, allow_nan=False).replace("\x7f", "\\u007f")


def show_json(values: Plain, *, indent: int | None = None, flush: bool = False) -> None:
    """Print JSON for machines."""
    show(*as_json(values, indent).split("\n"), flush=flush)


_BRIEF = Repr()
_BRIEF.maxlevel = 3
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxset = _BRIEF.maxfrozenset = _BRIEF.maxdict = 20
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = MESSAGE


class EmbedcamError(Exception):
    """Base of every error embedcam raises on purpose."""

    def __init__(self, *about: object) -> None:
        super().__init__(*(sentence(one) if isinstance(one, str) else one for one in about))


class EmbedcamWarning(UserWarning):
    """Base of every warning; its message is as an error's."""

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


class InputError(EmbedcamError, ValueError):
    """An argument, array or option that cannot be used."""


class PiecesMissing(InputError):  # noqa: N818 - reads as the fact it states
    """Pieces of a job that have to be done before it can be merged: `pieces`, their numbers."""

    def __init__(self, path: str, pieces: Sequence[int], of: int) -> None:
        self.pieces = list(pieces)
        some = ", ".join(map(str, self.pieces[:20])) + (", ..." if len(self.pieces) > 20 else "")
        what, them = f"piece {some} of its {of:,} is missing", "it"
        if len(self.pieces) > 1:
            what = f"{len(self.pieces):,} of its {of:,} pieces are missing ({some})"
            them = "each of them"
        super().__init__(f"{path}: {what}; do {them}: `embedcam shard {path} {self.pieces[0]}`")


class ImageError(InputError):
    """An image that cannot be read; the message begins with its path or name."""


class ImageTooLarge(ImageError):  # noqa: N818 - reads as the fact it states
    """An image of more pixels than the limit; not one of them was decoded."""


class RecipeError(InputError):
    """Choices that do not go together; the message names the nearest valid ones."""


class NetworkError(EmbedcamError):
    """A network, layer or weights file that cannot be used."""


class EmbeddingError(NetworkError):
    """Embeddings or activations that cannot be used, of the pictures at `rows` of a batch."""

    def __init__(self, what: str, advice: str, rows: Sequence[int], size: int) -> None:
        self.what, self.advice, self.rows = what, advice, list(rows)
        self.is_named = False
        where = ", ".join(map(str, self.rows[:10])) + (", ..." if len(self.rows) > 10 else "")
        at = f" (positions {where} of the batch)" if size > 1 else ""
        super().__init__(f"{what}{at}; {advice}")

    def named(self, names: Sequence[str]) -> "EmbeddingError":
        """Return the error with the first of its pictures' name, of all `names`, before it."""
        return self.of_one(names[self.rows[0]])

    def of_one(self, name: str) -> "EmbeddingError":
        """Return the error with a name before it, whatever its places are."""
        self.args, self.is_named = (f"{name}: {self.what}; {self.advice}",), True
        return self


class NetworkMismatch(NetworkError):  # noqa: N818 - reads as the fact it states
    """A working network, but not the one the index was built with."""


class IndexFormatError(EmbedcamError):
    """An index on disk that is broken, unfinished or of another version."""


class IndexBusyError(IndexFormatError):
    """Another process is writing to the index."""


class StoreError(EmbedcamError):
    """A database of rows that cannot be reached, answers too late, or with what cannot be used."""


def text_of(error: BaseException) -> str:
    """Return what an exception says; nothing where its own code fails at that."""
    try:
        return str(error)
    except Exception:
        return ""


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
    """Return whether an exception, or one that led to it, tells of too little memory."""
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
    """Return whether that much memory, and a little to spare, could be had now."""
    try:
        mmap.mmap(-1, n_bytes + _SPARE).close()
    except (OSError, MemoryError, ValueError, OverflowError):
        return False
    return True


def told(error: BaseException, options: Container[str]) -> BaseException:
    """Return the error, or where memory ran out what a command with these options says of it."""
    if not ran_out(error):
        return error
    less = " or ".join(text for name, text in _LESS.items() if name in options)
    advice = f"take {less}, or allow it more" if less else "allow it more"
    while error.__cause__ is not None:
        error = error.__cause__
    why = re.sub(r"^\[enforce fail at .*?\] \.? ?", "", reason(error))
    memory = EmbedcamError(
        f"there is too little memory ({why}); {advice}, and run the same command again"
    )
    # As other failures of the machine.
    memory.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    return memory
