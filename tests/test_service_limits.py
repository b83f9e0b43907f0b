"""Limits on time and number, and what goes through the network together."""

import asyncio
import itertools
import threading
import time
from concurrent.futures import CancelledError
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_client import ask, data_of, explainer, picture, post, send

from embedcam.errors import InputError, NetworkError
from embedcam.service import Limits
from embedcam.service.pipeline import Batcher

QUERY = data_of(picture(3))
PNG = {"content-type": "image/png"}


def gathered(app, target, *bodies):
    async def all_of_them():
        return await asyncio.gather(*(send(app, "POST", target, body, PNG) for body in bodies))

    return asyncio.run(all_of_them())


def test_pictures_together_are_answered_as_each_alone(index, service):
    queries = [data_of(picture(seed)) for seed in range(6)]
    alone = service(explainer(index), limits=Limits(batch=1))
    together = service(explainer(index), limits=Limits(batch=6, batch_seconds=30))
    for found, query in zip(gathered(together, "/explain", *queries), queries, strict=True):
        body, other = found.json(), post(alone, "/explain", query).json()
        assert [one["id"] for one in body["neighbors"]] == [one["id"] for one in other["neighbors"]]
        np.testing.assert_allclose(body["cam"], other["cam"], atol=1e-5)
    text = ask(together, "GET", "/metrics").body.decode()
    assert "embedcam_batch_pictures_count 1.0" in text
    assert "embedcam_batch_pictures_sum 6.0" in text


def test_a_picture_the_network_cannot_embed_fails_alone(index, service):
    why, sizes = explainer(index), list[int]()
    embed = why.network.embed

    def picky(images, layers=None):
        sizes.append(len(images))
        if any(float(image[0].std()) == 0 for image in images):
            raise NetworkError("the embedding of image 1 is zero")
        return embed(images, layers)

    why.network.embed = picky
    app = service(why, limits=Limits(batch=3, batch_seconds=30))
    flat = data_of(picture().point(lambda _: 9))
    for _ in range(9):  # on a busy machine one may be read after the others have gone
        sizes.clear()
        found = gathered(app, "/search", QUERY, flat, QUERY)
        assert [one.status for one in found] == [200, 422, 200]
        assert found[1].error == (422, "no_embedding")
        if sizes[0] == 3:
            break
    assert sizes == [3, 1, 1, 1]


def events(number):
    return [threading.Event() for _ in range(number)]


class Recorder:
    """Answers a number with its double, and keeps what came together."""

    def __init__(self, held=False):
        self.batches, self.begun, self.go_on = list[tuple[str, list[int]]](), *events(2)
        if not held:
            self.go_on.set()

    def __call__(self, settings, inputs):
        self.begun.set()
        assert self.go_on.wait(20)
        numbers = [int(one) for one in inputs]
        self.batches.append((settings, numbers))
        if min(numbers) < 0:
            raise InputError(f"{numbers} hold a negative number")
        return [2 * one for one in numbers]


def submitted(batcher, answer, number, settings="a"):
    with batcher.announced():
        return batcher.submit(answer, settings, np.array(number))


@pytest.fixture
def held(batcher):
    """A recorder that waits with the first number until it may go on."""

    def make(most, number, **settings):
        recorder, made = Recorder(held=True), batcher(most, **settings)
        first = submitted(made, recorder, number)
        assert recorder.begun.wait(20)
        return recorder, made, first

    return make


@pytest.fixture
def batcher():
    """Make batchers, which are closed in the end."""
    with ExitStack() as stack:

        def make(*given, **settings):
            made = Batcher(*given, **settings)
            stack.callback(made.close)
            return made

        yield make


def test_one_alone_does_not_wait(batcher):
    start = time.monotonic()
    assert submitted(batcher(8, seconds=60), Recorder(), 4).result(20) == 8
    assert time.monotonic() - start < 30


def test_one_waits_for_what_was_announced_and_no_longer(batcher):
    recorder, made = Recorder(), batcher(8, seconds=60)
    with made.announced():
        first = submitted(made, recorder, 1)
        with pytest.raises(TimeoutError):
            first.result(0.05)
        second = made.submit(recorder, "a", np.array(2))
    assert second.result(20) == 4
    assert recorder.batches == [("a", [1, 2])]
    with made.announced():  # one that never comes: its picture could not be read
        third = submitted(made, recorder, 3)
    assert third.result(20) == 6
    made = batcher(8, seconds=0.01)
    with made.announced():  # so long at most
        assert submitted(made, recorder, 1).result(20) == 2


def test_a_batch_has_a_size(held):
    sizes: list[int] = []
    recorder, made, first = held(3, 0, seconds=0, batched=sizes.append)
    rest = [submitted(made, recorder, number, "ab"[number % 2]) for number in range(1, 8)]
    recorder.go_on.set()
    assert [one.result(20) for one in [first, *rest]] == [0, 2, 4, 6, 8, 10, 12, 14]
    made.close()
    assert recorder.batches == [("a", [0]), ("b", [1, 3, 5]), ("a", [2, 4, 6]), ("b", [7])]
    assert sizes == [1, 3, 3, 1]


def test_what_was_given_up_is_not_worked_on(held):
    recorder, made, first = held(1, 1, seconds=0)
    second, third = (submitted(made, recorder, number) for number in (2, 3))
    assert second.cancel()
    recorder.go_on.set()
    assert (first.result(20), third.result(20)) == (2, 6)
    with pytest.raises(CancelledError):
        second.result(0)
    assert [numbers for _, numbers in recorder.batches] == [[1], [3]]


def test_closing_answers_what_waits(held):
    recorder, made, first = held(1, 0, seconds=60)
    waiting = [first, *(submitted(made, recorder, number) for number in (1, 2))]
    closing = threading.Thread(target=made.close)
    closing.start()
    recorder.go_on.set()
    closing.join(20)
    assert [one.result(0) for one in waiting] == [0, 2, 4]
    with pytest.raises(RuntimeError, match="shutdown"):
        submitted(made, recorder, 1)


def test_a_fault_reaches_everyone_it_met(batcher):
    def broken(settings, inputs):
        raise MemoryError("out of it")

    made = batcher(2, seconds=0)
    for _ in range(2):  # the thread goes on
        with pytest.raises(MemoryError):
            submitted(made, broken, 1).result(20)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 9)), max_size=12), st.integers(1, 4)
)
def test_everyone_gets_the_answer_of_their_own(jobs, most):
    made, recorder = Batcher(most, seconds=0), Recorder()
    futures = [submitted(made, recorder, number, settings) for settings, number in jobs]
    for (_, number), future in zip(jobs, futures, strict=True):
        if number < 0:
            with pytest.raises(InputError, match=rf"^\[{number}\]"):
                future.result(20)
        else:
            assert future.result(20) == 2 * number
    made.close()


def slowed(index):
    """An explainer that waits until it is let go on; and what tells that it was asked."""
    why, (hold, begun) = explainer(index), events(2)
    explain = why.explain_batch

    def slow(*given, **options):
        begun.set()
        assert hold.wait(60)
        return explain(*given, **options)

    why.explain_batch = slow  # type: ignore[method-assign]
    return why, hold, begun


def test_too_many_at_once(index, service):
    why, hold, begun = slowed(index)
    app = service(why, limits=Limits(concurrency=2, batch=1))

    async def crowd():
        inside = [asyncio.create_task(send(app, "POST", "/explain", QUERY, PNG)) for _ in range(2)]
        await asyncio.to_thread(begun.wait, 20)
        for target in ("/explain", "/search"):
            refused = await send(app, "POST", target, QUERY, PNG)
            assert (refused.error, refused.headers["retry-after"]) == ((503, "busy"), "1")
            assert refused.message.startswith("2 requests are being worked on, which is the limit")
        assert (await send(app, "GET", "/items/c0/000.png/image")).error == (503, "busy")
        # Whoever watches is let in.
        assert "embedcam_in_progress 2.0" in (await send(app, "GET", "/metrics")).body.decode()
        hold.set()
        assert [(await one).status for one in inside] == [200, 200]
        assert (await send(app, "POST", "/explain", QUERY, PNG)).status == 200

    asyncio.run(crowd())


def test_an_answer_that_takes_too_long(index, service):
    why, hold, _ = slowed(index)
    app = service(why, limits=Limits(seconds=0.05, concurrency=1))
    for _ in range(3):  # the place is given back
        found = post(app, "/explain", QUERY)
        assert (found.error, found.headers["retry-after"]) == ((503, "too_slow"), "5")
    hold.set()
    assert post(app, "/search", QUERY).status in (200, 503)


def test_an_upload_that_takes_too_long(index, service):
    app = service(explainer(index), limits=Limits(seconds=0.05, concurrency=1))
    for tail in ([60.0], [b"", 60.0], [QUERY[:90], 60.0]):
        found = ask(app, "POST", "/explain", tail, content_length="99999")
        assert (found.error, found.headers["connection"]) == ((408, "slow_upload"), "close")


@pytest.mark.parametrize(
    "length", [{"content_length": str(len(QUERY) + 1000)}, {"transfer_encoding": "chunked"}]
)
def test_a_body_over_the_limit(index, length, service):
    app = service(explainer(index), limits=Limits(body_bytes=len(QUERY)))
    pieces = [QUERY[:100], QUERY[100:], b"x" * 1000]
    found = ask(app, "POST", "/explain", pieces, **length)
    assert found.error == (413, "body_too_long")
    assert f"longer than {len(QUERY)} bytes" in found.message
    assert "connection" not in found.headers  # all of it was taken, so the next request may come
    assert ask(app, "POST", "/explain", pieces[:2]).status == 200


def test_an_endless_body_is_not_kept(index, service):
    app = service(explainer(index), limits=Limits(body_bytes=10))
    taken = itertools.count()
    endless = (bytes(1_000_000) for _ in taken)
    found = ask(app, "POST", "/explain", endless, transfer_encoding="chunked")
    assert (found.error, found.headers["connection"]) == ((413, "body_too_long"), "close")
    assert next(taken) < 100
    # A client that asks first is refused before the body; and one goes away.
    found = ask(app, "POST", "/explain", [60.0], content_length="99", expect="100-continue")
    assert (found.error, found.headers["connection"]) == ((413, "body_too_long"), "close")
    assert ask(app, "POST", "/explain", [], content_length="5").error == (400, "cut_off")


def test_more_pixels_or_results_than_the_limit(index, service):
    limits = Limits(pixels=40 * 30 - 1, n_neighbors=4)
    app, allowed = service(explainer(index, n_neighbors=9), limits=limits), picture(0, (40, 29))
    found = post(app, "/explain", QUERY)
    assert found.error == (413, "too_many_pixels")
    assert "more than 1199 pixels" in found.message
    assert len(post(app, "/explain", data_of(allowed)).json()["neighbors"]) == 4
    found = post(app, "/explain?n_neighbors=5", data_of(allowed))
    assert found.message == "n_neighbors: input should be less than or equal to 4"
