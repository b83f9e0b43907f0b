"""One command from its arguments to its exit code, and how what goes wrong is said."""

import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from .. import errors
from ..errors import (
    EmbedcamError,
    EmbeddingError,
    ImageError,
    IndexFormatError,
    NetworkError,
    StoreError,
    say,
    show,
)
from .interrupts import INTERRUPTED, INTERRUPTS

EXIT_CODES: dict[type[Exception], int] = {
    ImageError: 3,
    NetworkError: 4,
    IndexFormatError: 5,
    StoreError: 6,
    EmbedcamError: 2,
    OSError: 6,
}
"""The first class that fits an error gives the exit code; 0 is success, 130 an interruption."""
UNEXPECTED = 70
_FOR_COMMAND_LINE = (
    # In brackets behind the option.
    (
        r" \((?:(?:(?:replace|update|exclude_query)=True|per_class=False|layer=|size=|resize=)"
        r"(?:, )?)+\)",
        "",
    ),
    (r'\b(labels|resize)="(\w+)"', r"--\1 \2"),
    (r"\bnormalize=False\b", "--no-normalize"),
    (r"\bimages= \(--images\)", "--images"),
    (r"\bmax_pixels\b=?", "--max-pixels"),
    (r"\bexclude=", "--exclude"),
    (r"\babove = '([^']*)'", r"--above \1"),
    (r"\bgive result\b", "give --result"),
    # With what else comes up to a mistyped id.
    (
        r"^(the index has no image .*?)(?:; see `index\.ids`)?$",
        r"\1; `embedcam info INDEX --ids` lists those it has",
    ),
)
"""Arguments that messages name to callers from Python, and what the command line has for them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0 done; 2 wrong arguments or choices; 3 an image; 4 the network; 5 the index; 6 a file,
    folder or store that cannot be read or written, or too little memory; 70 a fault of embedcam's
    own; 130 interrupted.
    """
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # before the command began, or while its error was being printed
        say("embedcam: interrupted")
        return INTERRUPTED
    except MemoryError:  # before the command began, or too little for a sentence about an error
        if "--debug" in (sys.argv if arguments is None else arguments):
            raise
    # What the command held is free by now.
    say("embedcam: there is too little memory; allow it more, and run the same command again")
    return EXIT_CODES[OSError]


def _run(arguments: Sequence[str] | None) -> int:
    from .parser import COMMANDS, parser

    if any("\0" in word for word in arguments or ()):
        say("embedcam: an argument holds a NUL, which no name can")
        return EXIT_CODES[EmbedcamError]
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has said what is wrong, or has printed the help
        return int(stop.code or 0)
    if options.command is None:
        say(f"embedcam: name a command: {', '.join(COMMANDS)}; see `embedcam --help`")
        return EXIT_CODES[EmbedcamError]
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"embedcam\.")
        warnings.showwarning = _show_warning
        try:
            with INTERRUPTS:
                from .output import logged_as_notes  # nothing heavy before a command is known

                with logged_as_notes(options):
                    options.run(options)
                if sys.stdout is not None:
                    sys.stdout.flush()  # a reader that has gone away is met here, not at exit
                if INTERRUPTS.met:
                    raise KeyboardInterrupt  # a library has swallowed it
        except KeyboardInterrupt:
            return _interrupted(options)
        except BrokenPipeError:
            _discard_output()
        except (Exception, SystemExit) as error:
            if INTERRUPTS.met:  # a library has made its own error of it
                return _interrupted(options)
            if options.debug:
                raise
            return _say(errors.told(error, vars(options)), _way_out(error, options))
    return 0


def for_command_line(text: str) -> str:
    """Return a message in the words of the command line, where it names arguments of Python."""
    for argument, option in _FOR_COMMAND_LINE:
        text = re.sub(argument, option, text)
    return text


def _interrupted(options: Namespace) -> int:
    hint = "; run the same command again to go on" if _is_kept(options) else ""
    say(f"embedcam: interrupted{hint}")
    return INTERRUPTED


def _is_kept(options: Namespace) -> bool:
    """Return whether running the command again finds work that was done before."""
    from pathlib import Path  # no time for it where only help is printed

    if options.command in ("shard", "merge"):
        return any(Path(options.job).glob("embed-*/arrays.json"))
    if options.command not in ("build", "add", "demo"):
        return "report" in options and options.report is not None
    folder = Path(options.folder if options.command == "demo" else options.index)
    stages = folder / "stages.json"
    recorded = stages.read_text(encoding="utf-8").strip() if stages.is_file() else "{}"
    if getattr(options, "job", None) and any(Path(options.job).glob("embed-*/arrays.json")):
        return True
    return recorded != "{}" or any(folder.glob("**/.building/embed-*/arrays.json"))


def _way_out(error: BaseException, options: Namespace) -> str:
    """Return words on the option that leaves out a broken image among many."""
    of_job = options.command in ("shard", "merge")
    takes = of_job or options.command in ("build", "add", "plan", "evaluate")
    if not takes or re.search("the (build|job) again", str(error)):
        return ""
    # Of a probe picture, which is no file, there is nothing to leave out.
    of_file = isinstance(error, EmbeddingError) and error.is_named
    broken = of_file or isinstance(error, ImageError)
    if not broken or (not of_job and options.on_unreadable == "skip"):
        return ""
    left_out = "--on-unreadable skip leaves such files out"
    return f"; planned again in another folder, {left_out}" if of_job else f"; {left_out}"


def _say(error: BaseException, way_out: str = "") -> int:
    """Print one sentence about an error; return its exit code."""
    code = next((c for kind, c in EXIT_CODES.items() if isinstance(error, kind)), UNEXPECTED)
    name, text = type(error).__name__, str(error)
    if isinstance(error, EmbedcamError):  # one line already
        text = for_command_line(text)
        if code == EXIT_CODES[EmbedcamError] and isinstance(error.__cause__, OSError):
            code = EXIT_CODES[OSError]
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("embedcam"):
        # Installed for answering queries only, with --no-deps.
        code = EXIT_CODES[NetworkError]
        text = f"this takes {error.name}, which is not installed; run pip install embedcam, or "
        text += "explain with --onnx FILE"
    elif isinstance(error, OSError) and error.strerror:
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    elif isinstance(error, SystemExit):  # the only code that is not embedcam's own
        code, why = EXIT_CODES[NetworkError], errors.reason(error)
        text = f"the network's own code ended the program ({why}); it should raise an error"
    else:
        text = " ".join(text.split()) or name
        if code == UNEXPECTED:
            text = f"unexpected {name}: {text}; run again with --debug and report it"
    say(f"embedcam: {text}{way_out}")
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], *where: Any, **more: Any
) -> None:
    if category.__module__.startswith("embedcam."):
        say(f"embedcam: warning: {message}")
    else:
        text = warnings.formatwarning(message, category, *where[:2])
        show(*text.splitlines(), error=True)


def _discard_output() -> None:
    """Send what is left nowhere: nobody reads on (`embedcam info x | head -1`)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
