"""What can be said on the command line. Nothing heavy is imported until a command runs."""

import argparse
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__
from ..errors import cut, say
from . import examples
from .options import index_options
from .options_offline import (
    add_options,
    build_options,
    calibrate_options,
    compact_options,
    compress_options,
    remove_options,
)
from .options_online import (
    compare_options,
    evaluate_options,
    explain_options,
    export_options,
    serve_options,
)
from .values import path, whole

COMMANDS = {
    "build": "offline.build",
    "add": "offline.add",
    "remove": "offline.remove",
    "compact": "offline.compact",
    "compress": "offline.compress",
    "calibrate": "offline.calibrate",
    "explain": "online.explain",
    "serve": "serving.serve",
    "compare": "pairs.compare",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "info": "report.info",
    "verify": "report.verify",
    "demo": "offline.demo",
}
"""Each command's module and function."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and names the nearest option there is."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation that works today means something else once an option is added.
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {cut(message, 1500)}; see `{self.prog} --help`")
        self.exit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but refuses what no argument of a process can hold."""
        if args is not None and any("\0" in one for one in args):
            self.error("an argument holds a NUL, which no name can")
        return super().parse_args(args, namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs == argparse.PARSER and arg_strings:
            known = list(action.choices or ())
            if arg_strings[0] not in known:
                hint = _nearest(arg_strings[0], known) or f"known: {', '.join(known)}"
                self.error(f"there is no command {arg_strings[0]!r}; {hint}")
        if action.option_strings and arg_strings == ["--"]:  # argparse would make a list of it
            self.error(f"argument {'/'.join(action.option_strings)}: expected a value, not '--'")
        return super()._get_values(action, arg_strings)


class _Command(_Parser):
    """A command; its options may stand before, between and behind its arguments."""

    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but refuses what it does not know, and takes options anywhere."""
        if self._mixing:  # called back by argparse's own two passes
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            hint = _nearest(unknown[0].partition("=")[0], options)
            self.error(f"{' '.join(unknown)!r} means nothing here" + (hint and f"; {hint}"))
        return found, []


def _nearest(given: str, known: Sequence[str]) -> str:
    near = get_close_matches(given, known, 1)
    return f"did you mean {near[0]}?" if near else ""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="embedcam",
        description="Why did this image come back? Class activation maps for embedding networks.",
        epilog=examples.EPILOG,
    )
    top.add_argument("--version", action="version", version=f"embedcam {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", dest="command", parser_class=_Command)
    build_options(_command(commands, "build", "[IMAGES] INDEX", "build an index of CAM weights"))
    add_options(_command(commands, "add", "INDEX IMAGES", "add images to an index"))
    remove_options(_command(commands, "remove", "INDEX ID ...", "remove images by id"))
    compact_options(_command(commands, "compact", "INDEX", "drop removed images' bytes"))
    compress_options(
        _command(
            commands,
            "compress",
            "INDEX OUTPUT",
            "merge an index into prototypes",
        )
    )
    explain_options(_command(commands, "explain", "INDEX IMAGE ...", "explain query images"))
    serve_options(_command(commands, "serve", "INDEX", "explain over HTTP"))
    compare_options(_command(commands, "compare", "INDEX IMAGE RESULT", "why two images match"))
    evaluate_options(
        _command(
            commands,
            "evaluate",
            "INDEX --images IMAGES",
            "measure how good the maps are",
        )
    )
    export_options(
        _command(
            commands,
            "export",
            "INDEX -o FILE",
            "write the network as an ONNX file",
        )
    )
    calibrate_options(
        _command(commands, "calibrate", "INDEX", "calibrate trust and match for what it holds now")
    )
    one = _command(commands, "info", "INDEX", "say what an index holds")
    index_options(one)
    one.add_argument("--ids", action="store_true", help="list the ids of its images, one a line")
    index_options(_command(commands, "verify", "INDEX", "check every promise of an index"))
    one = _command(commands, "demo", "[FOLDER]", "the main job on handwritten digits")
    one.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=path,
        default="demo-output",
        help="where everything is written (default demo-output)",
    )
    one.add_argument("--seed", type=whole, metavar="N", default=0, help="of scenes and training")
    return top


def _command(commands: Any, name: str, positionals: str, summary: str) -> argparse.ArgumentParser:
    one = commands.add_parser(
        name,
        usage=f"embedcam {name} [options] {positionals}",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=getattr(examples, name.upper()),
    )
    one.add_argument("--json", action="store_true", help="print JSON for machines; > FILE keeps it")
    one.add_argument("--quiet", action="store_true", help="no progress, no notes")
    one.add_argument("--debug", action="store_true", help="show the traceback of an error")
    one.set_defaults(run=_deferred(COMMANDS[name]), resumes=name in ("build", "add", "demo"))
    return one


def _deferred(where: str) -> Callable[[argparse.Namespace], None]:
    module, function = where.split(".")

    def run(options: argparse.Namespace) -> None:
        getattr(import_module(f"{__package__}.{module}"), function)(options)

    return run
