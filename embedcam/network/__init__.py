"""Any torch module and the layer to explain, as one object: `EmbeddingNetwork`."""

from .attention_pass import AttentionPass
from .embedding_network import EmbeddingNetwork
from .gradients import HeadPass, SeveralPass, input_gradient, several_pass
from .head import HeadKind
from .layers import LayoutName, OutputChoice
from .loading import load_network
from .reading import as_indexed, read_by
from .runner import Features
from .texts import TextTower

__all__ = [
    "AttentionPass",
    "EmbeddingNetwork",
    "Features",
    "HeadKind",
    "HeadPass",
    "LayoutName",
    "OutputChoice",
    "SeveralPass",
    "TextTower",
    "as_indexed",
    "input_gradient",
    "load_network",
    "read_by",
    "several_pass",
]
