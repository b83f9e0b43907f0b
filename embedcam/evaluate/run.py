"""Evaluate an index: groups of measures, one after another, from rows to rows."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .._checks import one_of
from ..errors import InputError
from ..explain.explainer import Explainer
from ..images import ImageSource, as_root
from ..index import Index
from ..network import EmbeddingNetwork
from .examples import Examples
from .gallery import Gallery, OwnRows, sample
from .groups import compared, explained, fidelity, pasted
from .maps import Mapper
from .measures import Clock
from .regions import Regions, of_boxes, of_masks
from .report import Evaluation
from .rivals import Recipes, named_methods, named_recipes, notes_of, rivals_of
from .settings import Settings
from .summary import summarized
from .work import Work


def evaluate_index(
    index: Index | str | Path,
    source: ImageSource,
    network: EmbeddingNetwork,
    *,
    boxes: str | Path | None = None,
    masks: str | Path | None = None,
    indexed: str | Path | None = None,
    methods: Sequence[str] = (),
    recipes: Recipes = (),
    settings: Settings | None = None,
    on_unreadable: Literal["fail", "skip"] = "fail",
    workers: int | None = None,
    progress: bool | None = None,
    **choices: Any,
) -> Evaluation:
    """Measure how good the maps of an index are on query images.

    An image that the index holds is explained by others only.

    Parameters
    ----------
    index : an open index, or its folder
    source : the query images, as `find_images` gives them
    network : the network the index was built with; another one is refused
    boxes : CSV with path,x0,y0,x1,y1[,label][,width,height], a line a box
    masks : folder of masks named as the images are, white on the object
    indexed : folder the indexed images lie in now; default the one they were built from
    methods : names of methods that draw on the query itself, of how similar it is to what it is
        explained by; a column each, beside the baselines
    recipes : TOML files, names of recipes that came along, or Recipes by name: the weights of the
        index's own pictures are computed by each, for a column each
    settings : what is measured; `choices` are single settings by name in its place
    on_unreadable : "fail" at the first image that cannot be read or embedded, or "skip" and say so
    workers : threads that decode images
    progress : show bars; default on a terminal or in a notebook, elsewhere a log line now and then

    Raises
    ------
    InputError
        Images, boxes, masks or settings that cannot be used.
    NetworkMismatch
        The network is not the index's.
    IndexFormatError
        No index, or a broken one.
    """
    if settings is not None and choices:
        raise InputError("give settings, or single ones by name, not both")
    try:
        settings = settings or Settings(**choices)
    except TypeError as error:
        raise InputError(f"{error}; see `embedcam.evaluate.Settings`") from None
    if boxes is not None and masks is not None:
        raise InputError("give boxes or masks, not both")
    one_of("on_unreadable", on_unreadable, ("fail", "skip"))
    if not isinstance(source, ImageSource):
        kind = type(source).__name__
        raise InputError(f"source is a {kind}; give the query images: find_images(folder)")
    if not isinstance(network, EmbeddingNetwork):
        kind = type(network).__name__
        raise InputError(f"network is a {kind}; give the EmbeddingNetwork of the index")
    root = None if indexed is None else as_root(indexed)
    if isinstance(root, Path) and not root.is_dir():
        raise InputError(f"{indexed}: there is no such folder; name the indexed images' own")
    if not len(source):
        raise InputError("there are no images to evaluate with")
    wanted, by_name = named_methods(methods), named_recipes(recipes)
    with nullcontext(index) if isinstance(index, Index) else Index.open(index) as opened:
        regions = Regions(source) if boxes is None else of_boxes(boxes, source)
        regions = regions if masks is None else of_masks(masks, source)
        explainer = Explainer(
            opened, network, n_neighbors=settings.n_neighbors, transfer=settings.transfer,
            images=root, max_pixels=source.max_pixels,
        )  # fmt: skip
        if root is None and opened.manifest.images_root is not None:
            root = as_root(opened.manifest.images_root)
        positions = sample(len(source), settings.limit, settings.seed)
        work = Work(
            settings, source, Mapper(explainer, network, Clock()), Gallery(opened, settings.seed),
            OwnRows(opened, source, positions, root), regions, on_unreadable, workers, progress,
        )  # fmt: skip
        with rivals_of(work, wanted, by_name) as work.rivals:
            evaluation = _evaluated(work, positions)
    evaluation.summary["methods"] = list(wanted)
    evaluation.summary["recipes"] = {name: one.to_dict() for name, one in by_name.items()}
    evaluation.summary["notes"] += notes_of(wanted)
    return evaluation


def _evaluated(work: Work, positions: np.ndarray) -> Evaluation:
    begun = time.perf_counter()
    rows, boxed = explained(work, positions)
    if not rows:
        raise InputError(f"none of the {len(positions)} images could be used: {work.skipped[0]}")
    rows, beside = compared(work, rows)
    questions = boxed + pasted(work, rows)
    transfers = fidelity(work, rows)
    rows = dict(sorted(rows.items()))
    summary = summarized(work, list(rows.values()), questions, beside, transfers)
    examples = Examples(work)
    shown, grid = examples.choose(rows, questions), examples.grid(rows, questions)
    summary["seconds"] = {**work.mapper.clock.seconds, "total": time.perf_counter() - begun}
    return Evaluation(summary, list(rows.values()), questions, shown, grid)
