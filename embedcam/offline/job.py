"""A job on disk: what is to be done, for processes that see one folder and nothing else of it.

`job.json`, written last, holds the choices, the network's identity and how it is loaded, versions
of libraries, and how many pieces there are; the list of images lies beside it as columns. Pieces
are ranges of chunks. Only names, paths and numbers are in a job.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict, Unpack

import numpy as np

from .. import _files
from .._checks import whole as checked_whole
from ..errors import IndexFormatError, InputError, NetworkError, NetworkMismatch, reason
from ..export import opened_for
from ..images import ImageSource, load_source
from ..images.texts import Texts
from ..index.identity import Identity
from ..index.manifest import RunEntry
from ..index.records import Json, Wrong, of_type, read_as, text, whole
from ..network import EmbeddingNetwork, as_indexed, load_network
from ..recipe.recipe import Recipe
from .checkpoint import Checkpoint, give_name, publish, unfinished_name
from .plan import (
    Plan,
    caches_within,
    chunk_size,
    job_digest,
    libraries_of,
    run_of,
)
from .report import Stages
from .strategies import Strategy, is_exact, strategy_for
from .triplets import pairs_digest

NAME = "job.json"
MOST_PIECES = 1000
"""Pieces where nothing is said, at most: one a chunk, else several."""
_VERSION, _MOST_BYTES, _MOST = 1, 16 << 20, 1 << 40
_LIBRARIES = ("torchvision", "timm")
_PROBE = ("probe_embedding", "probe_pooled")
_DIGEST = text(64, r"[0-9a-f]{64}", "a SHA-256")
_PLAN_AGAIN = "plan the job again in another folder"

Digest = Annotated[str, _DIGEST]
Path4096 = Annotated[str, text(4096)]
Entries = Annotated[Json, lambda value: of_type(dict, value)]


@dataclass(frozen=True)
class Choices:
    """What `job.json` says; `per_chunk` images make a chunk, `rounds` looks at images a piece.

    `kind` is what the merge does with `index`: "build" makes it, "refit" replaces what it holds,
    and "add" adds to the very version that `index_sha256` names.
    """

    key: Digest
    kind: Literal["build", "refit", "add"]
    recipe: Entries
    network: Entries
    loading: Entries | None
    libraries: Mapping[Annotated[str, text(40)], Annotated[str, text(80)]]
    n_images: Annotated[int, whole(1, _MOST)]
    n_pieces: Annotated[int, whole(1, _MOST)]
    run: RunEntry
    per_chunk: Annotated[int, whole(1, _MOST)]
    rounds: Annotated[int, whole(1, 3)]
    on_unreadable: Literal["fail", "skip"]
    own_maps: bool
    trust: bool
    caches: bool
    index: Path4096 | None = None
    index_sha256: Digest | None = None

    def plain(self) -> Json:
        """Return the choices as `job.json` has them."""
        values: Json = json.loads(json.dumps(asdict(self)))
        return values


class How(TypedDict):
    """How the work of a job is done, as `build_index` has it."""

    batch_size: int | None
    on_unreadable: str
    scratch_gb: float


@dataclass(frozen=True)
class Job:
    """Choices with the images they are about.

    `files` are the fingerprints of the source's images when they were listed, `triplets` the user's
    own `[N S 2]` or None, `gone` ids that an addition removes, `prompts` the user's own captions.
    Of a job that lives in this process alone `path` is None.
    """

    choices: Choices
    source: ImageSource
    files: Texts
    identity: Identity
    triplets: np.ndarray | None = None
    gone: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe, as given."""
        return Recipe.from_dict(self.choices.recipe, "the job's recipe")

    @property
    def checkpoint(self) -> Checkpoint:
        """Where finished chunks of a job on disk lie, each with the stamp of this job."""
        assert self.path is not None
        return Checkpoint(self.path, stamp_of(self.maker()))

    @property
    def n_chunks(self) -> int:
        """Chunks of all images."""
        return -(-self.choices.n_images // self.choices.per_chunk)

    def draws(self, strategy: Strategy) -> bool:
        """Return whether stored maps take a look at the images of their own."""
        return self.choices.own_maps and not self.choices.caches and not strategy.layers

    def chunks_of(self, piece: int, of: int | None = None) -> range:
        """Return the chunks of a piece, of the plan's or of `of` in their place."""
        n = self.choices.n_pieces if of is None else checked_whole("of", of, 1)
        if checked_whole("piece", piece) >= n:
            raise InputError(f"piece = {piece} of {n:,}; pieces are counted from 0 to {n - 1:,}")
        return range(*(end * self.n_chunks // n for end in (piece, piece + 1)))

    def piece_of(self, chunk: int) -> int:
        """Return the plan's piece that a chunk belongs to."""
        return ((chunk + 1) * self.choices.n_pieces - 1) // self.n_chunks

    def missing(self, stage: str = "embed") -> list[int]:
        """Return the pieces of which a chunk is not there yet."""
        there = self.checkpoint.has
        lacking = (chunk for chunk in range(self.n_chunks) if not there(stage, chunk))
        return sorted({self.piece_of(chunk) for chunk in lacking})

    def work(
        self,
        network: EmbeddingNetwork,
        checkpoint: Checkpoint,
        stages: Stages,
        workers: int | None,
        strategy: Strategy | None = None,
    ) -> Plan:
        """Return the job with a network that does it."""
        choices = self.choices
        if strategy is None:
            exact = is_exact(self.recipe, network.head_kind.matrix, network.normalize)
            of = (network, self.recipe)
            strategy = strategy_for(*of, exact=exact, batch_size=choices.run.batch_size)
        strategy.caches = choices.caches
        how = (choices.run, workers, choices.on_unreadable, choices.per_chunk)
        # A job of this process has just listed them.
        files = None if self.path is None else self.files
        about = (network, self.source, self.recipe, strategy, checkpoint, stages)
        return Plan(*about, *how, files, fits=choices.kind != "add")

    def admit(self, network: EmbeddingNetwork | None) -> EmbeddingNetwork:
        """Return the network (None loads it) if it and the libraries are those of the plan."""
        network = self._load() if network is None else as_indexed(network, self.identity.layer)
        network.repeat_run(self.choices.run)
        if self.choices.run.runtime == "onnx" and network.onnx_file is None:
            network = self._by_onnx(network)
        here, planned = libraries_of(network), self.choices.libraries
        if here != planned:
            raise InputError(
                f"{self.path}: was planned with {differing(planned, here)}; install the plan's "
                f"versions here, or {_PLAN_AGAIN}"
            )
        identity = network.identity()
        entries = zip(self.identity.to_dict().items(), identity.to_dict().values(), strict=True)
        for (name, before), now in entries:
            if before != now:
                raise NetworkMismatch(
                    f"{self.path}: this is not the network of the plan: its {name} is {before!r}, "
                    f"given is one with {now!r}; give the network and weights that the job was "
                    f"planned with, or {_PLAN_AGAIN}"
                )
        probes = self.identity.arrays(), identity.arrays()
        if any(not np.array_equal(probes[0][name], probes[1][name]) for name in _PROBE):
            most = max(float(np.abs(probes[0][n] - probes[1][n]).max()) for n in _PROBE)
            raise NetworkMismatch(
                f"{self.path}: on the probe picture the network differs by {most:.2g} from the "
                "plan's: another kind of processor, device or number of threads computes other "
                f"bytes; work on machines like the one that planned, or {_PLAN_AGAIN} on one like "
                "this"
            )
        return network

    def _by_onnx(self, network: EmbeddingNetwork) -> EmbeddingNetwork:
        """Return the network run by the job's own file."""
        try:
            return opened_for(network, self._onnx_file)
        except NetworkMismatch as error:
            raise NetworkMismatch(
                f"{self._onnx_file}: holds another network than the one given here; give the "
                f"network and weights that the job was planned with, or {_PLAN_AGAIN}"
            ) from error
        except NetworkError as error:
            if not str(error).startswith(f"{self._onnx_file}: "):
                raise
            raise NetworkError(
                f"{self._onnx_file}: is missing or damaged, and runs the job's network; "
                f"{_PLAN_AGAIN}"
            ) from error

    @property
    def _onnx_file(self) -> Path:
        assert self.path is not None
        return self.path / f"network-{self.choices.key[:16]}.onnx"

    def save(self, path: Path, onnx_file: Path | None = None) -> "Job":
        """Write the job to a folder; workers see it by one rename, once all of it is there.

        `onnx_file` is what runs the network, where torch does not.
        """
        job, choices = replace(self, path=path), self.choices.plain()
        _files.make_folder(path)
        key, given = self.choices.key, dict[str, np.ndarray]()
        for name, texts in (("gone", Texts.of(self.gone)), ("prompts", Texts.of(self.prompts))):
            given |= {name: texts.blob, f"{name}_ends": texts.offsets}
        if self.triplets is not None:
            given["triplets"] = np.asarray(self.triplets)
        images, unfinished = _images_of(path, key), unfinished_name(_images_of(path, key))
        try:
            self.source.save(unfinished)
            give_name(unfinished, images)
        finally:
            _files.remove_tree(unfinished)
        columns = {"files": self.files.blob, "files_ends": self.files.offsets}
        arrays = {**columns, **self.identity.arrays(), **given}
        Checkpoint(path, key).write(_stage(key), 0, arrays)
        if onnx_file is not None:
            publish(job._onnx_file, onnx_file.read_bytes())
        maker = job.maker()
        publish(path / f"made-{stamp_of(maker)}.json", json.dumps(maker).encode())
        content = {"version": _VERSION, "sha256": _sha256(choices), "job": choices}
        publish(path / NAME, json.dumps(content, indent=1).encode())
        _files.sync_folder(path)
        return job

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a job from its folder, or say in one sentence why it cannot be."""
        try:
            choices = read_choices(path)
            listing = Checkpoint(path, choices.key)
            if not listing.whole(_stage(choices.key), 0):
                raise Wrong("its list of files is damaged or missing")
            arrays = listing.read(_stage(choices.key), 0)
            source = _source_of(path, choices.key)
            names = ("files", "gone", "prompts")
            files, gone, prompts = (_texts_of(arrays, name) for name in names)
            if not len(source) == len(files) == choices.n_images:
                raise Wrong(f"its list of images has not {choices.n_images} entries")
            probe = {name: np.array(arrays[name]) for name in _PROBE}
            identity = Identity.from_dict(choices.network, probe)
            triplets = arrays.get("triplets")
            lists = (tuple(gone), tuple(prompts))
            job = cls(choices, source, files, identity, triplets, *lists, path)
            if job._digest() != choices.key:
                raise Wrong(f"{NAME} and the list of images do not belong together")
        except (Wrong, IndexFormatError, KeyError, ValueError) as error:
            if isinstance(error, InputError) and not isinstance(error, Wrong):
                raise
            what = f"{path}: is no job that can be done ({reason(error)})"
            raise InputError(f"{what}; {_PLAN_AGAIN}") from error
        return job

    def refuse_others(self) -> None:
        """Refuse chunks that something else made than the plan says, by the number of the piece."""
        checkpoint = self.checkpoint
        for stage in ("embed", "weights", "maps"):
            for chunk in range(self.n_chunks):
                if checkpoint.has(stage, chunk):
                    made = checkpoint.made(stage, chunk)
                    if made != checkpoint.made_by:
                        piece = self.piece_of(chunk)
                        raise InputError(
                            f"{self.path}: piece {piece} {self._otherwise(made)}; do it again: "
                            f"`embedcam shard {self.path} {piece}`"
                        )

    def _otherwise(self, made: str) -> str:
        """Return how what made a chunk differs from the plan."""
        try:
            maker = json.loads(
                _files.read_regular(self.path or Path(), f"made-{made}.json", 1 << 16)
            )
            if stamp_of(maker) == made and maker["key"] == self.choices.key:
                libraries = dict(maker["libraries"])
                if libraries != self.choices.libraries:
                    return f"was made with {differing(libraries, self.choices.libraries)}"
                return "was made with a network whose probe is another"
        except (OSError, ValueError, KeyError, TypeError, _files.NotPlain):
            pass
        return "was made for another job"

    def maker(self) -> Json:
        """Return what says who makes a chunk of this job."""
        probe = b"".join(array.tobytes() for _, array in sorted(self.identity.arrays().items()))
        return {
            "key": self.choices.key,
            "index_sha256": self.choices.index_sha256,
            "libraries": dict(self.choices.libraries),
            "probe_sha256": hashlib.sha256(probe).hexdigest(),
        }

    def _digest(self) -> str:
        """Return the key that the choices and the listing give."""
        choices, given = self.choices, None
        if self.triplets is not None:
            given = pairs_digest(self.triplets)
        of = (self.recipe, self.identity, self.source, self.files, choices.run)
        prompts = (self.prompts,) if self.prompts else ()
        more = (choices.own_maps, given, *sorted(self.gone), *prompts)
        return job_digest(*of, choices.libraries, *more)

    def _load(self) -> EmbeddingNetwork:
        loading = self.choices.loading
        if not loading:
            raise InputError(
                f"{self.path}: was planned with a network that was not loaded by name; give it "
                "(network=)"
            )
        name = str(loading.get("network", ""))
        if name.partition(":")[0] not in _LIBRARIES:
            raise InputError(
                f"{self.path}: names the network {name!r}, which is code of whoever planned it; if "
                f"you trust it, say so (--network {name}, or network=load_network({name!r}))"
            )
        arguments: dict[str, Any] = {name: one for name, one in loading.items() if one is not None}
        try:
            return load_network(**arguments)
        except TypeError as error:
            raise InputError(f"{self.path}: its network cannot be loaded ({error})") from error


def pieces_of(n_images: int, per_chunk: int) -> int:
    """Return how many pieces a job has where nothing is said: one a chunk, 1,000 at most."""
    chunks = -(-n_images // per_chunk)
    return min(MOST_PIECES, chunks)


def job_of(
    source: ImageSource,
    network: EmbeddingNetwork,
    recipe: Recipe,
    strategy: Strategy,
    identity: Identity,
    path: Path,
    *,
    kind: Literal["build", "add"],
    own_maps: bool,
    trust: bool,
    triplets: np.ndarray | None = None,
    gone: Sequence[str] = (),
    prompts: Sequence[str] = (),
    index_sha256: str | None = None,
    **how: Unpack[How],
) -> Job:
    """Return a job of this process; activations are cached where the disk of `path` has room."""
    # Once, before any is read: a file that changes meanwhile must not pass for the one indexed.
    files = source.fingerprints()
    folder = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    run = run_of(network, how["batch_size"])
    per_chunk = chunk_size(run.batch_size, recipe.entry.formula)
    room = how["scratch_gb"] if own_maps else 0.0
    strategy.caches = caches_within(strategy, network, len(source), folder, room)
    choices = Choices(
        key="0" * 64,
        kind=kind,
        recipe=recipe.to_dict(),
        network=identity.to_dict(),
        loading=network.spec,
        libraries=libraries_of(network),
        n_images=len(source),
        n_pieces=pieces_of(len(source), per_chunk),
        run=run,
        per_chunk=per_chunk,
        rounds=rounds_of(strategy, own_maps),
        on_unreadable="fail" if how["on_unreadable"] == "fail" else "skip",
        own_maps=own_maps,
        trust=trust,
        caches=strategy.caches,
        index_sha256=index_sha256,
    )
    job = Job(choices, source, files, identity, triplets, tuple(gone), tuple(prompts))
    return replace(job, choices=replace(choices, key=job._digest()))


def rounds_of(strategy: Strategy, own_maps: bool) -> int:
    """Return how often a piece has to be done: to embed, to weigh, and to draw stored maps."""
    draws = own_maps and not strategy.caches and not strategy.layers
    return 1 + (draws or strategy.stage == "weights") + draws


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return "numpy 2.1.0 (2.3.1 ...)": the versions of one side that the other has not."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    first, second = (
        " and ".join(f"{name} {of.get(name, 'missing')}" for name in names) for of in (one, other)
    )
    return f"{first}, and here is {second}"


def stamp_of(maker: Json) -> str:
    """Return the digest that chunks carry of what made them."""
    return _sha256(maker)[:32]


def _sha256(values: Json) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _stage(key: str) -> str:
    return f"listing-{key[:16]}"


def _images_of(path: Path, key: str) -> Path:
    return path / f"images-{key[:16]}"


def read_choices(path: Path) -> Choices:
    """Read what `job.json` says, or say in one sentence why it cannot be."""
    try:
        return _checked_choices(path)
    except (Wrong, ValueError) as error:
        if isinstance(error, InputError) and not isinstance(error, Wrong):
            raise
        what = f"{path}: is no job that can be done ({reason(error)})"
        raise InputError(f"{what}; {_PLAN_AGAIN}") from error


def _checked_choices(path: Path) -> Choices:
    step, place = "give the folder of a job", path
    try:
        _files.is_folder(path)
        step, place = _PLAN_AGAIN, path / NAME
        content = _files.read_regular(path, NAME, _MOST_BYTES)
    except _files.NotPlain as error:
        raise InputError(f"{place}: {error}; {step}") from error
    except OSError as error:
        why = f"has no {NAME}" if path.is_dir() else "there is no such folder"
        raise InputError(
            f"{path}: is no job ({why}); plan one: embedcam plan IMAGES {path}"
        ) from error
    try:
        values = of_type(dict, json.loads(content))
    except RecursionError as error:
        raise Wrong(" holds lists in lists", NAME) from error
    version = values.get("version")
    if version != _VERSION:
        raise InputError(
            f"{path}: is a job of version {version!r}, and this embedcam does version {_VERSION}; "
            "use the embedcam that planned it, or plan it again"
        )
    choices = of_type(dict, values.get("job"))
    if _sha256(choices) != values.get("sha256"):
        raise Wrong(" was altered", NAME)
    return read_as(Choices, choices)


def _source_of(path: Path, key: str) -> ImageSource:
    """Return the images that a job lists."""
    try:
        return load_source(_images_of(path, key))
    except InputError as error:
        raise InputError(f"{error}; {_PLAN_AGAIN}") from error.__cause__


def _texts_of(arrays: dict[str, np.ndarray], name: str) -> Texts:
    """Return a column of a listing, once its arrays fit each other."""
    blob, ends = arrays[name], arrays[f"{name}_ends"]
    if blob.dtype != np.uint8 or blob.ndim != 1 or ends.dtype != np.uint64 or ends.ndim != 1:
        raise Wrong(f"its list of {name} is no list of texts")
    if not len(ends) or ends[0] or ends[-1] != len(blob) or (ends[1:] < ends[:-1]).any():
        raise Wrong(f"its list of {name} has ends outside the text")
    return Texts(blob, ends)
