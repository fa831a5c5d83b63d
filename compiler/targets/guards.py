"""What TensorRT refuses, fails on late, or builds wrongly without a word: found before it sees the graph.

Each rule is one of TensorRT-RTX 1.7.1, by trial. A graph that our own lowering makes keeps all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from rqc.passes.base import sizes
from rqc.runtime.capabilities import sm_obstacles
from rqc.runtime.errors import TargetError

Rule = Callable[[ir.Node], str | None]
INTEGER_OPS = ("DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger")
FLOAT8, FLOAT4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1
CODES = (ir.DataType.INT4, ir.DataType.INT8, ir.DataType.UINT4, ir.DataType.UINT8, FLOAT8, FLOAT4)
KINDS = {ir.DataType.INT4: "int4", ir.DataType.UINT4: "int4", FLOAT8: "fp8", FLOAT4: "fp4"}
"""Types of codes that not every GPU computes with."""
ONNX_WAY = "--target onnx runs it"


def check_graph(model: ir.Model, flavour: str, sms: tuple[int, ...]) -> None:
    """Raise TargetError listing everything that stands against building this graph: compute capabilities first, then
    nodes, each with the rule that it breaks and the way out."""
    found = [*sm_obstacles(flavour, sms, _kinds(model)), *violations(model)]
    if found:
        raise TargetError(
            f"{flavour} cannot build this graph: " + "; ".join(said for said, _ in found),
            hint="; ".join(dict.fromkeys(way for _, way in found)),
        )


def violations(model: ir.Model) -> Iterator[tuple[str, str]]:
    """(node and rule, way out) of every rule that a node breaks, in graph order."""
    for node in model.graph:
        for rule, way in RULES:
            if (broken := rule(node)) is not None:
                yield f"{node.op_type} {node.name} {broken}", way


def _kinds(model: ir.Model) -> set[str]:
    """How weights are stored. 4-bit floats bring 8-bit ones along, as their scales."""
    found = {KINDS[value.dtype] for value in model.graph.initializers.values() if value.dtype in KINDS}
    return found - {"fp8"} if "fp4" in found else found


def _foreign(node: ir.Node) -> str | None:
    return f"is an operator of {node.domain}, which TensorRT does not have" if node.domain else None


def _integer(node: ir.Node) -> str | None:
    return "is an integer operator that the parser refuses" if node.op_type in INTEGER_OPS else None


def _asymmetric(node: ir.Node) -> str | None:
    """Zero points other than zero, and unsigned codes, which have one in the middle."""
    if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return None
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    if codes is not None and codes.dtype in (ir.DataType.UINT4, ir.DataType.UINT8):
        return "has unsigned codes"
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None:
        return None
    constant = zero.const_value
    return None if constant is not None and not constant.numpy().any() else "has a zero point"


def _scaled_blockwise(node: ir.Node | None) -> bool:
    """Whether a node dequantizes in blocks."""
    size = None if node is None else node.attributes.get("block_size")
    return node is not None and node.op_type == "DequantizeLinear" and size is not None and size.as_int() > 0


def _silently_wrong(node: ir.Node) -> str | None:
    """x that was rounded by QuantizeLinear times weights in blocks: only the first block's scales are ever read."""
    if node.op_type != "MatMul":
        return None
    x, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
    source = x.inputs[0].producer() if x is not None and x.inputs and x.inputs[0] is not None else None
    rounded = x is not None and x.op_type == "DequantizeLinear" and source is not None
    if rounded and source is not None and source.op_type == "QuantizeLinear" and _scaled_blockwise(_behind(weight)):
        return "multiplies statically rounded activations with weights in blocks, which is built wrongly without a word"
    return None


def _behind(node: ir.Node | None) -> ir.Node | None:
    """What a Transpose or a Cast reads, or the node itself."""
    while node is not None and node.op_type in ("Transpose", "Cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _mixed(node: ir.Node) -> str | None:
    """x that was rounded to 8-bit floats times 4-bit integers: the builder stops."""
    if node.op_type != "MatMul":
        return None
    x, weight = (_behind(value.producer()) if value is not None else None for value in node.inputs[:2])
    mixed = (_read_back(x), _read_back(weight)) == (FLOAT8, ir.DataType.INT4)
    return "multiplies 8-bit floats with 4-bit integers" if mixed else None


def _read_back(node: ir.Node | None) -> int | None:
    """The type of the codes that a DequantizeLinear reads, stored or rounded by the graph."""
    codes = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    there = None if codes is None else codes.producer()
    stated = None if there is None else there.attributes.get("output_dtype")
    if codes is None or stated is None:
        return None if codes is None else codes.dtype
    return stated.as_int()


def _two_levels(node: ir.Node) -> bool:
    """Whether the scales are constants of 8-bit floats."""
    scales = node.inputs[1]
    inner = scales.producer() if scales is not None else None
    codes = inner.inputs[0] if inner is not None and inner.op_type == "DequantizeLinear" else None
    return codes is not None and codes.dtype == FLOAT8 and codes.is_initializer()


def _blocks(node: ir.Node) -> str | None:
    """Blocks that do not divide, of 8-bit codes, or with scales that are computed."""
    if not _scaled_blockwise(node):
        return None
    codes, scales = node.inputs[0], node.inputs[1]
    assert codes is not None
    assert scales is not None
    if codes.dtype == ir.DataType.INT8:
        return "has 8-bit codes in blocks"
    if not scales.is_initializer() and not _two_levels(node):
        return "has scales that are computed"
    axis, block = node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()
    length = sizes(codes)[axis] if sizes(codes) else block
    return f"has blocks of {block} along {length}" if length % block else None


def _attention(node: ir.Node) -> str | None:
    if node.op_type != "Attention":
        return None
    if sum(bool(value.uses()) or value.is_graph_output() for value in node.outputs) > 1:
        return "has more than one output"
    cap = node.attributes.get("softcap")
    return "has a softcap" if cap is not None and cap.as_float() > 0 else None


def _constant_codes(node: ir.Node) -> str | None:
    """Quantized constants anywhere but before DequantizeLinear: the parser takes them, the builder does not."""
    if node.op_type == "DequantizeLinear":
        return None
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.dtype in CODES:
            return f"reads the codes {value.name}, which only DequantizeLinear may"
    return None


RULES: tuple[tuple[Rule, str], ...] = (
    (_foreign, ONNX_WAY),
    (_integer, ONNX_WAY),
    (_asymmetric, "SymmetricCodes moves zero points into a product of block sums"),
    (_silently_wrong, "round activations per token, or --group-size -1"),
    (_mixed, "round no activations to 8-bit floats"),
    (_blocks, "StoreColumns pads blocks; 8 bits take --group-size -1"),
    (_attention, "ScatterCache takes caches and soft caps out of it"),
    (_constant_codes, "put DequantizeLinear in front"),
)
"""Each rule with its way out."""
