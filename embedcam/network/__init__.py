"""Any torch module and the layer to explain, as one object: `EmbeddingNetwork`.

layers.py             finding a layer in a module; why one cannot be explained
layouts.py            what a layer and a network hand back, read
tap.py                the ONLY file that registers hooks: one run, tapped at the layer
gradients.py          what a run gives, and dy/dA for a cotangent at the embedding
several.py            one run tapped at several layers
guided.py             the gradient at the input, plain or guided
injected.py           the head alone, on other activations
state.py              a module's place, precision and mode
head.py               whether the head is pooled and affine, found by asking it
runs.py               how a module is run: what goes in, in which precision, tapped where
embedding_network.py  the object itself
"""

from .embedding_network import EmbeddingNetwork
from .gradients import Features, HeadPass
from .guided import input_gradient
from .head import HeadKind
from .layouts import LayoutName, OutputChoice
from .loading import load_network
from .several import SeveralPass, several_pass

__all__ = [
    "EmbeddingNetwork",
    "Features",
    "HeadKind",
    "HeadPass",
    "LayoutName",
    "OutputChoice",
    "SeveralPass",
    "input_gradient",
    "load_network",
    "several_pass",
]
