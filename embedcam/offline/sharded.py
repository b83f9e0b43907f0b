"""A build or an addition in pieces: planned once, done by any number of processes, then merged.

They meet in the folder of the job alone, in any order, also twice at once; who comes last or is
killed loses nothing but its own unfinished chunk.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .._checks import whole
from ..errors import EmbedcamError, InputError, PiecesMissing
from ..images import ImageSource
from ..index import Index, writer
from ..index.encoding import Encoding
from ..network import EmbeddingNetwork, as_indexed, read_by
from ..recipe.recipe import Recipe
from . import build, merge, plan, shard
from .job import NAME, Choices, How, Job
from .plan import SCRATCH_GB, Plan
from .report import BuildReport, Stages

MOST_PIECES = 1 << 20
_OURS = re.compile(
    r"(images|listing|made|network|embed|reduced|weights|fitted|maps)-.*|job\.json\..*"
)
_SMALL = ("positions", "embedding", "length", "grid", "errors", "refused", "cropped")
"""Arrays of an embedded chunk that others read."""


@dataclass(frozen=True)
class PlanReport:
    """What was planned: `n_images` in `n_pieces`, counted from 0, each done `rounds` times.

    The first round embeds a piece's images; a second and third, where there are any, look at them
    again once every piece has done the one before. `not_taken` is what the source left out.
    """

    path: Path
    n_images: int
    n_pieces: int
    rounds: int
    not_taken: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShardReport:
    """What became of a piece: `done` of its `rounds`, and the pieces it waits for with the next.

    `skipped` are (id, reason) of images that could not be read, or not embedded.
    """

    path: Path
    piece: int
    of: int
    n_images: int
    done: int
    rounds: int
    waits_for: list[int]
    skipped: list[tuple[str, str]]
    seconds: dict[str, float]


def plan_job(
    source: ImageSource,
    network: EmbeddingNetwork,
    path: str | Path,
    recipe: Recipe | None = None,
    *,
    pieces: int | None = None,
    add_to: str | Path | None = None,
    batch_size: int | None = None,
    on_unreadable: str = "fail",
    triplets: np.ndarray | None = None,
    prompts: Sequence[str] | None = None,
    own_maps: bool = True,
    trust: bool = True,
    scratch_gb: float = SCRATCH_GB,
    replace: bool = False,
) -> PlanReport:
    """Divide a build, or an addition to an index, into pieces and write the job to a folder.

    Parameters
    ----------
    source
        The images, in files: from `find_images`.
    network
        The network to explain; workers load it by its name, or are given the same.
    path
        Folder of the job, which every worker must see.
    pieces
        How many; None makes one of each chunk (256 images, or with methods that are slow a batch),
        at most 1,000. Of more pieces than chunks some are empty.
    add_to
        The index that the merge adds the images to, by its own recipe.
    recipe, batch_size, on_unreadable, triplets, prompts, own_maps, trust, scratch_gb
        As for `build_index`.
    replace
        The merge replaces the finished index it finds.

    Raises
    ------
    InputError
        Images that are in this process alone, or a folder that holds something else or another job.
    """
    path = Path(path)
    _check_folder(path)
    source.describe()  # refuse what lives in this process alone
    how = How(batch_size=batch_size, on_unreadable=on_unreadable, scratch_gb=scratch_gb)
    if add_to is None:
        network = read_by(network, (recipe or Recipe()).entry.reading)
        job, _ = build.planned_build(
            source,
            network,
            path,
            recipe,
            triplets=triplets,
            prompts=prompts,
            own_maps=own_maps,
            trust=trust,
            **how,
        )
        job = _with(job, kind="refit" if replace else "build")
    else:
        plan.check_options(source, network, batch_size, on_unreadable, scratch_gb)
        with Index.open(add_to) as index:
            network = as_indexed(network, index.layers[0].name)
            build.check_additions(index, source, network)
            plan.check_new(index, source)
            job, _ = build.planned_additions(index, source, network, **how)
        job = _with(job, index=str(Path(add_to).resolve()))
    if pieces is not None:
        job = _with(job, n_pieces=whole("pieces", pieces, 1, MOST_PIECES))
    with plan.disk_errors(path):
        _write(job, path, network.onnx_file)
    choices = job.choices
    of, notes = (choices.n_images, choices.n_pieces, choices.rounds), list(source.notes)
    if (empty := choices.n_pieces - job.n_chunks) > 0:
        notes.append(
            f"{empty:,} pieces are empty: each is whole chunks of {choices.per_chunk} images"
        )
    return PlanReport(path, *of, str(source.left_out), notes)


def run_shard(
    path: str | Path,
    piece: int,
    of: int | None = None,
    network: EmbeddingNetwork | None = None,
    *,
    workers: int | None = None,
    progress: bool | None = None,
) -> ShardReport:
    """Do what can be done of a piece now; it may be done again, anywhere, also at the same time.

    Parameters
    ----------
    path
        Folder of the job.
    piece, of
        Which piece, from 0; `of` divides the images anew, into so many.
    network
        The network of the plan; None loads it as it was loaded there.
    workers, progress
        As for `build_index`.

    Raises
    ------
    InputError
        No job, no such piece, or other versions of libraries than the plan's.
    NetworkMismatch
        Another network than the plan's, or one that computes other bytes here.
    ImageError
        An image whose file changed since the plan, or that cannot be read and is not to be skipped.
    """
    job = Job.open(Path(path))
    job.chunks_of(piece, of)  # refuse a piece that is none before a network is loaded
    return do_piece(job, work_of(job, network, workers, progress), piece, of)


def do_piece(job: Job, work: Plan, piece: int, of: int | None = None) -> ShardReport:
    """Do what can be done of a piece now, with a network that is admitted."""
    path, chunks = job.checkpoint.path, job.chunks_of(piece, of)
    done, waits_for = 1, list[int]()
    with plan.disk_errors(path), _there(path), work.network.one_thread_each():
        shard.embed_chunks(work, chunks)
        if job.choices.rounds > 1 and not (waits_for := job.missing()):
            waits_for = _look_again(job, work, chunks)
            done = 2 if waits_for else job.choices.rounds
    n_images = sum(len(work.positions(chunk)) for chunk in chunks)
    skipped = [one for chunk in chunks for one in work.unusable(chunk)]
    of = job.choices.n_pieces if of is None else of
    report = (path, piece, of, n_images, done, job.choices.rounds, waits_for, skipped)
    return ShardReport(*report, work.stages.seconds)


def merge_job(
    path: str | Path,
    index: str | Path,
    network: EmbeddingNetwork | None = None,
    *,
    workers: int | None = None,
    progress: bool | None = None,
) -> BuildReport:
    """Make the index from the pieces of a job: the reductions, all that is left, one commit.

    Parameters
    ----------
    path
        Folder of the job.
    index
        Folder of the index: a new one, or the one that a job adds to.
    network, workers, progress
        As for `run_shard`.

    Raises
    ------
    PiecesMissing
        Pieces that are not embedded, by number.
    InputError
        A piece that was made with other versions than the plan's, or a folder that holds something
        else.
    """
    path, index = Path(path), Path(index)
    job = Job.open(path)
    if job.choices.kind != "add":
        writer.check_target(index, replace=True)
    refuse_unfinished(job)
    work = work_of(job, network, workers, progress)
    with plan.disk_errors(index), _there(path), work.network.one_thread_each():
        if job.choices.kind == "add":
            Index.open(index).close()  # refuse a folder without one before a lock appears in it
            with writer.lock(index), Index.open(index) as into:
                if (done := build.finished_additions(job, into)) is not None:
                    return done
                if _holds(work, into):
                    return BuildReport(index, 0, work.skipped(), left_out=job.source.left_out)
                _check_same(job, into)
                return build.write_additions(job, work, into)
        with writer.lock(index):
            again = job.choices.kind == "refit"
            done = build.finished_build(job, index, work.network, replace=again)
            return build.write_build(job, work, index) if done is None else done


def missing_pieces(path: str | Path) -> list[int]:
    """Return the numbers of the pieces of a job that are not embedded yet."""
    return Job.open(Path(path)).missing()


def work_of(
    job: Job, network: EmbeddingNetwork | None, workers: int | None, progress: bool | None
) -> Plan:
    """Return a job on disk with its network, which is admitted."""
    return job.work(job.admit(network), job.checkpoint, Stages(progress), workers)


def keep(job: Job, path: Path, onnx_file: Path | None) -> Job:
    """Write a job to a folder, or find it there; refuse a folder that holds something else."""
    _check_folder(path)
    _write(job, path, onnx_file)
    return replace(job, path=path)


@contextmanager
def _there(path: Path) -> Iterator[None]:
    """Say of a job that is removed under the work what to do."""
    try:
        yield
    except FileNotFoundError as error:
        if (path / NAME).exists():
            raise
        raise EmbedcamError(
            f"{path}: the job was removed, or is out of reach, while it was worked on; bring its "
            "folder back and run the same command again, or plan it again"
        ) from error


def _with(job: Job, **changes: object) -> Job:
    choices: Choices = replace(job.choices, **changes)  # type: ignore[arg-type]
    return replace(job, choices=choices)


def _check_folder(path: Path) -> None:
    """Refuse a folder that holds anything but a job, or what is left of a plan."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: not a directory; give a new one for the job")
    for one in path.iterdir() if path.is_dir() else ():
        if one.name != NAME and not _OURS.fullmatch(one.name):
            raise InputError(
                f"{path}: holds {one.name!r}, which is no part of a job; choose an empty or a new "
                "directory"
            )


def _write(job: Job, path: Path, onnx_file: Path | None) -> None:
    if (path / NAME).exists():
        if Job.open(path).choices.plain() != job.choices.plain():
            raise InputError(
                f"{path}: holds another job (other images, or other choices); choose another "
                "folder, or delete it"
            )
        return
    job.save(path, onnx_file)


def refuse_unfinished(job: Job) -> None:
    """Refuse a job of which pieces are missing, damaged, or made by something else."""
    if missing := job.missing():
        raise PiecesMissing(str(job.path), missing, job.choices.n_pieces)
    job.refuse_others()
    chunks = range(job.n_chunks)
    broken = {job.piece_of(chunk) for chunk in chunks if not job.checkpoint.intact("embed", chunk)}
    if broken:
        raise PiecesMissing(str(job.path), sorted(broken), job.choices.n_pieces)


@contextmanager
def _opened(job: Job) -> Iterator[Index | None]:
    """Open the index that a job adds to, which must be as it was."""
    if job.choices.index is None:
        yield None
        return
    with Index.open(job.choices.index) as index:
        _check_same(job, index)
        yield index


def _holds(work: Plan, index: Index) -> bool:
    """Return whether an index has the images of a job, embedded as there: it was merged before."""
    chunks = work.filled()
    for chunk in chunks:
        ids = work.source.ids.select(work.embedded(chunk))
        found = index.find_live(ids)
        if len(found) < len(ids):
            return False
        stored = index.embeddings([found[name] for name in ids])
        if not np.array_equal(stored, work.checkpoint.column("embed", chunk, "embedding")):
            return False
    return bool(chunks)


def _check_same(job: Job, index: Index) -> None:
    if index.manifest.manifest_sha256 != job.choices.index_sha256:
        raise InputError(
            f"{index.path}: is not as it was when {job.path} was planned (it changed since, or it "
            "is another); plan the addition again in another folder"
        )


def _look_again(job: Job, work: Plan, chunks: range) -> list[int]:
    """Weigh chunks and draw their stored maps; return the pieces that have to be weighed before."""
    wanted = ["weights", "maps"] if job.draws(work.strategy) else ["weights"]
    if all(work.checkpoint.has(stage, c) for stage in wanted for c in _filled(work, chunks)):
        return []
    for chunk in work.chunks:
        if not work.checkpoint.whole("embed", chunk, *_SMALL):
            job.refuse_others()
            piece = job.piece_of(chunk)
            raise InputError(
                f"{job.path}: piece {piece} is damaged; do it again: `embedcam shard {job.path} "
                f"{piece}`"
            )
    with _opened(job) as index:
        embedded = build.gathered(job, work, index)
        anchors = build.anchors_of(job, work, embedded)
        before = sum(len(work.embedded(chunk)) for chunk in range(chunks.start))
        shard.weigh_chunks(work, anchors, embedded.n_before + before, chunks)
        if not job.draws(work.strategy):
            return []
        filled, there = _filled(work, work.chunks), work.checkpoint.has
        lacking = [chunk for chunk in filled if not there("weights", chunk)]
        if not lacking:
            encoding = build.encodings_of(work, embedded, index)[0]
            _draw(work, encoding, embedded, before, chunks)
    return sorted({job.piece_of(chunk) for chunk in lacking})


def _filled(work: Plan, chunks: range) -> list[int]:
    return [chunk for chunk in chunks if len(work.embedded(chunk))]


def _draw(
    work: Plan, encoding: Encoding, embedded: merge.EmbeddedImages, done: int, chunks: range
) -> None:
    """Write chunks `maps`, of images of which `done` come before the first."""
    grid, filled = merge.grid_of(work), _filled(work, chunks)
    with work.stages("maps", sum(len(work.embedded(chunk)) for chunk in filled)) as progressed:
        for chunk in filled:
            weights = np.asarray(work.checkpoint.column("weights", chunk, "weights"))
            if not work.checkpoint.intact("maps", chunk):
                new = embedded.new[done : done + len(weights)]
                factors = merge.encode_rows(encoding, weights, new, embedded.mean, grid)[1]
                maps, scales = shard.map_chunk(work, chunk, factors)
                work.checkpoint.write("maps", chunk, {"maps": maps, "scales": scales})
            done += len(weights)
            progressed(len(weights))
