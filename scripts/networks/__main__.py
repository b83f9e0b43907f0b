"""Which networks are explained by one line? Each is tried, and docs/networks.md is written.

    python -m scripts.networks --export
    python -m scripts.networks timm:cait torchvision
    python -m scripts.networks --records networks.jsonl --output docs/networks.md

Random weights, nothing fetched: an index of eight pictures drawn here, a query, receipts of its
nearest, with --export an ONNX file. Each network has a process of its own; one that runs out of
time or memory ends alone. What was tried is kept in a file of records and not tried again.
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

from .cases import SOURCES
from .table import page, summary
from .trial import Trial, Tried, read

_RECORDS = Path("networks.jsonl")


def main(given: list[str] | None = None) -> None:
    """Try the networks that have no record yet, print how each went, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="what names begin with; without any, all")
    parser.add_argument("--export", action="store_true", help="also write ONNX files")
    parser.add_argument("--records", type=Path, default=_RECORDS, help="file of what was tried")
    parser.add_argument("--seconds", type=float, default=600, help="the most a network may take")
    parser.add_argument("--output", type=Path, help="the page to write")
    options = parser.parse_args(given)
    known = {one.name: one for one in recorded(options.records)}
    for name in all_names():
        if name in known or not name.startswith(tuple(options.names) or ""):
            continue
        known[name] = one = tried_apart(name, options.export, options.seconds)
        with options.records.open("a", encoding="utf-8") as file:
            file.write(one.line() + "\n")
        took = f"{sum(one.seconds.values()):6.1f} s"
        said = f"{one.failed}: {one.said}" if one.failed else f"{one.layer} {one.grid} {one.onnx}"
        print(f"{took} {name}: {said}", flush=True)
    ordered = {name: known[name] for name in all_names() if name in known}
    if options.output:
        options.output.write_text(page(ordered), encoding="utf-8")
    print(summary(list(ordered.values())))


def all_names() -> list[str]:
    """Return the networks' names, as `load_network` takes them."""
    return [
        f"{prefix}:{name}"
        for prefix, families in SOURCES.values()
        for names in families.values()
        for name in names
    ]


def recorded(file: Path) -> Iterator[Tried]:
    """Yield what was tried before."""
    if file.exists():
        yield from map(read, file.read_text(encoding="utf-8").splitlines())


def tried_apart(name: str, export: bool, seconds: float) -> Tried:
    """Return what came of a network in a process of its own."""
    settings = {} if name.startswith(__package__) else {"weights": "random"}
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def work() -> None:
        theirs.send(Trial(name, settings, export).run())

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        if mine.poll(seconds):
            return mine.recv()
        ended = f"took more than {seconds:.0f} seconds"
    except EOFError:
        process.join()
        ended = f"its process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Tried(name, failed="process", said=ended, crashed=True)


if __name__ == "__main__":
    main()
