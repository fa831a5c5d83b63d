"""4-bit floats on a CPU, for checks alone: ONNX Runtime has no kernel that reads them, so a graph looks them up itself.

The bytes stay where they are, in a stage's data or in an engine: 16 codes of E2M1 are packed as 16 of UINT4 are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rqc.models.float_grid import FORMS
from rqc.models.small_floats import E2M1
from rqc.runtime.container import EngineFile

LEVELS, MIDDLE = "rqc.e2m1", "rqc.e2m1.middle"
BLOCK = FORMS["nvfp4"][1]


def look_up_float4(model: onnx.ModelProto) -> bool:
    """DequantizeLinear(v [K, N], s [K/g, N]) ← levels[codes of v] · s, in place; whether there was one.

    The weights are computed anew whenever they are read, or once, where a session folds constants.
    """
    initializers = {value.name: value for value in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    shapes: set[tuple[int, ...]] = set()
    for node in model.graph.node:
        codes = initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != TensorProto.FLOAT4E2M1:
            nodes.append(node)
            continue
        codes.data_type = TensorProto.UINT4
        shapes.add(tuple(codes.dims))
        nodes.extend(_looked_up(node, tuple(codes.dims)))
    if not shapes:
        return False
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(_constants(shapes))
    return True


def _looked_up(node: onnx.NodeProto, shape: tuple[int, ...]) -> Iterator[onnx.NodeProto]:
    """levels[codes] as [K/g, g, N], times s as [K/g, 1, N]."""
    codes, scales, out = node.input[0], node.input[1], node.output[0]
    blocks, whole = _shape_names(shape)
    steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("Cast", [codes], f"{out}.codes", {"to": TensorProto.INT32}),
        ("Gather", [LEVELS, f"{out}.codes"], f"{out}.levels", {}),
        ("Reshape", [f"{out}.levels", blocks], f"{out}.blocks", {}),
        ("Unsqueeze", [scales, MIDDLE], f"{out}.scales", {}),
        ("Mul", [f"{out}.blocks", f"{out}.scales"], f"{out}.scaled", {}),
        ("Reshape", [f"{out}.scaled", whole], out, {}),
    )
    for kind, inputs, output, attributes in steps:
        yield helper.make_node(kind, inputs, [output], name=output, **attributes)


def _shape_names(shape: tuple[int, ...]) -> tuple[str, str]:
    """The constants [K/g, g, N] and [K, N]."""
    size = "x".join(map(str, shape))
    return f"{LEVELS}.{size}.blocks", f"{LEVELS}.{size}"


def _constants(shapes: set[tuple[int, ...]]) -> Iterator[TensorProto]:
    """What the steps read beside codes and scales."""
    yield numpy_helper.from_array(E2M1.levels, LEVELS)
    yield numpy_helper.from_array(np.asarray([1]), MIDDLE)
    for rows, columns in sorted(shapes):
        blocks, whole = _shape_names((rows, columns))
        yield numpy_helper.from_array(np.asarray([rows // BLOCK, BLOCK, columns]), blocks)
        yield numpy_helper.from_array(np.asarray([rows, columns]), whole)


class Float4File(EngineFile):
    """An engine of 4-bit floats as one that ONNX Runtime runs: of the same weights, and slowly."""

    def _load(self) -> None:
        super()._load()
        self.manifest = {key: value for key, value in self.manifest.items() if key != "weights"}

    def graph(self) -> bytes:
        model = onnx.load_model_from_string(super().graph())
        look_up_float4(model)
        data: bytes = model.SerializeToString()
        return data
