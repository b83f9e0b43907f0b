"""The benchmarks `service` and `soak`: their figures. Values, never seconds."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from scripts.benchmarks import load, service, soak


def test_ratios_with_and_without_the_client():
    took = {
        "search": np.full(100, 100.0),
        "search again (A/A)": np.full(100, 100.0),
        "explain": np.r_[np.full(90, 109.0), np.full(10, 130.0)],
        "null": np.full(100, 20.0),
    }
    lines = service.report(8, took).splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line.startswith("| ")
    }
    assert lines[1] == "## 8 at a time"
    # (109 - 20) / (100 - 20) and (130 - 20) / (100 - 20)
    assert cells["explain"] == [
        "100", "109.0", "1.090", "1.113", "<= 1.1: **not met**",
        "130.0", "1.300", "1.375", "<= 1.15: **not met**",
    ]  # fmt: skip
    assert cells["search again (A/A)"][2:4] == ["1.000", "1.000"]
    assert cells["null"][1:3] == ["20.0", "0.200"]


def test_growth_of_memory():
    held = [10e6] * 25 + [100e6] * 24 + [900e6] + [200e6] * 25 + [104e6] * 25
    memory = [(float(gone), int(one)) for gone, one in enumerate(held)]
    first, last, ratio = soak.growth(memory)
    assert (first, last, ratio) == (100, 104, pytest.approx(1.04))


def test_every_hostile_request_is_to_be_refused():
    good, bad = soak.good_calls(), soak.hostile_calls()
    assert all(call.expected == 200 for call in good)
    assert all(400 <= call.expected < 500 for call in bad)
    assert not {call.name for call in good} & {call.name for call in bad}


def test_a_closed_loop_sends_each_request_once():
    seen: list[str] = []
    at_once, lock = [0, 0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            with lock:
                at_once[0] += 1
                at_once[1] = max(at_once)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                seen.append(f"{self.path} {body.decode()}")
                at_once[0] -= 1
            self.send_response(404 if "bad" in self.path else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        running = threading.Thread(target=server.serve_forever)
        running.start()
        port = server.server_port
        calls = (load.Call("POST", f"/{place}", b"x" * place) for place in range(20))
        try:
            assert (len(service.answered(port, 3, calls)), at_once[1] <= 3) == (20, True)
            assert sorted(seen) == sorted(f"/{place} {'x' * place}" for place in range(20))
            with pytest.raises(RuntimeError, match="POST /bad: 404 b'ok'"):
                service.answered(port, 1, iter([load.Call("POST", "/bad")]))
        finally:
            server.shutdown()
            running.join()
