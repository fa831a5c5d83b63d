"""Keys and values kept as codes on a grid per token, which no kernel has: in steps of the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rqc.models.token_grid import TINY
from rqc.passes.base import Pass, constant, initializer, sizes
from rqc.passes.build import Builder
from rqc.passes.cache_ranges import KEY_MEAN, means

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
    in the low nibbles, the second in the high ones), one of scales and one of zero points.
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
        masks: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            _Lowering(model, node, self.bits, masks).run()
        return ir.passes.PassResult(model, modified=bool(nodes))


class _Lowering:
    """One attention whose cache becomes codes."""

    def __init__(self, model: ir.Model, node: ir.Node, bits: int, masks: dict[ir.Value, ir.Value]) -> None:
        past = node.inputs[4]
        assert past is not None
        self.model, self.node, self.bits, self.masks = model, node, bits, masks
        self.layer = (past.name or "").removesuffix(".key")
        self.build = Builder(node, f"{node.name}/cache")
        _, self.heads, _, self.size = sizes(past)
        self.batch, self.past = (past.shape or [None])[0], (past.shape or [None] * 3)[2]
        self.top, self.groups = float(2**bits - 1), groups_of(self.size)

    def run(self) -> None:
        node, build = self.node, self.build
        query, key, value, mask = node.inputs[:4]
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
        if options.pop("is_causal", 0):
            mask = self._causal(query, mask, codes=kept[0])
        y = build.op("Attention", queries, keys, values, mask, is_causal=0, **options)
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
        """present = past ++ new, an output of the graph."""
        kind = new.type
        past = ir.Value(
            name=f"{self.layer}.{what}", shape=ir.Shape([self.batch, 2 * self.heads, self.past, width]), type=kind
        )
        present = self.build.op("Concat", past, new, axis=2, dtype=new.dtype or FLOAT)
        present.name = f"{self.layer.replace('past_key_values', 'present')}.{what}"
        present.shape = ir.Shape([self.batch, 2 * self.heads, None, width])
        self.model.graph.inputs.append(past)
        self.model.graph.outputs.append(present)
        return present

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

    def _causal(self, query: ir.Value | None, mask: ir.Value | None, codes: ir.Value) -> ir.Value:
        """The mask of queries that see no later slot: the kernel would count from the first slot, not from the past's
        end. One for all layers that have the same mask without."""
        assert mask is not None
        if mask in self.masks:
            return self.masks[mask]
        int64, boolean = ir.DataType.INT64, ir.DataType.BOOL

        def op(kind: str, *inputs: ir.Value | None, dtype: ir.DataType = int64, **attributes: int) -> ir.Value:
            return self.build.op(kind, *inputs, dtype=dtype, **attributes)

        tokens = op("Squeeze", op("Shape", query, start=1, end=2))
        total = op("Squeeze", op("Shape", codes, start=2, end=3))
        first, one, axis = (
            initializer(self.model, f"rqc.cache.{name}", np.asarray(value, np.int64))
            for name, value in (("first", 0), ("one", 1), ("rows", [1]))
        )
        rows = op("Unsqueeze", op("Range", op("Sub", total, tokens), total, one), axis)
        seen = op("LessOrEqual", op("Range", first, total, one), rows, dtype=boolean)
        if mask.dtype == boolean:
            self.masks[mask] = op("And", mask, seen, dtype=boolean)
        else:
            lowest = self._float(float(np.finfo(np.float32).min))
            self.masks[mask] = op("Where", seen, mask, lowest, dtype=FLOAT)
        return self.masks[mask]

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
