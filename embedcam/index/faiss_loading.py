"""The FAISS file of an open index: checked when it is opened, loaded by whoever first needs it."""

import os
from pathlib import Path
from typing import Any

from .._files import ProcessLock
from ..errors import InputError
from .faiss_files import load_faiss, open_faiss


class FaissFile:
    """Loaded once for all threads; its descriptor is closed with it.

    Args:
        root: the index directory.
        manifest: of the index; it names the file.

    Raises:
        FileNotFoundError: it is missing.
        IndexFormatError: its size or its header are not what the manifest says.
    """

    descriptor: int | None = None

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self._root, self._manifest = root, manifest
        self._lock = ProcessLock()
        self._loaded: Any = None
        self.descriptor = open_faiss(root, manifest)

    def __del__(self) -> None:
        if self.descriptor is not None:
            self.close()

    def loaded(self) -> Any:
        """The FAISS index.

        Raises:
            IndexFormatError: the file is broken.
            InputError: it was closed before.
        """
        found = self._loaded
        return self._load() if found is None else found

    def _load(self) -> Any:
        with self._lock:
            if self._loaded is None:
                if self.descriptor is None:
                    raise InputError(f"{self._root}: the index is closed; open it again")
                self._loaded = load_faiss(self._root, self._manifest, self.descriptor)
            return self._loaded

    def close(self) -> None:
        """Let go of the file; a search that has begun ends with what it took."""
        # Under the lock: a number closed while another thread loads may come to name another file.
        with self._lock:
            descriptor, self.descriptor, self._loaded = self.descriptor, None, None
            if descriptor is not None:
                os.close(descriptor)
