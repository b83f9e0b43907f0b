"""What can be said on the command line. Nothing heavy is imported until a command runs."""

import argparse
import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__
from ..errors import cut, say


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and names the nearest option there is."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {cut(message, 1500)}; see `{self.prog} --help`")
        self.exit(2)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        known = list(action.choices or ())
        if action.nargs == argparse.PARSER and arg_strings[0] not in known:
            hint = _nearest(arg_strings[0], known) or f"known: {', '.join(known)}"
            self.error(f"there is no command {arg_strings[0]!r}; {hint}")
        if action.option_strings and arg_strings == ["--"]:  # argparse would make a list of it
            self.error(f"argument {'/'.join(action.option_strings)}: expected a value, not '--'")
        return super()._get_values(action, arg_strings)


class _Command(_Parser):
    """A command: its options are declared once it is named, and may stand anywhere."""

    declare: Callable[[argparse.ArgumentParser], None] | None = None
    _mixing = False

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, but refuse what is unknown, and take options anywhere."""
        if self.declare is not None:
            declare, self.declare = self.declare, None
            declare(self)
        if self._mixing:  # called back by argparse's own two passes
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            hint = _nearest(unknown[0].partition("=")[0], options)
            self.error(f"{' '.join(unknown)!r} means nothing here" + (hint and f"; {hint}"))
        return parsed, []


def _nearest(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else ""


def examples() -> dict[str, str]:
    """Return what `--help` ends with, by command; "" is of all of them."""
    file = os.path.join(os.path.dirname(__file__), "templates", "examples.txt")
    with open(file, encoding="utf-8") as opened:
        sections = opened.read().removeprefix("== ").split("\n== ")
    # A command's text ends in one line end, as the help of argparse wants it.
    pairs = [section.partition("\n")[::2] for section in sections]
    return {name: f"{text.rstrip()}\n" for name, text in pairs}


def parser() -> argparse.ArgumentParser:
    """Return the whole command line."""
    # An abbreviation that works today means something else once an option is added.
    usual: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }
    epilogs, about = examples(), "Class activation maps for embedding networks."
    top = _Parser(
        "embedcam",
        description=f"Why did this image come back? {about}",
        epilog=epilogs[""],
        **usual,
    )
    top.add_argument("--version", action="version", version=f"embedcam {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", dest="command", parser_class=_Command)
    for name, (module, positionals, summary) in COMMANDS.items():
        command: _Command = commands.add_parser(
            name,
            usage=f"embedcam {name} [options] {positionals}",
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilogs[name],
            **usual,
        )
        command.set_defaults(run=partial(_run, module, name))
        # What only one command needs is not made for `embedcam --help`.
        command.declare = partial(_run, "options", name)
    return top


COMMANDS = {
    "build": ("offline", "[IMAGES] INDEX", "build an index of CAM weights"),
    "add": ("offline", "INDEX IMAGES", "add images to an index"),
    "plan": ("offline", "[IMAGES] JOB", "divide a build into pieces"),
    "shard": ("offline", "JOB I", "do a piece of a job, anywhere"),
    "merge": ("offline", "JOB INDEX", "make the index from a job's pieces"),
    "remove": ("offline", "INDEX ID ...", "remove images by id"),
    "compact": ("offline", "INDEX", "drop removed images' bytes"),
    "compress": ("offline", "INDEX OUTPUT", "merge an index into prototypes"),
    "rows": ("stores", "INDEX --to URL", "write an index's rows into a database"),
    "model": ("stores", "INDEX -o FILE", "write what explains such rows as one file"),
    "explain": ("online", "INDEX IMAGE ...", "explain query images"),
    "serve": ("serving", "INDEX", "explain over HTTP"),
    "compare": (
        "online",
        "INDEX [IMAGE] RESULT",
        "why two images, or words and one, match",
    ),
    "evaluate": ("evaluation", "INDEX --images IMAGES", "measure how good the maps are"),
    "export": ("offline", "INDEX -o FILE", "write the network as an ONNX file"),
    "calibrate": ("offline", "INDEX", "calibrate trust and match for what it holds now"),
    "info": ("output", "INDEX", "say what an index holds"),
    "verify": ("output", "INDEX", "check every promise of an index"),
    "demo": ("offline", "[FOLDER]", "the main job on handwritten digits"),
}
"""Each command's module, with a function of its name, its arguments, and what it does."""


def _run(module: str, name: str, given: argparse.Namespace | argparse.ArgumentParser) -> None:
    getattr(import_module(f"{__package__}.{module}"), name)(given)
