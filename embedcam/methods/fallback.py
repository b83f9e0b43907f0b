"""What is computed on a query itself, where a transfer is not to be trusted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..network import EmbeddingNetwork
from ..recipe.recipe import Recipe
from ..recipe.registry import LayersMethod
from ..targets import Direction, TripletMargin, query_cotangent
from .direct import found_for
from .subject import Subject, inputs_a_pass


class DirectWeights:
    """Weights of a query by the recipe's own method and target, with the query as anchor.

    Its neighbours are the positives and stand for its label, which a query has none of; seeded
    random other images are the negatives, see `targets.query_cotangent`. Through the head alone
    where the method is Grad-CAM's kind; works inside inference mode too.

    Args:
        network: the network the index was built with.
        recipe: the index's, `Recipe.of_index(index.manifest)`.

    Raises:
        InputError: they are something else.
    """

    def __init__(self, network: EmbeddingNetwork, recipe: Recipe) -> None:
        if not isinstance(network, EmbeddingNetwork) or not isinstance(recipe, Recipe):
            raise InputError(
                "DirectWeights takes the index's network and recipe, an EmbeddingNetwork and a "
                f"Recipe; given {type(network).__name__} and {type(recipe).__name__}"
            )
        self.network, self.recipe = network, recipe

    def weights(
        self, inputs: Any, positives: np.ndarray, negatives: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Weights `[K]` of each layer, in the manifest's order.

        Args:
            inputs: the network's input, `[3 H W]`.
            positives: embeddings of the neighbours, `[P D]`.
            negatives: of other images, `[Q D]`.
        """
        recipe, entry = self.recipe, self.recipe.entry
        options = recipe.method_options
        if isinstance(entry, LayersMethod):
            options["layers"] = list(recipe.layers)
        batch = torch.as_tensor(inputs)[None].to(self.network.device)
        with Subject(
            self.network,
            batch.float(),
            self._target(positives, negatives, batch),
            norm="through" if self.network.already_normalized else recipe.head_norm,
            batch_size=inputs_a_pass(self.network.device),
            seed=recipe.seed % (1 << 63),
            fill=recipe.fill,
        ) as subject:
            found = found_for(subject, entry, **options)
        if found.layers is not None:
            run = self.network.run_several(batch, recipe.layers, differentiable=False)
            order = sorted(range(len(run.names)), key=lambda place: -run.depth[place])
            return [_numpy(found.layers[run.names[place]][0]) for place in order]
        assert found.weights is not None
        return [_numpy(found.weights[0])]

    def _target(
        self, positives: np.ndarray, negatives: np.ndarray, batch: torch.Tensor
    ) -> Direction | TripletMargin:
        recipe = self.recipe
        if recipe.per_triplet:
            generator = np.random.default_rng(recipe.seed)
            count = recipe.n_triplets
            first, second = (
                generator.integers(len(each), size=count) for each in (positives, negatives)
            )
            return TripletMargin(positives[first], negatives[second])
        # Affine in the anchor, so the mean over all triplets is one direction.
        own = self.network.forward(batch).embedding[0].cpu().numpy()
        target, norm = recipe.resolved_target, recipe.norm
        return Direction(query_cotangent(target, norm, own, positives, negatives))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().float().cpu().numpy()
    return found
