"""The whole evaluation, a batch of images at a time; kept are numbers, not pictures."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import EmbedcamError, InputError
from ..explanation import may_follow
from ..images import Batch, ImageSource, Item, embed, load_batches
from ..index import Index
from ..methods.subject import inputs_a_pass
from ..metrics import rank_correlations
from ..metrics.order import pixel_count
from ..network import EmbeddingNetwork
from ..progress import Advance, progress_of
from ..targets import WHITENED
from . import summary as told
from .controls import (
    MEAN,
    RANDOM,
    SHUFFLED,
    WRONG,
    ShuffledNetwork,
    mean_weights,
    random_weights,
    wrong_rows,
)
from .evaluation import Evaluation
from .examples import Examples
from .faithfulness import Asked, Faithfulness
from .fidelity import fidelity
from .gallery import Gallery
from .maps import Mapper, Maps, Seen
from .measures import localised, retrieved
from .queries import OwnPositions, chosen
from .regions import Region, Regions, of_boxes, of_masks
from .scenes import NoScenesError, Scenes
from .settings import KS, METHOD, Clock, Settings

CALIBRATED = 16
"""Images that a shuffled network's batch norms are measured on."""


def evaluate_index(
    index: Index | str | Path,
    source: ImageSource,
    network: EmbeddingNetwork,
    *,
    boxes: str | Path | None = None,
    masks: str | Path | None = None,
    indexed: str | Path | None = None,
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
    opened = index if isinstance(index, Index) else Index.open(index)
    try:
        regions: Regions = Regions()
        if boxes is not None:
            regions = of_boxes(boxes, source)
        elif masks is not None:
            regions = of_masks(masks, source)
        root = None if indexed is None else Path(indexed)
        job = _Job(
            opened, source, network, regions, root, settings, on_unreadable, workers, progress
        )
        return job.run()
    finally:
        if opened is not index:
            opened.close()


class _Job:
    """One evaluation on its way."""

    def __init__(
        self,
        index: Index,
        source: ImageSource,
        network: EmbeddingNetwork,
        regions: Regions,
        indexed: Path | None,
        settings: Settings,
        on_unreadable: Literal["fail", "skip"],
        workers: int | None,
        progress: bool | None,
    ) -> None:
        self.index, self.source, self.regions, self.settings = index, source, regions, settings
        stored = (index.manifest["images"] or {}).get("root")
        self.root = indexed if indexed is not None or stored is None else Path(stored)
        self.moved = indexed is not None
        self.merged = index.manifest.get("compressed") is not None
        self.on_unreadable, self.workers, self.progress = on_unreadable, workers, progress
        self.clock = Clock()
        self.mapper = Mapper(
            index, network, settings, self.clock, indexed, max_pixels=source.max_pixels
        )
        if network.preprocess is None:
            raise InputError(
                "the network does not say how pictures are prepared for it; give it preprocess="
            )
        self.preprocess = network.preprocess
        self.batch_size = settings.batch_size or inputs_a_pass(network.device)
        self.gallery = Gallery(index)
        self.positions = chosen(len(source), settings.limit, settings.seed)
        self.own = OwnPositions(index, source, self.positions, self.root)
        self.scenes = Scenes(self.mapper, self.gallery, settings)
        self.rows: dict[int, dict[str, Any]] = {}
        self.asked: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.held: dict[int, int] = {}

    def wants(self, group: str) -> bool:
        """Whether a group of measures was asked for."""
        return group in self.settings.measures

    def run(self) -> Evaluation:
        """Everything, one group after another."""
        begun = time.perf_counter()
        with self._bar(len(self.positions), "images") as tick:
            for batch in self._batches(self.positions, tick):
                self._first_pass(batch)
        if not self.rows:
            raise InputError(
                f"none of the {len(self.positions)} images could be used: {self.skipped[0]}"
            )
        compared = self._controls()
        self._objects()
        found = self._fidelity()
        rows = [self.rows[position] for position in sorted(self.rows)]
        summary = self._summary(rows, compared, found)
        examples = Examples(
            self.mapper, self.gallery, self.source, self.regions, self.held, self.scenes.see
        )
        shown = examples.choose(self.rows, self.asked, self.settings)
        summary["seconds"] = {**self.clock.seconds, "total": time.perf_counter() - begun}
        return Evaluation(summary, rows, self.asked, shown)

    def _check_pixels(self, size: tuple[int, int]) -> None:
        """Refuse what `metrics` could only refuse after a look at every image."""
        if not self.wants("faithfulness") or not self.settings.faithfulness:
            return
        pixels, steps, removed = size[0] * size[1], self.settings.steps, self.settings.removed
        if steps > pixels:
            raise InputError(
                f"steps = {steps}; it must be a whole number, 1 to {pixels}, the pixels of the "
                "network's input"
            )
        if pixel_count(removed, pixels) == pixels:
            raise InputError(
                f"removed = {removed} is every one of the {pixels} pixels of the network's input; "
                "give a smaller share"
            )

    # ---------------------------------------------------------------- every image

    def _first_pass(self, read: Batch) -> None:
        batch, seen = embed(read, self.source, self.mapper.see, self.on_unreadable)
        self.skipped += [one[1] for one in batch.errors if one not in read.errors]
        if seen is None:
            return
        self._check_pixels(seen.size)
        own = self.own.of(batch.positions.tolist(), seen.embeddings)
        with self.clock("explaining"):
            near = self.gallery.nearest(seen.embeddings, own, max(*KS, self.settings.n_neighbors))
        with self.clock("metrics"):
            items = [self.source.items[position] for position in batch.positions]
            labels = [item.label for item in items]
            precise: list[float | None] = [None] * len(items)
            if self.wants("retrieval") and self.gallery.labelled:
                precise = self.gallery.precision_at_r(seen.embeddings, labels, own)
        explained = self.mapper.transferred(
            seen, [rows[: self.settings.n_neighbors] for rows in near]
        )
        placed = self._placed(batch, seen.size)
        with self.clock("metrics"):
            for place, item in enumerate(items):
                one = explained[place]
                row: dict[str, Any] = {
                    "id": item.id,
                    "label": item.label,
                    "indexed": bool(own[place] >= 0),
                    "result": one.ids[0],
                    "result_label": one.labels[0],
                    "distance": float(one.distances[0]),
                    "trust": one.trust,
                    "empty": one.empty,
                }
                if self.wants("retrieval"):
                    others = [self.gallery.label_of(int(r)) for r in near[place]]
                    known = item.label if self.gallery.labelled else None
                    row |= retrieved(known, others) | {"map_at_r": precise[place]}
                self.rows[int(batch.positions[place])] = row
                self.held[int(batch.positions[place])] = int(own[place])
            ways = {METHOD: Maps.of(explained)}
            if any(region is not None for region in placed):
                ways[MEAN] = self._mean(seen)
            self._localise(batch, placed, ways)
        if self.wants("objects"):
            for place, region in enumerate(placed):
                if region is not None and len(region.by_label) > 1:
                    self.asked += self.scenes.of_boxes(
                        seen.row(place),
                        region.by_label,
                        int(own[place]),
                        int(batch.positions[place]),
                        items[place].id,
                    )

    def _placed(self, batch: Batch, grid: tuple[int, int]) -> list[Region | None]:
        """The regions of a batch's images."""
        found: list[Region | None] = []
        for position, (width, height) in zip(
            batch.positions.tolist(), batch.sizes.tolist(), strict=True
        ):
            if not self.regions.has(position):
                found.append(None)
                continue
            extent = self.preprocess.extent(width, height)
            found.append(self.regions.of(position, (width, height), extent, grid))
        return found

    def _localise(self, batch: Batch, placed: list[Region | None], maps: dict[str, Maps]) -> None:
        """The localisation measures of each way's maps, into the rows."""
        there = [place for place, region in enumerate(placed) if region is not None]
        regions = [region for region in placed if region is not None]
        if not there or not self.wants("localisation"):
            return
        for way, found in maps.items():
            prefix = "" if way == METHOD else f"{way}: "
            some = Maps(found.drawn[there], found.signed[there])
            numbers = localised(some, regions, self.settings.threshold)
            for place, values in zip(there, numbers, strict=True):
                row = self.rows[int(batch.positions[place])]
                row |= {
                    f"{prefix}{name}": value
                    for name, value in values.items()
                    if not prefix or name != "area"
                }

    # ---------------------------------------------------------------- controls and masked images

    def _controls(self) -> dict[str, Any]:
        """Faithfulness and the controls, on a sample."""
        settings = self.settings
        faithful = self.wants("faithfulness")
        localise = settings.controls and self.wants("localisation") and len(self.regions)
        sane = settings.controls and self.wants("sanity")
        found: dict[str, Any] = {"curves": {}, "sanity": [], "passes": 0, "sample": 0}
        if not settings.faithfulness or not (faithful or localise or sane):
            return found
        read = np.array(sorted(self.rows))
        if localise and not faithful:
            # Drawn among those that say something: of many images few may have a box.
            located = [place for place, row in sorted(self.rows.items()) if "area" in row]
            read = np.array(located) if located or not sane else read
        if not len(read):
            return found
        sample = read[chosen(len(read), settings.faithfulness, settings.seed)]
        shuffled = self._shuffled(sample) if settings.controls else None
        asking = Faithfulness(self.mapper.network, self.gallery, settings, self.clock)
        correlations: dict[int, list[tuple[float, bool]]] = {}
        with self._bar(len(sample), "controls" if settings.controls else "faithfulness") as tick:
            for batch in self._batches(sample, None):
                seen = self.mapper.see(batch.images)
                own = np.array([self.held[position] for position in batch.positions.tolist()])
                with self.clock("explaining"):
                    near = self.gallery.nearest(seen.embeddings, own, settings.n_neighbors)
                maps = {METHOD: self._maps(seen, near)}
                if settings.controls:
                    maps |= self._control_maps(batch, seen, near, own)
                if shuffled is not None:
                    last = self._cascade(shuffled, batch, seen, near, own, correlations)
                    maps |= {} if last is None else {SHUFFLED: last}
                with self.clock("metrics"):
                    placed = self._placed(batch, seen.size)
                    controls = {way: some for way, some in maps.items() if way != METHOD}
                    self._localise(batch, placed, controls)
                for place, position in enumerate(batch.positions.tolist()):
                    for way, some in controls.items():
                        self.rows[position][f"{way}: empty"] = not some.drawn[place].any()
                    if faithful:
                        asked = Asked(
                            batch.images[place],
                            seen.embeddings[place],
                            int(near[place][0]),
                            int(own[place]),
                        )
                        numbers = asking(
                            asked, {way: some.drawn[place] for way, some in maps.items()}
                        )
                        for way, values in numbers.items():
                            prefix = "" if way == METHOD else f"{way}: "
                            self.rows[position] |= {
                                f"{prefix}{name}": value for name, value in values.items()
                            }
                    tick(1)
        found["sample"] = len(sample)
        found["passes"] = asking.passes
        found["curves"] = told.mean_curves(asking.curves)
        if shuffled is not None:
            shuffled.shuffle(0)
            found["sanity"] = [
                {
                    "modules": stage,
                    "of": shuffled.count,
                    **told.mean_of(np.array([alike for alike, _ in values])),
                    "empty": sum(empty for _, empty in values) / len(values),
                }
                for stage, values in sorted(correlations.items())
                if values
            ]
        return found

    def _maps(self, seen: Seen, near: list[np.ndarray]) -> Maps:
        rows = [places[: self.settings.n_neighbors] for places in near]
        return Maps.of(self.mapper.transferred(seen, rows))

    def _mean(self, seen: Seen) -> Maps:
        count = len(seen.embeddings)
        ones = [np.repeat(one, count, 0) for one in mean_weights(self.mapper.channels)]
        return self.mapper.drawn(seen, ones)

    def _control_maps(
        self, batch: Batch, seen: Seen, near: list[np.ndarray], own: np.ndarray
    ) -> dict[str, Maps]:
        """Maps of what needs no other network."""
        items = [self.source.items[position] for position in batch.positions]
        channels, seed = self.mapper.channels, self.settings.seed
        drawn = [random_weights(channels, seed, item.id) for item in items]
        noise = [np.concatenate(layer) for layer in zip(*drawn, strict=True)]
        maps = {MEAN: self._mean(seen), RANDOM: self.mapper.drawn(seen, noise)}
        wrong = [
            wrong_rows(self.gallery, item.label, near[place], int(own[place]), seed, item.id)
            for place, item in enumerate(items)
        ]
        others = [rows for rows in wrong if rows is not None]
        if len(others) == len(items):
            maps[WRONG] = self._maps(seen, others)
        else:
            self._note("the index holds too few images for a control with wrong images' weights")
        return maps

    def _shuffled(self, sample: np.ndarray) -> ShuffledNetwork | None:
        some = next(self._batches(sample[:CALIBRATED], None, CALIBRATED), None)
        if some is None:
            self._note("no controls: the images could be read before, and no longer can")
            return None
        try:
            return ShuffledNetwork(self.mapper.network, self.settings.seed, some.images)
        except EmbedcamError as error:
            self._note(f"no network of shuffled parameters as a control: {error}")
            return None

    def _cascade(
        self,
        shuffled: ShuffledNetwork,
        batch: Batch,
        seen: Seen,
        near: list[np.ndarray],
        own: np.ndarray,
        correlations: dict[int, list[tuple[float, bool]]],
    ) -> Maps | None:
        """Maps of the wholly shuffled network; how alike each stage's are is noted."""
        here = self._maps(seen.small(), near).drawn
        stages = shuffled.stages if self.wants("sanity") else shuffled.stages[-1:]
        last = None
        for stage in stages:
            shuffled.shuffle(stage)
            other = shuffled.see(self.mapper, batch.images)
            if other is None:
                self._note("the network computes nothing finite once its parameters are shuffled")
                return None
            with self.clock("explaining"):
                found = self.gallery.nearest(other.embeddings, own, self.settings.n_neighbors)
            there = self._maps(other.small(), found).drawn
            with self.clock("metrics"):
                alike = rank_correlations(here, there)
            empty = [not drawn.any() for drawn in there]
            correlations.setdefault(stage, []).extend(zip(alike.tolist(), empty, strict=True))
            if stage == shuffled.stages[-1]:
                last = self._maps(other, found)
        return last

    # ---------------------------------------------------------------- two objects, fidelity

    def _objects(self) -> None:
        """Pairs of pictures side by side."""
        if not self.wants("objects") or not self.settings.scenes:
            return
        read = np.array(sorted(self.rows))
        with self._bar(self.settings.scenes, "scenes") as tick:
            try:
                self.asked += self.scenes.pasted(
                    self.source, read, self.own, self.on_unreadable, tick
                )
            except NoScenesError as error:
                self._note(f"no scenes of two pictures: {error}")
        if self.scenes.squeezed:
            self._note(
                f"scenes show both pictures at half their width: {self.scenes.squeezed}, so two "
                "stand side by side in the size of one"
            )

    def _fidelity(self) -> dict[str, Any]:
        if not self.wants("fidelity") or not self.settings.fidelity or len(self.gallery) < 2:
            return {}
        if self.merged:
            self._note(
                "no transfer fidelity: a prototype's weights are no image's own; what prototypes "
                "lose was measured when they were made, see `embedcam info`"
            )
            return {}
        source, rows = self._indexed()
        if source is None:
            self._note(
                "no transfer fidelity: the index's own pictures are not to be found; say where "
                "they lie now (--indexed, indexed=), or evaluate with images that are indexed"
            )
            return {}
        with self._bar(len(source), "fidelity") as tick:
            records, missing = fidelity(
                self.mapper, self.gallery, source, rows, self.batch_size, tick
            )
        if missing:
            self._note(f"transfer fidelity: {missing} indexed pictures could not be used")
        shared = self.index.manifest["target"] in WHITENED and self.gallery.labelled
        return told.fidelity(records, shared)

    def _indexed(self) -> tuple[ImageSource | None, np.ndarray]:
        """Pictures that the index holds, and their rows: among the queries, else its own files."""
        wanted, seed = min(self.settings.fidelity, len(self.gallery)), self.settings.seed
        mine = np.array([position for position, row in self.held.items() if row >= 0], np.int64)
        if len(mine) >= wanted:
            some = mine[chosen(len(mine), wanted, seed)].tolist()
            return _Part(self.source, some), np.array([self.held[place] for place in some])
        root = self.root
        rows = self.gallery.positions[chosen(len(self.gallery), wanted, seed)]
        if root is None:
            return None, rows[:0]
        listed = zip(self.index.ids[rows], self.index.paths[rows], rows.tolist(), strict=True)
        there = [
            (Item(name, path), row)
            for name, path, row in listed
            if path and may_follow(str(root / path), root, self.moved)
        ]
        states = [self.mapper.explainer.file_state(item.id) for item, _ in there]
        if replaced := states.count("changed"):
            self._note(
                f"transfer fidelity: {replaced} indexed pictures were replaced since the build and "
                "are left out"
            )
            there = [one for one, state in zip(there, states, strict=True) if state != "changed"]
        if not any((root / item.path).is_file() for item, _ in there):
            return None, rows[:0]
        listed_items = [item for item, _ in there]
        source = ImageSource(listed_items, root, max_pixels=self.source.max_pixels)
        return source, np.array([row for _, row in there])

    # ---------------------------------------------------------------- what is said

    def _summary(
        self,
        rows: list[dict[str, Any]],
        compared: dict[str, Any],
        found: dict[str, Any],
    ) -> dict[str, Any]:
        sample = told.sampled(rows)
        controls = told.beside_controls(sample, ("localisation", "faithfulness"))
        pasted = [row for row in self.asked if row["second"] >= 0]
        boxed = [row for row in self.asked if row["second"] < 0]
        objects: dict[str, dict[str, Any]] = {
            name: {
                "questions": len(some),
                "measures": told.measured(some, "objects"),
                "controls": told.beside_controls(some, ("objects",))
                if self.settings.controls
                else {},
            }
            for name, some in (("pasted pairs", pasted), ("boxes of several labels", boxed))
            if some
        }
        held = [(controls, f"{compared['sample']} images")]
        held += [(entry["controls"], name) for name, entry in objects.items()]
        self._count_notes(rows, compared)
        return {
            "index": str(self.index.path),
            "images": {
                "given": len(self.source),
                "asked": len(self.positions),
                "measured": len(rows),
                "indexed": sum(row["indexed"] for row in rows),
                "empty_maps": sum(row["empty"] for row in rows),
                "with_regions": sum("area" in row for row in rows),
                "skipped": self.skipped,
            },
            "indexed_images": len(self.gallery),
            "settings": self.settings.to_dict(),
            "flags": [text for one, what in held for text in told.flags(one, what)],
            "beats": [text for one, what in held for text in told.beaten(one, what)],
            "notes": self.notes,
            "retrieval": told.retrieval(rows),
            "localisation": told.measured(rows, "localisation"),
            "faithfulness": told.measured(rows, "faithfulness"),
            "sample": compared["sample"],
            "masked_passes": compared["passes"],
            "controls": controls,
            "empty_in_controls": told.empties(rows),
            "curves": compared["curves"],
            "objects": objects,
            "fidelity": found,
            "sanity": compared["sanity"],
        }

    def _count_notes(self, rows: list[dict[str, Any]], compared: dict[str, Any]) -> None:
        if self.wants("retrieval") and not told.retrieval(rows):
            what = "no image has a label"
            if not self.gallery.labelled:
                numbers = self.gallery.numbers
                what = (
                    "the index's labels are numbers, not classes"
                    if numbers
                    else ("the index has no labels")
                )
            self._note(f"no retrieval quality: {what}")
        if self.wants("localisation"):
            if not len(self.regions):
                self._note("no localisation: neither boxes nor masks were given")
            else:
                missing = sum("area" not in row for row in rows)
                if missing:
                    self._note(
                        f"localisation leaves out {missing} of {len(rows)} images: without a box "
                        "or mask, or with all of it outside of what the network sees"
                    )
        if self.merged:
            self._note(
                "the index holds prototypes and does not know what was merged into them: a query "
                "that was is explained with its own part in them"
            )
        sample = compared["sample"]
        if sample and sample < len(rows):
            self._note(
                f"faithfulness and controls: a seeded sample of {sample} of {len(rows)} images"
            )
        if len(self.positions) < len(self.source):
            self._note(
                f"a seeded sample of {len(self.positions)} of {len(self.source)} images was queried"
            )
        empty = sum(row["empty"] for row in rows)
        if empty:
            self._note(f"{empty} of {len(rows)} maps are empty, and score what chance does")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # ---------------------------------------------------------------- reading

    def _batches(
        self,
        positions: np.ndarray,
        tick: Callable[[int], Any] | None,
        batch_size: int | None = None,
    ) -> Iterator[Batch]:
        """Images that can be read, a batch at a time."""
        loaded = load_batches(
            self.source,
            positions,
            self.preprocess,
            batch_size or self.batch_size,
            workers=self.workers,
            on_error=self.on_unreadable,
        )
        while True:
            with self.clock("reading"):
                batch = next(loaded, None)
            if batch is None:
                return
            self.skipped += [message for _, message in batch.errors]
            if len(batch):
                yield batch
            if tick is not None:
                tick(len(batch) + len(batch.errors))

    def _bar(self, total: int, what: str) -> AbstractContextManager[Advance]:
        return progress_of(what, total, shown=self.progress)


class _Part(ImageSource):
    """Some images of a source."""

    def __init__(self, source: ImageSource, positions: list[int]) -> None:
        items = [source.items[position] for position in positions]
        super().__init__(items, source.root, max_pixels=source.max_pixels)
        self._source, self._positions = source, positions

    def open(self, position: int) -> Any:
        """The picture."""
        return self._source.open(self._positions[position])
