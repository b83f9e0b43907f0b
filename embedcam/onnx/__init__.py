"""A network as an ONNX file, run by ONNX Runtime: embeds queries without torch."""

from .network import HEAD_KINDS, Described, Head, OnnxNetwork
from .session import PROVIDERS, Session, runtime_version

__all__ = [
    "HEAD_KINDS",
    "PROVIDERS",
    "Described",
    "Head",
    "OnnxNetwork",
    "Session",
    "runtime_version",
]
