"""What stores in a folder or file share: a lock, a check of columns, failures in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

from .._files import held, make_folder
from ..errors import EmbedcamError, InputError, StoreError, ran_out, reason, short

if TYPE_CHECKING:
    import pyarrow as pa

    from .store import Table

COLUMNS: Final = ("id", "codes", "scale", "label", "path", "generation")
"""Of every row; beside them may be "embedding"."""
_PLACE: Final = re.compile(r",? \S+\.rs:\d+(:\d+)?")
"""Where in an engine's own source its error arose."""


def place_of(url: str, scheme: str, *known: str) -> tuple[str, dict[str, str]]:
    """Return the path in an address, and its options, all of which have to be known."""
    path, _, query = url.removeprefix(f"{scheme}:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not path or any(name not in known for name in options):
        names = f"; it takes {', '.join(known)}" if known else ""
        wrong = next((short(name) for name in options if name not in known), "no path")
        raise InputError(f"{url}: has {wrong}; expected {scheme}:PATH{names}")
    return path, options


def locked(folder: str) -> AbstractContextManager[None]:
    """Make a folder where it is missing, and hold its lock; another that does is a StoreError."""
    make_folder(Path(folder).absolute())
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    busy = StoreError(f"{folder}: another process has it open; wait until it is done")
    return held(os.open(Path(folder, ".embedcam.lock"), flags, 0o666), Path(folder), busy)


def check_columns(name: str, found: pa.Schema, table: Table) -> bool:
    """Refuse a table that is not one of rows as these; return whether it has embeddings."""
    for column in COLUMNS:
        if column not in found.names:
            raise StoreError(
                f"{name}: has no column {column!r}, so it holds no rows of embedcam; give another "
                "table or path, or write them with `embedcam rows`"
            )
    check_kind(name, kind_of(found), table)
    return "embedding" in found.names


def kind_of(schema: pa.Schema) -> str | None:
    """Return what embeddings are, such as "float16[128]"; None where there are none."""
    if "embedding" not in schema.names:
        return None
    kind = schema.field("embedding").type
    return f"float{kind.value_type.bit_width}[{getattr(kind, 'list_size', '')}]"


def check_kind(name: str, found: str | None, table: Table) -> None:
    """Refuse embeddings that are not as those to be written, or as wide as those of a model."""
    if table.schema is not None and (wanted := kind_of(table.schema)) != found:
        raise StoreError(
            f"{name}: its embeddings are {found or 'left out'}, and {wanted or 'none'} are to be "
            "written; write them as these (--embedding), or to another place"
        )
    if table.schema is None and found and found[7:] not in ("[]", f"[{table.width}]"):
        raise StoreError(
            f"{name}: its embeddings are {found}, and the model's have {table.width} numbers; give "
            "the model whose rows these are"
        )


def no_search(name: str) -> StoreError:
    """Return what a store says that is asked for neighbors and has no embeddings."""
    return StoreError(
        f"{name}: holds no embeddings, so it cannot search; write rows with --embedding full or "
        "half, or search where the embeddings are and give the ids that were found"
    )


@contextmanager
def in_words(name: str, extra: str, doing: str, seconds: float | None = None) -> Iterator[None]:
    """Tell what an engine raises in one sentence; a missing package by the extra that brings it."""
    try:
        yield
    except EmbedcamError:
        raise
    except ImportError as error:
        raise InputError(
            f'{name}: is opened by {reason(error)}; pip install "embedcam[{extra}]"'
        ) from None
    except Exception as error:
        if ran_out(error):
            raise
        said = _PLACE.sub("", reason(error))
        if seconds is not None and re.search("timeout|interrupt", said, re.IGNORECASE):
            raise StoreError(
                f"{name}: {doing} took longer than {seconds:g} seconds; allow it more, or ask for "
                "fewer rows"
            ) from error
        raise StoreError(
            f"{name}: {doing} failed ({said}); see that it is there and whole, and that this "
            "process may use it"
        ) from error
