"""The command that answers over HTTP."""

import logging
import socket
import sys
from argparse import Namespace
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from .._options import chosen
from ..errors import cut, printable, sentence, show, show_json
from ..images import MAX_PIXELS, is_url
from ..service import check_installed
from .networks import query_network, run_by, runtime_of, torch_network
from .online import check_folder, explainer_of
from .output import attached, counted, note, say_run

if TYPE_CHECKING:
    from ..explain.explainer import Explainer
    from ..network import EmbeddingNetwork
    from ..onnx import OnnxNetwork


def serve(options: Namespace) -> None:
    """Explain over HTTP until a signal."""
    check_installed()
    from ..index import Index
    from ..service import server
    from ..service.app import create_app
    from ..service.limits import Limits

    # Whatever can be refused is refused before the network is loaded.
    check_folder("--images", options.images)
    limits = Limits(**chosen(options, Limits))
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(PrintableLines("%(asctime)s %(message)s"))
    # A line a request; with --quiet only what goes wrong.
    level = logging.INFO if options.progress is None else logging.WARNING
    with ExitStack() as stack:
        with Index.open(options.index, with_faiss=False) as index:
            bound = stack.enter_context(closing(server.bind(options.host, options.port)))
            runtime_of(options)
            network: EmbeddingNetwork | OnnxNetwork
            if options.onnx is None:
                loaded = torch_network(options, index.manifest)
                network = stack.enter_context(run_by(options, loaded, threads=None))
            else:
                network = query_network(options, index.manifest)
            # Of an indexed picture: what the index was let hold may be larger than an upload.
            pixels = max(options.max_pixels or 0, MAX_PIXELS)
            # Its own to open: after a reload the old version is let go of.
            explainer = explainer_of(options, index, network, options.index, pixels)
            stack.enter_context(explainer)
            say_run(options, explainer.network, limits.batch)
        app = create_app(explainer, limits=limits, hosts=_hosts(options, bound))
        _announce(options, bound, len(explainer.index))
        if options.images is None and (address := _address_of(explainer)) is not None:
            note(
                options,
                f"note: pictures of this index lie at addresses, which are read below one that you "
                f"name, so they are not shown: serve it with --images {cut(address, 200)}",
            )
        with attached(log, {"embedcam": level}):
            server.serve(app, bound, seconds=limits.seconds, reload=app.state.pipeline.reload)


def _address_of(explainer: "Explainer") -> str | None:
    """Return the address that the first or the last indexed picture lies below, if it does."""
    rows = explainer.index.live_positions()[[0, -1]] if len(explainer.index) else ()
    if isinstance(explainer.root, str):
        return explainer.root
    places = filter(is_url, explainer.index.select(rows).paths)
    return next((place.rpartition("/")[0] for place in places), None)


def _hosts(options: Namespace, bound: socket.socket) -> list[str] | None:
    """Return the names this service goes by; any, where machines reach it and none was named."""
    from ..service.server import LOOPBACK, is_loopback

    if options.allow_host:
        return [*options.allow_host, *LOOPBACK]
    return [options.host, *LOOPBACK] if is_loopback(bound) else None


def _announce(options: Namespace, bound: socket.socket, images: int) -> None:
    from ..service.server import address_of, is_loopback

    address = address_of(bound)
    if options.json:
        show_json({"address": address, "index": options.index, "images": images}, flush=True)
    else:
        text = f"{address}  {options.index}, {counted(images, 'image')}; Ctrl-C ends it"
        show(text, flush=True)
    if not is_loopback(bound):
        note(
            options,
            f"note: other machines reach {options.host}, and nobody is asked for a password: put a "
            "proxy before it that does",
        )


class PrintableLines(logging.Formatter):
    """Format log records for a person: only tracebacks have several lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record, printable."""
        return "\n".join(map(printable, super().format(record).split("\n")))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """Return the message, on one line."""
        return sentence(super().formatMessage(record))
