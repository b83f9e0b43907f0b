"""`explain --method`: the query's map by a method of the zoo itself, beside the index's results."""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..ops import attended
from ..recipe.registry import LayersMethod, Method, find_method


def check_method(options: argparse.Namespace) -> Method | None:
    """The method that was asked for, refused before a network is loaded.

    Raises:
        InputError: unknown, or one whose branch is trained with the network.
    """
    if options.method is None:
        if options.fill is not None or options.option:
            raise InputError("--fill and --option are a method's; name it with --method")
        return None
    found = find_method(options.method)
    if options.fill is not None and not found.filled:
        raise InputError(f"{found.title} fills nothing in; leave out --fill")
    if found.trained:
        raise InputError(
            f"{found.title} draws with a branch that is trained with the network; call "
            "embedcam.cam_for with a network that has one (embedcam.methods.learned)"
        )
    return found


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """The method's own options, and its fill, as `cam_for` takes them."""
    asked = dict(options.option or ())
    return asked if options.fill is None else {**asked, "fill": options.fill}


def trust_of(options: argparse.Namespace, index: Any, network: Any) -> dict[str, Any]:
    """What `Explainer` is told of trust.

    Raises:
        InputError: a fallback or a threshold without a calibration.
    """
    asked = options.fallback or options.trusted_from is not None
    if asked and index.manifest.trust_calibration is None:
        raise InputError(
            f"{index.path} holds no calibration of trust (built without one, from features, of "
            "fewer than 40 images, or of prototypes), so no transfer is found wanting; leave out "
            f"--fallback and --trusted-from, or run embedcam calibrate {index.path}"
        )
    given: dict[str, Any] = {}
    if options.trusted_from is not None:
        given["trusted_from"] = options.trusted_from
    if options.fallback:
        from ..methods.fallback import DirectWeights
        from ..recipe.recipe import Recipe

        recipe = Recipe.of_index(index.manifest)
        given["fallback"] = DirectWeights(network, recipe)
    return given


def redrawn(
    explanation: Any,
    index: Any,
    network: Any,
    query: str,
    method: Method,
    asked: dict[str, Any],
    quiet: bool,
) -> Any:
    """The explanation with its query's map made by the method, from the query's own passes.

    The target is the cosine similarity to the result it is explained by; of several results, to
    the mean of their normalised embeddings; with a rival, how much farther that is.

    Args:
        explanation: of the query, from the index.
        index: the index.
        network: its network.
        query: path of the picture.
        method: what draws.
        asked: its options, and its fill.
        quiet: no progress bar.
    """
    from ..methods import cam_for

    target = _target(explanation, index)
    layers = index.manifest.layer_names
    chosen: dict[str, Any] = {"layers": layers} if isinstance(method, LayersMethod) else {}
    if chosen and len(layers) < 2:
        raise InputError(
            f"{method.title} draws with several layers and this index has one; call "
            "embedcam.cam_for(..., layers=[...])"
        )
    made = cam_for(
        network, query, target, method.name, progress=False if quiet else None,
        max_pixels=explanation.max_pixels, **chosen, **asked,
    )  # fmt: skip
    weights = np.zeros_like(explanation.weights) if made.weights is None else made.weights
    seen = network.forward(network.preprocess(explanation.image)[None]).activations[0]
    return replace(
        explanation,
        cam=np.maximum(made.cam, 0),
        signed_cam=made.cam,
        weights=weights,
        features=attended(seen.cpu().numpy(), np.maximum(made.grid_cam, 0)),
        layer_weights=made.layer_weights,
        method=method.title,
        trust=None,
        trust_low=None,
        direct=False,
    )


def _target(explanation: Any, index: Any) -> Any:
    """What the query's map is computed for, see `redrawn`."""
    from ..targets import ClassProxy, Similarity, TripletMargin

    vectors = np.asarray(index.embeddings(index.positions(explanation.explained)))
    if explanation.rival is not None:
        rival = index.embeddings(index.positions([explanation.rival.id]))
        return TripletMargin(vectors, np.asarray(rival))
    return Similarity(vectors[0] if len(vectors) == 1 else ClassProxy(vectors).proxy)
