"""The command that answers over HTTP."""

import logging
import socket
import sys
from argparse import Namespace
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from .._options import chosen
from ..errors import Plain, StoreError, cut, printable, sentence, show, show_json
from ..images import MAX_PIXELS, is_url
from ..service import check_installed
from .networks import query_network, run_by, runtime_of, torch_network
from .online import check_folder, explainer_of
from .output import attached, counted, note, say_run
from .stores import store_of, take_model

if TYPE_CHECKING:
    from ..explain import Explainer
    from ..network import EmbeddingNetwork
    from ..onnx import OnnxNetwork
    from ..stores import Store


def serve(options: Namespace) -> None:
    """Explain over HTTP until a signal."""
    check_installed()
    from ..index import Index
    from ..index.concepts import read_names
    from ..pairs import named_concepts
    from ..service import server
    from ..service.app import create_app
    from ..service.limits import Limits

    # Whatever can be refused is refused before the network is loaded.
    take_model(options)
    check_folder("--images", options.images)
    limits = Limits(**chosen(options, Limits))
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(PrintableLines("%(asctime)s %(message)s"))
    # A line a request; with --quiet only what goes wrong.
    level = logging.INFO if options.progress is None else logging.WARNING
    with ExitStack() as stack:
        with Index.open(options.index, with_faiss=False) as index:
            names = {} if options.concept_names is None else read_names(options.concept_names)
            named_concepts(index, names)
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
            root = index.manifest.images_root
            if options.store is not None and options.images is None and not is_url(root or ""):
                # Whoever may write rows says where pictures lie: none is read beside the others.
                options.images = root

            def opened() -> "Explainer":
                # Its own to open: after a reload the old version is let go of.
                explainer = explainer_of(options, index, network, options.index, pixels)
                stack.enter_context(explainer)
                rows = store_of(options, explainer.index, limits.store_seconds)
                explainer.store = stack.enter_context(rows)
                return explainer

            explainer = opened()
            say_run(options, explainer.network, limits.batch)
        app = create_app(
            explainer,
            limits=limits,
            hosts=_hosts(options, bound),
            renew=opened,
            concept_names=names,
        )
        _announce(options, bound, explainer)
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


def _announce(options: Namespace, bound: socket.socket, explainer: "Explainer") -> None:
    from ..service.server import address_of, is_loopback

    address, place, images = address_of(bound), options.index, _count(options, explainer)
    told: dict[str, Plain] = {"address": address, "index": place, "images": images}
    if options.store is not None:
        told["store"] = explainer.store.name  # type: ignore[union-attr]
        place += f" and {told['store']}"
    if options.json:
        show_json(told, flush=True)
    else:
        held = "" if images is None else f", {counted(images, 'image')}"
        show(f"{address}  {place}{held}; Ctrl-C ends it", flush=True)
    if not is_loopback(bound):
        note(
            options,
            f"note: other machines reach {options.host}, and nobody is asked for a password: put a "
            "proxy before it that does",
        )


def _count(options: Namespace, explainer: "Explainer") -> int | None:
    """Return how many images there are; None where a store takes long to count them."""
    if options.store is None:
        return len(explainer.index)
    store: Store = explainer.store  # type: ignore[assignment]
    own = explainer.index.generation
    try:
        held = store.generations()
    except StoreError:
        return None
    if not held.get(own):
        others = ", ".join(sorted(held)) or "none"
        note(
            options,
            f"note: {store.name} holds no row of the generation {own}, which {options.index} reads "
            f"(generations there: {others}); `embedcam rows` writes them",
        )
    return held.get(own, 0)


class PrintableLines(logging.Formatter):
    """Format log records for a person: only tracebacks have several lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record, printable."""
        return "\n".join(map(printable, super().format(record).split("\n")))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """Return the message, on one line."""
        return sentence(super().formatMessage(record))
