"""Small engines as a TensorRT target has them: TensorScatter caches, codes behind DequantizeLinear, one float type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
from onnx import TensorProto, helper, numpy_helper

from rqc.compiler.plan import write_engine

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, BLOCK = 4, 2, 16, 64, 96, 32
VERSION = "1.7.1.116"
_TYPES: dict[str, tuple[int, Any]] = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Scatter:
    """A decoder and the profile of its plan. adapters: gates that add a row of a table each.

    static: activations of linears go through a static int8 QuantizeLinear.
    """

    dtype: str = "fp16"
    layers: int = 2
    vocab: int = 320
    length: int = 256  # the model's context
    context: int = 64  # the plan's
    batch: int = 4
    prompt: int = 16
    adapters: int = 0
    static: bool = False
    weights: str | None = None  # what the manifest says of them
    target: str = "tensorrt-rtx"


class _Builder:
    def __init__(self, made: Scatter) -> None:
        self.made = made
        self.rng = np.random.default_rng(0)
        self.float, self.numpy = _TYPES[made.dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        value = value.astype(self.numpy) if value.dtype == np.float32 else value
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def ints(self, name: str, *values: int) -> str:
        return self.constant(name, np.asarray(values, np.int64))

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def linear(self, x: str, name: str, k: int, n: int) -> str:
        codes = self.rng.integers(-7, 8, (k, n)).astype(ml_dtypes.int4)
        scales = (self.rng.uniform(0.5, 1.5, (k // BLOCK, n)) / (4 * np.sqrt(k))).astype(np.float32)
        parts = [self.constant(f"{name}.codes", codes), self.constant(f"{name}.scales", scales)]
        weight = self.node("DequantizeLinear", parts, f"{name}.weight", axis=0, block_size=BLOCK)
        if self.made.static:
            grid = [self.constant(f"{name}.step", np.array(0.05, np.float32))]
            codes_of_x = self.node("QuantizeLinear", [x, *grid], f"{name}.xq", output_dtype=TensorProto.INT8)
            x = self.node("DequantizeLinear", [codes_of_x, *grid], f"{name}.x")
        return self.node("MatMul", [x, weight], name)

    def apart(self, x: str, heads: int) -> str:
        """Rotated: [batch, sequence, heads · dim] as [batch, heads, sequence, dim]."""
        shape = self.ints(f"{x}.shape", 0, 0, heads, HEAD_DIM)
        return self.node(
            "Transpose", [self.node("Reshape", [x, shape], f"{x}.parted")], f"{x}.apart", perm=[0, 2, 1, 3]
        )

    def mask(self) -> None:
        self.node("Unsqueeze", ["position_ids", self.ints("axes13", 1, 3)], "position")
        self.node("Shape", ["past_key_values.0.key"], "slot_count1", start=2, end=3)
        self.node("Squeeze", ["slot_count1"], "slot_count")
        zero, one = (self.constant(name, np.asarray(value, np.int64)) for name, value in (("zero", 0), ("one", 1)))
        self.node("Range", [zero, "slot_count", one], "slots")
        self.node("GreaterOrEqual", ["position", "slots"], "seen")
        lowest = np.asarray(ml_dtypes.finfo(self.numpy).min).astype(np.float32)
        self.node("Where", ["seen", self.constant("shown", np.zeros((), np.float32)), self.hidden(lowest)], "mask")
        self.node("Gather", ["position_ids", zero], "first", axis=1)

    def hidden(self, lowest: npt.NDArray[np.float32]) -> str:
        return self.constant("hidden", lowest)

    def block(self, x: str, layer: int) -> str:
        name = f"layers.{layer}"
        h = self.node("RMSNormalization", [x, "ones"], f"{name}.in")
        q, k, v = (
            self.linear(h, f"{name}.{kind}", HIDDEN, heads * HEAD_DIM)
            for kind, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        rope = ["cos", "sin", "position_ids"]
        q = self.node("RotaryEmbedding", [q, *rope], f"{name}.q.rope", num_heads=HEADS)
        k = self.node("RotaryEmbedding", [k, *rope], f"{name}.k.rope", num_heads=KV_HEADS)
        caches = [
            self.node(
                "TensorScatter",
                [f"past_key_values.{layer}.{kind}", self.apart(new, KV_HEADS), "first"],
                f"present.{layer}.{kind}",
                axis=-2,
            )
            for kind, new in (("key", k), ("value", v))
        ]
        y = self.node("Attention", [self.apart(q, HEADS), *caches, "mask"], f"{name}.y", is_causal=0)
        y = self.node("Transpose", [y], f"{name}.y.together", perm=[0, 2, 1, 3])
        y = self.node("Reshape", [y, "flat"], f"{name}.y.flat")
        x = self.node("Add", [x, self.linear(y, f"{name}.o", HIDDEN, HIDDEN)], f"{name}.mid")
        up = self.linear(self.node("RMSNormalization", [x, "ones"], f"{name}.post"), f"{name}.up", HIDDEN, INNER)
        down = self.linear(self.node("Tanh", [up], f"{name}.act"), f"{name}.down", INNER, HIDDEN)
        return self.node("Add", [x, down], f"{name}.out")

    def build(self) -> onnx.ModelProto:
        made = self.made
        rope = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM) * np.arange(made.length)[:, None]
        self.constant("cos", np.cos(rope).astype(np.float32))
        self.constant("sin", np.sin(rope).astype(np.float32))
        self.constant("ones", np.ones(HIDDEN, np.float32))
        self.ints("flat", 0, 0, -1)
        self.constant("embed", self.rng.standard_normal((made.vocab, HIDDEN)).astype(np.float32))
        x = self.node("Gather", ["embed", "input_ids"], "embedded")
        if made.adapters:
            self.constant("table", self.rng.standard_normal((made.adapters, HIDDEN)).astype(np.float32))
            gates = self.node("Cast", ["adapter_gates"], "gates", to=self.float)
            added = self.node("MatMul", [gates, "table"], "added")
            x = self.node("Add", [x, self.node("Unsqueeze", [added, self.ints("axis1", 1)], "added.row")], "adapted")
        self.mask()
        for layer in range(made.layers):
            x = self.block(x, layer)
        indices = self.node("Unsqueeze", ["logits_positions", self.ints("last", -1)], "indices")
        x = self.node("GatherND", [x, indices], "wanted", batch_dims=1)
        x = self.linear(self.node("RMSNormalization", [x, "ones"], "final"), "head", HIDDEN, made.vocab)
        self.node("Cast", [x], "logits", to=TensorProto.FLOAT)
        return self.model()

    def model(self) -> onnx.ModelProto:
        made, whole = self.made, TensorProto.INT64
        inputs: dict[str, tuple[int, list[Any]]] = {
            "input_ids": (whole, ["batch", "sequence"]),
            "position_ids": (whole, ["batch", "sequence"]),
            "logits_positions": (whole, ["batch", "positions"]),
        }
        if made.adapters:
            inputs["adapter_gates"] = (TensorProto.FLOAT, ["batch", made.adapters])
        outputs = {"logits": (TensorProto.FLOAT, ["batch", "positions", made.vocab])}
        for layer in range(made.layers):
            for kind in ("key", "value"):
                shape = ["batch", KV_HEADS, "capacity", HEAD_DIM]
                inputs[f"past_key_values.{layer}.{kind}"] = (self.float, shape)
                outputs[f"present.{layer}.{kind}"] = (self.float, shape)
        graph = helper.make_graph(
            self.nodes,
            "scatter",
            [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
            [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)


def scatter_graph(made: Scatter) -> onnx.ModelProto:
    """The graph, with a symbolic capacity."""
    return _Builder(made).build()


def plan_graph(made: Scatter) -> bytes:
    """The graph with the plan's capacity: what the fake module takes for a plan and what a real builder parses."""
    model = scatter_graph(made)
    for value in [*model.graph.input, *model.graph.output]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "capacity":
                size.dim_value = made.context
    data: bytes = model.SerializeToString()
    return data


def plan_record(made: Scatter, **changes: Any) -> dict[str, Any]:
    """The manifest's record of the plan."""
    profile = {"batch": [1, 1, made.batch], "prompt": [1, made.prompt, made.prompt], "context": made.context}
    record = {"name": "tiny", "entry": "device/tiny.plan", "flavour": made.target, "version": VERSION}
    more = {"sms": [80, 86], "profile": profile, "verified": False, "reason": "built without a GPU"}
    return record | more | changes


def write_scatter(
    path: Path, made: Scatter, *, plan: bytes | None = None, pending: bool = False, **changes: Any
) -> Path:
    """An engine with one plan (by default the graph itself), or with none; `changes` are the record's."""
    manifest: dict[str, Any] = {
        "target": made.target,
        "scheme": "w4a16" if made.weights is None else f"{made.weights}a16",
        **({} if made.weights is None else {"weights": made.weights}),
        "group_size": BLOCK,
        "dtype": made.dtype,
        "context_length": made.length,
        "graph": {
            "cache": "shared",
            "layers": made.layers,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "cache_dtype": "float16",
            "vocab_size": made.vocab,
        },
        "generation": {"eos_token_ids": [], "bos_token_id": None, "pad_token_id": None, "add_bos": False},
        "adapter": {"names": [f"a{index}" for index in range(made.adapters)]} if made.adapters else None,
        "plans": [] if pending else [plan_record(made, **changes)],
    }
    files = {} if pending else {"device/tiny.plan": plan_graph(made) if plan is None else plan}
    write_engine(path, onnx_ir.from_proto(scatter_graph(made)), manifest, files)
    return path
