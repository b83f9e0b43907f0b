"""What others wrote, made fit to be read: one line, of letters that can be seen, of bounded length.

Ids, labels, paths and names come from files and indexes of strangers. Whatever is printed for a
person goes through `printable`; whatever quotes a value in a message goes through `short`.
"""

import json
import logging
import re
import sys
from reprlib import Repr
from typing import Any, TextIO
from unicodedata import category

MESSAGE = 2_000
"""Characters of the longest message."""
_QUOTED = 60
_UNSEEN_LETTERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0]")
"""Drawn as nothing, though Unicode counts them among letters and marks."""


def printable(text: str) -> str:
    """The text with everything that is not seen escaped as Python writes it (`\\x1b`, `\\u202e`).

    That is: control characters and line ends, marks that turn the direction of writing, other
    format characters, and halves of surrogate pairs. Blanks of every width stay.
    """
    if text.isprintable() and not _UNSEEN_LETTERS.search(text):
        return text
    return "".join(
        letter
        if (letter.isprintable() or category(letter) == "Zs") and not _UNSEEN_LETTERS.match(letter)
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def cut(text: str, most: int = MESSAGE) -> str:
    """The text, or its beginning and its end around "..." where it is longer than `most`."""
    if len(text) <= most:
        return text
    kept = most - 3
    tail = 2 * kept // 5
    return f"{text[: kept - tail]}...{text[len(text) - tail :]}"


def sentence(text: str, most: int = MESSAGE) -> str:
    """A message: printable, and no longer than `most` characters."""
    return cut(printable(cut(text, most)), most)


def short(value: object, most: int = _QUOTED) -> str:
    """A value as messages quote it: Python's way of writing it, cut in the middle."""
    try:
        return sentence(_BRIEF.repr(value), most)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        return f"<{type(value).__name__}>"


def reason(error: BaseException, most: int = 200) -> str:
    """The first line of a foreign exception's message; its kind where it has none.

    Of the system's errors what it says, without the number and the file's name.
    """
    text = (isinstance(error, OSError) and error.strerror) or str(error)[: 10 * MESSAGE]
    line = next(filter(None, map(str.strip, text.splitlines())), "")
    return sentence(line.rstrip(". ") or type(error).__name__, most)


def show(*lines: str, error: bool = False, flush: bool = False) -> None:
    """Print lines for a person: the only place that writes to a terminal.

    Args:
        lines: each is printed as one line, whatever it holds.
        error: on the error stream. A stream that was closed from the start is passed over.
        flush: at once.
    """
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


def as_json(values: Any, indent: int | None = None) -> str:
    """JSON of ASCII letters that can be seen."""
    # One control character that JSON lets through: DEL.
    return json.dumps(values, indent=indent, allow_nan=False).replace("\x7f", "\\u007f")


def show_json(values: Any, *, indent: int | None = None, flush: bool = False) -> None:
    """Print JSON for machines."""
    show(*as_json(values, indent).split("\n"), flush=flush)


class PrintableLines(logging.Formatter):
    """A log's lines for a person: its own tracebacks keep theirs, and nothing else makes one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, printable."""
        return "\n".join(map(printable, super().format(record).split("\n")))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """The message, on one line."""
        return sentence(super().formatMessage(record))


class _Brief(Repr):
    """`reprlib`'s, with more of a string and of a long list than it shows of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 20
        self.maxstring = self.maxother = self.maxlong = MESSAGE


_BRIEF = _Brief()
