"""The command that answers over HTTP."""

import argparse
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from ..errors import PrintableLines, show, show_json
from ..images import MAX_PIXELS
from ..service import check_installed
from .direct import trust_of
from .networks import check_onnx, network_given
from .online import check_images
from .report import counted, note


def serve(options: argparse.Namespace) -> None:
    """Explain over HTTP until a signal."""
    check_installed()
    from ..explain.explainer import Explainer
    from ..index import Index
    from ..service import server
    from ..service.app import create_app

    # Whatever can be refused is refused before the network is loaded.
    check_onnx(options)
    check_images(options.images)
    limits = _limits(options)
    with ExitStack() as stack:
        with Index.open(options.index, with_faiss=False) as index:
            bound = stack.enter_context(closing(server.bind(options.host, options.port)))
            network = network_given(options, index.manifest)
            chosen: dict[str, Any] = trust_of(options, index, network)
        if options.n_neighbors is not None:
            chosen["n_neighbors"] = options.n_neighbors
        chosen |= {"transfer": options.transfer, "images": options.images}
        # Of an indexed picture: what the index was let hold may be larger than an upload.
        chosen["max_pixels"] = max(options.max_pixels or 0, MAX_PIXELS)
        # Its own to open: after a reload the old version is let go of.
        explainer = stack.enter_context(Explainer(options.index, network, **chosen))
        app = create_app(explainer, limits=limits, hosts=_hosts(options, bound))
        _announce(options, bound, len(explainer.index))
        with _logged(options):
            server.serve(app, bound, seconds=limits.seconds, reload=app.state.pipeline.reload)


def _limits(options: argparse.Namespace) -> Any:
    """The limits that were given; the others are the default's."""
    from ..service.limits import Limits

    names = {
        "body_bytes": options.max_body,
        "pixels": options.max_pixels,
        "n_neighbors": options.max_neighbors,
        "seconds": options.timeout,
        "concurrency": options.concurrency,
        "batch": options.batch,
    }
    return Limits(**{name: value for name, value in names.items() if value is not None})


def _hosts(options: argparse.Namespace, bound: socket.socket) -> list[str] | None:
    """The names this service goes by; any, where other machines reach it and none was named."""
    from ..service.server import LOOPBACK, is_loopback

    if options.allow_host:
        return [*options.allow_host, *LOOPBACK]
    return [options.host, *LOOPBACK] if is_loopback(bound) else None


@contextmanager
def _logged(options: argparse.Namespace) -> Iterator[None]:
    """A line a request on the error stream; with --quiet only what goes wrong."""
    log, shown = logging.getLogger("embedcam"), logging.StreamHandler(sys.stderr)
    shown.setFormatter(PrintableLines("%(asctime)s %(message)s"))
    before = log.level
    log.addHandler(shown)
    log.setLevel(logging.WARNING if options.quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(shown)
        log.setLevel(before)


def _announce(options: argparse.Namespace, bound: socket.socket, images: int) -> None:
    from ..service.server import address_of, is_loopback

    address = address_of(bound)
    text = f"{address}  {options.index}, {counted(images, 'image')}; Ctrl-C ends it"
    values = {"address": address, "index": options.index, "images": images}
    if options.json:
        show_json(values, flush=True)
    else:
        show(text, flush=True)
    if not is_loopback(bound):
        note(
            options,
            f"note: other machines reach {options.host}, and nobody is asked for a password: put a "
            "proxy before it that does",
        )
