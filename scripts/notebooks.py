"""Execute the notebooks; an error in a cell is an error.

    python scripts/notebooks.py [--write] [NOTEBOOK ...]

Each runs in a folder of its own. EMBEDCAM_WEIGHTS names ImageNet weights of torchvision's
mobilenet_v2; without it the networks have random weights, which checks that every cell runs.
--write keeps the outputs in the notebooks.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"


def main() -> int:
    """Execute notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs")
    options = parser.parse_args()
    os.environ.setdefault("EMBEDCAM_WEIGHTS", "random")
    for file in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
            client.execute()
        if options.write:
            nbformat.write(notebook, file)
        print(f"{file.name}: {len(notebook.cells)} cells ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
