"""Commands that bring rows to stores, and what --model and --store open for those that explain."""

import os
from argparse import Namespace
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..errors import InputError, Plain
from ..images.progress import progress_of
from .output import counted, emit, size_text

if TYPE_CHECKING:
    from ..index import Index
    from ..stores import Copied, Store

_SECONDS = 30.0
"""The longest that a command waits for one search."""


def rows(options: Namespace) -> None:
    """Bring a store's rows up to those of an index."""
    from ..index import Index
    from ..stores import Table, copy_rows, open_store

    with Index.open(options.index, with_faiss=False) as index:
        if not index.manifest.parts:
            raise InputError(f"{index.path}: is a model, which holds no images; give the index")
        old, own = options.drop_generation, index.generation
        if old == own:
            raise InputError(
                f"--drop-generation {old} is the generation of this index, whose rows are written; "
                "name an old one"
            )
        table, total = Table.of(index, options.embedding), len(index)
        with closing(open_store(options.to, table)) as store:
            if old is not None and old not in (known := store.generations()):
                there = ", ".join(sorted(known)) or "none"
                raise InputError(
                    f"--drop-generation {old}: {store.name} holds no row of it; it holds rows of: "
                    f"{there}"
                )
            with progress_of("rows", total, "rows", shown=options.progress) as advance:
                done = copy_rows(
                    index,
                    store,
                    embedding=options.embedding,
                    prune=options.prune,
                    progress=advance,
                )
            dropped = 0
            if old is not None:
                dropped = store.drop(old)
                store.finish()
            told: dict[str, Plain] = {"store": store.name, "generation": own}
            told |= {**asdict(done), "dropped": dropped}
            emit(options, told, f"{store.name}: {', '.join(_done(done, own, old, dropped))}")


def _done(done: "Copied", own: str, old: str | None, dropped: int) -> list[str]:
    """Return what was done, in words."""
    wrote = counted(done.written, "row") + " written"
    told = [wrote if done.written or not done.kept else "nothing to write"]
    others = {name: rows for name, rows in (done.others or {}).items() if name != old}
    for number, what in (
        (done.kept, "there before"),
        (done.unplaced, "without a row there, whose codes were left out"),
        (done.removed, "removed, as from the index"),
        (done.pruned, "pruned, which the index does not know"),
        (done.unknown - done.pruned, "that the index does not know (--prune removes them)"),
    ):
        if number:
            told.append(f"{number:,} {what}")
    told.append(f"generation {own}")
    for name, rows in sorted((done.replaced or {}).items()):
        told.append(f"in place of {counted(rows, 'row')} of generation {name}")
    if old is not None:
        told.append(f"{counted(dropped, 'row')} of generation {old} dropped")
    if others:
        each = ", ".join(f"{name} ({rows:,})" for name, rows in sorted(others.items()))
        told.append(f"beside those of {each}")
    return told


def model(options: Namespace) -> None:
    """Write what an index fits once as one file."""
    from ..index import Index
    from ..index.model import write_model
    from .online import check_file

    check_file(options.output)
    with Index.open(options.index, with_faiss=False) as index:
        path, generation = write_model(index, options.output), index.generation
    size = path.stat().st_size
    told: dict[str, Plain] = {"path": str(path), "bytes": size, "generation": generation}
    emit(options, told, f"{path}: {size_text(size)}, generation {generation}")


def take_model(options: Namespace) -> None:
    """Put the file of --model in INDEX's place, whose word is then the first picture."""
    if options.model is not None:
        if options.store is None:
            raise InputError(
                "--model knows no images; say with --store URL where its rows are, as "
                "`embedcam rows INDEX --to URL` wrote them"
            )
        if hasattr(options, "queries"):
            options.queries = [*filter(None, [options.index]), *options.queries]
        elif options.index is not None:
            raise InputError(f"--model is given, and {options.index}, too; leave one of them out")
        options.index = options.model
    elif options.index is None:
        raise InputError("no index was given; name its folder, or give --model and --store")
    if options.store is not None and getattr(options, "fallback", False):
        raise InputError(
            "--fallback tells a query from other images of an index, and a store returns its "
            "neighbors alone; leave out --fallback, or explain by the index"
        )
    words = getattr(options, "text", None) or getattr(options, "text_embedding", None)
    if getattr(options, "queries", True) == [] and not words:
        raise InputError("no picture was given; name one, a folder or a CSV behind INDEX")
    if options.store is not None and not os.path.isfile(options.index):
        raise InputError(
            f"--store goes with the file of a model, and {options.index} is none; "
            "`embedcam model INDEX -o model.embedcam` writes one: --model model.embedcam"
        )
    if options.store is None and os.path.isfile(options.index):
        raise InputError(
            f"{options.index}: is a file, not the folder of an index; of a model, say with --store "
            "URL where its rows are"
        )


def store_of(
    options: Namespace, index: "Index", seconds: float = _SECONDS
) -> "AbstractContextManager[Store | None]":
    """Open the store that --store names; None without one."""
    if options.store is None:
        return nullcontext()
    from ..stores import Table, open_store

    return closing(open_store(options.store, Table.of(index), seconds=seconds))
