"""A network as an ONNX file, run by ONNX Runtime: embeds queries without torch."""

from .described import HEAD_KINDS, Described, Head
from .network import OnnxNetwork
from .session import PROVIDERS, Session

__all__ = ["HEAD_KINDS", "PROVIDERS", "Described", "Head", "OnnxNetwork", "Session"]
