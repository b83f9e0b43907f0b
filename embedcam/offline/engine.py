"""The pieces of a job done by workers of a Ray cluster, while the driver holds the index's lock.

What travels is names, paths and the numbers of pieces; images, chunks and the job lie in folders
that all workers see. Ray starts a killed worker again and gives it its piece again, of which the
finished chunks are kept.
"""

import importlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

from .. import _files, errors
from .._checks import whole
from ..errors import EmbedcamError, EmbeddingError, InputError, NetworkError, reason
from ..images.batches import default_workers
from ..images.progress import Advance
from ..index.records import Json
from ..network import EmbeddingNetwork, load_network
from . import sharded
from .job import Job
from .plan import Plan
from .report import Stages

log = logging.getLogger(__name__)

CPUS_EACH = 4
"""CPUs of a worker where nothing is said: passes side by side share one loaded network."""
PIECES_EACH = 16
"""Pieces a worker gets, about: more balance better, fewer read ahead better."""
TRIES = 10
"""How often a piece may kill its worker before it is given up."""
PATIENCE = 60.0
"""Seconds without an answer after which the driver says that it waits, and frees idle workers."""
_POLL, _LONGEST, _TERM = 1.0, 30, signal.SIGTERM
_ZERO = ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_worker_niceness")
"""Nothing is sent to Ray's makers; workers without a GPU are no news, and no background."""
_STAGES = ("embed", "weights", "maps")
_STORE = 80 << 20
"""Bytes of the object store of a cluster of this machine: next to nothing goes through it."""


@dataclass(frozen=True)
class RayEngine:
    """Let the workers of a Ray cluster do the pieces of a job.

    Parameters
    ----------
    address
        Of a running cluster; None takes the one of RAY_ADDRESS, else one of this machine alone,
        which ends with the job.
    workers
        How many; None takes one for each four CPUs, or for each GPU, of the cluster.
    num_gpus
        GPUs of a worker, also a share of one; None takes one where the network is on a GPU.
    job
        Folder for the job, which all workers see and which goes once the index is there; None keeps
        it in the index's folder.
    """

    address: str | None = None
    workers: int | None = None
    num_gpus: float | None = None
    job: str | Path | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            whole("workers", self.workers, 1)
        if self.num_gpus is not None and not 0 <= self.num_gpus < 1 << 10:
            raise InputError(f"num_gpus = {self.num_gpus}; give the GPUs of a worker, such as 1")
        check_ray()

    def do(self, job: Job, folder: Path, network: EmbeddingNetwork, stages: Stages) -> Job:
        """Have all rounds of all pieces of a job done; return the job, on disk in a folder.

        The folder is the engine's own where it has one. For the holder of the index's lock.
        """
        if network.spec is None:
            raise InputError(
                "the workers of Ray load the network by its name, and this one was not; write a "
                "function that returns it, and give load_network('package.module:function')"
            )
        gpus = self._gpus(network)
        if self.job is None:
            job = job.save(folder, network.onnx_file)
        else:
            job = sharded.keep(job, Path(self.job), network.onnx_file)
        if job.missing() or job.choices.rounds > 1:
            with _cluster(self.address, self.workers) as ray:
                threads, count = _shares(ray.nodes(), self.workers, gpus)
                pool = _Pool(ray, job, network.spec, threads, count, gpus)
                try:
                    pool.do_all(stages)
                finally:
                    pool.end()
        sharded.refuse_unfinished(job)
        return job

    def tidy(self) -> None:
        """Remove the job's own folder, once the index is there."""
        if self.job is not None:
            with suppress(OSError):
                _files.remove_tree(Path(self.job))

    def _gpus(self, network: EmbeddingNetwork) -> float:
        on_gpu = network.device.type != "cpu"
        if self.num_gpus and not on_gpu:
            raise InputError(
                f"num_gpus = {self.num_gpus:g}, and the network is on the CPU; load it on a GPU "
                '(device="cuda"), here too: the plan and the workers compute the same bytes'
            )
        return float(on_gpu) if self.num_gpus is None else self.num_gpus


def check_ray() -> None:
    """Raise InputError where Ray is not installed."""
    try:
        importlib.import_module("ray")
    except ImportError as error:
        raise InputError(
            f'this takes Ray, which cannot be imported ({reason(error)}); pip install "embedcam'
            '[ray]", or leave out the engine'
        ) from error


@contextmanager
def _cluster(address: str | None, workers: int | None) -> Iterator[Any]:
    """Yield Ray, connected: as this process is already, to a cluster, or to one of its own."""
    for name in _ZERO:
        os.environ.setdefault(name, "0")
    import ray

    if ray.is_initialized():
        if address is not None:
            raise InputError(
                f"this process is connected to a Ray cluster already; leave out the address "
                f"{address!r}, or call ray.shutdown() before"
            )
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        with _connected(ray, address):
            yield ray
        return
    # Names of sockets, which lie deep in it, have 103 letters at most.
    place = gettempdir() if len(gettempdir()) < _LONGEST else "/tmp"
    options = {
        "num_cpus": max(default_workers(), workers or 1),
        "include_dashboard": False,
        "object_store_memory": _STORE,
    }
    with (
        TemporaryDirectory(prefix="er-", dir=place, ignore_cleanup_errors=True) as folder,
        _connected(ray, "local", _temp_dir=folder, **options),
    ):
        yield ray


@contextmanager
def _connected(ray: Any, address: str, **options: object) -> Iterator[None]:
    """Connect to a cluster, and in the end leave it, or end it where it is this process's own."""
    # Ray prints what it has to say on standard output, where a command's JSON is.
    printing = importlib.import_module("ray._private.worker")
    before, terminated = getattr(printing, "print_to_stdstream", None), signal.getsignal(_TERM)
    printing.print_to_stdstream = _heard  # type: ignore[attr-defined]
    try:
        try:
            ray.init(address, logging_level="ERROR", log_to_driver=False, **options)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            raise InputError(
                f"no Ray cluster can be used at {address!r} ({reason(error)}); start one (ray "
                "start --head), or leave out the address for one of this machine alone"
            ) from error
        with suppress(ValueError):  # in another thread than the first none was set
            signal.signal(_TERM, terminated)
        yield
    finally:
        ray.shutdown()
        printing.print_to_stdstream = before  # type: ignore[attr-defined]


def _heard(message: Json, *_: object, **__: object) -> None:
    """Log what Ray says, but for workers that are ended here."""
    text = " ".join(str(message.get("lines", "")).split())
    if "ray.kill" not in text:
        log.info("Ray: %s", errors.sentence(text, 300))


def _shares(nodes: list[Json], workers: int | None, gpus: float) -> tuple[int, int]:
    """Return the CPUs of each worker, and how many workers there are, on the nodes of a cluster."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(one.get("CPU", 0)) for one in alive]
    room = [n if not gpus else min(n, int(one.get("GPU", 0) / gpus))
            for n, one in zip(cpus, alive, strict=True)]  # fmt: skip
    most = sum(room)
    if most < (workers or 1):
        each = f"with a CPU and {gpus:g} GPUs each" if gpus else "with a CPU each"
        raise InputError(
            f"the Ray cluster has room for {most:,} workers {each}, and {workers or 1:,} are to be "
            "started; ask for fewer, or add nodes"
        )
    usable = [(n, places) for n, places in zip(cpus, room, strict=True) if places]
    if workers is None and gpus:
        return min(n // places for n, places in usable), most
    wanted, threads = workers or 1, min(n for n, _ in usable)
    if workers is None:
        threads = min(threads, CPUS_EACH)
        return threads, sum(n // threads for n, _ in usable)
    threads = max(n for n, _ in usable)
    while sum(min(n // threads, places) for n, places in usable) < wanted:
        threads -= 1
    return threads, wanted


class _Worker:
    """Does pieces of one job, with the network loaded once; an actor of Ray."""

    def __init__(self, job: str, loading: str, paths: list[str], threads: int) -> None:
        self._path, self._loading, self._threads = Path(job), loading, threads
        self._open: tuple[Job, Plan] | None = None
        sys.path += [path for path in paths if path not in sys.path]

    def ready(self) -> str:
        """Answer."""
        return json.dumps({"pid": os.getpid()})

    def piece(self, number: int, of: int) -> str:
        """Do what can be done of a piece now; return JSON of what was done, or of the error."""
        try:
            if not self._path.is_dir():
                raise InputError(
                    f"{self._path}: is not seen by the worker on {os.uname().nodename}; give a "
                    "folder for the job that all workers see (--job FOLDER, or job=)"
                )
            if self._open is None:
                network = load_network(**json.loads(self._loading))
                job = Job.open(self._path)
                self._open = job, sharded.work_of(job, network, self._threads, False)
            job, work = self._open
            report = sharded.do_piece(job, work, number, of)
            return json.dumps({"done": report.done})
        except (EmbedcamError, MemoryError, SystemExit) as error:
            return json.dumps(_told(error))


def _told(error: BaseException) -> Json:
    """Return an error of a worker as JSON."""
    if isinstance(error, SystemExit):
        why = f"the network's own code ended the program ({reason(error)})"
        error = NetworkError(f"{why}; it should raise an error")
    number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
    return {"error": type(error).__name__, "text": str(error), "errno": number}


def _error_of(told: Json) -> BaseException:
    """Return a worker's error, as if it had been met here."""
    kind = getattr(errors, told["error"], EmbedcamError)
    if told["error"] == "MemoryError":
        return MemoryError(told["text"])
    error: EmbedcamError = kind.__new__(kind, told["text"])  # some are made of other things
    if isinstance(error, EmbeddingError):
        error.is_named = True
    if told["errno"] is not None:
        error.__cause__ = OSError(told["errno"], os.strerror(told["errno"]))
    return error


class _Task(NamedTuple):
    """What a worker is at: a piece, or None where it is not known to have begun."""

    actor: Any
    piece: int | None


class _Pool:
    """The workers of one job, and what each is at."""

    def __init__(
        self, ray: Any, job: Job, loading: Json, threads: int, count: int, gpus: float
    ) -> None:
        self.ray, self.job, self.threads = ray, job, threads
        self.count = min(count, job.n_chunks)
        self.of = min(job.n_chunks, PIECES_EACH * self.count)
        self._given = (
            str(job.checkpoint.path.absolute()),
            json.dumps(loading),
            [os.path.abspath(path) for path in sys.path],
            threads,
        )
        options = {"num_cpus": threads, "num_gpus": gpus}
        retried = {"max_restarts": -1, "max_task_retries": TRIES}
        self._make: Callable[..., Any] = ray.remote(**options, **retried)(_Worker).remote
        self._actors: list[Any] = []
        self._running: dict[Any, _Task] = {}

    def do_all(self, stages: Stages) -> None:
        """Do all rounds of all pieces: each begins once all pieces have done the one before."""
        rounds, left = self.job.choices.rounds, list(range(self.of))
        of = f"{self.of:,} pieces by {self.count:,} workers of {self.threads} CPUs"
        log.info("Ray: %s", of if self.count > 1 else of.replace("workers", "worker"))
        for number, stage in enumerate(_STAGES[:rounds], 1):
            with stages(stage, self.job.choices.n_images) as progressed:
                counted = _Counted(self.job, stage, progressed)
                done = self._round(left, counted, last=number == rounds)
            left = [piece for piece in left if done[piece] < rounds]

    def end(self) -> None:
        """End all workers, whatever they are at."""
        for actor in self._actors:
            with suppress(Exception):
                self.ray.kill(actor, no_restart=True)
        self._actors, self._running = [], {}

    def _round(self, pieces: list[int], counted: "_Counted", *, last: bool) -> dict[int, int]:
        """Do pieces once; return the rounds that each has done by then."""
        waiting, done = pieces[::-1], dict[int, int]()
        idle, heard = self._idle(), time.monotonic()
        while len(done) < len(pieces):
            while idle and waiting:
                actor, piece = idle.pop(), waiting.pop()
                self._running[actor.piece.remote(piece, self.of)] = _Task(actor, piece)
            silent = time.monotonic() - heard
            if idle and not waiting and (last or silent > PATIENCE):
                # Room for a worker that was lost with its node, or for other jobs.
                self._release(idle)
            answered, _ = self.ray.wait([*self._running], timeout=_POLL)
            for one in answered:
                task = self._running.pop(one)
                told = self._answer(one, task)
                idle.append(task.actor)
                if task.piece is not None:
                    done[task.piece] = told["done"]
            if counted.again() or answered:
                heard = time.monotonic()
            elif silent > PATIENCE:
                log.warning("Ray: no worker has answered for %.0f s; waiting", silent)
                heard = time.monotonic()
        return done

    def _idle(self) -> list[Any]:
        """Return workers that wait for a piece; start those that lack, which answer later."""
        busy = [task.actor for task in self._running.values()]
        idle = [actor for actor in self._actors if all(actor is not one for one in busy)]
        for _ in range(self.count - len(self._actors)):
            actor = self._make(*self._given)
            self._actors.append(actor)
            self._running[actor.ready.remote()] = _Task(actor, None)
        return idle

    def _release(self, idle: list[Any]) -> None:
        for actor in idle:
            self.ray.kill(actor, no_restart=True)
        self._actors = [one for one in self._actors if all(one is not actor for actor in idle)]
        idle.clear()

    def _answer(self, one: Any, task: _Task) -> Json:
        what = "a worker" if task.piece is None else f"piece {task.piece} of {self.of}"
        try:
            told: Json = json.loads(self.ray.get(one))
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise RuntimeError(f"{what}: {type(cause).__name__}: {reason(cause)}") from error
        except self.ray.exceptions.RayError as error:
            why = _why(str(error)) or reason(error)
            tried = "" if task.piece is None else f" {TRIES + 1} times"
            raise EmbedcamError(
                f"{what} ended its process{tried} ({why}); see that every node has this embedcam "
                "and memory enough, and run the same command again: it goes on where it stopped"
            ) from error
        if "error" in told:
            raise _error_of(told)
        return told


def _why(text: str) -> str:
    """Return the line of Ray's message that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if "Error:" in line]
    return errors.sentence(lines[-1], 200) if lines else ""


class _Counted:
    """How many images of a stage are done, by the chunks there are."""

    def __init__(self, job: Job, stage: str, progressed: Advance) -> None:
        self._job, self._stage, self._progressed = job, stage, progressed
        self._seen, self._next = 0, 0.0
        self.again()

    def again(self) -> bool:
        """Look for new chunks, now and then; return whether there are any."""
        now = time.monotonic()
        if now < self._next:
            return False
        path, prefix = self._job.checkpoint.path, f"{self._stage}-"
        names = (one.name.removeprefix(prefix) for one in os.scandir(path)
                 if one.name.startswith(prefix))  # fmt: skip
        chunks = sum(name.isdecimal() for name in names)
        # Of a folder with many chunks on a slow disk less often.
        self._next = time.monotonic() + 50 * (time.monotonic() - now)
        images = min(chunks * self._job.choices.per_chunk, self._job.choices.n_images)
        more = images - self._seen
        self._progressed(max(more, 0))
        self._seen = max(images, self._seen)
        return more > 0
