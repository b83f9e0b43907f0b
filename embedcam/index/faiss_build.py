"""FAISS indexes made: trained once, filled in one place or by shards, the same bytes either way.

FAISS is imported when it is first needed. Everything that builds runs on one OpenMP thread, because
graphs (HNSW, NSG) and OPQ give other bytes with another number of threads.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import one_of
from ..errors import InputError, cut, short
from .arrays import ArrayLike, block_rows

if TYPE_CHECKING:
    import faiss

AUTO = "auto"
EF_SEARCH = 64
MOST_BYTES = 4 << 30
"""Of the rows in a search file of a type that shards can fill: where they take more, in several."""
_AUTO = ((20_000, "Flat"), (200_000, "IVF512,SQ8"), (2_000_000, "IVF1024,SQ8"))
_AUTO_ABOVE, _AUTO_MOST = "IVF4096,SQ8", "IVF16384,SQ8"
_COARSE = ((5.5, 1), (3.5, 2), (1.75, 4), (0.9, 16), (0.0, 64))
"""Bits that a code spends on a dimension, and of how many times the candidates the best are kept.

Measured so that the true 5 of 100,000 are among them at .99, see docs/results/faiss.md.
"""
_MERGED = (
    "IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexIVFScalarQuantizer",
    "IndexIVFPQ", "IndexIVFRaBitQ",
)  # fmt: skip
_MOST, _MOST_LINKS, _MOST_LETTERS = 1 << 24, 1024, 200
"""Of a number in a factory string; of a graph's links a row, usually 4 to 64; of its letters."""
_MOST_EMPTY = 1 << 20
"""Lists of a multi-index, however few the images: about 300 bytes each."""
_A_LIST, _A_LIST_OF_AUTO = 256, 64
"""Vectors that train a list: FAISS takes no more, and with a quarter the lists are as good."""


def choose(factory: str, n_images: int) -> str:
    """Return a factory string; for "auto" what serves so many images, whatever their width.

    Flat below 20,000: there a search is as fast. Above, inverted lists of 8 bits a dimension, whose
    candidates are re-ranked exactly: 512 lists, from 200,000 on 1,024, from 2,000,000 on 4,096, and
    from 20,000,000 on 16,384. How many are visited is measured, see `faiss_choice`.
    """
    if factory.lower() != AUTO:
        return factory
    for below, chosen in _AUTO:
        if n_images < below:
            return chosen
    return _AUTO_ABOVE if n_images < 20_000_000 else _AUTO_MOST


def choice_note(asked: str, factory: str, n_images: int) -> str | None:
    """Return what was chosen where "auto" was asked for, a sentence; None where it was not."""
    if asked.lower() != AUTO:
        return None
    if (now := choose(asked, n_images)) == factory:
        return f"search: {factory}, chosen for {n_images:,} images"
    return (
        f"search: {factory}; auto prefers {now} for {n_images:,} images where that finds the true "
        "neighbours: `embedcam compact INDEX --rebuild-faiss auto` tries it"
    )


def check_factory(factory: str, width: int, n_images: int, metric: str = "l2") -> None:
    """Refuse a factory string that cannot serve so many images, before anything is computed."""
    _make(choose(factory, n_images), width, metric, n_images)


def is_flat(factory: str, width: int, n_images: int, metric: str) -> bool:
    """Return whether a factory string makes the file that is nothing but the vectors."""
    import faiss

    return isinstance(_make(factory, width, metric, n_images), faiss.IndexFlat)


def build(
    factory: str, embeddings: ArrayLike, metric: str, rows: np.ndarray, auto: bool = False
) -> tuple["faiss.Index", int]:
    """Return a FAISS index over embeddings `[N D]`, and how many rows it was trained on.

    The same bytes every time; `rows` are those that may be trained on; `auto` where we chose.
    """
    index, trained_on = train(factory, embeddings, metric, rows, auto)
    add(index, embeddings, factory=factory)
    return index, trained_on


def train(
    factory: str, embeddings: ArrayLike, metric: str, rows: np.ndarray, auto: bool = False
) -> tuple["faiss.Index", int]:
    """Return an empty FAISS index, trained, and on how many of the `rows` of `[N D]` it was.

    Those are a seeded sample by position: the same rows of the same embeddings, whoever asks.
    """
    index = _make(factory, embeddings.shape[1], metric, len(rows))
    if index.is_trained:
        return index, 0
    with threads(1), _as_input_error(factory):
        a_list = _A_LIST_OF_AUTO if auto else _A_LIST
        if len(rows) > (most := max(1 << 16, a_list * _training_need(index))):
            drawn = np.random.default_rng(0).choice(len(rows), most, replace=False)
            rows = rows[np.sort(drawn)]
        index.train(np.asarray(embeddings[rows], np.float32))
    return index, len(rows)


def add(
    index: "faiss.Index",
    embeddings: ArrayLike,
    start: int = 0,
    stop: int | None = None,
    *,
    factory: str = "",
) -> None:
    """Add the rows `start` to `stop` of embeddings `[N D]` to an index, which keeps those before.

    In blocks; graphs that cannot grow need all of them at once.
    """
    before, name = index.ntotal, type(index).__name__
    stop = embeddings.shape[0] if stop is None else stop
    at_once = "NSG" in name or "NNDescent" in name
    step = max(stop - start, 1) if at_once else block_rows(embeddings)
    with threads(1), _as_input_error(factory):
        for first in range(start, stop, step):
            rows = embeddings[first : min(first + step, stop)]
            index.add(np.ascontiguousarray(rows, np.float32))
    if (kept := index.ntotal - before) != stop - start:
        raise InputError(f"the FAISS factory {factory!r} keeps {kept} of {stop - start} rows")


def can_grow(index: "faiss.Index") -> bool:
    """Return whether rows can be added to an index that holds some; to some graphs they cannot."""
    return "NSG" not in type(index).__name__


def rows_a_file(index: "faiss.Index") -> int:
    """Return how many rows a search file holds where several do; all of a type not to be merged."""
    if not is_mergeable(index):
        return 1 << 62
    sizes: Any = index  # of its type, unseen by type checkers
    return max(1, MOST_BYTES // (int(sizes.code_size) + (8 if hasattr(sizes, "nlist") else 0)))


def first_of(index: "faiss.Index") -> "faiss.Index":
    """Return an index, or the first of those that are searched as one: all are of its type."""
    import faiss

    one = faiss.downcast_index(index)
    if isinstance(one, faiss.IndexShards):
        several: Any = one
        return faiss.downcast_index(several.at(0))
    return one


def is_mergeable(index: "faiss.Index") -> bool:
    """Return whether shards of an index can be merged into the bytes of one build.

    Flat, IVF,Flat, IVF,SQ, IVF,PQ and IVF,RaBitQ can; others (HNSW, NSG, the fast scan of PQ4fs,
    and what is wrapped) are filled in one place.
    """
    return type(index).__name__ in _MERGED


def shard(trained: "faiss.Index", embeddings: ArrayLike, start: int, stop: int) -> "faiss.Index":
    """Return the rows `start` to `stop` of embeddings `[N D]` as a shard of an empty index."""
    import faiss

    made = faiss.clone_index(trained)
    add(made, embeddings, start, stop)
    return made


def merge(trained: "faiss.Index", shards: Iterable["faiss.Index"]) -> "faiss.Index":
    """Return one index of shards, in the order of their rows: the bytes of one build.

    One shard is held at a time, and may be empty afterwards; `trained` grows to what is returned.
    """
    if not is_mergeable(trained):
        raise InputError(
            f"FAISS cannot merge shards of {type(trained).__name__} into the bytes of one build; "
            "add all rows in one place, or take Flat, IVF,Flat, IVF,SQ8, IVF,PQ or IVF,RaBitQ"
        )
    with threads(1), _as_input_error("of shards"):
        for one in shards:
            if hasattr(trained, "nlist"):
                # Lists keep numbers of their own, which go on where those before end.
                trained.merge_from(one, trained.ntotal)
            elif one.ntotal:  # Flat: FAISS merges no IndexFlat with the IndexFlatL2 it reads
                trained.add(one.reconstruct_n(0, one.ntotal))
    return trained


def candidates(index: "faiss.Index") -> int:
    """Return how many times the usual candidates a type of index must propose.

    Exact re-ranking can only keep what was proposed, and the coarser a code, the more rows seem as
    near as the true neighbors.
    """
    import faiss

    index = first_of(index)
    if isinstance(index, faiss.IndexRefine):
        return 1  # it ranks its candidates by finer codes itself
    if "HNSW" in (name := type(index).__name__) or "NSG" in name or "NNDescent" in name:
        inner = getattr(index, "storage", None)
        return 1 if inner is None else candidates(inner)
    inner = list(_pieces(index))[-1]
    if "RaBitQ" in type(inner).__name__:  # whose codes hold factors beside the bits
        bits = float(inner.rabitq.nb_bits) * int(inner.d) / int(index.d)
    elif hasattr(inner, "code_size"):
        bits = 8 * int(inner.code_size) / int(index.d)
    else:
        return 1
    return next(times for least, times in _COARSE if bits >= least)


def search_settings(index: "faiss.Index") -> dict[str, int]:
    """Return sensible search parameters, to be recorded: nprobe for IVF, ef for HNSW."""
    settings = {}
    for piece in _pieces(index):
        name = type(piece).__name__
        if "IVF" in name:
            settings["nprobe"] = min(int(piece.nlist), max(8, int(piece.nlist) // 32))
        elif "HNSW" in name:
            settings["ef_search"] = EF_SEARCH
    return settings


def parameters(
    index: "faiss.Index", nprobe: int, ef_search: int
) -> "faiss.SearchParameters | None":
    """Return FAISS search parameters for an index and what it wraps; None where it takes none."""
    import faiss

    if isinstance(index, faiss.IndexFlat):
        return None
    options: Any = faiss  # its keyword arguments are added at run time, unseen by type checkers
    index = first_of(index)
    made: faiss.SearchParameters | None = None
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(index.index, nprobe, ef_search)
        made = inner and options.SearchParametersPreTransform(index_params=inner)
    elif isinstance(index, faiss.IndexRefine):
        inner = parameters(index.base_index, nprobe, ef_search)
        made = options.IndexRefineSearchParameters(k_factor=2.0, base_index_params=inner)
    elif isinstance(index, faiss.IndexIVF):
        made = options.SearchParametersIVF(nprobe=min(nprobe, int(index.nlist)))
    elif isinstance(index, faiss.IndexHNSW):
        made = options.SearchParametersHNSW(efSearch=ef_search)
    return made


def metric_code(metric: str) -> int:
    """Return FAISS's number for a metric."""
    return ("ip", "l2").index(one_of("metric", metric, ("l2", "ip")))


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run FAISS on `count` OpenMP threads (None: as it is), put back afterwards.

    OpenMP keeps the number for each thread that computes, so no other thread sees it change.
    """
    import faiss

    before = faiss.omp_get_max_threads()
    if count is not None:
        faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _make(factory: str, width: int, metric: str, n_images: int) -> "faiss.Index":
    import faiss

    _refuse_many(factory, n_images)
    with _as_input_error(factory):
        index = faiss.index_factory(width, factory, metric_code(metric))
    if "IDMap" in type(index).__name__:
        raise InputError(f"the FAISS factory {factory!r} numbers its rows itself; drop IDMap")
    for piece in _pieces(index):
        for holder in (piece, getattr(piece, "pq", None)):
            if holder is not None and hasattr(holder, "cp"):
                # Few images a centroid is the user's choice; FAISS would print a line for each.
                holder.cp.min_points_per_centroid = 1
    _refuse_few(factory, _training_need(index), n_images)
    return index


def _refused(factory: str, why: str) -> InputError:
    return InputError(
        f"the FAISS factory {short(factory)} cannot be used ({why}); 'Flat' always can"
    )


def _refuse_many(factory: str, n_images: int) -> None:
    # What FAISS takes memory for before it looks at it, or the stack.
    if len(factory) > _MOST_LETTERS:
        raise _refused(factory, f"{len(factory):,} letters are more than {_MOST_LETTERS}")
    for kind, digits in re.findall(r"(HNSW|NSG|NNDescent)?([0-9]+)", factory):
        most = _MOST_LINKS if kind else _MOST
        if len(digits) > 9 or int(digits) > most:
            raise _refused(factory, f"{kind}{cut(digits, 20)} is more than {kind}{most}")

    # Lists and codes that so few images cannot fill, before FAISS takes gigabytes.
    lists = [int(digits) for digits in re.findall(r"IVF([0-9]+)", factory)]
    codes = [1 << int(bits) for bits in re.findall(r"(?<![A-Z])PQ[0-9]+x([0-9]{1,2})", factory)]
    _refuse_few(factory, max([0, *lists, *codes]), n_images)
    for number, bits in re.findall(r"IMI([0-9]{1,3})x([0-9]{1,3})", factory):
        if 1 << int(number) * int(bits) > max(_MOST_EMPTY, 16 * n_images):
            lists_of = f"2^{int(number) * int(bits)} lists are too many for {n_images} images"
            raise _refused(factory, lists_of)


def _refuse_few(factory: str, needed: int, n_images: int) -> None:
    if needed > n_images:
        raise InputError(
            f"the FAISS factory {short(factory)} needs at least {needed} images to train, and "
            f"there are {n_images}; use 'Flat', or one with fewer lists or codes"
        )


def _pieces(index: "faiss.Index") -> Iterator[Any]:
    """Yield the index and those it wraps, outermost first."""
    import faiss

    index = faiss.downcast_index(index)
    yield index
    for name in ("index", "base_index"):
        if isinstance(inner := getattr(index, name, None), faiss.Index):
            yield from _pieces(inner)


def _training_need(index: "faiss.Index") -> int:
    # The fewest vectors that the index can be trained on.
    import faiss

    if index.is_trained:
        return 0
    need = 1
    for piece in _pieces(index):
        if "IVF" in type(piece).__name__:
            coarse = type(faiss.downcast_index(piece.quantizer)).__name__
            # A product quantizer's lists are combinations: far fewer vectors train it.
            need = max(need, 1 if "MultiIndex" in coarse else int(piece.nlist))
        quantizer = getattr(piece, "pq", None)
        if quantizer is not None and not piece.is_trained:
            need = max(need, int(quantizer.ksub))
    return need


@contextlib.contextmanager
def _as_input_error(factory: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        why = "it takes more memory than there is" if isinstance(error, MemoryError) else None
        raise _refused(factory, why or brief(error)) from error


def brief(error: Exception) -> str:
    """Return FAISS's reason without the function signature and source line before it."""
    text = " ".join(str(error).split())
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: ", "", text)[:200]
