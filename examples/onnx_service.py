"""A service without torch: a picture in, results and maps out as JSON, by an index and ONNX.

    embedcam export my.index -o network.onnx          where torch is
    python examples/onnx_service.py my.index network.onnx --port 8000
    curl --data-binary @query.jpg http://127.0.0.1:8000/explain

Needs `pip install --no-deps embedcam` and `pip install -r requirements-online.txt`, nothing else.
One explainer answers all threads. `POST /explain` takes the bytes of a picture; `?neighbors=N`
says how many results. It is made to be read: no limits on time or concurrency, and for this machine
only.
"""

import argparse
import json
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from embedcam import EmbedcamError, Explainer
from embedcam.onnx import OnnxNetwork

MOST_BYTES = 20 << 20
GRID = (14, 14)
log = logging.getLogger("onnx_service")


def answer(explainer: Explainer, picture: bytes, neighbors: int) -> dict[str, Any]:
    """What came back for a picture, and why: ready for JSON, maps of at most 14 cells a side."""
    return explainer.explain(picture, n_neighbors=neighbors).to_dict(GRID)


class Handler(BaseHTTPRequestHandler):
    """One request; the server holds the explainer."""

    server: "Service"

    def do_POST(self) -> None:
        """Explain the picture that was sent."""
        asked = urlsplit(self.path)
        if asked.path != "/explain":
            return self.reply(404, {"error": "there is only POST /explain"})
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or not 0 < int(length) <= MOST_BYTES:
            self.close_connection = True
            return self.reply(413, {"error": f"send a picture of 1 to {MOST_BYTES} bytes"})
        wanted = parse_qs(asked.query).get("neighbors", ["5"])[0]
        try:
            neighbors = int(wanted) if wanted.isdigit() else 0
            body = answer(self.server.explainer, self.rfile.read(int(length)), neighbors)
        except ValueError as error:  # InputError and ImageError are its kind: the caller's fault
            return self.reply(400, {"error": str(error)})
        except EmbedcamError as error:
            log.error("%s", error)
            return self.reply(500, {"error": "the picture could not be explained"})
        return self.reply(200, body)

    def reply(self, status: int, body: dict[str, Any]) -> None:
        """Send JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """One line a request, through `logging`."""
        log.info(format, *arguments)


class Service(ThreadingHTTPServer):
    """A thread a connection, all of one explainer; port 0 takes any that is free."""

    daemon_threads = True

    def __init__(self, explainer: Explainer, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.explainer = explainer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("network", type=Path, help="what `embedcam export` wrote")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="that one picture is embedded on")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    network = OnnxNetwork(options.network, threads=options.threads)
    with Service(Explainer(options.index, onnx=network), options.port) as service:
        log.info("POST pictures to http://127.0.0.1:%d/explain", service.server_port)
        service.serve_forever()


if __name__ == "__main__":
    main()
