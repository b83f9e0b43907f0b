"""Explanations over HTTP: `create_app(explainer)` is an ASGI application, `embedcam serve` runs it.

app.py        the application: what is put together
explain.py    POST /explain and POST /search
compare.py    POST /compare: receipts of pairs
items.py      GET /items/{id}/image and /items/{id}/cam: the indexed images and nothing else
files.py      GET / and what else lies in page/, which people look at
status.py     GET /healthz, /readyz and /metrics
pipeline.py   from uploaded bytes to an explanation, through a pool of threads
receipts.py   from uploaded bytes and ids to receipts
batching.py   one thread that puts what waits through the network together
upload.py     the body of a request, counted while it comes in
pictures.py   bytes to pictures and back
limits.py     what one request, and all of them together, may cost
frame.py      around every request: its line in the log, headers, hosts
errors.py     what is said where something is refused
schemas.py    the JSON, as the OpenAPI description has it
telemetry.py  counters for Prometheus
server.py     uvicorn on a socket, until a signal

A request changes nothing on disk, and nothing of it is kept once it is answered. Needs the extra
`service`: FastAPI, uvicorn, python-multipart and prometheus-client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from .app import create_app
    from .limits import Limits

__all__ = ["Limits", "check_installed", "create_app"]

_WHERE = {"Limits": "limits", "create_app": "app"}
_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def check_installed() -> None:
    """Refuse to go on without the packages that the service is made of.

    Raises:
        InputError: one of them is missing.
    """
    for name in _NEEDED:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(
                f"the service needs {name.replace('_', '-')}, which is not installed; "
                'pip install "embedcam[service]"'
            ) from error


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'embedcam.service' has no attribute {name!r}")
    check_installed()
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
