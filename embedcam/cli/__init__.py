"""The command line: `embedcam build | add | remove | compact | explain | info | verify | demo`.

parser.py    what can be said, with examples; imports nothing heavy, so that --help is quick
offline.py   build, add, remove, compact
online.py    explain
report.py    info and verify, and how things are printed
"""

import sys
from collections.abc import Sequence

from ..errors import (
    EmbedcamError,
    ImageError,
    IndexFormatError,
    NetworkError,
)

EXIT_CODES = {ImageError: 3, NetworkError: 4, IndexFormatError: 5, EmbedcamError: 2}
"""The first class that fits an error gives the exit code; 0 is success, 130 an interruption."""
INTERRUPTED, UNEXPECTED = 130, 70


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 2 wrong arguments or choices; 3 an image; 4 the network; 5 the index; 70 a fault of
        embedcam's own; 130 interrupted.
    """
    from .parser import parser

    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except EmbedcamError as error:
        return _say(
            options, error, next(c for kind, c in EXIT_CODES.items() if isinstance(error, kind))
        )
    except KeyboardInterrupt:
        print("embedcam: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if options.debug:
            raise
        return _say(options, error, UNEXPECTED)
    return 0


def _say(options: object, error: Exception, code: int) -> int:
    """One sentence on the error stream; the whole traceback only with --debug."""
    if getattr(options, "debug", False):
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    if code == UNEXPECTED:
        text = f"unexpected {type(error).__name__}: {text}; run again with --debug and report it"
    print(f"embedcam: {text}", file=sys.stderr)
    return code
