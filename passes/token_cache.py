"""Keys and values kept as codes on a grid per token, which no kernel has: in steps of the graph."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from rqc.models.token_grid import TINY
from rqc.passes.attention import WINDOW
from rqc.passes.base import Pass, constant, initializer, sizes
from rqc.passes.build import Builder
from rqc.passes.cache_ranges import KEY_MEAN, means
from rqc.passes.scatter_cache import CAPACITY, first_position, positions

ROLE = "rqc.cache"
"""Mark on the nodes that read what enters the attention of a layer (query, key, value), and on the one that writes what
leaves it (output)."""
GROUP = 32
"""Channels that share a scale."""
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


def groups_of(size: int) -> int:
    """Groups in a head of `size` channels: one, where they do not divide it."""
    return size // GROUP if size % GROUP == 0 else 1


class TokenCache(Pass):
    """k ← s (c − z) + m, v ← s (c − z) with s = (max(x, 0) − min(x, 0)) / (2^b − 1), z = −round(min(x, 0) / s) and
    c = clamp(round(x / s) + z, 0, 2^b − 1), per token and `GROUP` channels of a kv head (`TokenGrid`); x is k − m or v.

    m is a constant for each channel: q mᵀ is the same for all keys that a query sees, so softmax takes it out again,
    and it is never added. A score with a softcap is not free of it: there m = 0.

    A layer's keys and values, in that order along the heads, are one cache of codes (4 bits: the first half of a group
    in the low nibbles, the second in the high ones), one of scales and one of zero points, of fixed size and updated in
    place.
    """

    exact = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @property
    def detail(self) -> str:
        """Bits per code."""
        return f"{self.bits} bit per token and {GROUP} channels"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.op_type == "Attention" and len(node.inputs) > 5]
        if nodes:
            windows = dict.fromkeys(node.metadata_props.get(WINDOW, "") for node in nodes)
            slots = _Slots(model, nodes[0], windows)
            for node in nodes:
                _Lowering(model, node, self.bits, slots).run()
        return ir.passes.PassResult(model, modified=bool(nodes))


class _Slots:
    """What all layers share: slot j of a row holds position j, so a query at position p sees the slots j ≤ p, and
    p − j < window; what lies behind a row's length is not seen."""

    def __init__(self, model: ir.Model, anchor: ir.Node, windows: Iterable[str]) -> None:
        self.model, self.build = model, Builder(anchor, "rqc/cache/slots")
        self.first = first_position(model, anchor)
        last = self._op("ReduceMax", positions(model), keepdims=0)
        self.end = self._op("Add", last, self.int64("one", 1))
        self.total = self._op("Unsqueeze", self.end, self.int64("start", [0]))
        self.masks = {window: self._mask(window) for window in windows}

    def _mask(self, window: str) -> ir.Value:
        """Which slots [batch, 1, tokens, total] the queries see; window "" reaches the whole past."""
        position = self._op("Unsqueeze", positions(self.model), self.int64("axes", [1, 3]))
        slots = self._op("Range", self.int64("zero", 0), self.end, self.int64("one", 1))
        distance, boolean = self._op("Sub", position, slots), ir.DataType.BOOL
        seen = self.build.op("GreaterOrEqual", distance, self.int64("zero", 0), dtype=boolean)
        if not window:
            return seen
        near = self.build.op("Less", distance, self.int64(f"window{window}", int(window)), dtype=boolean)
        return self.build.op("And", seen, near, dtype=boolean)

    def int64(self, name: str, value: int | list[int]) -> ir.Value:
        """A constant that all layers share."""
        return initializer(self.model, f"rqc.cache.{name}", np.asarray(value, np.int64))

    def _op(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return self.build.op(kind, *inputs, dtype=ir.DataType.INT64, **attributes)


class _Lowering:
    """One attention whose cache becomes codes."""

    def __init__(self, model: ir.Model, node: ir.Node, bits: int, slots: _Slots) -> None:
        past = node.inputs[4]
        assert past is not None
        self.model, self.node, self.bits, self.slots = model, node, bits, slots
        self.layer = (past.name or "").removesuffix(".key")
        self.build = Builder(node, f"{node.name}/cache")
        _, self.heads, _, self.size = sizes(past)
        self.batch = (past.shape or [None])[0]
        self.top, self.groups = float(2**bits - 1), groups_of(self.size)

    def run(self) -> None:
        node, build = self.node, self.build
        query, key, value = node.inputs[:3]
        queries = self._apart(query, node.attributes["q_num_heads"].as_int(), "query")
        codes, scales, zeros = self._codes(self._new(key, value))
        kept = [
            self._grown("codes", codes, self.size * self.bits // 8),
            self._grown("scales", scales, self.groups),
            self._grown("zeros", zeros, self.groups),
        ]
        keys, values = self._read(*kept)
        options = {
            name: attribute.value for name, attribute in node.attributes.items() if not name.endswith("num_heads")
        }
        mask = self.slots.masks[node.metadata_props.get(WINDOW, "")]
        y = build.op("Attention", queries, keys, values, mask, **{**options, "is_causal": 0})
        y = build.op("Transpose", y, perm=[0, 2, 1, 3])
        y = build.op("Reshape", y, constant(self.model, "rqc.flat", [0, 0, -1]))
        self._mark(y, "output")
        y.shape = node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(y)
        self._retire()

    def _apart(self, x: ir.Value | None, heads: int, role: str = "") -> ir.Value:
        """[batch, tokens, heads · size] as [batch, heads, tokens, size]."""
        shape = constant(self.model, f"rqc.cache.{heads}x{self.size}", [0, 0, heads, self.size])
        parted = self.build.op("Reshape", x, shape)
        if role:
            self._mark(parted, role)
        return self.build.op("Transpose", parted, perm=[0, 2, 1, 3])

    def _new(self, key: ir.Value | None, value: ir.Value | None) -> ir.Value:
        """New keys, from their mean, and values [batch, 2 kv heads, tokens, size]."""
        mark = self.node.metadata_props.pop(KEY_MEAN, None)
        capped = self.node.attributes.get("softcap")
        if mark is not None and not (capped is not None and capped.as_float() > 0):
            mean = np.broadcast_to(means(mark), self.heads * self.size).astype(np.float32)
            key = self.build.op("Sub", key, initializer(self.model, f"{self.layer}.mean", mean))
        else:
            key = self.build.op("Identity", key)
        self._mark(key, "key")
        value = self.build.op("Identity", value)
        self._mark(value, "value")
        return self._apart(self.build.op("Concat", key, value, axis=-1), 2 * self.heads)

    def _codes(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes, scales and zero points of x [batch, heads, tokens, size]."""
        op, last, zero = self.build.op, constant(self.model, "rqc.last_axis", [-1]), self._float(0.0)
        x = self._shaped(x, self.groups, self.size // self.groups)
        low = op("Min", op("ReduceMin", x, last, keepdims=1), zero)
        high = op("Max", op("ReduceMax", x, last, keepdims=1), zero)
        scales = op("Max", op("Div", op("Sub", high, low), self._float(self.top)), self._float(float(TINY)))
        bottom = op("Round", op("Div", low, scales))
        codes = op("Clip", op("Sub", op("Round", op("Div", x, scales)), bottom), zero, self._float(self.top))
        codes = op("Cast", codes, dtype=UINT8, to=UINT8.value)
        if self.bits == 4:
            first, second = self._halves(codes, -1)
            second = op("BitShift", second, self._byte(4), dtype=UINT8, direction="LEFT")
            codes = op("BitwiseOr", first, second, dtype=UINT8)
        zeros = op("Cast", op("Neg", bottom), dtype=UINT8, to=UINT8.value)
        return (
            self._shaped(codes, self.size * self.bits // 8),
            self._shaped(scales, self.groups),
            self._shaped(zeros, self.groups),
        )

    def _grown(self, what: str, new: ir.Value, width: int) -> ir.Value:
        """What the cache holds up to the last token, behind `new`: present is past, an input and output of the graph,
        with it at the rows' positions."""
        shape = ir.Shape([self.batch, 2 * self.heads, CAPACITY, width])
        past = ir.Value(name=f"{self.layer}.{what}", shape=shape, type=new.type)
        present = self.build.op("TensorScatter", past, new, self.slots.first, axis=2, dtype=new.dtype or FLOAT)
        present.name, present.shape = f"{self.layer.replace('past_key_values', 'present')}.{what}", shape
        self.model.graph.inputs.append(past)
        self.model.graph.outputs.append(present)
        bounds = (self.slots.int64("start", [0]), self.slots.total, self.slots.int64("axis", [2]))
        return self.build.op("Slice", present, *bounds, dtype=new.dtype or FLOAT)

    def _read(self, codes: ir.Value, scales: ir.Value, zeros: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Keys, from their mean, and values [batch, kv heads, total, size] that the cache stands for."""
        op, width = self.build.op, self.size // self.groups
        codes = self._shaped(codes, self.groups, width * self.bits // 8)
        if self.bits == 4:
            low = op("BitwiseAnd", codes, self._byte(15), dtype=UINT8)
            high = op("BitShift", codes, self._byte(4), dtype=UINT8, direction="RIGHT")
            codes = op("Concat", low, high, axis=-1, dtype=UINT8)
        zeros, scales = self._shaped(zeros, self.groups, 1), self._shaped(scales, self.groups, 1)
        from_zero = op("Sub", op("Cast", codes, to=FLOAT.value), op("Cast", zeros, to=FLOAT.value))
        return self._halves(self._shaped(op("Mul", from_zero, scales), self.size), 1)

    def _shaped(self, x: ir.Value, *last: int) -> ir.Value:
        """x [batch, heads, tokens, ...] with these last sizes."""
        shape = constant(self.model, f"rqc.cache.last{'x'.join(map(str, last))}", [0, 0, 0, *last])
        return self.build.op("Reshape", x, shape, dtype=x.dtype or FLOAT)

    def _halves(self, x: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        first = self.build.op("Split", x, dtype=x.dtype or FLOAT, axis=axis, num_outputs=2)
        split = first.producer()
        assert split is not None
        split.resize_outputs(2)
        second = split.outputs[1]
        second.name, second.type = f"{first.name}.second", first.type
        return first, second

    def _retire(self) -> None:
        """The attention goes, and the float caches that it had."""
        node, graph = self.node, self.model.graph
        pasts = [value for value in node.inputs[4:6] if value is not None]
        for output in node.outputs[1:3]:
            graph.outputs.remove(output)
        graph.remove(node, safe=True)
        for past in pasts:
            graph.inputs.remove(past)

    def _mark(self, value: ir.Value, role: str) -> None:
        producer = value.producer()
        assert producer is not None
        producer.metadata_props[ROLE] = f"{self.layer.removeprefix('past_key_values.')} {role}"

    def _float(self, number: float) -> ir.Value:
        return initializer(self.model, f"rqc.cache.float{number:g}", np.float32(number))

    def _byte(self, number: int) -> ir.Value:
        return initializer(self.model, f"rqc.cache.byte{number}", np.uint8(number))
