"""Small real engines: one decoder, the same random weights, with GroupQueryAttention and with standard Attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rqc.compiler.plan import write_engine
from rqc.runtime.engine import Engine

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 4, 2, 16, 64, 96
EOS = "<|end|>"
_TEXT = ["the cat sat on the mat and the dog ran to the hat", "a man, a plan, a canal: panama", "0123456789"] * 4


@dataclass(frozen=True)
class Tiny:
    """A decoder of two or so layers; `cache` as in the manifest, `window` as in local_window_size (-1: none)."""

    cache: str = "shared"
    layers: int = 2
    vocab: int = 320
    context: int = 1024
    window: int = -1
    seed: int = 0
    head_positions: bool = True
    online_rope: bool = False  # shared cache, but RotaryEmbedding and position_ids in the graph
    eos: tuple[int, ...] = ()


class GraphBuilder:
    """Collects nodes and initializers of a decoder that follows the inputs and outputs of an engine's graph."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self.rng = np.random.default_rng(tiny.seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        value = self.rng.standard_normal(shape) / np.sqrt(shape[0])
        return self.constant(name, value.astype(np.float32))

    def node(self, op: str, inputs: list[str], name: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        names = [name, *(f"{name}.{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(op, inputs, names, name=name, domain=domain, **attributes))
        return name

    def build(self) -> onnx.ModelProto:
        tiny = self.tiny
        rope = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM) * np.arange(tiny.context)[:, None]
        self.constant("cos", np.cos(rope).astype(np.float32))
        self.constant("sin", np.sin(rope).astype(np.float32))
        self.constant("ones", np.ones(HIDDEN, np.float32))
        x = self.node("Gather", [self.weight("embed", tiny.vocab, HIDDEN), "input_ids"], "embedded")
        if tiny.cache == "concat":
            self.mask()
        for layer in range(tiny.layers):
            x = self.block(x, layer)
        if tiny.head_positions:
            self.constant("last_axis", np.array([-1], np.int64))
            indices = self.node("Unsqueeze", ["logits_positions", "last_axis"], "indices")
            x = self.node("GatherND", [x, indices], "wanted", batch_dims=1)
        x = self.norm(x, "final")
        self.node("MatMul", [x, self.weight("head", HIDDEN, tiny.vocab)], "logits")
        return self.model()

    def norm(self, x: str, name: str) -> str:
        return self.node("RMSNormalization", [x, "ones"], f"{name}.norm", axis=-1, epsilon=1e-5)

    def linear(self, x: str, name: str, k: int, n: int) -> str:
        return self.node("MatMul", [x, self.weight(f"{name}.weight", k, n)], name)

    def block(self, x: str, layer: int) -> str:
        name = f"layers.{layer}"
        h = self.norm(x, f"{name}.in")
        q = self.linear(h, f"{name}.q", HIDDEN, HEADS * HEAD_DIM)
        k = self.linear(h, f"{name}.k", HIDDEN, KV_HEADS * HEAD_DIM)
        v = self.linear(h, f"{name}.v", HIDDEN, KV_HEADS * HEAD_DIM)
        attend = self.group_query if self.tiny.cache == "shared" else self.attention
        o = self.linear(attend(name, layer, q, k, v), f"{name}.o", HEADS * HEAD_DIM, HIDDEN)
        x = self.node("Add", [x, o], f"{name}.mid")
        up = self.linear(self.norm(x, f"{name}.post"), f"{name}.up", HIDDEN, INNER)
        down = self.linear(self.node("Tanh", [up], f"{name}.act"), f"{name}.down", INNER, HIDDEN)
        return self.node("Add", [x, down], f"{name}.out")

    def rope(self, x: str, heads: int) -> str:
        inputs = [x, "cos", "sin", "position_ids"]
        return self.node("RotaryEmbedding", inputs, f"{x}.rope", num_heads=heads)

    def group_query(self, name: str, layer: int, q: str, k: str, v: str) -> str:
        online = self.tiny.online_rope
        if online:
            q, k = self.rope(q, HEADS), self.rope(k, KV_HEADS)
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        inputs = [q, k, v, *past, "seqlens_k", "total_sequence_length", *([] if online else ["cos", "sin"])]
        outputs = [f"{name}.attention", f"present.{layer}.key", f"present.{layer}.value"]
        options = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": int(not online)}
        options["local_window_size"] = self.tiny.window
        self.nodes.append(
            helper.make_node("GroupQueryAttention", inputs, outputs, name=name, domain="com.microsoft", **options)
        )
        return outputs[0]

    def attention(self, name: str, layer: int, q: str, k: str, v: str) -> str:
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        inputs = [self.rope(q, HEADS), self.rope(k, KV_HEADS), v, "allowed", *past]
        outputs = [f"{name}.attention", f"present.{layer}.key", f"present.{layer}.value"]
        options = {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS, "is_causal": 1}
        self.nodes.append(helper.make_node("Attention", inputs, outputs, name=name, **options))
        return outputs[0]

    def mask(self) -> None:
        """allowed [batch, 1, sequence, total]: a valid slot within the window, by place in the cache."""
        for name, value in (("zero", 0), ("one", 1)):
            self.constant(name, np.array(value, np.int64))
        for name, values in (("axis0", [0]), ("axis1", [1]), ("axes12", [1, 2])):
            self.constant(name, np.array(values, np.int64))
        self.node("Shape", ["attention_mask"], "mask_shape")
        self.node("Gather", ["mask_shape", "one"], "total")
        self.node("Shape", ["input_ids"], "ids_shape")
        self.node("Gather", ["ids_shape", "one"], "sequence")
        self.node("Range", ["zero", "total", "one"], "keys")
        self.node("Sub", ["total", "sequence"], "past_slots")
        self.node("Range", ["past_slots", "total", "one"], "queries")
        self.node("Unsqueeze", ["queries", "axis1"], "queries_column")
        self.node("Sub", ["queries_column", "keys"], "distance")
        window = self.tiny.window if self.tiny.window > 0 else 1 << 40
        self.constant("window", np.array(window, np.int64))
        self.node("Less", ["distance", "window"], "near")
        self.node("Cast", ["attention_mask"], "valid", to=TensorProto.BOOL)
        self.node("Unsqueeze", ["valid", "axes12"], "valid_keys")
        self.node("And", ["valid_keys", "near"], "allowed")

    def model(self) -> onnx.ModelProto:
        tiny, int64 = self.tiny, TensorProto.INT64
        inputs: dict[str, tuple[int, list[Any]]] = {"input_ids": (int64, ["batch", "sequence"])}
        if tiny.cache == "concat" or tiny.online_rope:
            inputs["position_ids"] = (int64, ["batch", "sequence"])
        if tiny.cache == "concat":
            inputs["attention_mask"] = (int64, ["batch", "total"])
        else:
            inputs["seqlens_k"] = (TensorProto.INT32, ["batch"])
            inputs["total_sequence_length"] = (TensorProto.INT32, [])
        if tiny.head_positions:
            inputs["logits_positions"] = (int64, ["batch", "wanted"])
        outputs: dict[str, tuple[int, list[Any]]] = {"logits": (TensorProto.FLOAT, ["batch", "wanted", tiny.vocab])}
        for layer in range(tiny.layers):
            for kind in ("key", "value"):
                shape = ["batch", KV_HEADS, f"past.{layer}", HEAD_DIM]
                inputs[f"past_key_values.{layer}.{kind}"] = (TensorProto.FLOAT, shape)
                outputs[f"present.{layer}.{kind}"] = (TensorProto.FLOAT, [*shape[:2], f"all.{layer}", HEAD_DIM])
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
            [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def byte_level_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer with few merges: an emoji takes several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def manifest(tiny: Tiny, **generation: Any) -> dict[str, Any]:
    """What an engine says of itself, as far as running needs it."""
    return {
        "target": "onnx",
        "scheme": "fp32",
        "context_length": tiny.context,
        "graph": {
            "cache": tiny.cache,
            "layers": tiny.layers,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "cache_dtype": "float32",
            "vocab_size": tiny.vocab,
        },
        "generation": {
            "eos_token_ids": list(tiny.eos),
            "bos_token_id": None,
            "pad_token_id": None,
            "add_bos": False,
            **generation,
        },
    }


@pytest.fixture(scope="session")
def engine_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write the engine of a Tiny, once per session: engine_path(cache="concat", …), files={name: bytes} beside it."""
    written: dict[Any, Path] = {}

    def write(files: dict[str, bytes] | None = None, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
        tiny = replace(Tiny(), **changes)
        key = (tiny, tuple(sorted((files or {}).items())), json.dumps(generation, sort_keys=True))
        if key not in written:
            entries = {"tokenizer.json": byte_level_tokenizer(tiny.vocab).to_str().encode(), **(files or {})}
            model = onnx_ir.from_proto(GraphBuilder(tiny).build())
            path = tmp_path_factory.mktemp("engine") / "engine.plan"
            write_engine(path, model, manifest(tiny, **(generation or {})), entries)
            written[key] = path
        return written[key]

    return write


@pytest.fixture
def tiny_parts() -> Callable[..., tuple[onnx_ir.Model, dict[str, Any]]]:
    """The model and the manifest of a Tiny, to be spoilt before they are written."""

    def make(**changes: Any) -> tuple[onnx_ir.Model, dict[str, Any]]:
        tiny = replace(Tiny(), **changes)
        return onnx_ir.from_proto(GraphBuilder(tiny).build()), manifest(tiny)

    return make


@pytest.fixture
def engine(engine_path: Callable[..., Path]) -> Callable[..., Engine]:
    """Load the engine of a Tiny on one thread."""
    return lambda **changes: Engine.load(engine_path(**changes), threads=1)


@pytest.fixture(params=["shared", "concat"])
def cache(request: pytest.FixtureRequest) -> str:
    """Both kinds of key-value cache."""
    return str(request.param)
