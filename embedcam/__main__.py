"""The command line as a process: `python -m embedcam`, and the script `embedcam`."""

from .cli.interrupts import INTERRUPTS

INTERRUPTS.take()


def run() -> int:
    """Run the command that the process was started with; its exit code."""
    from .cli import main

    return main()


if __name__ == "__main__":
    import sys

    sys.exit(run())
