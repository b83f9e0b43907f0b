"""The command as it is run: a process of its own, a socket, signals."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from build_samples import pictures, quicken
from service_client import awake, data_of, picture

import embedcam
from embedcam.cli import main
from embedcam.cli.parser import parser
from embedcam.cli.serving import _hosts
from embedcam.errors import InputError
from embedcam.ops import area_average
from embedcam.service import Limits, server
from embedcam.service.frame import HEADERS

NETWORK = """
import os, time
from photo_samples import CROP, Pooled
from toys import seeded

class Net(Pooled):
    def forward(self, images):
        if os.path.exists("slow"):
            open("begun", "w").close()
            time.sleep(1.5)
        return super().forward(images)

def make():
    return seeded(Net, 4), CROP
"""
NAMED = ["--network", "served_toy_network:make", "--layer", "relu"]
QUERY = data_of(picture(3))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "served_toy_network.py").write_text(NETWORK)
    pictures(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(folder)
        with patch.context() as quick:
            quicken(quick)
            assert main(["build", "photos", "my.index", "--quiet", *NAMED]) == 0
        yield folder
    sys.modules.pop("served_toy_network", None)


class Served:
    """A running `embedcam serve`."""

    def __init__(self, folder, *options, of=("my.index",)):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "embedcam", "serve", *of, "--port", "0",
             "--json", *NAMED[:2], *options],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.told = json.loads(self.process.stdout.readline())
        self.port = int(self.told["address"].rpartition(":")[2])

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with closing(connection):
            connection.request(method, path, body, headers)
            found = connection.getresponse()
            return found.status, {k.lower(): v for k, v in found.getheaders()}, found.read()

    def explain(self):
        return self.ask("POST", "/explain", QUERY)

    def is_ready(self):
        with suppress(OSError):
            return self.ask("GET", "/readyz")[0] == 200


@contextmanager
def served(folder, *options, **of):
    running = Served(folder, *options, **of)
    try:
        until(running.is_ready, 60)
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def test_a_server_answers_and_finishes_what_was_begun(here):
    with served(here, "-n", "3") as running:
        assert running.told == {
            "address": f"http://127.0.0.1:{running.port}", "index": "my.index", "images": 12,
        }  # fmt: skip
        status, headers, body = running.explain()
        assert (status, "server" in headers) == (200, False)
        shown = json.loads(body)
        network = embedcam.load_network(NAMED[1], layer="relu")
        expected = embedcam.Explainer("my.index", network, n_neighbors=3).explain(QUERY)
        assert [one["id"] for one in shown["neighbors"]] == expected.ids
        distances = [one["distance"] for one in shown["neighbors"]]
        np.testing.assert_allclose(distances, expected.distances, atol=1e-5)
        status, headers, body = running.ask("HEAD", shown["neighbors"][0]["image_url"])
        assert (status, headers["content-type"], body) == (200, "image/jpeg", b"")
        assert running.ask("GET", "/healthz", Host="evil.example")[0] == 403
        _raw_requests(running)
        running.process.send_signal(signal.SIGHUP)  # nothing has changed, and nothing is lost
        assert running.explain()[0] == 200
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(running.explain()))
        (here / "slow").touch()
        asking.start()
        until((here / "begun").exists)
        assert not answers
        running.process.send_signal(signal.SIGTERM)
        _, said = running.process.communicate(timeout=60)
        asking.join(30)
    (here / "slow").unlink()
    assert running.process.returncode == 0, said
    assert [status for status, _, _ in answers] == [200]
    assert len(json.loads(answers[0][2])["neighbors"]) == 3
    assert said.count("POST /explain 200") == 3
    assert "Traceback" not in said
    with pytest.raises(OSError):
        running.explain()


@pytest.fixture(scope="module")
def models(here):
    """Generations of two indexes, whose models lie there; rows.lance has the first one's rows."""
    pytest.importorskip("lancedb")
    assert main(["build", "photos", "other.index", "--norm", "around", "--quiet", *NAMED]) == 0
    generations = {}
    for name in ("my", "other"):
        assert main(["model", f"{name}.index", "-o", f"{name}.embedcam"]) == 0
        with embedcam.Index.open(f"{name}.index") as opened:
            generations[name] = opened.generation
    assert main(["rows", "my.index", "--to", "rows.lance", "--quiet"]) == 0
    return generations


def test_what_is_said_of_a_model_and_a_store(here, models, monkeypatch, say):
    seen: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda app, *_, **__: seen.append(app.state.pipeline))
    usual = ["--port", "0", *NAMED]
    of = ["--model", "my.embedcam", "--store", "rows.lance"]
    assert say(*of, "--store-seconds", "7", *usual)[0] == 0
    (pipeline,) = seen
    assert pipeline.limits == Limits(store_seconds=7)
    assert (pipeline.explainer.only_below, pipeline.explainer.root) == (True, here / "photos")
    code, told = say("--model", "other.embedcam", "--store", "rows.lance", *usual)
    missing = "rows.lance holds no row of the generation {other}, which other.embedcam reads "
    missing += "(generations there: {my}); `embedcam rows` writes them"
    assert (code, missing.format(**models) in told) == (0, True)
    (here / "names.toml").write_text('[concepts]\n1 = "wheel"\n')
    for words, said in (
        ([], "no index was given; name its folder, or give --model and --store"),
        (["--model", "my.embedcam"], "say with --store URL where its rows are"),
        (["my.index", "--model", "my.embedcam", "--store", "rows.lance"], "leave one of them out"),
        (["my.index", "--store", "rows.lance"], "--store goes with the file of a model"),
        (["--model", "my.embedcam", "--store", "rows.lance", "--fallback"], "leave out --fallback"),
        (["--model", "my.embedcam", "--store", "there.lance"], "write rows to it first"),
        (["my.index", "--concept-names", "names.toml"], "my.index: has no concepts"),
    ):
        code, told = say(*words, *usual)
        assert (code > 0, said in told, told.count("\n")) == (True, True, 1), told


def test_a_model_and_a_store_are_served(here, models):
    shutil.copy("my.embedcam", "live.embedcam")
    of = ["--model", "live.embedcam", "--store", "rows.lance"]
    network = embedcam.load_network(NAMED[1], layer="relu")

    def check(running, name):
        ready = json.loads(running.ask("GET", "/readyz")[2])
        assert (ready["digest"], ready["images"]) == (models[name], 12)
        why = embedcam.Explainer(f"{name}.index", network, n_neighbors=3).explain(QUERY)
        shown = json.loads(running.explain()[2])
        assert [one["id"] for one in shown["neighbors"]] == why.ids
        np.testing.assert_allclose(shown["cam"], area_average(why.cam, (14, 14)), atol=1e-6)
        assert running.ask("GET", shown["neighbors"][0]["image_url"])[0] == 200

    with served(here, "-n", "3", "--store-seconds", "20", of=of) as running:
        about = {"index": "live.embedcam", "store": "rows.lance", "images": 12}
        assert running.told == {"address": f"http://127.0.0.1:{running.port}", **about}
        check(running, "my")
        assert main(["rows", "other.index", "--to", "rows.lance", "--quiet"]) == 0
        shutil.copy("other.embedcam", "live.embedcam")
        running.process.send_signal(signal.SIGHUP)
        digest = models["other"].encode()
        until(lambda: digest in running.ask("GET", "/readyz")[2])
        check(running, "other")
        running.process.send_signal(signal.SIGTERM)
        _, said = running.process.communicate(timeout=60)
    assert (running.process.returncode, "Traceback" in said) == (0, False), said


HOST = b"Host: localhost\r\n"
GET = b"GET /healthz HTTP/1.1\r\n"
POST = b"POST /search HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
AFTER = GET + HOST + b"\r\n"
LAST = b"0\r\n\r\n" + AFTER
# Requests that are none, or that could be read in two ways; nothing behind them is answered.
BROKEN = {
    "a NUL in the address": b"GET /items/c0/000.png\x00/image HTTP/1.1\r\n" + HOST + b"\r\n",
    "no host": GET + b"\r\n",
    "two hosts": GET + 2 * HOST + b"\r\n",
    "no version": b"GET /healthz\r\n\r\n",
    "no words": b"hello\r\n\r\n",
    "tabs": b"GET\t/healthz\tHTTP/1.1\r\n" + HOST + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "an endless header": b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000,
    "an endless address": b"GET /" + b"a" * 100_000,
    "no name": GET + HOST + b": a\r\n\r\n",
    "no colon": GET + HOST + b"a\r\n\r\n",
    "a folded first line": GET + b" " + HOST + b"\r\n",
    "a NUL in a header": GET + HOST + b"X: a\0b\r\n\r\n",
    "lines that end in LF": b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    "one line that ends in LF": POST + b"X: a\nContent-Length: 5\r\n\r\nabcde" + AFTER,
    "a blank line that ends in LF": GET + HOST + b"\n" + AFTER,
    "one line that ends in CR": POST + b"X: a\rContent-Length: 5\r\n\r\nabcde",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde" + AFTER,
    "a list of lengths": POST + b"Content-Length: 5, 6\r\n\r\nabcde" + AFTER,
    "a length with a sign": POST + b"Content-Length: +5\r\n\r\nabcde" + AFTER,
    "a length below 0": POST + b"Content-Length: -5\r\n\r\nabcde" + AFTER,
    "a length in hexadecimal": POST + b"Content-Length: 0x5\r\n\r\nabcde" + AFTER,
    "a blank before the colon": POST + b"Content-Length : 5\r\n\r\nabcde" + AFTER,
    "a length and chunks": CHUNKED.replace(HOST, HOST + b"Content-Length: 4\r\n") + LAST,
    "chunks and a length": CHUNKED[:-2] + b"Content-Length: 6\r\n\r\n" + LAST,
    "folded chunks beside a length": POST + b"Transfer-Encoding:\r\n chunked\r\n"
    b"Content-Length: 6\r\n\r\n" + LAST,
    "chunks in 1.0": CHUNKED.replace(b"1.1", b"1.0") + LAST,
    "chunks twice": POST + 2 * b"Transfer-Encoding: chunked\r\n" + b"\r\n" + LAST,
    "chunks that are not": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + LAST,
    "chunks behind a tab": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n" + LAST,
    "the identity": POST + b"Transfer-Encoding: identity\r\n\r\n" + AFTER,
    "a chunk of no size": CHUNKED + b"zz\r\n",
    "a chunk below 0": CHUNKED + b"-1\r\nx\r\n" + LAST,
    "a chunk in hexadecimal": CHUNKED + b"0x1\r\nx\r\n" + LAST,
    "a chunk line that ends in LF": CHUNKED + b"1\nx\r\n" + LAST,
    "an extension with LF": CHUNKED + b"1;a\n=b\r\nx\r\n" + LAST,
    "a chunk that is longer": CHUNKED + b"1\r\nxx" + LAST,
}


def _everything(client):
    return b"".join(iter(lambda: client.recv(65536), b""))


def _check_refusal(answer, status, code, what=None):
    """One answer, as every refusal looks, after which the connection was closed."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), (what, answer[:200])
    headers = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
    expected = {"content-type": "application/json", "connection": "close", **HEADERS}
    expected["content-length"] = str(len(body))  # nothing behind it
    assert {(name.lower(), value.lower()) for name, value in expected.items()} <= {*headers.items()}
    assert json.loads(body)["error"]["code"] == code


def raw(running, request, *, ends=False, whole=True):
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
        client.sendall(request)
        if ends:
            client.shutdown(socket.SHUT_WR)  # it has said all, and listens
        return _everything(client) if whole else client.recv(65536)


def _raw_requests(running):
    for what, request in BROKEN.items():
        _check_refusal(raw(running, request), 400, "broken_request", what)
    for request in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", AFTER.replace(b"1.1", b"1.2")):
        _check_refusal(raw(running, request), 505, "unknown_version")
    # After a good one, both are answered.
    first, second = raw(running, AFTER + b"GARBAGE\r\n\r\n").split(b'{"status":"ok"}')
    assert first.startswith(b"HTTP/1.1 200 ")
    _check_refusal(second, 400, "broken_request")
    assert raw(running, AFTER, ends=True).startswith(b"HTTP/1.1 200 ")
    for request in (AFTER[:9], POST + b"Content-Length: 9\r\n\r\nabc"):
        assert b"200 OK" not in raw(running, request, ends=True)
    for request, status in (
        (b"GET /items/../../etc/passwd/image HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + HOST + b"\r\n", 200),
        (POST + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n", 413),
    ):
        answer = raw(running, request, whole=False)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (request[:60], answer[:60])


def answering(status, body):
    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return answer


LARGE = bytes(8_000_000)
empty, large = answering(204, b""), answering(200, LARGE)


@pytest.fixture
def begun(monkeypatch):
    """The servers of this process, once they are begun."""
    kept: list[Any] = []
    made = server.uvicorn.Server

    def keep(config):
        kept.append(made(config))
        return kept[-1]

    monkeypatch.setattr(server.uvicorn, "Server", keep)
    return kept


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def until_started(begun):
    until(lambda: begun and begun[0].started)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_quietly(begun, number):
    def interrupt():
        until_started(begun)
        os.kill(os.getpid(), number)

    before, interrupting = signal.getsignal(number), threading.Thread(target=interrupt)
    interrupting.start()
    server.serve(awake(empty), server.bind("127.0.0.1", 0), seconds=1)
    interrupting.join(20)
    assert signal.getsignal(number) is before


@contextmanager
def running(app, begun):
    bound = server.bind("127.0.0.1", 0)
    address = bound.getsockname()
    thread = threading.Thread(target=server.serve, args=(awake(app), bound), kwargs={"seconds": 1})
    thread.start()
    try:
        until_started(begun)
        yield address
    finally:
        begun[0].should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def test_a_slow_head_is_not_waited_for(begun, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
    with running(empty, begun) as address:
        for head in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(address, timeout=20) as client:
                client.sendall(head)
                assert client.recv(100) == b""  # closed from the other side
        with socket.create_connection(address, timeout=20) as client:
            for _ in range(3):  # one after the other on a connection that lives longer than that
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(1000).startswith(b"HTTP/1.1 204")
                time.sleep(0.2)
            client.sendall(b"GET / HT")
            assert client.recv(100) == b""


def asking(address, times=1):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(address)
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * times)
    return client


@pytest.mark.parametrize("times", [1, 300], ids=["one request", "pipelined"])
def test_a_client_that_never_reads_is_let_go(begun, monkeypatch, caplog, times):
    monkeypatch.setattr(server, "READ_SECONDS", 0.3)
    with running(large, begun) as address, asking(address, times):
        held = begun[0].server_state.connections
        until(lambda: held)
        # One answer, however many were asked for, and what the system keeps besides.
        sizes = [one.transport.get_write_buffer_size() for one in held]
        assert all(size <= 1.01 * len(LARGE) for size in sizes)
        until(lambda: not held)
    assert "a client did not read its answer for 0.3 s: closed" in caplog.text


def test_a_client_that_reads_slowly_gets_it_all(begun, monkeypatch):
    monkeypatch.setattr(server, "READ_SECONDS", 0.5)
    with running(large, begun) as address, asking(address) as client:
        taken, start = 0, time.monotonic()
        while taken < len(LARGE):
            found = len(client.recv(1_000_000))
            assert found, f"closed after {taken} bytes"
            taken += found
            time.sleep(max(0.0, start + 2 * taken / len(LARGE) - time.monotonic()))


def test_who_comes_when_all_connections_are_taken_is_told(begun, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 1)
    with running(empty, begun) as address, asking(address) as first:
        assert first.recv(1000).startswith(b"HTTP/1.1 204")
        with asking(address) as second:
            _check_refusal(_everything(second), 503, "busy")
        first.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert first.recv(1000).startswith(b"HTTP/1.1 204")


@pytest.fixture
def say(here, capsys):
    def run(*words):
        code = main(["serve", *words])
        return code, capsys.readouterr().err

    return run


def test_a_port_that_is_taken(say):
    with closing(server.bind("127.0.0.1", 0)) as other:
        other.listen()
        port = str(other.getsockname()[1])
        said = f"embedcam: 127.0.0.1 port {port} cannot be used (Address already in use); choose "
        assert say("my.index", "--port", port, *NAMED) == (6, f"{said}with --host and --port\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--images", "nowhere"], 2, "--images nowhere: there is no such folder; give the one"),
        (["--port", "70000"], 2, "port = 70000; give a whole number from 0 to 65,535"),
        (["--host", "no.such.host.invalid"], 6, "no.such.host.invalid port 0"),
        ([], 2, "if you trust it, say so with --network"),
        (["--timeout", "0"], 2, "'0' is not a number of at least 0.01"),
        (["--fallback", *NAMED], 2, "holds no calibration of trust"),
    ],
)
def test_what_the_command_refuses(say, words, code, said):
    found, told = say("my.index", "--port", "0", *words)
    assert (found, told.count("\n")) == (code, 1)
    assert said in told


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "python_multipart", "prometheus_client"])
def test_a_missing_extra_is_one_sentence(say, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, told = say("my.index", *NAMED)
    said = f"the service needs {missing.replace('_', '-')}, which is not installed; pip install"
    assert (code, said in told) == (2, True)
    with pytest.raises(InputError, match="pip install"):
        _ = embedcam.service.create_app


def test_limits_of_the_command(here, monkeypatch, capsys):
    seen: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *given, **named: seen.append((given, named)))
    words = (
        "my.index --host 0.0.0.0 --port 0 --max-body 1000 --max-pixels 99 --max-neighbors 7 "
        "--timeout 2.5 --concurrency 3 --batch 2 -n 4"
    )
    assert main(["serve", *words.split(), *NAMED]) == 0
    (((app, bound), named),) = seen
    pipeline = app.state.pipeline
    assert pipeline.limits == Limits(1000, 99, 7, 2.5, 3, 2)
    assert (pipeline.n_neighbors, named["seconds"]) == (4, 2.5)
    told = capsys.readouterr()
    assert "my.index, 12 images; Ctrl-C ends it" in told.out
    assert "other machines reach 0.0.0.0, and nobody is asked for a password" in told.err
    assert bound.fileno() == -1  # closed


def test_names_the_service_goes_by():
    local = ["localhost", "127.0.0.1", "[::1]"]
    for options, hosts in (
        (["--host", "127.0.0.1"], ["127.0.0.1", *local]),
        (["--host", "0.0.0.0"], None),
        (["--allow-host", "why.example"], ["why.example", *local]),
        (["--host", "0.0.0.0", "--allow-host", "why.example"], ["why.example", *local]),
    ):
        said = parser().parse_args(["serve", "my.index", *options])
        with closing(server.bind(said.host, 0)) as bound:
            assert _hosts(said, bound) == hosts


def test_numpy_has_one_thread_while_it_serves(monkeypatch):
    def threads(sockets=()):
        found = threadpoolctl.threadpool_info()
        seen.append({one["num_threads"] for one in found if one["user_api"] == "blas"})

    seen: list[set[int]] = []
    monkeypatch.setattr(server.uvicorn, "Server", lambda config: SimpleNamespace(run=threads))
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        threads()
        server.serve(empty, server.bind("127.0.0.1", 0), seconds=1)
        threads()
    assert seen == [seen[0], {1}, seen[0]]


def test_addresses_are_for_a_browser():
    with closing(server.bind("0.0.0.0", 0)) as bound:
        assert server.address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert not server.is_loopback(bound)
    with closing(server.bind("localhost", 0)) as bound:
        assert server.is_loopback(bound)


def test_hanging_up_loads_the_index_again(caplog):
    done = threading.Event()
    with server._signals(done.set):
        os.kill(os.getpid(), signal.SIGHUP)
        assert done.wait(20)

    def fail():
        raise InputError("the index is gone")

    server._reloaded(fail)
    assert "the index was not loaded again: the index is gone" in caplog.text
