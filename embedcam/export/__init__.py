"""An index's network, trunk and head, as one ONNX file that runs without torch.

tracing.py   the network followed through one run: torch to ONNX
writing.py   written, held against torch, put in place: `export_onnx`
"""

from .tracing import check_packages
from .writing import TOLERANCE, ExportReport, check_target, export_onnx

__all__ = ["TOLERANCE", "ExportReport", "check_packages", "check_target", "export_onnx"]
