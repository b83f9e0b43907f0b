"""The command line: `embedcam build | add | explain | export | info ...`."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run one command; see `embedcam.cli.command_line.main`."""
    from .command_line import main as run

    return run(arguments)
