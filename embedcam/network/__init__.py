"""Any torch module and the layer to explain, as one object: `EmbeddingNetwork`."""

from .embedding_network import EmbeddingNetwork
from .gradients import HeadPass, SeveralPass, input_gradient, several_pass
from .head import HeadKind
from .layers import LayoutName, OutputChoice
from .loading import load_network
from .runner import Features
from .texts import TextTower

__all__ = [
    "EmbeddingNetwork",
    "Features",
    "HeadKind",
    "HeadPass",
    "LayoutName",
    "OutputChoice",
    "SeveralPass",
    "TextTower",
    "input_gradient",
    "load_network",
    "several_pass",
]
