"""Any torch module and the layer to explain, as one object: `EmbeddingNetwork`."""

from .embedding_network import EmbeddingNetwork
from .gradients import Features, HeadPass, SeveralPass, input_gradient, several_pass
from .head import HeadKind
from .layers import LayoutName, OutputChoice
from .loading import load_network

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
