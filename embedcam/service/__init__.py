"""Explanations over HTTP: `create_app(explainer)` is an ASGI application, `embedcam serve` runs it.

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

_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def check_installed() -> None:
    """Raise InputError unless the packages that the service is made of are installed."""
    for name in _NEEDED:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(
                f"the service needs {name.replace('_', '-')}, which is not installed; "
                'pip install "embedcam[service]"'
            ) from error


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'embedcam.service' has no attribute {name!r}")
    check_installed()
    return getattr(import_module(".app", __name__), name)
