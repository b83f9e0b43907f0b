"""One thread that puts through the network together what waits for it.

Pictures are decoded and prepared before, in other threads, so a picture that cannot be read meets
no other. A picture that waits while others are being read gives them a moment to come along; one
that is alone goes at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import EmbedcamError


@dataclass
class _Job:
    settings: Any
    inputs: Any
    future: Future[Any] = field(default_factory=Future)


class Batcher:
    """Answers pictures in batches of equal settings.

    Args:
        answer: called in the one thread with settings and inputs `[3 H W]`; an answer for each.
        most: pictures a batch.
        seconds: how long the first picture of a batch waits for those that were announced.
        batched: told how many pictures went together.
    """

    def __init__(
        self,
        answer: Callable[[Any, Sequence[Any]], Sequence[Any]],
        most: int,
        seconds: float,
        batched: Callable[[int], None] = lambda pictures: None,
    ) -> None:
        self._answer, self._most, self._seconds = answer, most, seconds
        self._batched = batched
        self._changed = threading.Condition()
        self._waiting: list[_Job] = []
        self._announced = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def announced(self) -> Iterator[Callable[[Any, Any], Future[Any]]]:
        """Say that a picture will come; the batch that is being collected waits for it a moment.

        Yields:
            what submits it, with its settings (hashable): a future of its answer.
        """
        with self._changed:
            self._announced += 1
        coming = True

        def arrived() -> None:
            nonlocal coming
            self._announced -= coming
            coming = False
            self._changed.notify_all()

        def submit(settings: Any, inputs: Any) -> Future[Any]:
            job = _Job(settings, inputs)
            with self._changed:
                if self._closed:
                    raise RuntimeError("the batcher is closed")
                self._waiting.append(job)
                arrived()
                self._start()
            return job.future

        try:
            yield submit
        finally:
            with self._changed:
                arrived()

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        """The thread is begun by the first picture, so that an application that was only made,
        or forked before it served, has none."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="embedcam-network", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while batch := self._next():
            live = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if live:
                self._batched(len(live))
                self._settle(live)

    def _next(self) -> list[_Job]:
        """The first picture that waits and others of its settings; nothing once all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            until = time.monotonic() + self._seconds
            while len(self._waiting) < self._most and self._announced and not self._closed:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            if not self._waiting:
                return []
            settings = self._waiting[0].settings
            alike = [job for job in self._waiting if job.settings == settings][: self._most]
            chosen = set(map(id, alike))
            self._waiting = [job for job in self._waiting if id(job) not in chosen]
            return alike

    def _settle(self, jobs: Sequence[_Job]) -> None:
        try:
            answers = self._answer(jobs[0].settings, [job.inputs for job in jobs])
        except EmbedcamError as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            # One of them is at fault, and the error does not say which.
            for job in jobs:
                self._settle([job])
        except BaseException as error:
            for job in jobs:
                job.future.set_exception(error)
        else:
            for job, answer in zip(jobs, answers, strict=True):
                job.future.set_result(answer)
