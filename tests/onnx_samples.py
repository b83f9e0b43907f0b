"""Small ONNX files written by hand, as another program writes them: no exporter of torch's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from photo_samples import CHANNELS, SIDE, WIDTH

from embedcam import EmbeddingNetwork

OPSET = 18


def pooled_model(
    network: EmbeddingNetwork,
    *,
    unit: bool = True,
    names: tuple[str, str, str] = ("images", "activations", "embedding"),
    batch: str | int = "batch",
    props: Mapping[str, str] | None = None,
    scale: float = 1.0,
) -> onnx.ModelProto:
    """`photo_samples.Pooled` as a graph.

    unit: with its L2 norm; names: of input and outputs; scale: of the convolution's weights.
    """
    state = {key: value.numpy() for key, value in network.module.state_dict().items()}
    images, activations, embedding = names
    node, z = helper.make_node, "z" if unit else embedding
    nodes = [
        node("Conv", [images, "w", "b"], ["conv"], strides=[4, 4], pads=[2, 2, 2, 2]),
        node("Relu", ["conv"], [activations]),
        node("GlobalAveragePool", [activations], ["mean"]),
        node("Flatten", ["mean"], ["pooled"]),
        node("Gemm", ["pooled", "m", "c"], [z], transB=1),
    ]
    if unit:
        nodes.append(node("LpNormalization", ["z"], [embedding], axis=1, p=2))
    weights = {"w": scale * state["conv.weight"], "b": scale * state["conv.bias"]}
    weights |= {"m": state["linear.weight"], "c": state["linear.bias"]}
    grid = SIDE // 4
    outputs = [(activations, [batch, CHANNELS, grid, grid]), (embedding, [batch, WIDTH])]
    inputs = [(images, [batch, 3, SIDE, SIDE])]
    return model_of(nodes, inputs, outputs, weights=weights, props=props)


def model_of(
    nodes: list[Any],
    inputs: list[tuple[str, list[Any]]],
    outputs: list[tuple[str, Any]],
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    props: Mapping[str, str] | None = None,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    held = [
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in (weights or {}).items()
    ]
    given = [info(name, kind, shape) for name, shape in inputs]
    made = [info(name, TensorProto.FLOAT, shape) for name, shape in outputs]
    graph = helper.make_graph(nodes, "graph", given, made, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    helper.set_model_props(model, dict(props or {}))
    return model


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
