"""Everything embedcam raises on purpose.

EmbedcamError
├── InputError (also ValueError)     an argument, array or option that cannot be used
│   ├── ImageError                   an image that cannot be read, with its path
│   │   └── ImageTooLarge            one of more pixels than the limit
│   └── RecipeError                  choices that do not go together; names the nearest valid ones
├── NetworkError                     a network, layer or weights file that cannot be used
│   ├── EmbeddingError               what it makes of some pictures: NaN, infinity, or zeros
│   └── NetworkMismatch              a working network, but not the one the index was built with
└── IndexFormatError                 an index on disk that is broken, unfinished or too new
    └── IndexBusyError               another process is writing to the index

A message says what was given, what was expected, and what to do next. It is one line of at most
2,000 printable characters, whatever a file or a caller put into it.
"""

from collections.abc import Sequence

from .printing import sentence


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


class ImageError(InputError):
    """An image that cannot be read; the message begins with its path or name."""


class ImageTooLarge(ImageError):  # noqa: N818 - reads as the fact it states
    """An image of more pixels than the limit; not one of them was decoded."""


class RecipeError(InputError):
    """Choices that do not go together; the message names the nearest valid ones."""


class NetworkError(EmbedcamError):
    """A network, layer or weights file that cannot be used."""


class EmbeddingError(NetworkError):
    """Embeddings or activations of some pictures that cannot be used.

    Args:
        what: is wrong with them, such as "the embedding is zero and cannot be normalised".
        advice: what to do next.
        rows: the pictures' places in the batch.
        size: pictures of the batch; of one alone no place is named.
    """

    def __init__(self, what: str, advice: str, rows: Sequence[int], size: int) -> None:
        self.what, self.advice, self.rows = what, advice, list(rows)
        self.is_named = False
        where = ", ".join(map(str, self.rows[:10])) + (", ..." if len(self.rows) > 10 else "")
        at = f" (positions {where} of the batch)" if size > 1 else ""
        super().__init__(f"{what}{at}; {advice}")

    def named(self, names: Sequence[str]) -> "EmbeddingError":
        """The same error with the first picture's name before it.

        Args:
            names: of all pictures of the batch.
        """
        return self.of_one(names[self.rows[0]])

    def of_one(self, name: str) -> "EmbeddingError":
        """The same error with a name before it, whatever its places are."""
        self.args, self.is_named = (f"{name}: {self.what}; {self.advice}",), True
        return self


class NetworkMismatch(NetworkError):  # noqa: N818 - reads as the fact it states
    """A working network, but not the one the index was built with."""


class IndexFormatError(EmbedcamError):
    """An index on disk that is broken, unfinished or of another version."""


class IndexBusyError(IndexFormatError):
    """Another process is writing to the index."""


def text_of(error: BaseException) -> str:
    """What an exception says; nothing where its own code fails at that."""
    try:
        return str(error)
    except Exception:
        return ""
