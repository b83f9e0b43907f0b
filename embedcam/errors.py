"""Everything embedcam raises on purpose.

EmbedcamError
├── InputError (also ValueError)     an argument, array or option that cannot be used
│   ├── ImageError                   an image that cannot be read, with its path
│   │   └── ImageTooLarge            one of more pixels than the limit
│   └── RecipeError                  choices that do not go together; names the nearest valid ones
├── NetworkError                     a network, layer or weights file that cannot be used
│   └── NetworkMismatch              a working network, but not the one the index was built with
└── IndexFormatError                 an index on disk that is broken, unfinished or too new
    └── IndexBusyError               another process is writing to the index

A message says what was given, what was expected, and what to do next. It is one line of at most
2,000 printable characters, whatever a file or a caller put into it.
"""

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


class NetworkMismatch(NetworkError):  # noqa: N818 - reads as the fact it states
    """A working network, but not the one the index was built with."""


class IndexFormatError(EmbedcamError):
    """An index on disk that is broken, unfinished or of another version."""


class IndexBusyError(IndexFormatError):
    """Another process is writing to the index."""
