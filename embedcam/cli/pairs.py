"""The command that explains a pair."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import ImageError, show, show_json
from ..images import MAX_PIXELS
from ..images.reading import why_missing
from .networks import check_onnx, network_given
from .online import check_above, check_images, plan_pictures
from .report import columns, listing_ids, note


def compare(options: argparse.Namespace) -> None:
    """Why a query and a result match, or why the result came above a rival."""
    from ..explain.explainer import Explainer
    from ..index import Index
    from ..pairs import PairExplainer

    # Whatever can be refused is refused before the network is loaded.
    check_onnx(options)
    (picture,) = plan_pictures(options.output, [options.query])
    check_images(options.images)
    if not Path(options.query).exists():
        raise ImageError(f"{options.query}: {why_missing(options.query)}")
    with Index.open(options.index) as index:
        with listing_ids(options.index):
            for name in filter(None, (options.result, options.above)):
                index.position(name)
        check_above(options)
        network = network_given(options, index.manifest)
        pixels = options.max_pixels or MAX_PIXELS
        explainer = Explainer(index, network, images=options.images, max_pixels=pixels)
        pairs = PairExplainer(explainer)
        centred = not options.not_centred
        made: Any
        if options.above is None:
            made = pairs.receipt(options.query, options.result, centred=centred)
        else:
            made = pairs.above(options.query, options.result, options.above, centred=centred)
        if index.manifest.is_compressed:
            note(
                options,
                "note: a prototype is the mean of several images; what is compared is the picture "
                "in its middle",
            )
        given = [name for name in (options.result, options.above) if name is not None]
        if changed := [name for name in given if explainer.file_state(name) == "changed"]:
            note(
                options,
                f"note: changed since the build: {', '.join(changed)}; what is compared is the "
                "picture as it is now, which embeds as the old one did",
            )
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            made.save(picture, lines=options.lines)
    if options.json:
        saved = {} if picture is None else {"picture": str(picture)}
        show_json({"query": options.query, **saved, "pair": made.to_dict(options.lines)})
        return
    show(*_lines(options, made))
    if picture is not None:
        note(options, f"picture: {picture}")


def _lines(options: argparse.Namespace, made: Any) -> list[str]:
    """What is added up, a line each, and the sum."""
    head = f"{options.query} and {options.result}"
    if options.above is not None:
        head += f", above {options.above}"
        total = ["more similar by", f"{made.score:+.3f}"]
    else:
        total = ["similarity", f"{made.similarity:+.3f}"]
    rows = [[words, f"{number:+.3f}"] for words, number in made.amounts(options.lines)]
    shown = columns([*rows, total], right=(1,))
    return [head, *(f"  {line}" for line in shown)]
