"""The whole evaluation: groups of measures, one after another, from rows to rows."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from ..images import ImageSource
from ..index import Index
from ..network import EmbeddingNetwork
from .compared import compared
from .evaluation import Evaluation
from .examples import Examples
from .explained import explained
from .fidelity import fidelity
from .gallery import Gallery
from .maps import Mapper, Way
from .queries import OwnPositions, chosen
from .regions import Regions, of_boxes, of_masks
from .rivals import Recipes, named_methods, named_recipes, notes_of, rivals_of
from .scenes import pasted
from .settings import Clock, Settings
from .summary import summarised
from .work import Reader, Work


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

    Args:
        index: an open index or its folder.
        source: the query images, as `find_images` gives them.
        network: the network the index was built with; another one is refused.
        boxes: CSV with path,x0,y0,x1,y1[,label][,width,height], a line a box.
        masks: folder of masks named as the images are, white on the object.
        indexed: folder the indexed images lie in now; None takes the one they were built from.
        methods: names of methods that draw on the query itself, of how similar it is to what it is
            explained by; a column each, beside the controls.
        recipes: TOML files, names of recipes that came along, or `Recipe`s by name: the weights of
            the index's own pictures are computed by each, for a column each.
        settings: what is measured; see `Settings`.
        on_unreadable: "fail" at the first image that cannot be read or embedded, or "skip" it and
            say so.
        workers: threads that decode images.
        progress: bars; None shows them on a terminal or in a notebook, else logs how far it is.
        **choices: single settings by name, such as `n_neighbors=1`, in place of `settings`.

    Raises:
        InputError: images, boxes, masks or settings that cannot be used.
        NetworkMismatch: the network is not the index's.
        IndexFormatError: no index, or a broken one.
    """
    if settings is not None and choices:
        raise InputError("give settings, or single ones by name, not both")
    try:
        settings = settings or Settings(**choices)
    except TypeError as error:
        raise InputError(f"{error}; see `embedcam.evaluate.Settings`") from None
    if boxes is not None and masks is not None:
        raise InputError("give boxes or masks, not both")
    if on_unreadable not in ("fail", "skip"):
        raise InputError(f'on_unreadable: expected "fail" or "skip", given {on_unreadable!r}')
    if not isinstance(source, ImageSource):
        raise InputError(
            f"source is a {type(source).__name__}; give the query images as find_images returns "
            "them: find_images(folder)"
        )
    if not isinstance(network, EmbeddingNetwork):
        raise InputError(
            f"network is a {type(network).__name__}; give the EmbeddingNetwork that the index was "
            "built with"
        )
    if indexed is not None and not Path(indexed).is_dir():
        raise InputError(f"{indexed}: there is no such folder; name the indexed images' own")
    if not len(source):
        raise InputError("there are no images to evaluate with")
    wanted, by_name = named_methods(methods), named_recipes(recipes)
    opened = index if isinstance(index, Index) else Index.open(index)
    try:
        regions: Regions = Regions()
        if boxes is not None:
            regions = of_boxes(boxes, source)
        elif masks is not None:
            regions = of_masks(masks, source)
        root = None if indexed is None else Path(indexed)
        mapper = Mapper(opened, network, settings, Clock(), root, max_pixels=source.max_pixels)
        reader = Reader(source, mapper, settings, on_unreadable, workers, progress)
        with rivals_of(reader, wanted, by_name) as rivals:
            found = _evaluated(reader, regions, rivals, root)
        found.summary["methods"] = list(wanted)
        found.summary["recipes"] = {name: one.to_dict() for name, one in by_name.items()}
        found.summary["notes"] += notes_of(wanted)
        return found
    finally:
        if opened is not index:
            opened.close()


def _evaluated(
    reader: Reader, regions: Regions, rivals: dict[str, Way], indexed: Path | None
) -> Evaluation:
    """Everything, one group of measures after another: each takes rows and gives rows."""
    begun = time.perf_counter()
    source, mapper, settings = reader.source, reader.mapper, reader.settings
    stored = mapper.index.manifest.images_root
    root = Path(stored) if indexed is None and stored is not None else indexed
    positions = chosen(len(source), settings.limit, settings.seed)
    own = OwnPositions(mapper.index, source, positions, root)
    work = Work(
        settings, reader, mapper, Gallery(mapper.index, settings.seed), own, regions, rivals
    )
    rows, boxed = explained(work, positions)
    if not rows:
        raise InputError(f"none of the {len(positions)} images could be used: {reader.skipped[0]}")
    rows, beside = compared(work, rows)
    questions = boxed + pasted(work, rows)
    transfers = fidelity(work, rows)
    rows = {position: rows[position] for position in sorted(rows)}
    summary = summarised(work, list(rows.values()), questions, beside, transfers)
    examples = Examples(work)
    shown, grid = examples.choose(rows, questions), examples.grid(rows, questions)
    summary["seconds"] = {**mapper.clock.seconds, "total": time.perf_counter() - begun}
    return Evaluation(summary, list(rows.values()), questions, shown, grid)
