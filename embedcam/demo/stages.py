"""Finished stages of the demonstration, so that running it again does only what is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError

_RECORD = "stages.json"


class Stages:
    """Runs each stage once per digest; a stage that ran makes all later ones run again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _RECORD
        recorded = self._read()
        if recorded is None and folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"{folder} holds files that are not this demonstration's; give an empty or new "
                "folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._recorded = recorded or {}
        self._done: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def run(self, name: str, digest: str, product: Path, make: Callable[[], object]) -> None:
        """Call `make` unless `product` is there and was made under the same digest."""
        if self._recorded.get(name) == digest and product.exists():
            self._done[name] = digest
            return
        # Forgotten before the work begins, so that a killed run leaves no later stage believed.
        self._recorded = {}
        self._write()
        begun = time.perf_counter()
        make()
        self.seconds[name] = round(time.perf_counter() - begun, 1)
        self._done[name] = digest
        self._write()

    def _read(self) -> dict[str, str] | None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise InputError(f"{self._path} is damaged; delete the folder and run the demo again")
        return {str(name): str(digest) for name, digest in content.items()}

    def _write(self) -> None:
        unfinished = self._path.with_name(_RECORD + ".part")
        unfinished.write_text(json.dumps(self._done, indent=1), encoding="utf-8")
        unfinished.replace(self._path)
