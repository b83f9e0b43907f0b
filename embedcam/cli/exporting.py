"""The command that writes an index's network as an ONNX file."""

import argparse
from dataclasses import asdict
from typing import Any

from .networks import named, network_of_index, network_options
from .report import emit, size_text


def export(options: argparse.Namespace) -> None:
    """Write an index's network as one ONNX file, checked against torch."""
    from ..export import check_packages, check_target, export_onnx
    from ..index import Index

    # Whatever can be refused is refused before the network is loaded.
    check_packages()
    check_target(options.output)
    with Index.open(options.index, with_faiss=False) as index:
        network = named(network_of_index(index.manifest, network_options(options)))
        shown = False if options.quiet else None
        report = export_onnx(index, network, options.output, progress=shown)
    values: dict[str, Any] = {**asdict(report), "path": str(report.path)}
    layers = ", ".join(report.layers)
    emit(
        options,
        values,
        f"{report.path}: {size_text(report.bytes)}, layer {layers}, {report.head} head; "
        f"off from torch by {report.difference:.1g}; {report.seconds:.1f} s",
    )
