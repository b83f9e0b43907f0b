"""A network as an ONNX file, run by ONNX Runtime: embeds queries without torch.

described.py   what an ONNX file says of itself: written by `embedcam export`, read with suspicion
session.py     the file opened and run; what ONNX Runtime says, in our words
network.py     `OnnxNetwork`: what an `Explainer` takes in place of a torch network
"""

from .described import HEAD_KINDS, Described, Head
from .network import OnnxFeatures, OnnxNetwork
from .session import PROVIDERS, Session

__all__ = [
    "HEAD_KINDS",
    "PROVIDERS",
    "Described",
    "Head",
    "OnnxFeatures",
    "OnnxNetwork",
    "Session",
]
